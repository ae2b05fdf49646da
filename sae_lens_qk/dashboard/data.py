"""Everything a report shows, as plain JSON values: dicts of columns, numbers of 4 significant digits, null for "not known".

    overview   model, sizes, figures, histograms of density, heads, what was left out
    texts      words: every token string that is needed, once; rows: row -> [[first position, [word, ...]], ...];
               labels: side -> for each feature the words it fires on most
    features   side -> columns; one entry a shown feature, most important first
    pairs      columns; one entry a shown pair, most important first
    prompts    one entry a prompt

Contexts point into the rows: [row, position, value, activations of the tokens around] and [row, query, key, value].
Importance is m^2 times the importance of the map: what dropping the pair costs, to leading order, in nats a query.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_qk.statistics.activations import ActivationStatistics
from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.attention import SIDES, Side
from sae_lens_qk.explain.prompt import Prompt
from sae_lens_qk.dictionary import BilinearQKDictionary

Words = Callable[[Sequence[int]], list[str]]
"""Token ids -> one string each, as a tokenizer's `batch_decode` of single tokens."""

Inputs = Callable[[Tensor], Tensor]
"""Rows of tokens [batch, pos] -> the layer's input [batch, pos, d_model]."""

MAX_PROMPT = 128
"""Tokens; a grid of attention weights is not readable beyond."""

_LABEL_WORDS = 3
_DENSITY_BINS = np.arange(-6.0, 0.01, 0.25)
_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class ReportLimits:
    """How much a report holds; what is left out is said on its first page.

    Args:
        features: of each side; those that the prompts name and the most important ones.
        pairs: with pages of their own, among the shown features.
        contexts, pair_contexts: of one feature, of one pair.
        before, after: tokens shown on either side of one that fires.
        partners: features of the other side listed for one feature.
        neighbours: features of the same side that fire along with one.
        cells: attention weights of a prompt whose pairs are listed, the largest ones.
        cell_pairs: supporters, and as many inhibitors, of one attention weight.
    Raises:
        ValueError: a limit below 1.
    """

    features: int = 1000
    pairs: int = 5000
    contexts: int = 8
    pair_contexts: int = 5
    before: int = 14
    after: int = 5
    partners: int = 24
    neighbours: int = 8
    cells: int = 1500
    cell_pairs: int = 8

    def __post_init__(self):
        for limit in fields(self):
            if getattr(self, limit.name) < 1:
                raise ValueError(
                    f"{limit.name} must be at least 1, got {getattr(self, limit.name)}."
                )


class Shown(NamedTuple):
    """Features of each side and rows of the feature map that have pages, most important first."""

    query: np.ndarray
    key: np.ndarray
    pairs: np.ndarray


class _Material(NamedTuple):
    """What the sections are made of."""

    d: BilinearQKDictionary
    statistics: ActivationStatistics
    pairs: pd.DataFrame
    """`pair_table`."""
    shown: Shown
    limits: ReportLimits

    def pair_column(self, name: str) -> np.ndarray:
        return self.pairs[name].to_numpy()

    def feature_column(self, side: Side, name: str) -> np.ndarray:
        return _feature_column(self.statistics, side, name)


@torch.no_grad()
def report_data(
    d: BilinearQKDictionary,
    statistics: ActivationStatistics,
    prompts: Sequence[Prompt],
    words: Words,
    title: str,
    limits: ReportLimits,
    inputs: Inputs | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
) -> dict[str, Any]:
    """The sections of a report; see the module, and `report.write_report` for the arguments."""
    _check(d, statistics, prompts)
    pairs = pair_table(d, statistics)
    cells = [strongest_cells(prompt, limits) for prompt in prompts]
    material = _Material(d, statistics, pairs, choose(d, statistics, pairs, cells, limits), limits)
    contexts = _Contexts(statistics, limits)
    features: dict[Side, dict[str, Any]] = {
        side: _features(material, side, contexts) for side in SIDES
    }
    if inputs is not None:
        _add_activations(d, features, contexts, inputs)
    return {
        "overview": _overview(material, title)
        | {"tables": [_table(*table) for table in (tables or {}).items()]},
        "features": features,
        "pairs": _pairs(material, contexts),
        "texts": contexts.texts(words),  # after all who say which texts they need
        "prompts": [
            _prompt(d, prompt, listed) for prompt, listed in zip(prompts, cells, strict=True)
        ],
    }


