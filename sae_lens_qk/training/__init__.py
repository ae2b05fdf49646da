"""Both training steps: `transcoders` (step 1), `mask` (step 2), their `losses`, the input `cache`, and the `runner`."""
