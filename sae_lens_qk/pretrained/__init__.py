"""Dictionaries by name: the registry, loading and verification, model cards, the Hub."""
