"""Synthetic activations, decoders and true patterns."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec, attention_scores, log_pattern
from sae_lens_qk.scoring.pairs import Decoders
from sae_lens_qk.scoring.entries import with_constant
from sae_lens_qk.training.losses import TruePattern

TOPIC_SHARE = 0.75
"""Of a token's features come from its topic."""
_RUN = 64  # tokens a topic lasts, on average
_SCORE_VARIANCE = 2.0


class Case(NamedTuple):
    """What step 2 trains on: features of both sides, decoders with the constant last, and the true pattern."""

    query_acts: Tensor
    key_acts: Tensor
    decoders: Decoders
    spec: AttentionSpec
    true: TruePattern

    def rows(self, n: int) -> "Case":
        """The first n sequences."""
        true = TruePattern(self.true.pattern[:n], self.true.log_pattern[:n])
        return self._replace(query_acts=self.query_acts[:n], key_acts=self.key_acts[:n], true=true)


class Whole(NamedTuple):
    """A case among more features than ever fire: the same function on more of them."""

    case: Case
    query_numbers: Tensor
    """Number in `case` of each query feature of the smaller one, its constant included."""
    key_numbers: Tensor


def make_spec(n_heads: int, d_head: int, n_frequencies: int = 0) -> AttentionSpec:
    """An attention layer; n_frequencies rotate 2 * n_frequencies dimensions of a head, 0 none."""
    frequencies = tuple(10_000 ** (-f / max(n_frequencies, 1)) for f in range(n_frequencies))
    return AttentionSpec(n_heads, n_heads, d_head, n_heads * d_head, d_head**-0.5, frequencies)


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
        kind: "random": l0 features a token, drawn uniformly; "clustered": most of them from the token's topic.
        d: query and key features, without constants.
    """
    generator = torch.Generator().manual_seed(seed)
    topic_of = _topics(n_rows, n_pos, max(2, min(d) // 20), generator)
    sides = [
        _acts(size, l0, topic_of if kind == "clustered" else None, n_rows, n_pos, generator)
        for size in d
    ]
    query_acts, key_acts = (acts.to(dtype) for acts in sides)
    decoders = Decoders(*(_decoder(size, spec, l0, generator).to(dtype) for size in d))
    queries, keys = (
        with_constant(acts) @ W.flatten(1)
        for acts, W in zip((query_acts, key_acts), decoders, strict=True)
    )
    scores = attention_scores(spec.split_queries(queries), spec.split_keys(keys), spec)
    noise = torch.randn(scores.shape, generator=generator).to(dtype)
    log_true = log_pattern(scores + 0.5 * noise)
    return Case(query_acts, key_acts, decoders, spec, TruePattern(log_true.exp(), log_true))


def among(case: Case, d: int, seed: int = 1) -> Whole:
    """The case as part of d features a side, of which the others never fire."""
    generator = torch.Generator().manual_seed(seed)
    numbers, acts, decoders = [], [], []
    for small, W in zip((case.query_acts, case.key_acts), case.decoders, strict=True):
        chosen = torch.randperm(d, generator=generator)[: small.shape[-1]].sort().values
        acts.append(small.new_zeros(*small.shape[:-1], d).index_copy(-1, chosen, small))
        number = torch.cat([chosen, torch.tensor([d])])
        numbers.append(number)
        others = torch.randn(d + 1, *W.shape[1:], generator=generator).to(W.dtype)
        decoders.append(others.index_copy(0, number, W))
    return Whole(
        case._replace(query_acts=acts[0], key_acts=acts[1], decoders=Decoders(*decoders)), *numbers
    )


def _topics(n_rows: int, n_pos: int, n_topics: int, generator: torch.Generator) -> Tensor:
    """Topic of each position [row, pos]: it stays, and changes every 64 tokens or so."""
    drawn = torch.randint(n_topics, (n_rows, n_pos), generator=generator)
    changes = torch.rand(n_rows, n_pos, generator=generator) < 1 / _RUN
    changes[:, 0] = True
    since = torch.where(changes, torch.arange(n_pos), 0).cummax(dim=1).values
    return drawn.gather(1, since)


def _acts(
    d: int, l0: int, topic_of: Tensor | None, n_rows: int, n_pos: int, generator: torch.Generator
) -> Tensor:
    """Activations [row, pos, d], l0 a token, uniform in [0.5, 1.5]."""
    acts = torch.zeros(n_rows, n_pos, d)
    weights = (
        torch.ones(d) if topic_of is None else 1 / (1 + torch.randperm(d, generator=generator))
    )  # Zipf
    n_topics = 0 if topic_of is None else int(topic_of.max()) + 1
    topics = torch.randint(d, (n_topics, 3 * l0), generator=generator)
    for row in range(n_rows):
        bias = weights.log().expand(n_pos, d)
        n_free = l0
        if topic_of is not None:
            n_free = l0 - round(TOPIC_SHARE * l0)
            members = topics[topic_of[row]]
            order = torch.rand(members.shape, generator=generator).argsort(dim=1)[:, : l0 - n_free]
            bias = bias.scatter(1, members.gather(1, order), torch.inf)
        gumbel = -torch.rand(n_pos, d, generator=generator).clamp(min=1e-9).log().neg().log()
        features = (bias + gumbel).topk(l0, dim=1).indices
        acts[row].scatter_(1, features, 0.5 + torch.rand(n_pos, l0, generator=generator))
    return acts


def _decoder(d: int, spec: AttentionSpec, l0: int, generator: torch.Generator) -> Tensor:
    """Random rows such that scores have variance 2 or so, whatever l0 is."""
    return (
        torch.randn(d + 1, spec.n_heads, spec.d_head, generator=generator)
        * (_SCORE_VARIANCE**0.5 / l0) ** 0.5
    )
