"""Why did this head attend there? Every term of one attention score, exactly.

For head h, query i and key j, with e_q = q - q_hat and e_k = k - k_hat what the transcoders miss,

    score[h,i,j] = sum_ab query_acts[i,a] key_acts[j,b] M[a,b,h](i-j)                       "full" form, constants included
                 + s <R_i q_hat, R_j e_k> + s <R_i e_q, R_j k_hat> + s <R_i e_q, R_j e_k>   errors
                 = sum over kept pairs of m c + sum over pairs of (1 - m) c + errors        "kept" form

Beside each term c stand two measures of what it does to the pattern P, which only feels differences between keys:

    pattern_effect   c[i,j] - sum_j' P[i,j'] c[i,j'], the derivative of log P[i,j] along the pair; negative: an inhibitor
    attention_drop   P[i,j] - softmax(score - c)[i,j], exact: the pair's terms leave the whole row of scores

Source: Kamath et al. 2025, "Tracing Attention Computation Through Feature Interactions"; Wynroe and Sharkey 2024.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from sae_lens_qk.explain.removals import Directions
from sae_lens_qk.explain.terms import ScoreTerms, pattern_effect
from sae_lens_qk.explain.check import Check, check
from sae_lens_qk.explain.prompt import Prompt, ScorePlace
from sae_lens_qk.tables import html_table, named_features, rich_table
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import as_pairs
from sae_lens_qk.host.support import Model

Form = Literal["full", "kept"]
Sign = Literal["both", "supporting", "inhibiting"]

KINDS = ("pair", "query_constant", "key_constant", "constant", "masked", "error")
"""Feature x feature; constant x key feature; query feature x constant; constant x constant; in kept form what the mask takes
away, summed; anything x a reconstruction error (in kept form summed)."""

_SUMS = ("masked", "error")

COLUMNS = (
    "kind",
    "query_feature",
    "key_feature",
    "weight",
    "contribution",
    "pattern_effect",
    "attention_drop",
)


class Marginals(NamedTuple):
    """Sums of each feature's terms over the other side; the contributions of either table add up to the model's score.

    Columns: feature (d_query / d_key: the constant; missing: errors and, in kept form, what the mask takes away), n_terms,
    contribution, pattern_effect (of the query feature's terms with all keys; of the key feature's at all its positions);
    the largest effect in size first.
    """

    query: pd.DataFrame
    key: pd.DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """The terms of one score; made by `attribute`, explained in the module's docstring.

    Attributes:
        terms: of the whole row of scores, errors included.
    """

    prompt: Prompt
    place: ScorePlace
    terms: ScoreTerms

    @classmethod
    def of(cls, prompt: Prompt, head: int, query_pos: int, key_pos: int) -> "Attribution":
        """Explain one score of a prompt; positions may count from the end."""
        place = prompt.place(head, query_pos, key_pos)
        return cls(prompt, place, prompt.terms(place.head, place.query_pos))

    @property
    def score(self) -> float:
        """The model's own, scaled."""
        return float(self.prompt.scores[tuple(self.place)])

    @property
    def attention(self) -> float:
        """The model's own P[i,j]."""
        return float(self.prompt.pattern[tuple(self.place)])

    @property
    def form(self) -> Form:
        """What tables show unless told otherwise: "kept" where there is a feature map."""
        return "kept" if self.prompt.dictionary.has_feature_map else "full"

    def to_frame(self, form: Form = "full") -> pd.DataFrame:
        """All terms of the score; the contributions add up to it, to rounding.

        Args:
            form: "full": every term with its whole contribution, `weight` telling what the map gives the pair (0: not kept;
                1 without a map); "kept": the map's pairs times their weights, one row for all that the mask takes away and
                one for all errors.
        Returns:
            The `COLUMNS`; d_query / d_key stand for the constant, missing features for errors and sums; the largest
            pattern effect in size first.
        Raises:
            ValueError: unknown form, or "kept" without a feature map.
        """
        self._checked(form)
        d, terms, (head, _, j) = self.prompt.dictionary, self.terms, self.place
        here = terms.key_positions == j
        rows = terms.pairs(terms.query_features, terms.key_features[here])
        a, b = (
            side.flatten()
            for side in torch.meshgrid(
                terms.query_features, terms.key_features[here], indexing="ij"
            )
        )
        rows, no_error = rows.flatten(0, 1), (a <= d.cfg.d_query) & (b <= d.cfg.d_key)
        m = (
            terms.weights(d.feature_map, head)[:, here].flatten()
            if d.has_feature_map
            else torch.ones_like(rows[:, j])
        )
        if form == "full":
            frame = self._measured(a, b, m.where(no_error, torch.nan), rows)
        else:
            kept = m > 0
            frame = self._measured(a[kept], b[kept], m[kept], m[kept, None] * rows[kept])
            sums = torch.stack(
                [((1 - m)[:, None] * rows)[no_error].sum(dim=0), rows[~no_error].sum(dim=0)]
            )
            beyond = (
                torch.full_like(a[:2], d.cfg.d_query + 1),
                torch.full_like(b[:2], d.cfg.d_key + 1),
            )
            of_sums = self._measured(*beyond, torch.full_like(sums[:, j], torch.nan), sums).assign(
                kind=list(_SUMS)
            )
            frame = pd.concat([frame, of_sums])
        return frame.sort_values(
            "pattern_effect", key=abs, ascending=False, kind="stable", ignore_index=True
        )

    def _checked(self, form: Form) -> Form:
        if form not in ("full", "kept"):
            raise ValueError(f"form must be 'full' or 'kept', got {form!r}.")
        if form == "kept":
            self.prompt.dictionary.require_feature_map()
        return form

    def _measured(
        self, a: Tensor, b: Tensor, weight: Tensor, rows: Float[Tensor, "term pos"]
    ) -> pd.DataFrame:
        """The frame of some terms; `rows`: each in the whole row of scores."""
        (head, i, j), cfg = self.place, self.prompt.dictionary.cfg
        scores, pattern = (t[head, i, : i + 1] for t in (self.prompt.scores, self.prompt.pattern))
        columns = {
            "kind": _kinds((a - cfg.d_query).cpu().numpy(), (b - cfg.d_key).cpu().numpy()),
            "query_feature": _features(a, cfg.d_query),
            "key_feature": _features(b, cfg.d_key),
            "weight": weight.cpu().numpy(),
            "contribution": rows[:, j].cpu().numpy(),
            "pattern_effect": pattern_effect(rows, pattern, j).cpu().numpy(),
            "attention_drop": (pattern[j] - (scores - rows).softmax(dim=-1)[:, j]).cpu().numpy(),
        }
        return pd.DataFrame(columns)

    def top(self, n: int = 10, sign: Sign = "both", form: Form | None = None) -> pd.DataFrame:
        """The n terms of features and constants with the largest pattern effects, the n with the lowest, or both.

        Returns:
            Columns as `to_frame`; supporting terms first, the strongest of either sign first.
        Raises:
            ValueError: unknown sign.
        """
        if sign not in ("both", "supporting", "inhibiting"):
            raise ValueError(f"sign must be 'both', 'supporting' or 'inhibiting', got {sign!r}.")
        frame = self._of_features(form)
        supporting = frame.query("pattern_effect > 0").nlargest(n, "pattern_effect")
        inhibiting = frame.query("pattern_effect < 0").nsmallest(n, "pattern_effect")
        parts = {
            "both": [supporting, inhibiting],
            "supporting": [supporting],
            "inhibiting": [inhibiting],
        }[sign]
        return pd.concat(parts, ignore_index=True)

    def triples(
        self, n: int = 10, sign: Sign = "supporting", form: Form | None = None
    ) -> Int[Tensor, "pair 3"]:
        """The strongest pairs of `top` as (query feature, key feature, head), as `fwd_hooks` takes them."""
        top = self.top(n, sign, form).query("kind != 'constant'")
        listed = [
            [a, b, self.place.head]
            for a, b in zip(top["query_feature"], top["key_feature"], strict=True)
        ]
        return as_pairs(np.array(listed, dtype=np.int64).reshape(-1, 3))

    def _of_features(self, form: Form | None) -> pd.DataFrame:
        return self.to_frame(form or self.form).query("kind not in @_SUMS")

    def marginals(self, form: Form | None = None) -> Marginals:
        """What each query feature adds over all key features, and each key feature over all query features."""
        terms, (head, i, j) = self.terms, self.place
        m, here, pattern = (
            self._mask(form or self.form),
            terms.key_positions == j,
            self.prompt.pattern[head, i, : i + 1],
        )
        listed, rest = (terms._replace(terms=terms.terms * factor) for factor in (m, 1 - m))
        tables = []
        for axis, features in ((1, terms.query_features), (0, terms.key_features[here])):
            effects, of_rest = (
                some.row_effects(pattern, j) if axis else some.effects(pattern)[:, here].sum(dim=0)
                for some in (listed, rest)
            )
            n_terms, contributions = (
                (m[:, here] > 0).sum(dim=axis),
                listed.terms[:, here].sum(dim=axis),
            )
            rest_here = float(rest.terms[:, here].sum()), float(of_rest.sum())
            tables.append(_marginal_table(features, n_terms, contributions, effects, rest_here))
        return Marginals(*tables)

    def _mask(self, form: Form) -> Float[Tensor, "a entry"]:
        """What multiplies each term: 1 or, in kept form, m; 0 for the errors."""
        d, terms = self.prompt.dictionary, self.terms
        if self._checked(form) == "kept":
            return terms.weights(d.feature_map, self.place.head)
        of_features = (terms.query_features <= d.cfg.d_query)[:, None] & (
            terms.key_features <= d.cfg.d_key
        )
        return of_features.to(terms.terms.dtype)

    def parts(self, form: Form | None = None) -> pd.DataFrame:
        """The terms summed by kind: kind, n_terms, contribution (together the score) and pattern_effect."""
        return _sums(self.to_frame(form or self.form), "kind")

    def to_dict(self, n: int = 10, form: Form | None = None) -> dict[str, Any]:
        """All that the terminal, notebooks and the page show, as plain JSON values (no NaN: None).

        Every float is unrounded; features are integers, d_query / d_key stand for the constants.

            model, layer             of the dictionary
            head, query_pos, key_pos the place of the score, positions from the start
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
            n: entries of each list.
            source: default: "feature_map" where there is one.
        """
        cfg, (_, i, j) = self.prompt.dictionary.cfg, self.place
        listed = self._of_features(form).head(n)
        query, key = (table.dropna(subset="feature").head(n) for table in self.marginals(form))
        queries = _Nodes(cfg.layer, "query", i, cfg.d_query, self.prompt.query_acts[i])
        keys = _Nodes(cfg.layer, "key", j, cfg.d_key, self.prompt.key_acts[j])
        pairs = listed[["query_feature", "key_feature", "contribution"]].itertuples(index=False)
        traced = {
            "pair_wise_contributors": [[queries.id(a), keys.id(b), c] for a, b, c in pairs],
            "top_q_marginal_contributors": queries.listed(query),
            "top_k_marginal_contributors": keys.listed(key),
        }
        return {
            "model": cfg.model_name,
            "layer": cfg.layer,
            **self.place._asdict(),
            "tokens": self.prompt.words,
            "score": self.score,
            "attention": self.attention,
            "form": form or self.form,
            "parts": self.parts(form).to_dict("records"),
            "nodes": [
                *queries.described(
                    {*listed["query_feature"], *query["feature"]}, self.prompt.words
                ),
                *keys.described({*listed["key_feature"], *key["feature"]}, self.prompt.words),
            ],
            "qk_tracing_results": traced,
        }

    def to_json(self, n: int = 10, form: Form | None = None, indent: int | None = None) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(n, form), indent=indent)

    def check(
        self,
        k: Iterable[int] = (1, 2, 5, 10),
        directions: Directions | None = None,
        n_controls: int = 32,
        seed: int = 0,
    ) -> Check:
        """Is this the reason? Features leave the model's own x and W_Q and W_K say what remains.

        Args and Returns: see `sae_lens_qk.explain.check.check`.
        """
        return check(self.prompt, self.place, self.terms, k, directions, n_controls, seed)

    def __str__(self) -> str:
        (head, i, j), words = self.place, self.prompt.words
        layer = self.prompt.dictionary.cfg.layer
        return f"layer {layer}, head {head}: {words[i]!r} ({i}) attends to {words[j]!r} ({j}) with {self.attention:.3f}"

    def __repr__(self) -> str:
        return f"Attribution({self})"

    def shown(self, n: int = 10, form: Form | None = None) -> RenderableType:
        """For rich: the score by kind of term, n supporting and n inhibiting terms, and the features behind them."""
        made = self.prompt.made("feature_map" if self.form == "kept" else "transcoders")[
            tuple(self.place)
        ]
        parts = [
            Text(f"{self}; rebuilt from features {made:.3f}"),
            rich_table(self.parts(form), f"score {self.score:+.3f}, by kind of term"),
        ]
        for sign in ("supporting", "inhibiting"):
            parts.append(
                rich_table(
                    named_features(self.top(n, sign, form), self.prompt.dictionary.cfg),
                    f"{sign} pairs",
                )
            )
        for side, table in zip(("query", "key"), self.marginals(form), strict=True):
            named = named_features(
                table.head(5).rename(columns={"feature": f"{side}_feature"}),
                self.prompt.dictionary.cfg,
            )
            parts.append(rich_table(named, f"{side} features over all their partners"))
        return Group(*parts)

    def __rich__(self) -> RenderableType:
        return self.shown()

    def _repr_html_(self) -> str:
        return html_table(
            named_features(self.top(10), self.prompt.dictionary.cfg),
            str(self),
            bars="pattern_effect",
        )


