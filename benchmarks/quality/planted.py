"""Attention layers whose pattern is known to come from a sparse list of (query feature, key feature, head).

    x[i]          = sum over features f of act[i,f] e_f  +  noise * (isotropic in directions that no feature uses)
    W_Q[h]        = sum over planted pairs p of head h of  sqrt(w_p / s) r(a_p) u_p^T,     W_K[h] the same with r(b_p)
    scores[h,i,j] = sum over p of  w_p <r(a_p), x_i> <r(b_p), x_j> <R_i u_p, R_j u_p>

r(f) reads feature f: the dual basis where there are at most as many features as dimensions, e_f itself where they are
superposed (then reading one feature picks up a little of all others). The u_p of a head are orthonormal, so that a head of
d_head dimensions holds at most d_head of them and its matrix has rank at most d_head. With rotary embeddings each u_p lies
in a rotating plane of its own, and its pair's score turns with the offset i - j.

The noise is attention-irrelevant variance: the dimensions of a head that no u_p uses read it, some in queries alone and
some in keys alone, so that it is in x, in q and in k, and in no score.

Two features are special, and orthogonal to all others. Feature 1 is on at every position and asks, in every head, for
feature 0, which marks the first position: the dense attend-to-first-token feature. *Packed* pairs share their u_p with a
pair of the other topic; a sequence has one topic, so the two never meet: their decoders are aligned, their interaction is
large, and it never acts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    LowRankCorrelationMatrix,
    generate_random_low_rank_correlation_matrix,
    orthogonal_initializer,
)
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.weights import QKWeights

FIRST_TOKEN, ALWAYS_ON = 0, 1
_N_SPECIAL = 2


@dataclass(frozen=True)
class Setting:
    """What is planted; `n_features` counts the two special ones."""

    n_features: int = 50
    d_signal: int = 64
    """Dimensions that hold the features."""
    d_noise: int = 16
    """Further dimensions of x, which matter to no score."""
    noise: float = 0.25
    """Standard deviation of x in each of them; a feature's activation is about 1."""
    n_heads: int = 4
    d_head: int = 16
    pairs_per_head: int = 12
    """Without the attend-to-first-token pair."""
    n_packed: int = 0
    """Of these, how many share their direction with one of the other topic."""
    density: float = 0.08
    """Share of the positions at which a feature is on, of those where its topic allows it."""
    correlation_scale: float = 0.0
    """Strength of a rank-8 correlation between the features that are on; 0: independent."""
    strength: float = 4.0
    """Mean score of a pair whose two features are at 1."""
    sink_strength: float = 2.0
    """The same of the attend-to-first-token pair."""
    rotary: bool = False


class Circuit(NamedTuple):
    """A planted layer."""

    setting: Setting
    spec: AttentionSpec
    weights: QKWeights
    features: Float[Tensor, "feature d_model"]
    pairs: Int[Tensor, "pair 3"]
    """(query feature, key feature, head)"""
    topics: Int[Tensor, " feature"]
    """Topic in which a feature can be on; -1: both."""
    activations: ActivationGenerator
    irrelevant: Float[Tensor, "d_noise d_model"]
    readable: Float[Tensor, "head d_head d_head"]
    """Projection on the dimensions that can make a score: elsewhere a query or key vector is arbitrary."""

    def vectors(self) -> tuple[Float[Tensor, "feature d_queries"], Float[Tensor, "feature d_keys"]]:
        """What the heads make of each feature, as queries and as keys: the planted decoder rows."""
        return self.weights.queries(self.features).flatten(1), self.weights.keys(
            self.features
        ).flatten(1)

    def read(self, rows: Float[Tensor, "feature head d_head"]) -> Float[Tensor, "feature d_out"]:
        """The part of decoder rows that can make a score."""
        return torch.einsum("fhd,hde->fhe", rows, self.readable).flatten(1)


class Sample(NamedTuple):
    """Sequences of a planted layer."""

    x: Float[Tensor, "row pos d_model"]
    acts: Float[Tensor, "row pos feature"]


