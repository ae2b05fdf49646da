"""The only folder that reads transformer_lens: support, a layer, the proof, loading."""
