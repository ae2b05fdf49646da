"""The only folder that reads transformer_lens: what is supported, a layer, its residual stream, the proof, loading."""
