"""A prompt on the page: patterns, the pairs behind its attention weights, explanations in full."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_qk.dashboard.pages import PAIR, ReportLimits
from sae_lens_qk.dashboard.values import plain, records
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.patching import Source

MAX_PROMPT = 128
"""Tokens; a grid of attention weights is not readable beyond."""

_CELL = ["head", "query_pos", "key_pos"]
_SOURCES: tuple[Source, Source] = ("feature_map", "transcoders")
_ELSEWHERE = ("model", "layer", "tokens", "d_query", "d_key", "nodes", "qk_tracing_results")
"""Fields of an explanation that the page has already, or that are meant for other programs."""


class Prompt(Protocol):
    """What a page shows of a prompt: `explain.prompt.RecordedPrompt`.

    Explanations can write reports, so `explain` imports the dashboard and not the other way.
    """

    @property
    def words(self) -> list[str]: ...
    @property
    def pattern(self) -> Tensor:
        """The model's own, [head, pos_q, pos_k]."""
        ...

    def rebuilt_pattern(self, source: Source) -> Tensor: ...
    def strongest(self, n: int) -> pd.DataFrame: ...
    def require(self, dictionary: BilinearQKDictionary) -> None: ...


class Explanation(Protocol):
    """What a page shows of an attention weight: `explain.one_score.Attribution`."""

    @property
    def prompt(self) -> Prompt: ...
    @property
    def position(self) -> tuple[int, int, int]:
        """Head, query and key."""
        ...

    def to_dict(self, n: int) -> dict[str, Any]: ...


def check_prompts(
    d: BilinearQKDictionary,
    prompts: Sequence[Prompt],
) -> None:
    """Refuse prompts that cannot be shown.

    Raises:
        ValueError: one is too long, or was recorded with another dictionary.
    """
    for number, prompt in enumerate(prompts):
        prompt.require(d)
        n_pos = len(prompt.words)
        if n_pos > MAX_PROMPT:
            raise ValueError(
                f"Prompt {number} has {n_pos} tokens, a report shows at most {MAX_PROMPT}."
            )


def strongest_cells(
    prompt: Prompt,
    limits: ReportLimits,
) -> pd.DataFrame:
    """`prompt.strongest` of the attention weights that are largest in the model or as rebuilt."""
    pairs = prompt.strongest(limits.cell_pairs)
    rebuilt = prompt.rebuilt_pattern("feature_map")
    weights = torch.maximum(prompt.pattern, rebuilt).cpu().numpy()  # [head, pos_q, pos_k]
    order = np.argsort(-weights, axis=None, kind="stable")
    has_list = np.zeros(weights.shape, dtype=bool)
    has_list.ravel()[order[: limits.cells]] = True
    cells = tuple(pairs[name] for name in _CELL)
    return pairs.loc[has_list[cells], :]


def prompt_section(
    d: BilinearQKDictionary,
    prompt: Prompt,
    pairs: pd.DataFrame,
    explanations: Sequence[Explanation],
    limits: ReportLimits,
) -> dict[str, Any]:
    """A prompt as JSON; see `data`.

    Args:
        pairs: `strongest_cells`.
        explanations: those of this prompt are shown, the first one when the page opens.
    """
    n_pos = len(prompt.words)
    allowed = d.spec.allowed_mask(n_pos)
    rebuilt: dict[Source, list[list[float]]] = {}
    for source in _SOURCES:
        pattern = prompt.rebuilt_pattern(source)
        rebuilt[source] = _weights(pattern, allowed)
    explained: dict[str, dict[str, Any]] = {}
    for explanation in explanations:
        if explanation.prompt is prompt:
            cell = _cell_name(explanation.position)
            explained[cell] = _explanation_fields(explanation, limits)
    return {
        "words": list(prompt.words),
        "first_keys": d.spec.first_keys(n_pos).tolist(),
        "true": _weights(prompt.pattern, allowed),
        "rebuilt": rebuilt,
        "cells": _cell_pairs(pairs),
        "n_cells": d.spec.n_allowed(n_pos) * d.spec.n_heads,
        "explanations": explained,
    }


def _weights(
    pattern: Tensor,
    allowed: Tensor,
) -> list[list[float]]:
    """Attention weights per head, of the allowed keys of each query in turn."""
    cells = pattern.double().cpu()[:, allowed]  # [head, cell]
    # float64, so that no digits come back after rounding
    return cells.numpy().round(4).tolist()


def _cell_pairs(pairs: pd.DataFrame) -> dict[str, list[list[Any]]]:
    """Each cell's pairs: [query feature, key feature, contribution, pattern effect]."""
    # the head is in the cell's name
    columns = [*PAIR[:2], "contribution", "pattern_effect"]
    rows = records(pairs.loc[:, columns])
    positions = pairs[_CELL].to_numpy()  # [row, 3]
    cells: dict[str, list[list[Any]]] = {}
    for position, row in zip(positions.tolist(), rows, strict=True):
        cell = _cell_name(position)
        cells.setdefault(cell, []).append(row)
    return cells


def _cell_name(position: Sequence[int]) -> str:
    return "/".join(str(number) for number in position)


def _explanation_fields(
    explanation: Explanation,
    limits: ReportLimits,
) -> dict[str, Any]:
    fields = explanation.to_dict(n=limits.cell_pairs)
    for name in _ELSEWHERE:
        fields.pop(name, None)
    return plain(fields)
