"""One sequence as an attention layer sees it: the model's own scores, a dictionary's features."""

import html
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product
from operator import itemgetter
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.explain.removals import Directions, ScoreRow
from sae_lens_qk.explain.renamed import warn_renamed
from sae_lens_qk.explain.strongest import strongest_pairs
from sae_lens_qk.explain.terms import AttentionRow, Errors, HeadTerms, ScoreTerms
from sae_lens_qk.feature_map import Features
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.proof import proven_layer
from sae_lens_qk.host.support import Model
from sae_lens_qk.patching import Source
from sae_lens_qk.tables import html_pattern
from sae_lens_qk.weights import QKWeights

_READABLE = 48
"""Tokens of a prompt whose patterns can be read as grids."""

Tokens = str | Tensor | np.ndarray | Sequence[SupportsIndex]
"""A text, or the token ids of one sequence."""


class ScorePosition(NamedTuple):
    """Where a score stands, positions from the start."""

    head: int
    query_pos: int
    key_pos: int


@dataclass(
    frozen=True,
    eq=False,
    repr=False,
)
class RecordedPrompt:
    """One sequence, run through a model up to a dictionary's layer; made by `record`.

    Attributes:
        tokens, words: [pos], and as text.
        x: [pos, d_model], the layer's input.
        scores, pattern: [head, pos_q, pos_k], the model's own; scores are scaled, and mean nothing
            at keys that are not allowed.
        query_acts, key_acts: [pos, d_query], [pos, d_key].
    """

    dictionary: BilinearQKDictionary
    model: Model
    tokens: Int[Tensor, " pos"]
    words: list[str]
    x: Float[Tensor, "pos d_model"]
    scores: Float[Tensor, "head pos_q pos_k"]
    pattern: Float[Tensor, "head pos_q pos_k"]
    query_acts: Float[Tensor, "pos d_query"]
    key_acts: Float[Tensor, "pos d_key"]

    @classmethod
    @torch.no_grad()
    def record(
        cls, dictionary: BilinearQKDictionary, model: Model, tokens: Tokens
    ) -> "RecordedPrompt":
        """Run the model up to the dictionary's layer.

        Args:
            tokens: ids [pos] or [1, pos] of a full sequence from position 0, as a list, array or
                tensor; or a text, before which the model's BOS is put.
        Raises:
            ValueError: several sequences, no token, or ids that are not those of the model.
            FingerprintError, UnsupportedModelError: the model is not the dictionary's, or does
                what is not computed here.
        """
        layer = proven_layer(dictionary.cfg, model)
        token_row = _token_row(model, tokens)
        record = layer.record(token_row[None])  # batch of one
        x = record.x.float().to(dictionary.device)  # [1, pos, d_model]
        features = dictionary.features(x.to(dictionary.dtype))
        return cls(
            dictionary=dictionary,
            model=model,
            tokens=token_row.cpu(),
            words=[str(word) for word in model.to_str_tokens(token_row)],
            x=x[0],
            scores=record.scores[0].float().to(dictionary.device),
            pattern=record.pattern[0].float().to(dictionary.device),
            query_acts=features.query[0].float(),
            key_acts=features.key[0].float(),
        )

    @classmethod
    def of(
        cls,
        dictionary: BilinearQKDictionary,
        model: Model,
        tokens: Tokens,
    ) -> "RecordedPrompt":
        """Old name of `record`, which goes with the next release."""
        warn_renamed("Prompt.of", "RecordedPrompt.record")
        return cls.record(dictionary, model, tokens)

    def require(
        self,
        dictionary: BilinearQKDictionary,
        model: Model | None = None,
    ) -> None:
        """Refuse a prompt that was recorded with another dictionary, or another model if given.

        Raises:
            ValueError: it was.
        """
        same_model = model is None or model is self.model
        if dictionary is not self.dictionary or not same_model:
            other = "model" if dictionary is self.dictionary else "dictionary"
            raise ValueError(
                f"{self!r} was recorded with another {other}: "
                "record it with this one, RecordedPrompt.record(d, model, tokens)."
            )

    def __repr__(self) -> str:
        text = "".join(self.words)
        layer = self.dictionary.cfg.layer
        return f"RecordedPrompt({text!r}, {len(self.words)} tokens, layer {layer})"

    def _repr_html_(self) -> str:
        """Every head's pattern, the model's and rebuilt; of long prompts the tokens alone."""
        if len(self.words) > _READABLE:
            numbered = [f"{pos}:{word!r}" for pos, word in enumerate(self.words)]
            return html.escape(" ".join(numbered))
        rebuilt = self.rebuilt_pattern()
        grids = []
        for head in range(len(self.pattern)):
            grids.append(html_pattern(self.pattern[head], self.words, f"head {head}, model"))
            grids.append(html_pattern(rebuilt[head], self.words, f"head {head}, rebuilt"))
        return "".join(grids)

    # What the dictionary makes of it

    @property
    def source(self) -> Source:
        """What explanations count unless told otherwise: the feature map where there is one."""
        return "feature_map" if self.dictionary.has_feature_map else "transcoders"

    @cached_property
    def features(self) -> Features:
        """The features as a batch of one, in float32."""
        return Features(self.query_acts[None], self.key_acts[None])

    @cached_property
    def _own_features(self) -> Features:
        """The same in the dictionary's precision."""
        dtype = self.dictionary.dtype
        return Features(*(acts.to(dtype) for acts in self.features))

    @torch.no_grad()
    def rebuilt_pattern(
        self,
        source: Source | None = None,
    ) -> Float[Tensor, "head pos_q pos_k"]:
        """The pattern rebuilt from features; computed once.

        Args:
            source: None: the feature map where there is one.
        """
        source = source or self.source
        if source not in self._patterns:
            # [1, head, pos_q, pos_k]
            patterns = self.dictionary.pattern(self._own_features, source)
            self._patterns[source] = patterns[0]
        return self._patterns[source]

    def made(self, source: Source = "feature_map") -> Float[Tensor, "head pos_q pos_k"]:
        """Old name of `rebuilt_pattern`, which goes with the next release."""
        warn_renamed("RecordedPrompt.made", "RecordedPrompt.rebuilt_pattern")
        return self.rebuilt_pattern(source)

    @cached_property
    def _patterns(self) -> dict[Source, Tensor]:
        return {}

    @cached_property
    def weights(self) -> QKWeights:
        """The layer's W_Q and W_K."""
        layer = AttentionLayer(self.model, self.dictionary.cfg.layer)
        return layer.qk_weights.to(self.x.device, torch.float32)

    @cached_property
    def directions(self) -> Directions:
        """Where features lie in x, for removals: fitted on the package's own text on first use."""
        return Directions.from_own_text(self.dictionary, self.model)

    @cached_property
    @torch.no_grad()
    def _errors(self) -> Errors:
        """q - q_hat [pos, head, d_head] and k - k_hat [pos, kv_head, d_head]."""
        reconstruction = self.dictionary.reconstruct(self._own_features)
        return Errors(
            query=self.weights.queries(self.x) - reconstruction.queries[0],
            key=self.weights.keys(self.x) - reconstruction.keys[0],
        )

    # Rows of scores

    def head_terms(self, head: int) -> HeadTerms:
        """All terms of one head, the errors included, row by row."""
        # several query heads share a key head
        kv_head = head // self.dictionary.spec.heads_per_kv
        query_errors = self._errors.query[:, head]
        errors = Errors(query_errors, self._errors.key[:, kv_head])
        return HeadTerms(self.dictionary, self.features, head, errors=errors)

    def terms(
        self,
        head: int,
        query_pos: int,
    ) -> ScoreTerms:
        """All terms of one row of the model's scores, errors included; they add up to it."""
        return self.head_terms(head).row(query_pos)

    def row(
        self,
        head: int,
        query_pos: int,
    ) -> AttentionRow:
        """One row of the model's own scores, with its own pattern."""
        keys = slice(query_pos + 1)
        scores = self.scores[head, query_pos, keys]
        pattern = self.pattern[head, query_pos, keys]
        return AttentionRow(self.dictionary.spec, head, query_pos, scores, pattern)

    def score_row(
        self,
        head: int,
        query_pos: int,
    ) -> ScoreRow:
        """One row of scores, to be measured again after edits of x."""
        x = self.x[: query_pos + 1]
        return ScoreRow(self.weights, self.dictionary.spec, x, head)

    # Positions

    def position(
        self, head: SupportsIndex, query_pos: SupportsIndex, key_pos: SupportsIndex
    ) -> ScorePosition:
        """The same place with positions counted from the start.

        Raises:
            ValueError: no such head or position, or a key that the query may not attend to.
        """
        head = operator.index(head)
        n_heads = len(self.scores)
        if not 0 <= head < n_heads:
            raise ValueError(f"head must lie in [0, {n_heads - 1}], got {head}.")
        i = self._from_start("query_pos", query_pos)
        j = self._from_start("key_pos", key_pos)
        if not self.is_allowed(i, j):
            window = self.dictionary.spec.window
            limit = "" if window is None else f", its last {window} keys alone"
            raise ValueError(
                f"A query attends to keys at or before it{limit}: got query {i} and key {j}."
            )
        return ScorePosition(head, i, j)

    def is_allowed(
        self,
        query_pos: SupportsIndex,
        key_pos: SupportsIndex,
    ) -> bool:
        """Whether the query may attend to the key."""
        i = self._from_start("query_pos", query_pos)
        return self.dictionary.spec.allowed(i, self._from_start("key_pos", key_pos))

    def _from_start(
        self,
        name: str,
        position: SupportsIndex,
    ) -> int:
        n_pos = len(self.tokens)
        pos = operator.index(position)
        if not -n_pos <= pos < n_pos:
            raise ValueError(f"{name} must lie in [{-n_pos}, {n_pos - 1}], got {pos}.")
        return pos % n_pos

    def find(self, token: SupportsIndex | str) -> int:
        """Position of a token, given as its position (negative: from the end) or as its text.

        Spaces around the text do not count.

        Raises:
            ValueError: no such position, or a text that occurs never or several times.
        """
        if not isinstance(token, str):
            return self._from_start("query_pos", token)
        if token.lstrip("-").isdigit():
            return self._from_start("query_pos", int(token))
        text = token.strip()
        # tokens of GPT-2 and its like begin with their space
        words = [word.strip() for word in self.words]
        positions = [pos for pos, word in enumerate(words) if word == text]
        if not positions:
            raise ValueError(f"The token {token!r} is not among {self.words[:20]}.")
        if len(positions) > 1:
            raise ValueError(
                f"The token {token!r} stands at {positions[:5]}: give a position instead."
            )
        return positions[0]

    # The pairs behind every attention weight

    @torch.no_grad()
    def strongest(
        self,
        n: int,
        heads: Iterable[SupportsIndex] | None = None,
        query_positions: Iterable[SupportsIndex] | None = None,
    ) -> pd.DataFrame:
        """The pairs behind attention weights: per cell, n supporters and n inhibitors.

        Pairs of the feature map, times their weights, where there is one, else all pairs; see
        `attribution` for the effect.

        Args:
            n: pairs of either sign per (head, query, key).
            heads, query_positions: None: all; positions may count from the end.
        Returns:
            head, query_pos, key_pos, query_feature, key_feature (d_query / d_key: the constant),
            contribution, pattern_effect; supporters by cell, the largest effect first, then
            inhibitors likewise.
        """
        n_heads, n_pos = self.scores.shape[:2]
        if heads is None:
            heads = range(n_heads)
        if query_positions is None:
            query_positions = range(n_pos)
        rows = product(heads, query_positions)
        # a query may always attend to itself: this checks head and query, and drops repetitions
        positions = {self.position(head, i, i) for head, i in rows}
        return strongest_pairs(self._mapped_rows(sorted(positions)), n)

    def _mapped_rows(
        self, positions: Iterable[ScorePosition]
    ) -> Iterator[tuple[AttentionRow, ScoreTerms]]:
        """Rows of scores with the map's terms, every head's keys rotated once; sorted rows."""
        feature_map = self.dictionary.feature_map if self.dictionary.has_feature_map else None
        for head, head_positions in groupby(positions, key=itemgetter(0)):
            head_terms = HeadTerms(self.dictionary, self.features, head, feature_map)
            for _, query_pos, _ in head_positions:
                yield self.row(head, query_pos), head_terms.row(query_pos)


