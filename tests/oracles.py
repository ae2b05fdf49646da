"""Scores of feature pairs, written without the package's own: loops over pairs, queries and keys.

score    sum over pairs (a, b, h) of weight query_act[i,a] key_act[j,b] M[a,b,h](i - j)
M        scale <R_(i-j) W_Q[a,h], W_K[b,g(h)]>
"""

from typing import NamedTuple

import torch
from attention_oracles import loop_allowed, rotated
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.feature_map import Features, SparseFeatureMap
from sae_lens_qk.scoring.pairs import Decoders

BATCH = 2
N_POS = 13
D_QUERY = 17
D_KEY = 19
N_HEADS = 6
SIZES = (D_QUERY, D_KEY, N_HEADS)
ROTARY = {"none": (), "partial": (1.0, 0.3), "full": (1.0, 0.3, 0.1, 0.02, 0.007)}
WINDOWS = (None, 1, 3, 5, N_POS + 1)


class Case(NamedTuple):
    features: Features
    decoders: Decoders


def make_spec(
    rotary: str,
    n_kv_heads: int = 3,
    window: int | None = None,
) -> AttentionSpec:
    return AttentionSpec(
        n_heads=N_HEADS,
        n_kv_heads=n_kv_heads,
        d_head=10,
        d_model=11,
        scale=0.29,
        rotary_inv_freq=ROTARY[rotary],
        window=window,
    )


def random_case(
    spec: AttentionSpec,
    dtype: torch.dtype = torch.float64,
    batch: int = BATCH,
    n_pos: int = N_POS,
) -> Case:
    """Sparse activations of both sides (a third active) and decoders with a bias row."""
    generator = torch.Generator().manual_seed(0)

    def random_acts(d: int) -> Tensor:
        shape = (batch, n_pos, d)
        values = torch.rand(shape, generator=generator, dtype=torch.float64)
        is_active = torch.rand(shape, generator=generator) < 1 / 3
        return (values * is_active).to(dtype)

    def random_rows(
        d: int,
        heads: int,
    ) -> Tensor:
        shape = (d + 1, heads, spec.d_head)
        rows = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (0.3 * rows).to(dtype)

    features = Features(query=random_acts(D_QUERY), key=random_acts(D_KEY))
    query_rows = random_rows(D_QUERY, spec.n_heads)
    key_rows = random_rows(D_KEY, spec.n_kv_heads)
    return Case(features, Decoders(query_rows, key_rows))


def random_map(
    n_pairs: int = 211, dtype: torch.dtype = torch.float64, seed: int = 0
) -> SparseFeatureMap:
    """Some of all pairs, constants among them; random weights, some 0 and 1, and statistics."""
    every_pair = SparseFeatureMap.all_pairs(*SIZES).indices
    generator = torch.Generator().manual_seed(seed)
    pairs = every_pair[torch.randperm(len(every_pair), generator=generator)[:n_pairs]]
    assert (pairs[:, 0] == D_QUERY).any()
    assert (pairs[:, 1] == D_KEY).any()
    numbers = torch.rand(n_pairs, 4, generator=generator, dtype=torch.float64).to(dtype)
    weights = numbers[:, 0]
    weights[:3] = 1.0
    weights[3:5] = 0.0
    return SparseFeatureMap(pairs, weights, *SIZES, statistics=numbers[:, 1:])


def with_one(acts: Tensor) -> Tensor:
    """The constant feature behind the others."""
    return torch.nn.functional.pad(acts, (0, 1), value=1.0)


def loop_kernel(
    pair,
    decoders: Decoders,
    spec: AttentionSpec,
    offset: int,
) -> float:
    """M[a, b, h](offset)."""
    query_feature, key_feature, head = pair
    kv_head = head * spec.n_kv_heads // spec.n_heads
    query = decoders.query[query_feature, head].double().tolist()
    key = decoders.key[key_feature, kv_head].double().tolist()
    turned = rotated(query, offset, spec.rotary_inv_freq)
    return spec.scale * sum(q * k for q, k in zip(turned, key, strict=True))


def loop_pair_scores(
    weights: dict[tuple[int, int, int], float], case: Case, spec: AttentionSpec
) -> Tensor:
    """float64 [batch, head, pos_q, pos_k] of pairs with weights; zero where not allowed."""
    query_acts = with_one(case.features.query).double()
    key_acts = with_one(case.features.key).double()
    n_rows, n_pos, _ = query_acts.shape
    scores = torch.zeros(n_rows, spec.n_heads, n_pos, n_pos, dtype=torch.float64)
    for pair, weight in weights.items():
        query_feature, key_feature, head = pair
        M = [loop_kernel(pair, case.decoders, spec, offset) for offset in range(n_pos)]
        for i in range(n_pos):
            for j in range(n_pos):
                if loop_allowed(i, j, spec.window):
                    acts = query_acts[:, i, query_feature] * key_acts[:, j, key_feature]
                    scores[:, head, i, j] += weight * M[i - j] * acts
    return scores


def dense_kernel(
    decoders: Decoders,
    spec: AttentionSpec,
    n_pos: int,
) -> Tensor:
    """M of all pairs, float64 [d_query + 1, d_key + 1, head, offset], differentiable.

    Halves of the rotating dimensions are complex numbers here: <R_d q, k> = Re z_q conj(z_k) e^(i
    theta d), summed over frequencies, plus the other dimensions.
    """
    query = decoders.query.double()
    key = decoders.key.double().repeat_interleave(spec.n_heads // spec.n_kv_heads, dim=1)
    inv_freq = torch.tensor(spec.rotary_inv_freq, dtype=torch.float64)
    n_freq = len(inv_freq)
    z_query = torch.complex(query[..., :n_freq], query[..., n_freq : 2 * n_freq])
    z_key = torch.complex(key[..., :n_freq], key[..., n_freq : 2 * n_freq])
    angles = torch.arange(n_pos)[:, None] * inv_freq  # [offset, freq]
    turns = torch.exp(1j * angles)
    turning = torch.einsum("ahf,bhf,of->abho", z_query, z_key.conj(), turns).real
    query_rest = query[..., 2 * n_freq :]
    key_rest = key[..., 2 * n_freq :]
    passing = torch.einsum("ahd,bhd->abh", query_rest, key_rest)
    return spec.scale * (turning + passing[..., None])


def dense_scores(
    mask: Tensor,
    case: Case,
    spec: AttentionSpec,
) -> Tensor:
    """Scores of every entry of a dense mask, float64, differentiable; zero where not allowed."""
    query_acts = with_one(case.features.query).double()
    key_acts = with_one(case.features.key).double()
    n_rows, n_pos, _ = query_acts.shape
    kernel = mask.double()[..., None] * dense_kernel(case.decoders, spec, n_pos)
    scores = torch.zeros(n_rows, spec.n_heads, n_pos, n_pos, dtype=torch.float64)
    for i in range(n_pos):
        for j in range(n_pos):
            if loop_allowed(i, j, spec.window):
                query = query_acts[:, i]  # [batch, d_query + 1]
                key = key_acts[:, j]
                M = kernel[..., i - j]
                scores[:, :, i, j] = torch.einsum("na,nb,abh->nh", query, key, M)
    return scores
