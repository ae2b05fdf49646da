"""Scores of a list of feature pairs: one operation, several engines side by side."""
