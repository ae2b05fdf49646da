"""What a dictionary does over text: activations, kept pairs, heads."""
