"""A small transcoder with random weights, and seeded random numbers."""

import torch
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_half(dtype: str = "float32") -> Transcoder:
    """6 inputs, 7 features, 5 outputs."""
    config = TranscoderConfig(
        d_in=6,
        d_sae=7,
        d_out=5,
        dtype=dtype,
        apply_b_dec_to_input=False,
    )
    half = Transcoder(config)
    random = generator(1)
    for parameter in half.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=random))
    return half
