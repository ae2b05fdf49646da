"""Scores of feature pairs written independently of the package: complex rotations, plain loops, dense float64 einsums."""

import math

import torch
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.scoring.pairs import Decoders

ROTARY = {"none": (), "partial": (1.0, 0.3), "full": (1.0, 0.3, 0.1, 0.02, 0.007)}
BATCH, N_POS, D_QUERY, D_KEY, N_HEADS = 2, 13, 17, 19, 6


def make_spec(rotary: str, n_kv_heads: int = 3) -> AttentionSpec:
    return AttentionSpec(
        N_HEADS, n_kv_heads, d_head=10, d_model=11, scale=0.29, rotary_inv_freq=ROTARY[rotary]
    )


def random_case(
    spec: AttentionSpec, dtype=torch.float64, seed: int = 0, batch: int = BATCH, n_pos: int = N_POS
):
    """Sparse activations of both sides (a third active) and decoders with a bias row."""
    generator = torch.Generator().manual_seed(seed)

    def acts(d):
        values = torch.rand(batch, n_pos, d, generator=generator, dtype=torch.float64)
        return (values * (torch.rand(values.shape, generator=generator) < 1 / 3)).to(dtype)

    def decoder(d, heads):
        return (
            0.3 * torch.randn(d + 1, heads, spec.d_head, generator=generator, dtype=torch.float64)
        ).to(dtype)

    return (
        acts(D_QUERY),
        acts(D_KEY),
        Decoders(decoder(D_QUERY, spec.n_heads), decoder(D_KEY, spec.n_kv_heads)),
    )


def random_map(n_pairs: int = 211, dtype=torch.float64, seed: int = 0) -> SparseFeatureMap:
    """A subset of all pairs, pairs with a constant among them, with random weights, some 0 and 1, and statistics."""
    everything = SparseFeatureMap.all_pairs(D_QUERY, D_KEY, N_HEADS)
    generator = torch.Generator().manual_seed(seed)
    chosen = everything.indices[torch.randperm(len(everything), generator=generator)[:n_pairs]]
    assert (chosen[:, 0] == D_QUERY).any()
    assert (chosen[:, 1] == D_KEY).any()
    drawn = torch.rand(n_pairs, 4, generator=generator, dtype=torch.float64).to(dtype)
    weights, statistics = drawn[:, 0], drawn[:, 1:]
    weights[:3], weights[3:5] = 1.0, 0.0
    return SparseFeatureMap(chosen, weights, D_QUERY, D_KEY, N_HEADS, statistics)


def with_one(acts: Tensor) -> Tensor:
    """The constant feature behind the others."""
    return torch.nn.functional.pad(acts, (0, 1), value=1.0)


def rotated(vector: list[float], position: int, inv_freq: tuple[float, ...]) -> list[float]:
    """Dimension f turns with dimension f + len(inv_freq), by position * inv_freq[f]."""
    turned = list(vector)
    for f, frequency in enumerate(inv_freq):
        z = complex(vector[f], vector[f + len(inv_freq)]) * complex(
            math.cos(position * frequency), math.sin(position * frequency)
        )
        turned[f], turned[f + len(inv_freq)] = z.real, z.imag
    return turned


def loop_kernel(pair, decoders: Decoders, spec: AttentionSpec, offset: int) -> float:
    """M[a, b, h](offset)."""
    a, b, h = pair
    q = rotated(decoders.query[a, h].double().tolist(), offset, spec.rotary_inv_freq)
    k = decoders.key[b, h // (spec.n_heads // spec.n_kv_heads)].double().tolist()
    return spec.scale * sum(x * y for x, y in zip(q, k, strict=True))


def dense_kernel(decoders: Decoders, spec: AttentionSpec, n_pos: int) -> Tensor:
    """M [d_query + 1, d_key + 1, head, offset] in float64, by rotating the query decoder with complex numbers."""
    query, key = (side.double() for side in decoders)
    key = key.repeat_interleave(spec.n_heads // spec.n_kv_heads, dim=1)
    half = len(spec.rotary_inv_freq)
    q, k = (torch.complex(side[..., :half], side[..., half : 2 * half]) for side in (query, key))
    angles = torch.arange(n_pos, dtype=torch.float64)[:, None] * torch.tensor(
        spec.rotary_inv_freq, dtype=torch.float64
    )
    turned = torch.einsum(
        "ahf,bhf,of->abho", q, k.conj(), torch.polar(torch.ones_like(angles), angles)
    ).real
    return spec.scale * (
        turned
        + torch.einsum("ahd,bhd->abh", query[..., 2 * half :], key[..., 2 * half :])[..., None]
    )


def dense_scores(
    mask: Tensor, query_acts: Tensor, key_acts: Tensor, decoders: Decoders, spec: AttentionSpec
) -> Tensor:
    """Differentiable in everything: every entry of the dense mask, at allowed keys, in float64."""
    n_pos = query_acts.shape[1]
    offsets = (torch.arange(n_pos)[:, None] - torch.arange(n_pos)).clamp(min=0)
    masked = mask.double()[..., None] * dense_kernel(decoders, spec, n_pos)
    query_acts, key_acts = with_one(query_acts).double(), with_one(key_acts).double()
    by_offset = torch.einsum("nia,njb,abho->nhijo", query_acts, key_acts, masked)
    return by_offset.gather(-1, offsets.expand(*by_offset.shape[:-1])[..., None])[..., 0].tril()
