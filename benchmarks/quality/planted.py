"""Attention layers whose pattern comes from a sparse list of (query feature, key feature, head).

    x[i]          = sum over features f of act[i,f] e_f
                    + noise * (isotropic in directions that no feature uses)
    W_Q[h]        = sum over planted pairs p of head h of  sqrt(w_p / s) r(a_p) u_p^T
    W_K[h]        the same with r(b_p)
    scores[h,i,j] = sum over p of  w_p <r(a_p), x_i> <r(b_p), x_j> <R_i u_p, R_j u_p>

r(f) reads feature f: the dual basis where there are at most as many features as dimensions, e_f
itself where they are superposed (then reading one feature picks up a little of all others). The u_p
of a head are orthonormal, so that a head of d_head dimensions holds at most d_head of them and its
matrix has rank at most d_head. With rotary embeddings each u_p lies in a rotating plane of its own,
and its pair's score turns with the offset i - j.

The noise is attention-irrelevant variance: the dimensions of a head that no u_p uses read it, some
in queries alone and some in keys alone, so that it is in x, in q and in k, and in no score.

Two features are special, and orthogonal to all others. Feature 1 is on at every position and asks,
in every head, for feature 0, which marks the first position: the dense attend-to-first-token
feature. *Packed* pairs share their u_p with a pair of the other topic; a sequence has one topic, so
the two never meet: their decoders are aligned, their interaction is large, and it never acts.
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

FIRST_TOKEN = 0
ALWAYS_ON = 1
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

    @property
    def n_directions(self) -> int:
        """Vectors u_p that a head needs."""
        return 1 + self.pairs_per_head - self.n_packed

    @property
    def room(self) -> int:
        """Vectors u_p that a head can hold: its dimensions, or its rotating planes."""
        return self.d_head // 2 if self.rotary else self.d_head

    @property
    def d_model(self) -> int:
        return self.d_signal + self.d_noise

    @property
    def scale(self) -> float:
        return self.d_head**-0.5


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
    """Projection on the dimensions that can make a score; in others a vector is arbitrary."""

    def vectors(self) -> tuple[Float[Tensor, "feature d_queries"], Float[Tensor, "feature d_keys"]]:
        """What the heads make of each feature, as queries and as keys: the planted decoder rows."""
        queries = self.weights.queries(self.features)
        keys = self.weights.keys(self.features)
        return queries.flatten(1), keys.flatten(1)

    def readable_part(
        self, rows: Float[Tensor, "feature head d_head"]
    ) -> Float[Tensor, "feature d_out"]:
        """The part of decoder rows that can make a score."""
        return torch.einsum("fhd,hde->fhe", rows, self.readable).flatten(1)


class Sample(NamedTuple):
    """Sequences of a planted layer."""

    x: Float[Tensor, "row pos d_model"]
    acts: Float[Tensor, "row pos feature"]


class _Head(NamedTuple):
    """One planted head, before the basis of x is turned."""

    W_Q: Float[Tensor, "d_model d_head"]
    W_K: Float[Tensor, "d_model d_head"]
    pairs: list[tuple[int, int]]
    readable: Float[Tensor, "d_head d_head"]


def plant(
    setting: Setting,
    seed: int,
) -> Circuit:
    """A circuit drawn from the setting.

    Raises:
        ValueError: a head cannot hold as many pairs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _plant(setting, seed)


def _plant(
    s: Setting,
    seed: int,
) -> Circuit:
    if s.n_directions > s.room or 2 * s.n_packed > s.pairs_per_head:
        raise ValueError(
            f"A head of {s.d_head} dimensions holds {s.room} pairs, and at most half are packed; "
            f"got {s}."
        )
    # the features' space is not aligned with the axes
    basis, _ = torch.linalg.qr(torch.randn(s.d_model, s.d_model))
    features, readers = _features(s)
    topics = _topics(s)
    heads = [_plant_head(s, readers, topics) for _ in range(s.n_heads)]
    pairs = [(*pair, h) for h, head in enumerate(heads) for pair in head.pairs]
    no_bias = torch.zeros(s.n_heads, s.d_head)
    spec = AttentionSpec(
        n_heads=s.n_heads,
        n_kv_heads=s.n_heads,
        d_head=s.d_head,
        d_model=s.d_model,
        scale=s.scale,
        rotary_inv_freq=tuple((0.3 ** torch.linspace(0, 4, s.room)).tolist()) if s.rotary else (),
    )
    weights = QKWeights(
        W_Q=basis @ torch.stack([head.W_Q for head in heads]),
        b_Q=no_bias,
        W_K=basis @ torch.stack([head.W_K for head in heads]),
        b_K=no_bias,
    )
    return Circuit(
        setting=s,
        spec=spec,
        weights=weights,
        features=features @ basis[:, : s.d_signal].T,
        pairs=torch.tensor(pairs),
        topics=topics,
        activations=_activations(s, seed),
        irrelevant=basis[:, s.d_signal :].T,
        readable=torch.stack([head.readable for head in heads]),
    )


