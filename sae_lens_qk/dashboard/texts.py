"""Contexts in which features and pairs fire, and the tokens around them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_qk.attention import SIDES, Side
from sae_lens_qk.dashboard.pages import ReportLimits, feature_table
from sae_lens_qk.dashboard.values import numbers
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.statistics.activations import ActivationStatistics
from sae_lens_qk.tables import significant

Words = Callable[[Sequence[int]], list[str]]
"""Token ids -> one string each, as a tokenizer's `batch_decode` of single tokens."""

Inputs = Callable[[Tensor], Tensor]
"""Rows of tokens [batch, pos] -> the layer's input [batch, pos, d_model]."""

_ShownContext = tuple[Side, int, list[Any]]
"""Side, feature and one of its contexts as the page lists it."""

_LABEL_WORDS = 3
_BATCH_ROWS = 8


class Contexts:
    """Looks contexts up, and remembers which tokens the page needs for them."""

    def __init__(
        self,
        statistics: ActivationStatistics,
        limits: ReportLimits,
    ):
        self.statistics = statistics
        self.limits = limits
        self.needed = np.zeros(statistics.tokens.shape, dtype=bool)

    def window(
        self,
        row: int,
        pos: int,
    ) -> slice:
        """Positions shown around one, and from now on needed."""
        first = max(0, pos - self.limits.before)
        positions = slice(first, pos + self.limits.after + 1)
        self.needed[row, positions] = True
        return positions

    def feature(
        self,
        side: Side,
        feature: int,
    ) -> list[list[Any]]:
        """[row, position, value] of each context of a feature."""
        contexts = self.statistics.feature_contexts(side, feature)
        rows = []
        for row, pos, value in contexts[: self.limits.contexts]:
            self.window(row, pos)
            rows.append([row, pos, significant(value)])
        return rows

    def pair(self, number: int) -> list[list[Any]]:
        """[row, query, key, value] of each context of a pair."""
        contexts = self.statistics.pair_contexts(number)
        rows = []
        for row, query_pos, key_pos, value in contexts[: self.limits.pair_contexts]:
            self.window(row, query_pos)
            self.window(row, key_pos)
            rows.append([row, query_pos, key_pos, significant(value)])
        return rows

    def label(
        self,
        side: Side,
        feature: int,
    ) -> list[int]:
        """Distinct tokens on which a feature fires most."""
        tokens = self.statistics.tokens
        contexts = self.statistics.feature_contexts(side, feature)
        firing = [int(tokens[row, pos]) for row, pos, _ in contexts]
        # a dict keeps the order, strongest first
        distinct = list(dict.fromkeys(firing))
        return distinct[:_LABEL_WORDS]

    def texts(self, words: Words) -> dict[str, Any]:
        """Words, rows and labels; see `data`.

        Raises:
            ValueError: not one word per token id.
        """
        labels: dict[Side, list[list[int]]] = {}
        needed_tokens = set(self.statistics.tokens[self.needed].tolist())
        for side in SIDES:
            features = feature_table(self.statistics, side)["feature"]
            labels[side] = [self.label(side, feature) for feature in features]
            needed_tokens.update(*labels[side])
        token_ids = sorted(needed_tokens)
        strings = words(token_ids)
        if len(strings) != len(token_ids):
            raise ValueError(
                f"words must give one string per token id, got {len(strings)} for {len(token_ids)}."
            )
        number = {token: index for index, token in enumerate(token_ids)}
        word_labels: dict[Side, list[list[int]]] = {}
        for side, side_labels in labels.items():
            word_labels[side] = [[number[token] for token in label] for label in side_labels]
        # token_ids are sorted, so that a token's place among them is its word
        words_at = np.searchsorted(token_ids, self.statistics.tokens)  # [row, pos]
        rows = {}
        needed_rows = np.flatnonzero(self.needed.any(axis=1))
        for row in needed_rows.tolist():
            rows[str(row)] = _runs(words_at[row], self.needed[row])
        return {"words": strings, "rows": rows, "labels": word_labels}


def _runs(
    words: np.ndarray,
    is_needed: np.ndarray,
) -> list[list[Any]]:
    """The needed stretches of a row: [first position, [word, ...]].

    Args:
        words, is_needed: [pos].
    """
    positions = np.flatnonzero(is_needed)
    gaps = np.flatnonzero(np.diff(positions) > 1)
    runs = []
    for run in np.split(positions, gaps + 1):
        first = int(run[0])
        runs.append([first, words[run].tolist()])
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
        tokens = torch.from_numpy(contexts.statistics.tokens[batch])  # [batch, pos]
        x = inputs(tokens.long()).to(d.device, d.dtype)
        features = d.features(x)
        # one copy per batch, not one per context
        query_acts = features.query.float().cpu()  # [batch, pos, d_query]
        key_acts = features.key.float().cpu()  # [batch, pos, d_key]
        for index, row in enumerate(batch):
            for side, feature, context in row_contexts[row]:
                pos = context[1]
                # needed already: the same window as when the context was listed
                window = contexts.window(row, pos)
                acts = query_acts if side == "query" else key_acts
                activations = acts[index, window, feature]  # [pos of the window]
                context.append(numbers(activations.tolist()))


def _contexts_by_row(sections: dict[Side, dict[str, Any]]) -> dict[int, list[_ShownContext]]:
    """Everything shown of each row of text."""
    row_contexts: dict[int, list[_ShownContext]] = {}
    for side, section in sections.items():
        features = zip(section["feature"], section["contexts"], strict=True)
        for feature, feature_contexts in features:
            for context in feature_contexts:
                row = context[0]
                row_contexts.setdefault(row, []).append((side, feature, context))
    return row_contexts
