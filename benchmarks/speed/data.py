"""Synthetic activations, decoders and true patterns."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.feature_map import Features
from sae_lens_qk.scoring.entries import with_constant
from sae_lens_qk.scoring.pairs import Decoders
from sae_lens_qk.training.losses import TruePattern

TOPIC_SHARE = 0.75
"""Share of a token's features that come from its topic."""
_TOPIC_LENGTH = 64
"""Tokens that a topic lasts, on average."""
_SCORE_VARIANCE = 2.0


class Case(NamedTuple):
    """What step 2 trains on: features, decoders with the constant last, and the true pattern."""

    query_acts: Tensor
    """[row, pos, d_query], without the constant."""
    key_acts: Tensor
    decoders: Decoders
    spec: AttentionSpec
    true: TruePattern

    @property
    def features(self) -> Features:
        return Features(self.query_acts, self.key_acts)

    @property
    def n_pos(self) -> int:
        return self.query_acts.shape[1]

    def rows(self, n: int) -> "Case":
        """The first n sequences."""
        true = self.true._replace(
            pattern=self.true.pattern[:n], log_pattern=self.true.log_pattern[:n]
        )
        return self._replace(
            query_acts=self.query_acts[:n],
            key_acts=self.key_acts[:n],
            true=true,
        )


class WideCase(NamedTuple):
    """A case among more features than ever fire: the same function on more of them."""

    case: Case
    query_numbers: Tensor
    """Number in `case` of each query feature of the smaller one, its constant included."""
    key_numbers: Tensor


def make_spec(
    n_heads: int,
    d_head: int,
    n_frequencies: int = 0,
) -> AttentionSpec:
    """An attention layer; n_frequencies rotate 2 * n_frequencies dimensions of a head, 0 none."""
    frequencies = [10_000 ** (-f / n_frequencies) for f in range(n_frequencies)]
    return AttentionSpec(
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        d_model=n_heads * d_head,
        scale=d_head**-0.5,
        rotary_inv_freq=tuple(frequencies),
    )


def make_case(
    kind: str,
    spec: AttentionSpec,
    d: tuple[int, int],
    n_rows: int,
    n_pos: int,
    l0: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """A case whose true pattern is that of the full reconstruction, its scores disturbed by noise.

    Args:
        kind: "random": l0 features per token, drawn uniformly; "clustered": most of them from the
            token's topic.
        d: query and key features, without constants.
    """
    generator = torch.Generator().manual_seed(seed)
    d_query, d_key = d
    topics = _topics(n_rows, n_pos, max(2, min(d) // 20), generator)
    if kind != "clustered":
        topics = None
    query_acts = _acts(d_query, l0, topics, (n_rows, n_pos), generator).to(dtype)
    key_acts = _acts(d_key, l0, topics, (n_rows, n_pos), generator).to(dtype)
    W_query = _decoder(d_query, spec, l0, generator).to(dtype)
    W_key = _decoder(d_key, spec, l0, generator).to(dtype)
    queries = with_constant(query_acts) @ W_query.flatten(1)
    keys = with_constant(key_acts) @ W_key.flatten(1)
    scores = spec.scores(spec.split_queries(queries), spec.split_keys(keys))
    noise = torch.randn(scores.shape, generator=generator).to(dtype)
    log_pattern = spec.log_pattern(scores + 0.5 * noise)
    true = TruePattern(log_pattern.exp(), log_pattern, spec)
    return Case(query_acts, key_acts, Decoders(W_query, W_key), spec, true)


def add_dead_features(
    case: Case,
    d: int,
    seed: int = 1,
) -> WideCase:
    """The case as part of d features per side, of which the others never fire."""
    generator = torch.Generator().manual_seed(seed)
    query_acts, W_query, query_numbers = _among(case.query_acts, case.decoders.query, d, generator)
    key_acts, W_key, key_numbers = _among(case.key_acts, case.decoders.key, d, generator)
    wide = case._replace(
        query_acts=query_acts, key_acts=key_acts, decoders=Decoders(W_query, W_key)
    )
    return WideCase(wide, query_numbers, key_numbers)


def _among(
    acts: Tensor, W: Tensor, d: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations and decoder of one side among d features, and where its own stand there."""
    live = torch.randperm(d, generator=generator)[: acts.shape[-1]].sort().values
    wide_acts = acts.new_zeros(*acts.shape[:-1], d).index_copy(-1, live, acts)
    numbers = torch.cat([live, torch.tensor([d])])  # the constant stays last
    dead_rows = torch.randn(d + 1, *W.shape[1:], generator=generator).to(W.dtype)
    return wide_acts, dead_rows.index_copy(0, numbers, W), numbers


def _topics(
    n_rows: int,
    n_pos: int,
    n_topics: int,
    generator: torch.Generator,
) -> Tensor:
    """Topic of each position [row, pos]: it stays, and changes every 64 tokens or so."""
    topics = torch.randint(n_topics, (n_rows, n_pos), generator=generator)
    changes = torch.rand(n_rows, n_pos, generator=generator) < 1 / _TOPIC_LENGTH
    changes[:, 0] = True
    last_change = torch.where(changes, torch.arange(n_pos), 0).cummax(dim=1).values
    return topics.gather(1, last_change)


def _acts(
    d: int,
    l0: int,
    topics: Tensor | None,
    shape: tuple[int, int],
    generator: torch.Generator,
) -> Tensor:
    """Activations [row, pos, d], l0 per token, uniform in [0.5, 1.5]."""
    n_rows, n_pos = shape
    acts = torch.zeros(n_rows, n_pos, d)
    if topics is None:
        weights = torch.ones(d)
        n_topics = 0
    else:
        weights = 1 / (1 + torch.randperm(d, generator=generator))  # Zipf
        n_topics = int(topics.max()) + 1
    topic_features = torch.randint(d, (n_topics, 3 * l0), generator=generator)
    for row in range(n_rows):
        bias = weights.log().expand(n_pos, d)
        if topics is not None:
            n_topical = round(TOPIC_SHARE * l0)
            members = topic_features[topics[row]]  # [pos, 3 * l0]
            order = torch.rand(members.shape, generator=generator).argsort(dim=1)
            bias = bias.scatter(1, members.gather(1, order[:, :n_topical]), torch.inf)
        # the l0 largest of log weight + Gumbel noise: a draw without replacement
        uniform = torch.rand(n_pos, d, generator=generator).clamp(min=1e-9)
        gumbel = -uniform.log().neg().log()
        features = (bias + gumbel).topk(l0, dim=1).indices
        acts[row].scatter_(1, features, 0.5 + torch.rand(n_pos, l0, generator=generator))
    return acts


def _decoder(
    d: int,
    spec: AttentionSpec,
    l0: int,
    generator: torch.Generator,
) -> Tensor:
    """Random rows [d + 1, head, d_head] such that scores have variance 2 or so, whatever l0 is."""
    rows = torch.randn(d + 1, spec.n_heads, spec.d_head, generator=generator)
    return rows * (_SCORE_VARIANCE**0.5 / l0) ** 0.5
