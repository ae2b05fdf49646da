"""Both training steps: `transcoders` (step 1), `mask` (step 2), their parts, and the `runner`."""
