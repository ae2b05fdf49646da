"""Is the explanation of one score its reason? Features are taken out of the model's own x, and W_Q and W_K asked again.

For each side, ranking and k, the features of the top k leave x at the query or at the key (see `causal`). Whether they were
named for a reason is judged by `score_drop`, the drop of the score against other keys', beside controls at the same place:

    other      as many other features, at random, several times
    matched    as many other features, each the one nearest in size to a top feature
    rescaled   other features, at random, scaled to the top features' joint size, several times

    features   k features by the pattern effect of all their terms at the place, supporting ones alone
    pairs      the distinct features of the k pairs with the largest pattern effects

An explanation holds at k if it drops the score more than 95 % of the random controls and more than the matched one.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from rich.console import Group, RenderableType
from torch import Tensor

from sae_lens_qk.explain.removals import CONTROLS, Change, Directions, Place, best_first, best_pairs, control_removals, top_features
from sae_lens_qk.attention import SIDES, Side
from sae_lens_qk.explain.terms import ScoreTerms, pattern_effect
from sae_lens_qk.explain.prompt import Prompt, ScorePlace
from sae_lens_qk.tables import html_table, rich_table

_BEATEN = 0.95
"""Share of random controls that an explanation has to beat."""


class Check(NamedTuple):
    """What removing the named features from the model's own x does, against controls; see the module.

    Attributes:
        table: ranking, side, k, n_features, predicted and score_drop (of the score against the row's, predicted by the
            dictionary and measured), attention_drop (measured), other, matched, rescaled (score_drop of the controls,
            means), beaten (share of the random controls with less), holds (missing: too few other features).
    """

    place: ScorePlace
    attention: float
    table: pd.DataFrame

    @property
    def holds(self) -> bool | None:
        """Whether the `features` ranking holds on both sides at every k from 2 on; None: controls are missing."""
        judged = self.table.query("ranking == 'features' and k >= 2").dropna(subset="holds")
        return bool(judged["holds"].all()) if len(judged) else None

    @property
    def verdict(self) -> str:
        return {
            True: "holds",
            False: "does not hold",
            None: "cannot be judged: too few other features",
        }[self.holds]

    def __str__(self) -> str:
        head, i, j = self.place
        title = f"head {head}, {i} to {j}, attention {self.attention:.3f}: the explanation {self.verdict}"
        return f"{title}\n{self.table.to_string(index=False, float_format='{:.3f}'.format, na_rep='-')}"

    def __rich__(self) -> RenderableType:
        title = "drop of the score when features leave the model's own input"
        return Group(rich_table(self.table, title), f"the explanation {self.verdict}")

    def _repr_html_(self) -> str:
        return html_table(
            self.table, f"features leave the model's own input: the explanation {self.verdict}"
        )


@torch.no_grad()
def check(
    prompt: Prompt,
    place: ScorePlace,
    terms: ScoreTerms,
    k: Iterable[int] = (1, 2, 5, 10),
    directions: Directions | None = None,
    n_controls: int = 32,
    seed: int = 0,
) -> Check:
    """Test an explanation causally; see the module.

    Args:
        terms: of the place's row of scores, as `Prompt.terms` gives them.
        k: how many pairs or features to remove; those of which there are fewer are left out.
        directions: default: fitted on the package's own text, once a prompt.
        n_controls: draws of the random controls.
    Raises:
        ValueError: no k, or one below 1.
    """
    ks = tuple(k)
    if not ks or min(ks) < 1:
        raise ValueError(f"k must be numbers of pairs or features to remove, 1 or more, got {ks}.")
    fitted = prompt.directions if directions is None else directions
    generator = torch.Generator().manual_seed(seed)
    row, j = prompt.score_row(place.head, place.query_pos), place.key_pos
    records = []
    for named in named_removals(prompt, place, terms, ks, fitted):
        names, factors = _removals(named.removable, named.top, n_controls, generator)
        measured, predicted = named.removable.remove(row, named.x, named.side, j, factors)
        change, expected = (Change.of(row.scores, scores, j) for scores in (measured, predicted))
        record = {
            "ranking": named.ranking,
            "side": named.side,
            "k": named.k,
            "n_features": int(named.top.sum()),
        }
        record |= {
            "predicted": float(expected.score_drop[0]),
            "score_drop": float(change.score_drop[0]),
        }
        record["attention_drop"] = float(change.weight_drop[0])
        records.append(record | _against_controls(names, change.score_drop))
    columns = ["ranking", "side", "k", "n_features", "predicted", "score_drop", "attention_drop"]
    table = pd.DataFrame(records, columns=[*columns, *CONTROLS, "beaten", "holds"])
    return Check(place, float(prompt.pattern[tuple(place)]), table)


class NamedRemoval(NamedTuple):
    """The features that an explanation names for one side of a score, among all that can be removed there."""

    side: Side
    ranking: str
    """features or pairs"""
    k: int
    x: Float[Tensor, " d_model"]
    """The input at the place."""
    removable: Place
    top: Bool[Tensor, " n"]


def named_removals(
    prompt: Prompt, place: ScorePlace, terms: ScoreTerms, ks: Sequence[int], directions: Directions
) -> Iterator[NamedRemoval]:
    """Both sides, both rankings and every k of which there are enough; see the module."""
    head, i, j = place
    pattern = prompt.pattern[head, i, : i + 1]
    features = {
        side: terms.active(side, j, fit.usable) for side, fit in zip(SIDES, directions, strict=True)
    }
    pairs = best_pairs(pattern_effect(terms.pairs(*features.values()), pattern, j), positive=True)
    for side, fit, of_pairs in zip(SIDES, directions, pairs.T, strict=True):
        x, acts = (
            (prompt.x[i], prompt.query_acts[i])
            if side == "query"
            else (prompt.x[j], prompt.key_acts[j])
        )
        removable = Place(fit.components(acts, features[side]), terms.rows(side, j, features[side]))
        of_features = best_first(pattern_effect(removable.rows, pattern, j), positive=True)
        for (ranking, best), k in product((("features", of_features), ("pairs", of_pairs)), ks):
            if k <= len(best):
                yield NamedRemoval(
                    side, ranking, k, x, removable, top_features(best, k, len(features[side]))
                )


def _removals(
    removable: Place, top: Bool[Tensor, " n"], n_controls: int, generator: torch.Generator
) -> tuple[list[str], Float[Tensor, "removal n"]]:
    """The removal of the top features first, then the controls: their names and factors."""
    names, factors = ["top"], [top.to(removable.rows.dtype)]
    for draw in range(n_controls):
        for name, control in control_removals(removable, top, generator).items():
            if draw == 0 or name != "matched":  # nothing about this one is random
                names.append(name)
                factors.append(control)
    return names, torch.stack(factors)


def _against_controls(names: list[str], drops: Float[Tensor, " removal"]) -> dict[str, Any]:
    """Mean drop of each control, the share of random draws beaten, and the verdict."""
    by_name = {
        name: [drop for at, drop in zip(names, drops.tolist(), strict=True) if at == name]
        for name in CONTROLS
    }
    means = {
        name: sum(listed) / len(listed) if listed else math.nan for name, listed in by_name.items()
    }
    of_top, random = float(drops[0]), by_name["other"] + by_name["rescaled"]
    if not by_name["other"]:
        return {**means, "beaten": math.nan, "holds": None}
    beaten = sum(of_top > drop for drop in random) / len(random)
    return {**means, "beaten": beaten, "holds": beaten >= _BEATEN and of_top > means["matched"]}
