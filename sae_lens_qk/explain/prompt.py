"""One sequence as an attention layer sees it: the model's own scores and pattern, and the features of a dictionary."""

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.explain.removals import Directions, ScoreRow
from sae_lens_qk.explain.terms import Errors, ScoreTerms
from sae_lens_qk.tables import html_pattern
from sae_lens_qk.dictionary import BilinearQKDictionary, Source
from sae_lens_qk.host.support import Model
from sae_lens_qk.weights import QKWeights
from sae_lens_qk.host.layer import check_attention_call, hook_names, input_completion, qk_weights, run_recording
from sae_lens_qk.host.proof import check_model

_READABLE = 48
"""Tokens of a prompt whose patterns can be read as grids."""


class ScorePlace(NamedTuple):
    """Where a score stands, positions from the start."""

    head: int
    query_pos: int
    key_pos: int


@dataclass(frozen=True, eq=False, repr=False)
class Prompt:
    """One sequence, run through a model up to a dictionary's layer.

    Attributes:
        tokens, words: [pos], and as text.
        x: [pos, d_model], the layer's input.
        scores, pattern: [head, pos_q, pos_k], the model's own; scores are scaled, those of future keys masked.
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

    def __repr__(self) -> str:
        return f"Prompt({''.join(self.words)!r}, {len(self.words)} tokens, layer {self.dictionary.cfg.layer})"

    @classmethod
    @torch.no_grad()
    def of(cls, dictionary: BilinearQKDictionary, model: Model, tokens: str | Tensor) -> "Prompt":
        """Run the model.

        Args:
            tokens: [pos] or [1, pos], a full sequence from position 0; or a text, before which the model's BOS is put.
        Raises:
            ValueError: several sequences.
            FingerprintError, UnsupportedModelError: the model is not the dictionary's, or does what is not computed here.
        """
        check_model(dictionary, model)
        listed = (
            model.to_tokens(tokens)
            if isinstance(tokens, str)
            else tokens.reshape(-1, tokens.shape[-1])
        )
        if len(listed) != 1:
            raise ValueError(
                f"A prompt is one sequence, tokens [pos] or [1, pos], got shape {list(listed.shape)}."
            )
        layer, dtype = dictionary.cfg.layer, dictionary.dtype
        names = hook_names(model, layer)
        _, seen = run_recording(
            model, listed, [names.input, names.scores, names.pattern], stop_at_layer=layer + 1
        )
        x = input_completion(model, layer)(seen[names.input])
        check_attention_call(x, seen[names.scores])
        x, scores, pattern = (
            t[0].float().to(dictionary.device) for t in (x, seen[names.scores], seen[names.pattern])
        )
        query_acts, key_acts = (
            dictionary.encode_query(x.to(dtype)).float(),
            dictionary.encode_key(x.to(dtype)).float(),
        )
        words = [str(word) for word in model.to_str_tokens(listed[0])]
        return cls(
            dictionary, model, listed[0].cpu(), words, x, scores, pattern, query_acts, key_acts
        )

    @torch.no_grad()
    def made(self, source: Source = "feature_map") -> Float[Tensor, "head pos_q pos_k"]:
        """The pattern rebuilt from features."""
        return self.dictionary.pattern(self.x[None].to(self.dictionary.dtype), source)[0]

    @cached_property
    def weights(self) -> QKWeights:
        """The layer's W_Q and W_K."""
        return qk_weights(self.model, self.dictionary.cfg.layer).to(self.x.device, torch.float32)

    @cached_property
    def directions(self) -> Directions:
        """Where features lie in x, for removals: fitted on the text that comes with the package, on first use."""
        return Directions.from_own_text(self.dictionary, self.model)

    @cached_property
    @torch.no_grad()
    def _missed(
        self,
    ) -> tuple[Float[Tensor, "pos head d_head"], Float[Tensor, "pos kv_head d_head"]]:
        """q - q_hat and k - k_hat."""
        d = self.dictionary
        q_hat, k_hat = (
            d.query.decode(self.query_acts.to(d.dtype)),
            d.key.decode(self.key_acts.to(d.dtype)),
        )
        return self.weights.queries(self.x) - d.spec.split_queries(q_hat), self.weights.keys(
            self.x
        ) - d.spec.split_keys(k_hat)

    def _repr_html_(self) -> str:
        """Every head's pattern, the model's and rebuilt; of long prompts the tokens alone."""
        if len(self.words) > _READABLE:
            return html.escape(" ".join(f"{at}:{word!r}" for at, word in enumerate(self.words)))
        made = self.made("feature_map" if self.dictionary.has_feature_map else "transcoders")
        grids = []
        for head, patterns in enumerate(zip(self.pattern, made, strict=True)):
            for name, pattern in zip(("model", "rebuilt"), patterns, strict=True):
                grids.append(html_pattern(pattern, self.words, f"head {head}, {name}"))
        return "".join(grids)

    def terms(self, head: int, query_pos: int) -> ScoreTerms:
        """All terms of one row of the model's scores, the errors included; they add up to it."""
        queries, keys = self._missed
        upto, kv_head = slice(query_pos + 1), head // self.dictionary.spec.heads_per_kv
        errors = Errors(queries[query_pos, head], keys[upto, kv_head])
        return ScoreTerms.of(
            self.dictionary, self.query_acts[query_pos], self.key_acts[upto], head, errors=errors
        )

    def score_row(self, head: int, query_pos: int) -> ScoreRow:
        """One row of scores, to be measured again after edits of x."""
        return ScoreRow(self.weights, self.dictionary.spec, self.x[: query_pos + 1], head)

    def place(self, head: int, query_pos: int, key_pos: int) -> ScorePlace:
        """The same place with positions counted from the start.

        Raises:
            ValueError: no such head or position, or a key after its query.
        """
        n_heads, n_pos = self.scores.shape[:2]
        if not 0 <= head < n_heads:
            raise ValueError(f"head must lie in [0, {n_heads - 1}], got {head}.")
        for name, at in (("query_pos", query_pos), ("key_pos", key_pos)):
            if not -n_pos <= at < n_pos:
                raise ValueError(f"{name} must lie in [{-n_pos}, {n_pos - 1}], got {at}.")
        i, j = query_pos % n_pos, key_pos % n_pos
        if j > i:
            raise ValueError(f"A query attends to keys at or before it, got query {i} and key {j}.")
        return ScorePlace(head, i, j)

    def find(self, token: int | str) -> int:
        """Position of a token, given as its position (negative: from the end) or as its text, spaces around it aside.

        Raises:
            ValueError: no such position, or a text that occurs never or several times.
        """
        try:
            return self.place(0, int(token), 0).query_pos
        except ValueError:
            if isinstance(token, int) or token.lstrip("-").isdigit():
                raise
        found = [at for at, word in enumerate(self.words) if word.strip() == token.strip()]
        if len(found) != 1:
            several = (
                f"stands at {found[:5]}: give a position"
                if found
                else f"is not among {self.words[:20]}"
            )
            raise ValueError(f"The token {token!r} {several}.")
        return found[0]

    @torch.no_grad()
    def strongest(
        self,
        n: int,
        heads: Sequence[int] | None = None,
        query_positions: Sequence[int] | None = None,
    ) -> pd.DataFrame:
        """The pairs behind attention weights: of each cell the n best supporters and the n best inhibitors.

        Pairs of the feature map, times their weights, where there is one, else all pairs; see `attribution` for the effect.

        Args:
            heads, query_positions: None: all.
        Returns:
            head, query_pos, key_pos, query_feature, key_feature (d_query / d_key: the constant), contribution,
            pattern_effect; supporters by cell, the largest effect first, then inhibitors likewise.
        """
        d = self.dictionary
        wanted = itertools.product(
            range(d.spec.n_heads) if heads is None else heads,
            range(len(self.tokens)) if query_positions is None else query_positions,
        )
        listed = pd.concat(
            [self._row_frame(head, self.place(head, i, 0).query_pos) for head, i in wanted]
        )
        cells = ["head", "query_pos", "key_pos"]
        listed = listed.sort_values([*cells, "pattern_effect"], ascending=[True, True, True, False])
        supporting, inhibiting = (
            listed.query("pattern_effect > 0"),
            listed.query("pattern_effect < 0"),
        )
        return pd.concat(
            [supporting.groupby(cells).head(n), inhibiting.groupby(cells).tail(n)],
            ignore_index=True,
        )

    def _row_frame(self, head: int, query_pos: int) -> pd.DataFrame:
        """The kept terms of one row of scores; columns as `strongest`."""
        d, upto = self.dictionary, slice(query_pos + 1)
        kept = d.feature_map if d.has_feature_map else None
        terms = ScoreTerms.of(d, self.query_acts[query_pos], self.key_acts[upto], head, kept)
        effects = terms.effects(self.pattern[head, query_pos, upto])
        a, entry = terms.terms.nonzero(as_tuple=True)
        columns = {
            "head": torch.full_like(a, head),
            "query_pos": torch.full_like(a, query_pos),
            "key_pos": terms.key_positions[entry],
            "query_feature": terms.query_features[a],
            "key_feature": terms.key_features[entry],
            "contribution": terms.terms[a, entry],
            "pattern_effect": effects[a, entry],
        }
        return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
