"""Static HTML report: one self-contained file that works from disk, offline, without a server."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_qk.dashboard.data import report_data
from sae_lens_qk.dashboard.overview import head_tables
from sae_lens_qk.dashboard.page import write_page
from sae_lens_qk.dashboard.pages import ReportLimits
from sae_lens_qk.dashboard.prompts import Explanation, Prompt, check_prompts
from sae_lens_qk.dashboard.texts import Inputs, Words
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.support import Model
from sae_lens_qk.inputs import model_batches
from sae_lens_qk.statistics.activations import ActivationStatistics, collect_activations
from sae_lens_qk.text import token_rows

_TEXT_ROWS = 100
_TEXT_CONTEXT = 256
_FIRST_TOKEN_BATCHES = 3
"""Batches on which the features of the first token are looked for."""


def write_explained(
    path: str | Path,
    d: BilinearQKDictionary,
    model: Model,
    prompts: Sequence[Prompt],
    explanations: Sequence[Explanation],
    tokens: Int[Tensor, "row pos"] | None = None,
    *,
    statistics: ActivationStatistics | str | Path | None = None,
    title: str | None = None,
    limits: ReportLimits = ReportLimits(),  # noqa: B008  # frozen
) -> Path:
    """Write a report of prompts that are recorded, and explained, already.

    What `explain.report.report` and `Attribution.report` end in, and what their arguments mean.
    """
    d.require_feature_map()
    check_prompts(d, prompts)
    layer = AttentionLayer(model, d.cfg.layer)
    if not isinstance(statistics, ActivationStatistics):
        if tokens is None:
            context_size = min(_TEXT_CONTEXT, model.cfg.n_ctx)
            tokens = token_rows(model, "", "text", _TEXT_ROWS, context_size)
        batches = model_batches(model, layer.index, tokens)
        statistics = collect_activations(d, batches, folder=statistics)
    elif tokens is not None:
        raise ValueError("Statistics are of their own rows: give tokens or statistics, not both.")
    # statistics that were read from a folder bring their own rows
    text_rows = torch.from_numpy(statistics.tokens).long()  # [row, pos]
    batches = model_batches(model, layer.index, text_rows)
    data = report_data(
        d,
        statistics,
        prompts,
        explanations,
        words=_model_words(model),
        title=title,
        limits=limits,
        inputs=layer.inputs,
        tables=head_tables(d, statistics, islice(batches, _FIRST_TOKEN_BATCHES)),
    )
    return write_page(path, data)


def write_report(
    path: str | Path,
    d: BilinearQKDictionary,
    statistics: ActivationStatistics,
    prompts: Sequence[Prompt] = (),
    *,
    words: Words,
    title: str | None = None,
    limits: ReportLimits = ReportLimits(),  # noqa: B008  # frozen
    inputs: Inputs | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """Old way to write a report, which goes with the next release: see `sae_lens_qk.report`."""
    warnings.warn(
        "write_report is now sae_lens_qk.report(path, d, model, prompts).",
        DeprecationWarning,
        stacklevel=2,
    )
    data = report_data(
        d,
        statistics,
        prompts,
        words=words,
        title=title,
        limits=limits,
        inputs=inputs,
        tables=tables,
    )
    return write_page(path, data)


def _model_words(model: Model) -> Words:
    """Token ids as the model's tokenizer writes them."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("The model has no tokenizer: a report needs one for its words.")

    def words(token_ids: Sequence[int]) -> list[str]:
        return tokenizer.batch_decode([[token_id] for token_id in token_ids])

    return words
