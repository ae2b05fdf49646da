"""Dictionaries by name: the registry, loading and verification, model cards, publishing to the Hub."""
