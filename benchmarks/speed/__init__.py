"""Time and memory of the package; `__main__` runs the cases, `report` writes the tables."""