class Attributions(Sequence[Attribution]):
    """Several scores of one prompt, by head, query and key."""

    def __init__(self, listed: Sequence[Attribution]):
        self._listed = tuple(listed)

    @overload
    def __getitem__(self, index: int) -> Attribution: ...
    @overload
    def __getitem__(self, index: slice) -> "Attributions": ...
    def __getitem__(self, index: int | slice) -> "Attribution | Attributions":
        return (
            Attributions(self._listed[index]) if isinstance(index, slice) else self._listed[index]
        )

    def __len__(self) -> int:
        return len(self._listed)

    def to_frame(self, form: Form = "full") -> pd.DataFrame:
        """`Attribution.to_frame` of each, after columns head, query_pos, key_pos."""
        frames = []
        for one in self:
            frame = one.to_frame(form)
            for at, (name, value) in enumerate(one.place._asdict().items()):
                frame.insert(at, name, value)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def to_dict(self, n: int = 10, form: Form | None = None) -> list[dict[str, Any]]:
        return [one.to_dict(n, form) for one in self]

    def to_json(self, n: int = 10, form: Form | None = None, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(n, form), indent=indent)

    def summary(self) -> pd.DataFrame:
        """head, query, key (positions and words), score, attention, and the pattern effect of each kind of term."""
        rows = []
        for one in self:
            i, j = one.place[1:]
            words = {"query": one.prompt.words[i], "key": one.prompt.words[j]}
            parts = one.parts().set_index("kind")["pattern_effect"]
            rows.append(
                {
                    **one.place._asdict(),
                    **words,
                    "score": one.score,
                    "attention": one.attention,
                    **parts,
                }
            )
        return pd.DataFrame(rows)

    def __rich__(self) -> RenderableType:
        return rich_table(self.summary(), f"{len(self)} scores")

    def _repr_html_(self) -> str:
        return html_table(self.summary(), f"{len(self)} scores")