def integers(
    name: str,
    values: Any,
) -> Int[Tensor, "*shape"]:
    """A number, or a sequence, array or tensor of numbers, as int64.

    Raises:
        ValueError: other than integers, or none of them.
    """
    try:
        # copies only what is no tensor yet
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers, got {values!r}.") from error
    if not tensor.numel():
        raise ValueError(f"{name} must be at least one integer, got none.")
    is_real = tensor.is_floating_point() or tensor.is_complex()
    if is_real or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {tensor.dtype}: {values!r}.")
    return tensor.to(torch.int64)


def _token_row(
    model: Model,
    tokens: Tokens,
) -> Int[Tensor, " pos"]:
    """Token ids of one sequence, on the model's device."""
    if isinstance(tokens, str):
        return model.to_tokens(tokens)[0]
    token_ids = integers("tokens", tokens)
    if token_ids.ndim == 2 and len(token_ids) == 1:
        token_ids = token_ids[0]
    if token_ids.ndim != 1:
        raise ValueError(
            "tokens must be one sequence, [pos] or [1, pos], or a text, "
            f"got shape {list(token_ids.shape)}."
        )
    largest_id = model.cfg.d_vocab - 1
    if token_ids.min() < 0 or token_ids.max() > largest_id:
        raise ValueError(
            f"tokens must be ids in [0, {largest_id}], "
            f"got {int(token_ids.min())} to {int(token_ids.max())}."
        )
    return token_ids.to(model.cfg.device)
