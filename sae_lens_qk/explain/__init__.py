"""Why one attention weight is what it is: recorded prompts, terms, attributions, causal checks."""
