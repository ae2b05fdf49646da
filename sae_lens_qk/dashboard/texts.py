"""Contexts in which features and pairs fire, and the tokens around them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_qk.attention import SIDES, Side
from sae_lens_qk.dashboard.pages import ReportLimits, feature_column
from sae_lens_qk.dashboard.values import numbers
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.statistics.activations import ActivationStatistics
from sae_lens_qk.tables import significant

Words = Callable[[Sequence[int]], list[str]]
"""Token ids -> one string each, as a tokenizer's `batch_decode` of single tokens."""

Inputs = Callable[[Tensor], Tensor]
"""Rows of tokens [batch, pos] -> the layer's input [batch, pos, d_model]."""

_LABEL_WORDS = 3
_BATCH_ROWS = 8


class Contexts:
    """Looks contexts up, and remembers which tokens the page needs for them."""

    def __init__(self, statistics: ActivationStatistics, limits: ReportLimits):
        self.statistics = statistics
        self.limits = limits
        self.needed = np.zeros(statistics.tokens.shape, dtype=bool)

    def window(self, row: int, pos: int) -> slice:
        """Positions shown around one, and from now on needed."""
        first = max(0, pos - self.limits.before)
        positions = slice(first, pos + self.limits.after + 1)
        self.needed[row, positions] = True
        return positions

    def feature(self, side: Side, feature: int) -> list[list[Any]]:
        """[row, position, value] of each context of a feature."""
        contexts = self.statistics.feature_contexts(side, feature)
        rows = []
        for context in contexts[: self.limits.contexts]:
            self.window(context.row, context.pos)
            rows.append([context.row, context.pos, significant(context.value)])
        return rows

    def pair(self, number: int) -> list[list[Any]]:
        """[row, query, key, value] of each context of a pair."""
        contexts = self.statistics.pair_contexts(number)
        rows = []
        for context in contexts[: self.limits.pair_contexts]:
            row, query_pos, key_pos, value = context
            self.window(row, query_pos)
            self.window(row, key_pos)
            rows.append([row, query_pos, key_pos, significant(value)])
        return rows

    def label(self, side: Side, feature: int) -> list[int]:
        """Distinct tokens on which a feature fires most."""
        tokens = self.statistics.tokens
        contexts = self.statistics.feature_contexts(side, feature)
        firing = [int(tokens[context.row, context.pos]) for context in contexts]
        distinct = list(dict.fromkeys(firing))
        return distinct[:_LABEL_WORDS]

    def texts(self, words: Words) -> dict[str, Any]:
        """Words, rows and labels; see `data`.

        Raises:
            ValueError: not one word per token id.
        """
        labels: dict[Side, list[list[int]]] = {}
        for side in SIDES:
            features = feature_column(self.statistics, side, "feature")
            labels[side] = [self.label(side, feature) for feature in features]
        token_ids = self._token_ids(labels)
        strings = words(token_ids)
        if len(strings) != len(token_ids):
            raise ValueError(
                f"words must give one string per token id, got {len(strings)} for {len(token_ids)}."
            )
        number = {token: index for index, token in enumerate(token_ids)}
        word_labels: dict[Side, list[list[int]]] = {}
        for side, side_labels in labels.items():
            word_labels[side] = [[number[token] for token in label] for label in side_labels]
        rows = {}
        needed_rows = np.flatnonzero(self.needed.any(axis=1))
        for row in needed_rows.tolist():
            rows[str(row)] = self._word_runs(row, number)
        return {"words": strings, "rows": rows, "labels": word_labels}

    def _token_ids(self, labels: dict[Side, list[list[int]]]) -> list[int]:
        """Every token that the page needs, once."""
        token_ids = set(self.statistics.tokens[self.needed].tolist())
        for side_labels in labels.values():
            token_ids.update(*side_labels)
        return sorted(token_ids)

    def _word_runs(self, row: int, number: dict[int, int]) -> list[list[Any]]:
        """The needed stretches of a row: [first position, [word, ...]]."""
        positions = np.flatnonzero(self.needed[row])
        gaps = np.flatnonzero(np.diff(positions) > 1)
        runs = []
        for run in np.split(positions, gaps + 1):
            tokens = self.statistics.tokens[row, run].tolist()
            runs.append([int(run[0]), [number[token] for token in tokens]])
        return runs


def add_activations(
    d: BilinearQKDictionary,
    sections: dict[Side, dict[str, Any]],
    contexts: Contexts,
    inputs: Inputs,
) -> None:
    """Append to every feature's contexts the activations of the tokens around.

    Args:
        sections: `columns.feature_columns` of each side.
    """
    row_contexts = _contexts_by_row(sections)
    rows = sorted(row_contexts)
    starts = range(0, len(rows), _BATCH_ROWS)
    for start in tqdm(starts, desc="Activations around contexts", unit="batch"):
        batch = rows[start : start + _BATCH_ROWS]
        tokens = torch.from_numpy(contexts.statistics.tokens[batch])
        x = inputs(tokens.long()).to(d.device, d.dtype)
        features = d.features(x)
        query_acts = features.query.float().cpu()
        key_acts = features.key.float().cpu()
        for index, row in enumerate(batch):
            for side, feature, context in row_contexts[row]:
                pos = context[1]
                window = contexts.window(row, pos)
                acts = query_acts if side == "query" else key_acts
                activations = acts[index, window, feature]
                context.append(numbers(activations.tolist()))


def _contexts_by_row(
    sections: dict[Side, dict[str, Any]],
) -> dict[int, list[tuple[Side, int, list[Any]]]]:
    """Row of text -> (side, feature, context) of everything shown of it."""
    row_contexts: dict[int, list[tuple[Side, int, list[Any]]]] = {}
    for side, section in sections.items():
        features = zip(section["feature"], section["contexts"], strict=True)
        for feature, feature_contexts in features:
            for context in feature_contexts:
                row = context[0]
                row_contexts.setdefault(row, []).append((side, feature, context))
    return row_contexts
