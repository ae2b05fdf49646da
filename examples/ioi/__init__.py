"""A study of indirect objects: which heads, which feature pairs, and what is left without them.

`prompts` writes the prompts, `scan` looks at every head of a model, `pairs` at the feature pairs
behind a head's attention to the names, `interventions` and `twins` at what follows from them;
`study` does all of it.
"""