def pair_table(d: BilinearQKDictionary, statistics: ActivationStatistics) -> pd.DataFrame:
    """One row a kept pair, in the map's order: `d.pair_frame()` with importance times m^2, and what the texts gave.

    Without measured importance, half of co-occurrence times the squared mean term stands for it.
    """
    frame = d.pair_frame()
    for name in ("co_occurrence", "mean", "max", "min"):
        frame[name] = statistics.pairs[name].to_numpy()
    if d.feature_map.statistics.any():
        importance = frame["importance"] * frame["weight"] ** 2
    else:
        importance = 0.5 * frame["co_occurrence"] * frame["mean"] ** 2
    frame["importance"] = np.nan_to_num(importance.to_numpy())
    return frame


def strongest_cells(prompt: Prompt, limits: ReportLimits) -> pd.DataFrame:
    """`prompt.strongest`, of the `limits.cells` attention weights that are largest in the model or as rebuilt."""
    listed = prompt.strongest(limits.cell_pairs)
    largest = torch.maximum(prompt.pattern, prompt.made("feature_map")).cpu().numpy()
    shown = np.zeros(largest.shape, dtype=bool)
    shown.ravel()[np.argsort(-largest, axis=None, kind="stable")[: limits.cells]] = True
    return listed.loc[shown[listed["head"], listed["query_pos"], listed["key_pos"]]]


def choose(
    d: BilinearQKDictionary,
    statistics: ActivationStatistics,
    pairs: pd.DataFrame,
    cells: Sequence[pd.DataFrame],
    limits: ReportLimits,
) -> Shown:
    """What has a page: up to half of it what the prompts name, by largest pattern effect, the rest by importance."""
    columns = ["query_feature", "key_feature", "head"]
    named = np.concatenate(
        [np.zeros((0, 3), int), *(listed[columns].to_numpy() for listed in cells)]
    )
    effects = np.concatenate(
        [np.zeros(0), *(listed["pattern_effect"].abs().to_numpy() for listed in cells)]
    )
    importance = pairs["importance"].to_numpy()
    chosen, possible = {}, np.ones(len(pairs), dtype=bool)
    for side, of_named in zip(SIDES, (named[:, 0], named[:, 1]), strict=True):
        density, of_pairs = (
            _feature_column(statistics, side, "density"),
            pairs[f"{side}_feature"].to_numpy(),
        )
        constant = len(density)
        effect = _largest(effects, of_named, constant + 1)[:constant]
        total = np.bincount(of_pairs, importance, minlength=constant + 1)[:constant]
        chosen[side] = _first(
            effect, total, (density > 0) | (total > 0) | (effect > 0), limits.features
        )
        possible &= np.isin(of_pairs, [*chosen[side], constant])
    at = d.feature_map.find(named).cpu().numpy()  # -1: constant x constant
    effect = _largest(effects, at, len(pairs) + 1)[: len(pairs)]
    return Shown(**chosen, pairs=_first(effect, importance, possible, limits.pairs))


def _largest(values: np.ndarray, groups: np.ndarray, n_groups: int) -> np.ndarray:
    """The largest value of each group, 0 of those that have none; group -1 is the last."""
    largest = np.zeros(n_groups)
    np.maximum.at(largest, groups, values)
    return largest


