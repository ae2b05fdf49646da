"""A report in one call: prompts recorded and explained, statistics collected, one HTML file."""

import operator
from collections.abc import Iterable
from pathlib import Path
from typing import SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_qk.dashboard.pages import ReportLimits
from sae_lens_qk.dashboard.prompts import check_prompts
from sae_lens_qk.dashboard.report import write_explained
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.explain.one_score import Attribution
from sae_lens_qk.explain.prompt import RecordedPrompt, ScorePosition, Tokens
from sae_lens_qk.host.support import Model
from sae_lens_qk.statistics.activations import ActivationStatistics


def report(
    path: str | Path,
    d: BilinearQKDictionary,
    model: Model,
    prompts: Iterable[Tokens | RecordedPrompt] = (),
    tokens: Int[Tensor, "row pos"] | None = None,
    *,
    statistics: ActivationStatistics | str | Path | None = None,
    checks: SupportsIndex = 1,
    title: str | None = None,
    limits: ReportLimits = ReportLimits(),  # noqa: B008  # frozen
) -> Path:
    """Write what a dictionary says about prompts, features, pairs and heads as one HTML file.

    The file needs no server and no network. Per prompt the largest attention weights are explained
    in full, as `attribute` explains them; the first of them is the last token's largest one (to
    another than itself and the first token).

    Args:
        path: of the file; its folder is created.
        d: with a feature map.
        prompts: each a text, token ids or a `RecordedPrompt`, of at most 128 tokens.
        tokens: full rows of text on which features and pairs are counted, and from which contexts
            are taken; default: 100 rows of the sample that comes with the package.
        statistics: collected with this dictionary, in place of `tokens`; or a folder where they are
            stored: they are read from there, or collected and saved.
        checks: attention weights per prompt whose explanations are tested causally, as by
            `Attribution.check`; 0: none.
        title: default: the model's name and the layer.
        limits: how much of the dictionary the file holds.
    Returns:
        The path.
    Raises:
        ValueError: no feature map; statistics or prompts of another dictionary; tokens and
            statistics; a prompt that is too long.
        FingerprintError, UnsupportedModelError: the model is not the dictionary's, or does what is
            not computed here.
    """
    n_checks = operator.index(checks)
    if n_checks < 0:
        raise ValueError(f"checks must be 0 or more, got {n_checks}.")
    d.require_feature_map()
    recorded = []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        if not isinstance(prompt, RecordedPrompt):
            prompt = RecordedPrompt.record(d, model, prompt)
        recorded.append(prompt)
    check_prompts(d, recorded)  # before what takes long
    explanations = []
    for prompt in recorded:
        positions = striking_positions(prompt, limits.explanations)
        for number, position in enumerate(positions):
            attribution = Attribution.of(prompt, *position)
            explanations.append(attribution.checked() if number < n_checks else attribution)
    return write_explained(
        path,
        d,
        model,
        recorded,
        explanations,
        tokens,
        statistics=statistics,
        title=title,
        limits=limits,
    )


def striking_positions(
    prompt: RecordedPrompt,
    n: int,
) -> list[ScorePosition]:
    """Positions of the n largest attention weights, the last token's largest one first.

    Tokens' attention to themselves and to the first token, where heads rest, does not count.
    """
    n_pos = len(prompt.words)
    weights = prompt.pattern.clone()  # [head, pos_q, pos_k]
    weights.diagonal(dim1=1, dim2=2).zero_()
    weights[:, :, 0] = 0.0
    last = int(weights[:, -1].argmax())
    head, key = divmod(last, n_pos)
    if weights[head, -1, key] > 0:
        weights[head, -1, key] += 1.0  # now more than any other
    values, cells = weights.flatten().sort(descending=True, stable=True)
    cells = cells[values > 0][:n]
    heads, queries, keys = torch.unravel_index(cells, weights.shape)
    positions = torch.stack([heads, queries, keys], dim=1)
    return [ScorePosition(*position) for position in positions.tolist()]
