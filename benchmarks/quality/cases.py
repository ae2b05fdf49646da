"""Attention weights of a real model to be explained: text, layer inputs, and a fixed sample of (row, head, query, key)."""

import os
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec, attention_scores, pattern_from_scores
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.support import Model
from sae_lens_qk.weights import QKWeights
from sae_lens_qk.host.layer import attention_spec, hook_names, input_completion, qk_weights, run_recording
from sae_lens_qk.text import token_rows

CORPUS = "QK_CORPUS"
"""Environment variable: folder with test.parquet and validation.parquet."""
LEAST_WEIGHT, FIRST_QUERY, FIRST_KEY = 0.1, 8, 1
_BATCH, _ALL = 8, 10**6


class Sizes(NamedTuple):
    context: int = 256
    test_rows: int = 64
    """Rows whose attention is explained, spread over the test split."""
    fit_rows: int = 128
    """Rows of the validation split: feature directions, firing rates."""
    ranking_rows: int = 16
    """Of these, rows on which the importance of pairs is measured."""
    n_candidates: int = 200_000
    cases: int = 270
    """A layer, spread evenly over heads."""
    ks: tuple[int, ...] = (1, 2, 5, 10, 25, 50)
    logit_cases: int = 40
    logit_ks: tuple[int, ...] = (1, 2, 5, 10)
    twins: int = 120
    checks: int = 20
    bootstrap: int = 2000


FULL = Sizes()
SMOKE = Sizes(
    context=24,
    test_rows=4,
    fit_rows=6,
    ranking_rows=2,
    n_candidates=500,
    cases=12,
    ks=(1, 2, 5),
    logit_cases=2,
    logit_ks=(1, 2),
    twins=3,
    checks=2,
    bootstrap=50,
)


class Case(NamedTuple):
    """One attention weight of a layer, at least `LEAST_WEIGHT`."""

    row: int
    head: int
    query_pos: int
    key_pos: int


class LayerCases(NamedTuple):
    """A layer, the dictionaries to compare on it, and the attention weights they are to explain."""

    model: Model
    layer: int
    dictionaries: dict[str, BilinearQKDictionary]
    weights: QKWeights
    spec: AttentionSpec
    tokens: Int[Tensor, "row pos"]
    x: Float[Tensor, "row pos d_model"]
    fit_x: Float[Tensor, "fit_row pos d_model"]
    """Layer inputs of other text."""
    cases: list[Case]
    """By row."""

    def by_row(self) -> Iterator[tuple[int, list[tuple[int, Case]]]]:
        """Each row with its cases and their numbers."""
        for row, numbered in groupby(enumerate(self.cases), key=lambda pair: pair[1].row):
            yield row, list(numbered)

    def subset(self, n: int, seed: int) -> list[int]:
        """Numbers of n cases, drawn once for all dictionaries."""
        order = torch.randperm(len(self.cases), generator=torch.Generator().manual_seed(seed))
        return sorted(order[:n].tolist())


def prepare(
    model: Model,
    dictionaries: dict[int, dict[str, BilinearQKDictionary]],
    sizes: Sizes,
    seed: int = 0,
) -> list[LayerCases]:
    """Cases of each layer: P >= 0.1, query >= 8, key after the first position, before the query and not BOS.

    Args:
        dictionaries: by layer and name; those of a layer share cases and layer inputs.
    """
    test, fit = text_rows(model, sizes)
    layers = list(dictionaries)
    test_x, fit_x = (_inputs(model, layers, tokens) for tokens in (test, fit))
    made = []
    for layer in layers:
        weights, spec = qk_weights(model, layer), attention_spec(model, layer)
        cases = sample_cases(weights, spec, test, test_x[layer], sizes.cases, seed)
        made.append(
            LayerCases(
                model,
                layer,
                dictionaries[layer],
                weights,
                spec,
                test,
                test_x[layer],
                fit_x[layer],
                cases,
            )
        )
    return made


def text_rows(
    model: Model, sizes: Sizes
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "fit_row pos"]]:
    """Rows to explain and rows to fit on: test and validation split of the corpus, or two parts of the sample that
    comes with the package."""
    if CORPUS in os.environ:
        splits = [
            token_rows(model, f"${CORPUS}/{name}.parquet", "text", _ALL, sizes.context)
            for name in ("test", "validation")
        ]
    else:
        sample = token_rows(model, "", "text", sizes.test_rows + sizes.fit_rows, sizes.context)
        splits = [sample[: sizes.test_rows], sample[sizes.test_rows :]]
    return _spread(splits[0], sizes.test_rows), _spread(splits[1], sizes.fit_rows)


def sample_cases(
    weights: QKWeights, spec: AttentionSpec, tokens: Tensor, x: Tensor, n: int, seed: int
) -> list[Case]:
    """n cases, as many from each head as there are or as make n."""
    found: list[Tensor] = []
    for row, x_row in enumerate(x):
        pattern = pattern_from_scores(
            attention_scores(weights.queries(x_row[None]), weights.keys(x_row[None]), spec)
        )[0]
        candidates = pattern.tril(diagonal=-1) >= LEAST_WEIGHT
        candidates[:, :FIRST_QUERY], candidates[..., :FIRST_KEY] = False, False
        candidates[..., tokens[row] == tokens[row, 0]] = False  # documents are joined by BOS
        at = candidates.nonzero()
        found.append(torch.cat([torch.full_like(at[:, :1], row), at], dim=1))
    listed = torch.cat(found)
    generator, cases = torch.Generator().manual_seed(seed), []
    for head in range(spec.n_heads):
        of_head = listed[listed[:, 1] == head]
        share = n * (head + 1) // spec.n_heads - n * head // spec.n_heads
        cases += of_head[torch.randperm(len(of_head), generator=generator)[:share]].tolist()
    return [Case(*case) for case in sorted(cases)]


def _spread(rows: Tensor, n: int) -> Tensor:
    """n rows at equal distances."""
    return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows))).long()]


def _inputs(model: Model, layers: list[int], tokens: Tensor) -> dict[int, Tensor]:
    """The tensor that W_Q and W_K multiply in each layer, from one pass."""
    names = {layer: hook_names(model, layer).input for layer in layers}
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for batch in tokens.split(_BATCH):
        _, seen = run_recording(model, batch, list(names.values()), stop_at_layer=max(layers) + 1)
        for layer, name in names.items():
            parts[layer].append(input_completion(model, layer)(seen[name]))
    return {layer: torch.cat(made) for layer, made in parts.items()}
