"""What a dictionary says about single attention weights, and whether it is so."""