def _plant_head(
    s: Setting,
    readers: Float[Tensor, "feature d_signal"],
    topics: Tensor,
) -> _Head:
    W_Q = torch.zeros(s.d_signal, s.d_head)
    W_K = torch.zeros(s.d_signal, s.d_head)
    directions = _directions(s)
    pairs = [(ALWAYS_ON, FIRST_TOKEN), *_draw_pairs(s, topics)]
    for n, (query, key) in enumerate(pairs):
        # the packed pairs come last; they share the directions of the first ones after the sink
        u = directions[n if n < s.n_directions else n - s.n_directions + 1]
        strength = s.strength if n else s.sink_strength
        w = strength * float(torch.empty(()).uniform_(0.6, 1.4))
        W_Q += (w / s.scale) ** 0.5 * torch.outer(readers[query], u)
        W_K += (w / s.scale) ** 0.5 * torch.outer(readers[key], u)
    query_spare, key_spare = directions[s.n_directions :].tensor_split(2)
    noise_Q = _noise_reader(s, query_spare)
    noise_K = _noise_reader(s, key_spare)
    score_directions = directions[: s.n_directions]
    readable = score_directions.T @ score_directions
    if s.rotary:  # both dimensions of a plane
        readable = readable + readable.roll((s.room, s.room), (0, 1))
    return _Head(torch.cat([W_Q, noise_Q]), torch.cat([W_K, noise_K]), pairs, readable)


def _noise_reader(
    s: Setting, directions: Float[Tensor, "spare d_head"]
) -> Float[Tensor, "d_noise d_head"]:
    """Reads the noise into dimensions that make no score."""
    mixing = torch.randn(s.d_noise, len(directions)) / s.d_noise**0.5
    return (s.strength / s.scale) ** 0.5 * mixing @ directions


def _features(
    s: Setting,
) -> tuple[Float[Tensor, "feature d_signal"], Float[Tensor, "feature d_signal"]]:
    """Feature vectors, the special ones in dimensions of their own, and what reads each of them."""
    ordinary = FeatureDictionary(
        s.n_features - _N_SPECIAL, s.d_signal - _N_SPECIAL, initializer=orthogonal_initializer()
    )
    features = torch.block_diag(torch.eye(_N_SPECIAL), ordinary.feature_vectors.detach())
    if s.n_features <= s.d_signal:
        return features, torch.linalg.pinv(features).T
    return features, features


def _topics(s: Setting) -> Int[Tensor, " feature"]:
    """Of three thirds of the features one belongs to no topic, the others to one each.

    Without packing there are no topics.
    """
    topics = torch.full((s.n_features,), -1)
    if s.n_packed:
        third = (s.n_features - _N_SPECIAL) // 3
        topics[-third:] = 1
        topics[-2 * third : -third] = 0
    return topics


def _directions(s: Setting) -> Float[Tensor, "direction d_head"]:
    if not s.rotary:
        return torch.linalg.qr(torch.randn(s.d_head, s.d_head))[0]
    # slow planes first; rotate-half turns dimensions d and d + D/2
    return torch.eye(s.d_head)[: s.d_head // 2].flip(0)


def _draw_pairs(
    s: Setting,
    topics: Tensor,
) -> list[tuple[int, int]]:
    """Pairs of one head: `n_packed` of topic 0, then free ones, then `n_packed` of topic 1.

    No feature stands twice on a side.
    """
    n_free = s.pairs_per_head - 2 * s.n_packed
    pair_topics = [0] * s.n_packed + [None] * n_free + [1] * s.n_packed
    query_features: list[int] = []
    key_features: list[int] = []
    for topic in pair_topics:
        if topic is None:
            allowed = list(range(_N_SPECIAL, s.n_features))
        else:
            allowed = (topics == topic).nonzero()[:, 0].tolist()
        for side in (query_features, key_features):
            free = [feature for feature in allowed if feature not in side]
            side.append(free[int(torch.randint(len(free), ()))])
    return list(zip(query_features, key_features, strict=True))


def _activations(
    s: Setting,
    seed: int,
) -> ActivationGenerator:
    correlation: LowRankCorrelationMatrix | None = None
    if s.correlation_scale:
        correlation = generate_random_low_rank_correlation_matrix(
            s.n_features, rank=8, correlation_scale=s.correlation_scale, seed=seed
        )
    return ActivationGenerator(s.n_features, s.density, 0.2, correlation_matrix=correlation)


def sample(
    circuit: Circuit,
    n_rows: int,
    n_pos: int,
    seed: int,
) -> Sample:
    """Sequences; the same seed gives the same ones."""
    s = circuit.setting
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        acts = circuit.activations.sample(n_rows * n_pos).unflatten(0, (n_rows, n_pos))
        row_topics = torch.randint(2, (n_rows, 1, 1))
        acts = acts * ((circuit.topics == -1) | (circuit.topics == row_topics))
        acts[:, 0] = 0.0
        acts[..., FIRST_TOKEN] = 0.0
        acts[:, 0, FIRST_TOKEN] = 1.0
        acts[..., ALWAYS_ON] = 1.0 + 0.2 * torch.rand(n_rows, n_pos)
        noise = s.noise * torch.randn(n_rows, n_pos, s.d_noise)
    return Sample(acts @ circuit.features + noise @ circuit.irrelevant, acts)
