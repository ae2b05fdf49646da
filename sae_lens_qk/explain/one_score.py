"""Why one attention weight is what it is: every term of one attention score, exactly.

For head h, query i and key j, with e_q = q - q_hat and e_k = k - k_hat what the transcoders miss,

    score[h,i,j] = sum_ab query_acts[i,a] key_acts[j,b] M[a,b,h](i-j) + errors    "transcoders"
                 = sum over kept pairs of m c + sum over pairs of (1 - m) c + errors
                                                                                  "feature_map"
    errors       = s <R_i q_hat, R_j e_k> + s <R_i e_q, R_j k_hat> + s <R_i e_q, R_j e_k>

with c a pair's term and m its weight in the map; the constants are features too. `term_frames` says
what stands next to each term.

Source: Kamath et al. 2025, "Tracing Attention Computation Through Feature Interactions"; Wynroe and
Sharkey 2024.
"""

import html
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsIndex

import pandas as pd
import torch
from jaxtyping import Float, Int
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from sae_lens_qk.dashboard.report import write_explained
from sae_lens_qk.explain.check import Check, check
from sae_lens_qk.explain.graph import graph_fields
from sae_lens_qk.explain.prompt import RecordedPrompt, ScorePosition
from sae_lens_qk.explain.removals import Directions
from sae_lens_qk.explain.renamed import form_renamed, warn_renamed
from sae_lens_qk.explain.term_frames import (
    Marginals,
    Sign,
    feature_terms,
    marginal_tables,
    records,
    sums_by_kind,
    term_frame,
    top_terms,
)
from sae_lens_qk.explain.terms import AttentionRow, ScoreTerms
from sae_lens_qk.feature_map import as_pairs
from sae_lens_qk.patching import Source
from sae_lens_qk.tables import html_table, named_features, rich_table