Places = int | Sequence[int] | None


@overload
def attribute(
    dictionary: BilinearQKDictionary,
    model: Model,
    tokens: str | Tensor | Prompt,
    head: int,
    query_pos: int,
    key_pos: int,
) -> Attribution: ...
@overload
def attribute(
    dictionary: BilinearQKDictionary,
    model: Model,
    tokens: str | Tensor | Prompt,
    head: Places = None,
    query_pos: Places = -1,
    key_pos: Places = None,
) -> Attributions: ...
@torch.no_grad()
def attribute(
    dictionary: BilinearQKDictionary,
    model: Model,
    tokens: str | Tensor | Prompt,
    head: Places = None,
    query_pos: Places = -1,
    key_pos: Places = None,
) -> Attribution | Attributions:
    """Why did this head attend there? All terms of one attention score, or of many, each adding up to the model's own.

    Args:
        tokens: [pos] or [1, pos], a full sequence from position 0; a text, before which the model's BOS is put; or a
            `Prompt`, which has been through the model.
        head, query_pos, key_pos: numbers, for one score; sequences of numbers or None (all), for every combination in which
            the key is not after the query. Negative positions count from the end.
    Returns:
        An `Attribution` where all three are numbers, else `Attributions` by head, query and key.
    Raises:
        ValueError: several sequences, no such head or position, or no key at or before any of the queries.
        FingerprintError, UnsupportedModelError: the model is not the dictionary's, or does what is not computed here.
    """
    prompt = tokens if isinstance(tokens, Prompt) else Prompt.of(dictionary, model, tokens)
    if isinstance(head, int) and isinstance(query_pos, int) and isinstance(key_pos, int):
        return Attribution.of(prompt, head, query_pos, key_pos)
    n_heads, n_pos = prompt.scores.shape[:2]
    heads, queries, keys = (
        range(n) if given is None else [given] if isinstance(given, int) else given
        for given, n in ((head, n_heads), (query_pos, n_pos), (key_pos, n_pos))
    )
    listed = []
    for h, i in itertools.product(heads, queries):
        terms = prompt.terms(h, prompt.place(h, i, 0).query_pos)
        places = [prompt.place(h, i, j) for j in keys if j % n_pos <= i % n_pos]
        listed += [Attribution(prompt, place, terms) for place in places]
    if not listed:
        raise ValueError(
            f"None of the keys {list(keys)[:5]} is at or before one of the queries {list(queries)[:5]}."
        )
    return Attributions(listed)


