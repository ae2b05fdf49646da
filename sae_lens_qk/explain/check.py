"""Is the explanation of one score its reason? Features leave the model's own x; W_Q and W_K answer.

For each side, ranking and k, the features of the top k leave x at the query or at the key (see
`removals`). Whether they were named for a reason is judged by `score_drop`, the drop of the score
against other keys', next to controls at the same site:

    other      as many other features, at random, several times
    matched    as many other features, each the one nearest in size to a top feature
    rescaled   other features, at random, scaled to the top features' joint size, several times

    features   k features by the pattern effect of all their terms at the site, supporters alone
    pairs      the distinct features of the k pairs with the largest pattern effects

An explanation holds at k if it drops the score more than 95 % of the random controls and more than
the matched one.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from rich.console import Group, RenderableType
from torch import Tensor

from sae_lens_qk.attention import Side
from sae_lens_qk.explain.prompt import RecordedPrompt, ScorePosition, integers
from sae_lens_qk.explain.removals import (
    CONTROLS,
    Directions,
    Factors,
    RemovalSite,
    best_first,
    best_pairs,
    control_removals,
    top_features,
)
from sae_lens_qk.explain.term_frames import records
from sae_lens_qk.explain.terms import ScoreTerms
from sae_lens_qk.tables import html_table, rich_table

BEATEN_SHARE = 0.95
"""Share of random controls that an explanation has to beat."""


_REMOVAL = ["ranking", "side", "k", "n_features", "predicted", "score_drop", "attention_drop"]
_COLUMNS = [*_REMOVAL, *CONTROLS, "beaten", "holds"]


class Check(NamedTuple):
    """What removing the named features from the model's own x does, against controls.

    Attributes:
        position: of the score.
        attention: the model's own.
        table: ranking, side, k, n_features, predicted and score_drop (of the score against the
            row's, predicted by the dictionary and measured), attention_drop (measured), other,
            matched, rescaled (score_drop of the controls, means), beaten (share of the random
            controls with less), holds (missing: too few other features).
    """

    position: ScorePosition
    attention: float
    table: pd.DataFrame

    @property
    def holds(self) -> bool | None:
        """Whether `features` hold on both sides at every k from 2 on; None: no controls exist."""
        # a single feature may be replaced by another: k = 1 proves little
        rows = self.table.query("ranking == 'features' and k >= 2").dropna(subset="holds")
        return bool(rows["holds"].all()) if len(rows) else None

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return "cannot be judged: too few other features"
        return "holds" if self.holds else "does not hold"

    def to_dict(self) -> dict[str, Any]:
        """verdict, holds and table (a list of rows) as plain JSON values; None where missing."""
        rows = records(self.table)
        return {"verdict": self.verdict, "holds": self.holds, "table": rows}

    def __str__(self) -> str:
        head, i, j = self.position
        decimals = "{:.3f}".format
        table = self.table.to_string(
            index=False,
            float_format=decimals,
            na_rep="-",
        )
        return (
            f"head {head}, {i} to {j}, attention {self.attention:.3f}: "
            f"the explanation {self.verdict}\n{table}"
        )

    def __rich__(self) -> RenderableType:
        title = "drop of the score when features leave the model's own input"
        return Group(rich_table(self.table, title), f"the explanation {self.verdict}")

    def _repr_html_(self) -> str:
        title = f"features leave the model's own input: the explanation {self.verdict}"
        return html_table(self.table, title)


@torch.no_grad()
def check(
    prompt: RecordedPrompt,
    position: ScorePosition,
    terms: ScoreTerms,
    k: SupportsIndex | Iterable[SupportsIndex] = (1, 2, 5, 10),
    directions: Directions | None = None,
    n_controls: int = 32,
    seed: int = 0,
) -> Check:
    """Test an explanation causally; see the module.

    Args:
        position: of the score.
        terms: of the score's row, as `RecordedPrompt.terms` gives them.
        k: how many pairs or features to remove; those of which there are fewer are left out.
        directions: default: fitted on the package's own text, once per prompt.
        n_controls: draws of the random controls.
        seed: of the draws.
    Raises:
        ValueError: no k, or one below 1.
    """
    ks = integers("k", k).reshape(-1).tolist()
    if min(ks) < 1:
        raise ValueError(f"k must be numbers of pairs or features, 1 or more, got {ks}.")
    if directions is None:
        directions = prompt.directions
    generator = torch.Generator().manual_seed(seed)
    row = prompt.score_row(position.head, position.query_pos)
    rows = []
    for removal in named_removals(prompt, position, terms, ks, directions):
        site = removal.site
        names, factors = _removals(site, removal.top, n_controls, generator)
        # all removals of a site at once; the first is the explanation's
        measured = row.change(site.measure(row, factors), site.key_pos)
        predicted = row.change(site.predict(row, factors), site.key_pos)
        result = {
            "ranking": removal.ranking,
            "side": site.side,
            "k": removal.k,
            "n_features": int(removal.top.sum()),
            "predicted": float(predicted.score_drop[0]),
            "score_drop": float(measured.score_drop[0]),
            "attention_drop": float(measured.weight_drop[0]),
        }
        rows.append(result | against_controls(names, measured.score_drop))
    table = pd.DataFrame(rows, columns=_COLUMNS)
    return Check(position, float(prompt.pattern[position]), table)


class NamedRemoval(NamedTuple):
    """The features that an explanation names for one side of a score, among all at its site."""

    ranking: str
    """features or pairs"""
    k: int
    site: RemovalSite
    top: Bool[Tensor, " n"]


def named_removals(
    prompt: RecordedPrompt,
    position: ScorePosition,
    terms: ScoreTerms,
    ks: Sequence[int],
    directions: Directions,
) -> Iterator[NamedRemoval]:
    """Both sides, both rankings and every k of which there are enough; see the module."""
    head, i, j = position
    row = prompt.row(head, i)
    query_features = terms.active("query", j, directions.query.usable)
    key_features = terms.active("key", j, directions.key.usable)
    pair_effects = row.effect(terms.pairs(query_features, key_features), j)  # [a, b]
    query_order, key_order = best_pairs(pair_effects, positive=True).T
    sides: list[tuple[Side, int, Tensor, Tensor, Tensor]] = [
        ("query", i, prompt.query_acts, query_features, query_order),
        ("key", j, prompt.key_acts, key_features, key_order),
    ]
    for side, pos, acts, features, pair_order in sides:
        fit = getattr(directions, side)
        site = RemovalSite(
            side=side,
            key_pos=j,
            x=prompt.x[pos],
            components=fit.components(acts[pos], features),
            rows=terms.rows(side, j, features),
        )
        feature_order = best_first(row.effect(site.rows, j), positive=True)
        # a feature counts once, however many of the best pairs it is part of
        for ranking, order in (("features", feature_order), ("pairs", pair_order)):
            for k in ks:
                if k <= len(order):
                    top = top_features(order, k, len(features))
                    yield NamedRemoval(ranking, k, site, top)


def _removals(
    site: RemovalSite,
    top: Bool[Tensor, " n"],
    n_controls: int,
    generator: torch.Generator,
) -> tuple[list[str], Factors]:
    """The removal of the top features first, then the controls: their names and factors."""
    names = ["top"]
    factors = [top.to(site.rows.dtype)]  # 1 for what leaves, 0 for what stays
    for draw in range(n_controls):
        for name, control in control_removals(site, top, generator).items():
            if draw == 0 or name != "matched":  # nothing about this one is random
                names.append(name)
                factors.append(control)
    return names, torch.stack(factors)


def against_controls(
    names: list[str],
    drops: Float[Tensor, " removal"],
) -> dict[str, Any]:
    """Mean drop of each control, the share of random draws beaten, and the verdict.

    Args:
        names: "top" first, then the control of each drop.
    """
    kinds = np.array(names)  # [removal]
    values = drops.double().cpu().numpy()
    result: dict[str, Any] = {}
    for name in CONTROLS:
        control_drops = values[kinds == name]
        result[name] = math.nan
        if len(control_drops):
            result[name] = control_drops.mean().item()
    if math.isnan(result["other"]):
        return result | {"beaten": math.nan, "holds": None}
    # the matched control is one, and compared by itself
    random_drops = values[np.isin(kinds, ["other", "rescaled"])]
    top_drop = values[0].item()
    beaten = (top_drop > random_drops).mean().item()
    holds = beaten >= BEATEN_SHARE and top_drop > result["matched"]
    return result | {"beaten": beaten, "holds": holds}