@dataclass(
    frozen=True,
    eq=False,
    repr=False,
)
class Attribution:
    """The terms of one score; made by `attribute`, explained in the module's docstring.

    What `source` means in every method: "transcoders" counts every term with its whole
    contribution; "feature_map" counts the map's pairs times their weights, and sums up what the
    mask takes away and the errors. None: the feature map where there is one.

    Attributes:
        position: of the score.
        terms: of the whole row of scores, errors included.
        causal_check: what `check` gave, if `checked` made this attribution.
    """

    prompt: RecordedPrompt
    position: ScorePosition
    terms: ScoreTerms
    causal_check: Check | None = None

    @classmethod
    def of(
        cls,
        prompt: RecordedPrompt,
        head: SupportsIndex,
        query_pos: SupportsIndex,
        key_pos: SupportsIndex,
    ) -> "Attribution":
        """Explain one score of a prompt; positions may count from the end."""
        position = prompt.position(head, query_pos, key_pos)
        return cls(prompt, position, prompt.terms(position.head, position.query_pos))

    @property
    def score(self) -> float:
        """The model's own, scaled."""
        return float(self.prompt.scores[tuple(self.position)])

    @property
    def attention(self) -> float:
        """The model's own P[i,j]."""
        return float(self.prompt.pattern[tuple(self.position)])

    # Tables

    @form_renamed
    def to_frame(self, source: Source | None = "transcoders") -> pd.DataFrame:
        """All terms of the score; the contributions add up to it, to rounding.

        Args:
            source: "transcoders": every term, `weight` telling what the map gives the pair (0: not
                kept; 1 without a map); "feature_map": the map's pairs, one row for all that the
                mask takes away and one for all errors.
        Returns:
            kind, query_feature, key_feature, weight, contribution, pattern_effect, attention_drop;
            see `term_frames.term_frame`. d_query / d_key stand for the constant, missing features
            for errors and sums; the largest pattern effect in size first.
        Raises:
            ValueError: unknown source, or "feature_map" without a feature map.
        """
        source = self._known(source)
        d = self.prompt.dictionary
        if d.has_feature_map:
            weights = self.terms.weights(d.feature_map, self.position.head)
        else:
            weights = torch.ones_like(self.terms.terms)  # every pair is kept
        key_pos = self.position.key_pos
        row = self._row
        return term_frame(d.cfg, row, self.terms, weights, key_pos, source)

    @property
    def _row(self) -> AttentionRow:
        return self.prompt.row(self.position.head, self.position.query_pos)

    @form_renamed
    def top(
        self,
        n: int = 10,
        sign: Sign = "both",
        source: Source | None = None,
    ) -> pd.DataFrame:
        """The n terms of features and constants with the largest pattern effects, the n lowest.

        Args:
            sign: "both", "supporting" (effects above 0) or "inhibiting".
        Returns:
            Columns as `to_frame`; supporting terms first, the strongest of either sign first.
        Raises:
            ValueError: unknown sign.
        """
        terms = feature_terms(self.to_frame(source))
        return top_terms(terms, n, sign)

    def triples(
        self,
        n: int = 10,
        sign: Sign = "supporting",
        source: Source | None = None,
    ) -> Int[Tensor, "pair 3"]:
        """The strongest pairs of `top` as (query feature, key feature, head), for `fwd_hooks`."""
        top = self.top(n, sign, source=source)
        # constant x constant belongs to every map and is no pair of it
        pairs = top.query("kind != 'constant'")
        features = pairs[["query_feature", "key_feature"]].astype("int64")
        return as_pairs(features.assign(head=self.position.head).to_numpy())

    def marginals(self, source: Source | None = None) -> Marginals:
        """What each query feature adds over all key features, and the other way round."""
        # the rest, 1 - weight, is a row of its own
        weights = self._weights(source)
        return marginal_tables(self._row, self.terms, weights, self.position.key_pos)

    def _weights(self, source: Source | None) -> Float[Tensor, "a entry"]:
        """Share of each term that counts: m, or 1; 0 for the errors."""
        d = self.prompt.dictionary
        terms = self.terms
        if self._known(source) == "feature_map":
            return terms.weights(d.feature_map, self.position.head)
        no_query_error = terms.query_features <= d.cfg.d_query  # [a]
        no_key_error = terms.key_features <= d.cfg.d_key  # [entry]
        return (no_query_error[:, None] & no_key_error).to(terms.terms.dtype)

    def _known(self, source: Source | None) -> Source:
        source = source or self.prompt.source
        if source not in ("transcoders", "feature_map"):
            raise ValueError(f"source must be 'transcoders' or 'feature_map', got {source!r}.")
        if source == "feature_map":
            self.prompt.dictionary.require_feature_map()
        return source

    def parts(self, source: Source | None = None) -> pd.DataFrame:
        """The terms summed by kind: kind, n_terms, contribution (together the score), effect."""
        return sums_by_kind(self.to_frame(source))

    def tables(
        self,
        n: int = 10,
        source: Source | None = None,
    ) -> dict[str, pd.DataFrame]:
        """What every view shows: parts, supporting, inhibiting, query, key and, if any, check.

        Args:
            n: rows of each table of terms or features.
        """
        frame = self.to_frame(source)
        return self._tables(frame, self.marginals(source), n)

    def _tables(
        self,
        frame: pd.DataFrame,
        marginals: Marginals,
        n: int,
    ) -> dict[str, pd.DataFrame]:
        terms = feature_terms(frame)
        tables = {
            "parts": sums_by_kind(frame),
            "supporting": top_terms(terms, n, "supporting"),
            "inhibiting": top_terms(terms, n, "inhibiting"),
            "query": marginals.query.head(n),
            "key": marginals.key.head(n),
        }
        if self.causal_check is not None:
            tables["check"] = self.causal_check.table
        return tables

    # Causal evidence

    def check(
        self,
        k: SupportsIndex | Iterable[SupportsIndex] = (1, 2, 5, 10),
        directions: Directions | None = None,
        n_controls: int = 32,
        seed: int = 0,
    ) -> Check:
        """Is this the reason? Features leave the model's own x; W_Q and W_K say what remains.

        Args and Raises: as of `sae_lens_qk.check`.
        """
        return check(self.prompt, self.position, self.terms, k, directions, n_controls, seed)

    def checked(self, **settings: Any) -> "Attribution":
        """This attribution with its causal check, which then is part of every view.

        Args:
            **settings: of `check`.
        """
        return replace(self, causal_check=self.check(**settings))

    # Views

    def to_dict(
        self,
        n: int = 10,
        source: Source | None = None,
    ) -> dict[str, Any]:
        """All that the terminal, notebooks and the page show, as plain JSON values (no NaN: None).

        Every float is unrounded; features are integers, d_query / d_key stand for the constants.

            model, layer             of the dictionary
            head, query_pos, key_pos  of the score, positions from the start
            title                    one line: layer, head, both tokens with positions, attention
            tokens                   the words of the prompt, [pos]
            score                    the model's own, scaled
            attention                the model's own P[i,j]
            rebuilt                  P[i,j] of the dictionary alone, from `source`
            source                   "transcoders" or "feature_map": what the tables count
            d_query, d_key           feature numbers of the constants
            parts                    [{kind, n_terms, contribution, pattern_effect}]; sums to score
            supporting, inhibiting   n each, strongest first: [{kind, query_feature, key_feature,
                                     weight, contribution, pattern_effect, attention_drop}]
            marginals                {"query": [...], "key": [...]}, n each, strongest first:
                                     [{feature, n_terms, contribution, pattern_effect}];
                                     feature None: errors and what the mask takes away
            check                    None, or {"verdict": str, "holds": bool or None, "table":
                                     [{ranking, side, k, n_features, predicted, score_drop,
                                     attention_drop, other, matched, rescaled, beaten, holds}]}
            nodes                    [{node_id, feature_type, layer, feature, ctx_idx, token,
                                     activation}], the features that qk_tracing_results names
            qk_tracing_results       names and shapes of Neuronpedia's graphs:
                                     pair_wise_contributors [[query node, key node, contribution]],
                                     top_q_marginal_contributors [[node, contribution]],
                                     top_k_marginal_contributors likewise

        Args:
            n: entries of each list, except parts and the check's table.
            source: default: "feature_map" where there is one.
        """
        cfg = self.prompt.dictionary.cfg
        source = self._known(source)
        frame = self.to_frame(source)
        marginals = self.marginals(source)
        pairs = feature_terms(frame).head(n)
        tables = self._tables(frame, marginals, n)
        # NaN is no JSON
        rows = {name: records(table) for name, table in tables.items()}
        return {
            "model": cfg.model_name,
            "layer": cfg.layer,
            **self.position._asdict(),
            "title": str(self),
            "tokens": self.prompt.words,
            "score": self.score,
            "attention": self.attention,
            "rebuilt": self.rebuilt(source),
            "source": source,
            "d_query": cfg.d_query,
            "d_key": cfg.d_key,
            "parts": rows["parts"],
            "supporting": rows["supporting"],
            "inhibiting": rows["inhibiting"],
            "marginals": {"query": rows["query"], "key": rows["key"]},
            "check": self.causal_check and self.causal_check.to_dict(),
            **graph_fields(self.prompt, self.position, pairs, marginals, n),
        }

    def rebuilt(self, source: Source | None = None) -> float:
        """P[i,j] of the dictionary alone."""
        return float(self.prompt.rebuilt_pattern(source)[tuple(self.position)])

    @form_renamed
    def to_json(
        self,
        n: int = 10,
        source: Source | None = None,
        indent: int | None = None,
    ) -> str:
        """`to_dict` as JSON text."""
        values = self.to_dict(n, source)
        return json.dumps(values, indent=indent, allow_nan=False)

    def report(
        self,
        path: str | Path,
        tokens: Int[Tensor, "row pos"] | None = None,
        **options: Any,
    ) -> Path:
        """Write this attribution, on its prompt's page of a report; with its check, if any.

        Args:
            path, tokens: as of `sae_lens_qk.report`.
            **options: statistics, title, limits, as of `sae_lens_qk.report`.
        Returns:
            The path.
        """
        d = self.prompt.dictionary
        model = self.prompt.model
        prompts = [self.prompt]
        return write_explained(path, d, model, prompts, [self], tokens, **options)

    def __str__(self) -> str:
        head, i, j = self.position
        words = self.prompt.words
        return (
            f"layer {self.prompt.dictionary.cfg.layer}, head {head}: {words[i]!r} ({i}) "
            f"attends to {words[j]!r} ({j}) with {self.attention:.3f}"
        )

    def __repr__(self) -> str:
        return f"Attribution({self})"

    def render(
        self,
        n: int = 10,
        source: Source | None = None,
    ) -> RenderableType:
        """For rich: `tables` under their titles, and the verdict of the check if there is one."""
        # `Text`: tokens may look like markup
        title = Text(f"{self}; rebuilt from features {self.rebuilt(source):.3f}")
        views: list[RenderableType] = [title]
        for name, table in self._titled_tables(n, source):
            views.append(rich_table(table, name))
        if self.causal_check is not None:
            views.append(f"the explanation {self.causal_check.verdict}")
        return Group(*views)

    def shown(self, *args: Any, **kwargs: Any) -> RenderableType:
        """Old name of `render`, which goes with the next release."""
        warn_renamed("Attribution.shown", "Attribution.render")
        return self.render(*args, **kwargs)

    def _titled_tables(
        self,
        n: int,
        source: Source | None,
    ) -> Iterator[tuple[str, pd.DataFrame]]:
        """`tables` as people read them: features by name, a title over each."""
        titles = {
            "parts": f"score {self.score:+.3f}, by kind of term",
            "supporting": "supporting pairs",
            "inhibiting": "inhibiting pairs",
            "query": "query features over all their partners",
            "key": "key features over all their partners",
            "check": "drop of the score when features leave the model's own input",
        }
        cfg = self.prompt.dictionary.cfg
        for name, table in self.tables(n, source).items():
            # marginals are long, and people read five of them
            if name in ("query", "key"):
                table = table.head(5).rename(columns={"feature": f"{name}_feature"})
            yield titles[name], named_features(table, cfg)

    def __rich__(self) -> RenderableType:
        return self.render()

    def _repr_html_(self) -> str:
        views = [f"<p>{html.escape(str(self))}</p>"]
        for title, table in self._titled_tables(10, None):
            bars = "pattern_effect" if "pattern_effect" in table else None
            views.append(html_table(table, title, bars))
        if self.causal_check is not None:
            views.append(f"<p>the explanation {self.causal_check.verdict}</p>")
        return "".join(views)