def _first(
    effect: np.ndarray, importance: np.ndarray, possible: np.ndarray, limit: int
) -> np.ndarray:
    """At most `limit` of those possible: half by effect where there is one, the rest by importance; most important first."""
    order = np.argsort(-importance, kind="stable")
    order = order[possible[order]]
    named = order[np.argsort(-effect[order], kind="stable")]
    named = named[effect[named] > 0][: limit // 2]
    rest = order[~np.isin(order, named)][: limit - len(named)]
    return order[np.isin(order, [*named, *rest])]


class _Contexts:
    """The contexts asked for, and the tokens around them."""

    def __init__(self, statistics: ActivationStatistics, limits: ReportLimits):
        self.statistics, self.limits = statistics, limits
        self.needed = np.zeros(statistics.tokens.shape, dtype=bool)

    def window(self, row: int, pos: int) -> slice:
        """Positions shown around one, and from now on needed."""
        around = slice(max(0, pos - self.limits.before), pos + self.limits.after + 1)
        self.needed[row, around] = True
        return around

    def of_feature(self, side: Side, feature: int) -> list[list[Any]]:
        """[row, position, value]."""
        listed = self.statistics.feature_contexts(side, feature)[: self.limits.contexts]
        for context in listed:
            self.window(context.row, context.pos)
        return [[int(c.row), int(c.pos), _short(c.value)] for c in listed]

    def of_pair(self, number: int) -> list[list[Any]]:
        """[row, query, key, value]."""
        listed = self.statistics.pair_contexts(number)[: self.limits.pair_contexts]
        for context in listed:
            self.window(context.row, context.query_pos)
            self.window(context.row, context.key_pos)
        return [[int(c.row), int(c.query_pos), int(c.key_pos), _short(c.value)] for c in listed]

    def label(self, side: Side, feature: int) -> list[int]:
        """Distinct tokens on which a feature fires most."""
        contexts = self.statistics.feature_contexts(side, feature)
        fired_on = dict.fromkeys(int(self.statistics.tokens[c.row, c.pos]) for c in contexts)
        return list(fired_on)[:_LABEL_WORDS]

    def texts(self, words: Words) -> dict[str, Any]:
        """Words, rows and labels; see the module."""
        tokens = self.statistics.tokens
        sizes = {side: len(_feature_column(self.statistics, side, "feature")) for side in SIDES}
        labels = {
            side: [self.label(side, feature) for feature in range(sizes[side])] for side in SIDES
        }
        of_labels = [token for of_side in labels.values() for label in of_side for token in label]
        ids = np.unique(
            np.concatenate([tokens[self.needed], np.asarray(of_labels, dtype=tokens.dtype)])
        )
        strings = words(ids.tolist())
        if len(strings) != len(ids):
            raise ValueError(
                f"words must give one string a token id, got {len(strings)} for {len(ids)}."
            )
        number = {int(token): index for index, token in enumerate(ids)}
        rows = {}
        for row in np.flatnonzero(self.needed.any(axis=1)):
            positions = np.flatnonzero(self.needed[row])
            runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
            rows[str(row)] = [
                [int(run[0]), [number[int(token)] for token in tokens[row, run]]] for run in runs
            ]
        return {
            "words": strings,
            "rows": rows,
            "labels": {
                side: [[number[token] for token in label] for label in of_side]
                for side, of_side in labels.items()
            },
        }


def _features(m: _Material, side: Side, contexts: _Contexts) -> dict[str, Any]:
    """Columns over the shown features of one side; partners are [feature, head, weight, importance, mean]."""
    shown = m.shown.query if side == "query" else m.shown.key
    best_first = np.argsort(-m.pair_column("importance"), kind="stable")
    of_pairs = m.pair_column(f"{side}_feature")[best_first]
    by_feature = best_first[np.argsort(of_pairs, kind="stable")]
    rows = [by_feature[run] for run in _runs(np.sort(of_pairs), shown)]
    partner = [
        m.pair_column(name) for name in (_other(side), "head", "weight", "importance", "mean")
    ]
    counted = m.statistics.sums.query.together.size > 0
    return {
        "feature": shown.tolist(),
        **{
            name: _shorts(m.feature_column(side, name)[shown])
            for name in ("density", "mean", "max")
        },
        "pairs": [len(own) for own in rows],
        "importance": _shorts(m.pair_column("importance")[own].sum() for own in rows),
        "contexts": [contexts.of_feature(side, feature) for feature in shown.tolist()],
        "partners": [
            _records(*(column[own[: m.limits.partners]] for column in partner)) for own in rows
        ],
        "neighbours": [
            _neighbours(m, side, feature) if counted else [] for feature in shown.tolist()
        ],
    }


def _neighbours(m: _Material, side: Side, feature: int) -> list[list[Any]]:
    """[feature, share] of those of the same side that fire along."""
    listed = m.statistics.feature_co_occurrence(side, feature, m.limits.neighbours)
    return _records(listed["feature"].to_numpy(), listed["share"].to_numpy())


def _add_activations(
    d: BilinearQKDictionary,
    features: dict[Side, dict[str, Any]],
    contexts: _Contexts,
    inputs: Inputs,
) -> None:
    """Append to every context the activations of the tokens around it."""
    of_row: dict[int, list[tuple[Side, int, list[Any]]]] = {}
    for side, of_side in features.items():
        for feature, listed in zip(of_side["feature"], of_side["contexts"], strict=True):
            for context in listed:
                of_row.setdefault(context[0], []).append((side, feature, context))
    rows = sorted(of_row)
    for start in tqdm(
        range(0, len(rows), _ROWS_AT_ONCE), desc="Activations around contexts", unit="batch"
    ):
        some = rows[start : start + _ROWS_AT_ONCE]
        x = inputs(torch.from_numpy(contexts.statistics.tokens[some]).long()).to(d.device, d.dtype)
        acts = {
            "query": d.encode_query(x).float().cpu().numpy(),
            "key": d.encode_key(x).float().cpu().numpy(),
        }
        for at, row in enumerate(some):
            for side, feature, context in of_row[row]:
                context.append(_shorts(acts[side][at, contexts.window(row, context[1]), feature]))


def _pairs(m: _Material, contexts: _Contexts) -> dict[str, Any]:
    """Columns over the shown pairs; heads: [head, weight, importance, effect] of the same features."""
    shown = m.shown.pairs
    same = m.pair_column("query_feature") * (m.d.cfg.d_key + 1) + m.pair_column(
        "key_feature"
    )  # sorted, as maps are
    of_heads = [m.pair_column(name) for name in ("head", "weight", "importance", "effect")]
    numbers = (
        "weight",
        "score_at_0",
        "importance",
        "effect",
        "co_occurrence",
        "mean",
        "max",
        "min",
    )
    return {
        "pair": shown.tolist(),
        **{
            name: m.pair_column(name)[shown].tolist()
            for name in ("query_feature", "key_feature", "head")
        },
        **{name: _shorts(m.pair_column(name)[shown]) for name in numbers},
        "contexts": [contexts.of_pair(number) for number in shown.tolist()],
        "heads": [
            _records(*(column[run] for column in of_heads)) for run in _runs(same, same[shown])
        ],
        **_kernels(m),
    }


def _kernels(m: _Material) -> dict[str, Any]:
    """The typical score of each shown pair, m times both mean activations times M, by distance; with rotary embeddings only.

    stretches are [first, last] distances; kernel holds the means over them.
    """
    if not m.d.spec.rotary_dim:
        return {"stretches": [], "kernel": None}
    shown, n_pos = m.shown.pairs, m.statistics.tokens.shape[1]
    typical = m.pair_column("weight")[shown].astype(float)
    for side in SIDES:
        mean = np.append(m.feature_column(side, "mean"), 1.0)  # the constant's
        typical *= mean[m.pair_column(f"{side}_feature")[shown]]
    by_offset = (
        m.d.pair_kernel(m.d.feature_map.indices[torch.from_numpy(shown)], range(n_pos))
        .double()
        .cpu()
        .numpy()
    )
    stretches = kernel_stretches(n_pos)
    means = np.stack(
        [by_offset[:, first : last + 1].mean(axis=1) for first, last in stretches], axis=1
    )
    return {"stretches": stretches, "kernel": [_shorts(row, 3) for row in means * typical[:, None]]}


def kernel_stretches(n_pos: int) -> list[tuple[int, int]]:
    """Distances 0 to 31 one by one, then in stretches that grow with the distance: a rotary kernel oscillates."""
    stretches = [(offset, offset) for offset in range(min(32, n_pos))]
    while (first := stretches[-1][1] + 1) < n_pos:
        stretches.append((first, min(first + (1 << (first.bit_length() - 3)), n_pos) - 1))
    return stretches


def _overview(m: _Material, title: str) -> dict[str, Any]:
    cfg, n_heads = m.d.cfg, m.d.spec.n_heads
    head, importance = m.pair_column("head"), m.pair_column("importance")
    constant = (m.pair_column("query_feature") == cfg.d_query) | (
        m.pair_column("key_feature") == cfg.d_key
    )
    density = {side: m.feature_column(side, "density") for side in SIDES}
    live = {side: values[values > 0] for side, values in density.items()}
    logs = {side: np.log10(values).clip(_DENSITY_BINS[0], 0.0) for side, values in live.items()}
    total = importance.sum()
    return {
        "title": title,
        "model": cfg.model_name,
        "layer": cfg.layer,
        "n_heads": n_heads,
        "rotary": m.d.spec.rotary_dim > 0,
        "d_query": cfg.d_query,
        "d_key": cfg.d_key,
        "n_pairs": len(head),
        "n_tokens": m.statistics.n_tokens,
        "live": {side: len(values) for side, values in live.items()},
        "always_on": {
            side: np.flatnonzero(values > ALWAYS_ON).tolist() for side, values in density.items()
        },
        "metrics": _plain(m.d.metrics, digits=6),
        "density": {
            "log10_edges": _DENSITY_BINS.tolist(),
            **{
                side: np.histogram(values, _DENSITY_BINS)[0].tolist()
                for side, values in logs.items()
            },
        },
        "heads": {
            "pairs": np.bincount(head, minlength=n_heads).tolist(),
            "with_constant": np.bincount(head[constant], minlength=n_heads).tolist(),
            "importance": _shorts(np.bincount(head, importance, minlength=n_heads)),
        },
        "importance_measured": bool(m.d.feature_map.statistics.any()),
        "importance_shown": _short(importance[m.shown.pairs].sum() / total) if total else None,
        "limits": asdict(m.limits),
    }


def _prompt(d: BilinearQKDictionary, prompt: Prompt, listed: pd.DataFrame) -> dict[str, Any]:
    """words; true and rebuilt patterns by head, row after row of allowed keys; cells: "head/query/key" -> pairs."""
    allowed = np.tril_indices(len(prompt.tokens))

    def by_head(pattern: Tensor) -> list[list[float]]:
        return [
            [round(v, 4) for v in of_head[allowed].tolist()]
            for of_head in pattern.double().cpu().numpy()
        ]

    columns = ("query_feature", "key_feature", "contribution", "pattern_effect")
    records = _records(*(listed[name].to_numpy() for name in columns))
    cells: dict[str, list[list[Any]]] = {}
    for place, record in zip(
        listed[["head", "query_pos", "key_pos"]].to_numpy().tolist(), records, strict=True
    ):
        cells.setdefault("/".join(map(str, place)), []).append(record)
    return {
        "words": list(prompt.words),
        "true": by_head(prompt.pattern),
        "rebuilt": {
            source: by_head(prompt.made(source)) for source in ("feature_map", "transcoders")
        },
        "cells": cells,
        "n_cells": len(allowed[0]) * d.spec.n_heads,
    }


def _table(title: str, table: pd.DataFrame) -> dict[str, Any]:
    """A table to be shown as it is; an index that has a name, or is more than a count, becomes its first column."""
    if table.index.name is not None or not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index()
    return {
        "title": title,
        "columns": [str(name) for name in table.columns],
        "rows": _plain(table.to_numpy(object).tolist()),
    }


def _feature_column(statistics: ActivationStatistics, side: Side, name: str) -> np.ndarray:
    features = statistics.features
    return features[name].to_numpy()[features["side"].to_numpy() == side]


def _other(side: Side) -> str:
    return "key_feature" if side == "query" else "query_feature"


def _check(
    d: BilinearQKDictionary, statistics: ActivationStatistics, prompts: Sequence[Prompt]
) -> None:
    d.require_feature_map()
    listed = statistics.pairs[["query_feature", "key_feature", "head"]].to_numpy()
    if not np.array_equal(listed, d.feature_map.indices.cpu().numpy()):
        raise ValueError(
            f"The statistics list {len(listed)} pairs that are not the {len(d.feature_map)} of this dictionary's map: "
            "collect them with this dictionary."
        )
    for number, prompt in enumerate(prompts):
        if prompt.dictionary is not d:
            raise ValueError(
                f"Prompt {number} was made with another dictionary: make it with this one, Prompt.of(d, ...)."
            )
        if len(prompt.tokens) > MAX_PROMPT:
            raise ValueError(
                f"Prompt {number} has {len(prompt.tokens)} tokens, the report shows at most {MAX_PROMPT}."
            )


def _runs(sorted_values: np.ndarray, wanted: np.ndarray) -> list[slice]:
    """Where each of the wanted values stands."""
    first, last = (np.searchsorted(sorted_values, wanted, side) for side in ("left", "right"))
    return [slice(a, b) for a, b in zip(first, last, strict=True)]


def _records(*columns: np.ndarray) -> list[list[Any]]:
    """Rows of columns, numbers shortened."""
    shortened = (
        _shorts(column) if column.dtype.kind == "f" else column.tolist() for column in columns
    )
    return [list(row) for row in zip(*shortened, strict=True)]


def _shorts(values: Iterable[float], digits: int = 4) -> list[float | int | None]:
    return [_short(float(value), digits) for value in values]


def _short(value: float, digits: int = 4) -> float | int | None:
    """So many significant digits; integers without a point, None for what JSON cannot hold."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e6 else rounded


def _plain(value: Any, digits: int = 4) -> Any:
    """The same with floats shortened and numpy's numbers as Python's."""
    match value:
        case dict():
            return {str(name): _plain(item, digits) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item, digits) for item in value]
        case bool() | np.bool_():
            return bool(value)
        case int() | np.integer():
            return int(value)
        case float() | np.floating():
            return _short(float(value), digits)
        case None:
            return None
    return str(value)