@torch.no_grad()
def overview(prompt: Prompt, query_pos: int = -1) -> pd.DataFrame:
    """Where each head looks from one query, leaving out the first token, on which heads rest when nothing matches.

    Returns:
        head, to_first (attention to position 0), key_pos and key (the most attended of the others), attention and rebuilt
        (by the feature map where there is one), query_feature, key_feature and pattern_effect of the strongest pair.
    """
    i = prompt.place(0, query_pos, 0).query_pos
    made = prompt.made("feature_map" if prompt.dictionary.has_feature_map else "transcoders")
    rows = prompt.pattern[:, i, : i + 1]
    keys = rows[:, 1:].argmax(dim=1) + 1 if i else rows.argmax(dim=1)
    heads = torch.arange(len(rows), device=keys.device)
    columns = {
        "head": heads,
        "to_first": rows[:, 0],
        "key_pos": keys,
        "attention": rows[heads, keys],
        "rebuilt": made[heads, i, keys],
    }
    looks = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
    looks.insert(3, "key", [prompt.words[key] for key in keys.tolist()])
    best = prompt.strongest(1, query_positions=[i]).query("pattern_effect > 0")
    best = best[["head", "key_pos", "query_feature", "key_feature", "pattern_effect"]]
    return looks.merge(
        best.astype({"query_feature": "Int64", "key_feature": "Int64"}),
        how="left",
        on=["head", "key_pos"],
    )