def plant(setting: Setting, seed: int) -> Circuit:
    """A circuit drawn from the setting.

    Raises:
        ValueError: a head cannot hold as many pairs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _plant(setting, seed)


def _plant(s: Setting, seed: int) -> Circuit:
    n_directions = 1 + s.pairs_per_head - s.n_packed
    room = s.d_head // 2 if s.rotary else s.d_head
    if n_directions > room or 2 * s.n_packed > s.pairs_per_head:
        raise ValueError(
            f"A head of {s.d_head} dimensions holds {room} pairs, and at most half are packed; got {s}."
        )
    d_model = s.d_signal + s.d_noise
    basis = torch.linalg.qr(torch.randn(d_model, d_model))[
        0
    ]  # the features' space is not aligned with the axes
    features, readers = _features(s)
    topics = _topics(s)
    W_Q, W_K, listed = (
        torch.zeros(s.n_heads, s.d_signal, s.d_head),
        torch.zeros(s.n_heads, s.d_signal, s.d_head),
        [],
    )
    noise_Q, noise_K = (
        torch.zeros(s.n_heads, s.d_noise, s.d_head),
        torch.zeros(s.n_heads, s.d_noise, s.d_head),
    )
    readable = torch.zeros(s.n_heads, s.d_head, s.d_head)
    scale = s.d_head**-0.5
    for head in range(s.n_heads):
        directions = _directions(s)
        pairs = [(ALWAYS_ON, FIRST_TOKEN), *_draw_pairs(s, topics)]
        for at, (query, key) in enumerate(pairs):
            u = directions[
                at if at < n_directions else at - n_directions + 1
            ]  # the packed come last, their twins first
            w = (s.strength if at else s.sink_strength) * float(torch.empty(()).uniform_(0.6, 1.4))
            W_Q[head] += (w / scale) ** 0.5 * torch.outer(readers[query], u)
            W_K[head] += (w / scale) ** 0.5 * torch.outer(readers[key], u)
            listed.append((query, key, head))
        by_queries, by_keys = directions[n_directions:].tensor_split(2)
        for noise, unused in ((noise_Q[head], by_queries), (noise_K[head], by_keys)):
            noise += (
                (s.strength / scale) ** 0.5
                * torch.randn(s.d_noise, len(unused))
                / s.d_noise**0.5
                @ unused
            )
        used = directions[:n_directions]
        readable[head] = used.T @ used
        if s.rotary:  # both dimensions of a plane
            readable[head] += readable[head].roll((room, room), (0, 1))
    frequencies = tuple((0.3 ** torch.linspace(0, 4, room)).tolist()) if s.rotary else ()
    zero = torch.zeros(s.n_heads, s.d_head)
    W_Q, W_K = (basis @ torch.cat(parts, dim=1) for parts in ((W_Q, noise_Q), (W_K, noise_K)))
    return Circuit(
        s,
        AttentionSpec(s.n_heads, s.n_heads, s.d_head, d_model, scale, frequencies),
        QKWeights(W_Q, zero, W_K, zero),
        features @ basis[:, : s.d_signal].T,
        torch.tensor(listed),
        topics,
        _activations(s, seed),
        basis[:, s.d_signal :].T,
        readable,
    )


def _features(
    s: Setting,
) -> tuple[Float[Tensor, "feature d_signal"], Float[Tensor, "feature d_signal"]]:
    """Feature vectors, the special ones in dimensions of their own, and what reads each of them."""
    rest = s.n_features - _N_SPECIAL, s.d_signal - _N_SPECIAL
    spread = FeatureDictionary(*rest, initializer=orthogonal_initializer()).feature_vectors.detach()
    features = torch.block_diag(torch.eye(_N_SPECIAL), spread)
    return features, torch.linalg.pinv(features).T if s.n_features <= s.d_signal else features


def _topics(s: Setting) -> Int[Tensor, " feature"]:
    """A third of the features belongs to no topic, a third to each of two; without packing there are none."""
    topics = torch.full((s.n_features,), -1)
    if s.n_packed:
        third = (s.n_features - _N_SPECIAL) // 3
        topics[-third:], topics[-2 * third : -third] = 1, 0
    return topics


def _directions(s: Setting) -> Float[Tensor, "direction d_head"]:
    if not s.rotary:
        return torch.linalg.qr(torch.randn(s.d_head, s.d_head))[0]
    return torch.eye(s.d_head)[: s.d_head // 2].flip(
        0
    )  # slow planes first; rotate-half turns dimensions d and d + D/2


def _draw_pairs(s: Setting, topics: Tensor) -> list[tuple[int, int]]:
    """Pairs of one head: `n_packed` of topic 0, then free ones, then `n_packed` of topic 1; no feature twice on a side."""
    topic_of = [0] * s.n_packed + [None] * (s.pairs_per_head - 2 * s.n_packed) + [1] * s.n_packed
    used: tuple[set[int], set[int]] = set(), set()
    drawn = []
    for topic in topic_of:
        pair = []
        for side in used:
            allowed = (
                torch.arange(_N_SPECIAL, s.n_features)
                if topic is None
                else (topics == topic).nonzero()[:, 0]
            )
            free = [f for f in allowed.tolist() if f not in side]
            pair.append(free[int(torch.randint(len(free), ()))])
            side.add(pair[-1])
        drawn.append(tuple(pair))
    return drawn


def _activations(s: Setting, seed: int) -> ActivationGenerator:
    correlation: LowRankCorrelationMatrix | None = None
    if s.correlation_scale:
        correlation = generate_random_low_rank_correlation_matrix(
            s.n_features, rank=8, correlation_scale=s.correlation_scale, seed=seed
        )
    return ActivationGenerator(s.n_features, s.density, 0.2, correlation_matrix=correlation)


def sample(circuit: Circuit, n_rows: int, n_pos: int, seed: int) -> Sample:
    """Sequences; the same seed gives the same ones."""
    s = circuit.setting
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        acts = circuit.activations.sample(n_rows * n_pos).unflatten(0, (n_rows, n_pos))
        topic = torch.randint(2, (n_rows, 1, 1))
        acts = acts * ((circuit.topics == -1) | (circuit.topics == topic))
        acts[:, 0] = acts[..., FIRST_TOKEN] = 0.0
        acts[:, 0, FIRST_TOKEN] = 1.0
        acts[..., ALWAYS_ON] = 1.0 + 0.2 * torch.rand(n_rows, n_pos)
        noise = s.noise * torch.randn(n_rows, n_pos, s.d_noise)
    return Sample(acts @ circuit.features + noise @ circuit.irrelevant, acts)
