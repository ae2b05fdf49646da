"""What is measured, at full size and at the tiny size of `--smoke`."""

from typing import NamedTuple


class Sizes(NamedTuple):
    d: int = 2400
    """Features per side, as in the post."""
    live: tuple[int, int] = (270, 466)
    """Query and key features that ever fire, as in the post's layer 10."""
    n_heads: int = 12
    d_head: int = 64
    n_frequencies: int = 32
    """Of the rotary embedding, where there is one."""
    n_tokens: int = 2048
    """Per step, whatever the context."""
    context: int = 256
    l0: int = 20
    n_candidates: int = 500_000
    dense_steps: int = 3
    steps: int = 10
    wide: tuple[int, ...] = (1536, 3072, 6144, 12288, 24576)
    wide_pairs: int = 1_000_000
    growth_pairs: int = 100_000
    """Pairs where something else grows."""
    growing: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("l0", (10, 20, 40, 80)),
        ("context", (64, 128, 256, 512, 1024)),
        ("pairs", (25_000, 100_000, 400_000, 1_000_000)),
    )
    model_rows: int = 8
    model_context: int = 256
    prompt: int = 16
    model_pairs: tuple[int, ...] = (200_000, 50_000)


FULL = Sizes()
SMOKE = Sizes(
    d=60,
    live=(17, 23),
    # as at full size: the compiler makes one version for each number of heads
    n_heads=12,
    d_head=8,
    n_frequencies=4,
    n_tokens=64,
    context=16,
    l0=4,
    n_candidates=2_000,
    dense_steps=2,
    steps=2,
    wide=(60, 120),
    wide_pairs=3_000,
    growth_pairs=1_000,
    growing=(("l0", (3, 4)), ("context", (8, 16)), ("pairs", (500, 1_000))),
    model_rows=2,
    model_context=32,
    model_pairs=(2_000, 500),
)