class _Nodes(NamedTuple):
    """The features of one side at one position, as nodes of a graph."""

    layer: int
    side: Literal["query", "key"]
    pos: int
    constant: int
    acts: Float[Tensor, " d"]

    def id(self, feature: Any) -> str:
        return f"{self.layer}{self.side[0]}_{feature}_{self.pos}"

    def listed(self, marginals: pd.DataFrame) -> list[list[Any]]:
        return [
            [self.id(feature), c]
            for feature, c in zip(marginals["feature"], marginals["contribution"], strict=True)
        ]

    def described(self, features: set[Any], words: list[str]) -> list[dict[str, Any]]:
        return [
            {
                "node_id": self.id(feature),
                "feature_type": f"{self.side} constant"
                if feature == self.constant
                else f"{self.side} feature",
                "layer": self.layer,
                "feature": int(feature),
                "ctx_idx": self.pos,
                "token": words[self.pos],
                "activation": 1.0 if feature == self.constant else float(self.acts[feature]),
            }
            for feature in sorted(features)
        ]


def _marginal_table(
    features: Tensor,
    n_terms: Tensor,
    contributions: Tensor,
    effects: Tensor,
    rest: tuple[float, float],
) -> pd.DataFrame:
    """Features that have terms here or elsewhere in the row, and a row without a feature for the rest."""
    columns = {
        "feature": features,
        "n_terms": n_terms,
        "contribution": contributions,
        "pattern_effect": effects,
    }
    frame = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()}).astype(
        {"feature": "Int64"}
    )
    frame = frame.query("n_terms > 0 or pattern_effect != 0")
    frame.loc[-1] = [pd.NA, 0, *rest]
    return frame.sort_values(
        "pattern_effect", key=abs, ascending=False, kind="stable", ignore_index=True
    )


def _sums(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """Terms summed over a column, missing values included; the largest effect in size first."""
    sums = frame.groupby(by, dropna=False).agg(
        n_terms=("kind", "size"),
        contribution=("contribution", "sum"),
        pattern_effect=("pattern_effect", "sum"),
    )
    return sums.sort_values("pattern_effect", key=abs, ascending=False, kind="stable").reset_index()


def _kinds(of_query: np.ndarray, of_key: np.ndarray) -> np.ndarray:
    """Kinds of terms from how far their features lie beyond the last one: 0 the constant, 1 the error."""
    conditions = [
        (of_query > 0) | (of_key > 0),
        (of_query == 0) & (of_key == 0),
        of_query == 0,
        of_key == 0,
    ]
    return np.select(conditions, ["error", "constant", "query_constant", "key_constant"], "pair")


def _features(features: Tensor, constant: int) -> pd.Series:
    numbers = pd.Series(features.cpu().numpy(), dtype="Int64")
    return numbers.mask(numbers > constant)
