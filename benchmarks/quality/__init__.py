"""How good dictionaries are at what they are for: `make bench-quality`.

Two halves. On planted attention layers the true features and pairs are known, and every method is
scored by how many of them it finds (`planted`, `methods`, `scores`, `recovery`). On a real model
nothing is known, so explanations are tested by editing the model's own inputs (`cases`,
`explainer`, `causal`, `twins`, `explained`, `trained`). `sections` runs them; `targets`,
`quality_report` and `figures` show the results.
"""
