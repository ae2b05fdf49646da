"""Attention weights of a real model to be explained: a fixed sample of (row, head, query, key)."""

import os
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.layer import AttentionLayer, run_recording
from sae_lens_qk.host.support import Model
from sae_lens_qk.text import token_rows
from sae_lens_qk.weights import QKWeights

CORPUS = "QK_CORPUS"
"""Environment variable: folder with test.parquet and validation.parquet."""
LEAST_WEIGHT = 0.1
FIRST_QUERY = 8
FIRST_KEY = 1
_BATCH_ROWS = 8
_ALL_ROWS = 10**6


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
    """Per layer, spread evenly over heads."""
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

    layer: AttentionLayer
    dictionaries: dict[str, BilinearQKDictionary]
    tokens: Int[Tensor, "row pos"]
    x: Float[Tensor, "row pos d_model"]
    fit_x: Float[Tensor, "fit_row pos d_model"]
    """Layer inputs of other text."""
    cases: list[Case]
    """Sorted by row."""

    @property
    def weights(self) -> QKWeights:
        return self.layer.qk_weights

    @property
    def spec(self) -> AttentionSpec:
        return self.layer.spec

    def rows(self) -> Iterator[tuple[int, list[tuple[int, Case]]]]:
        """Each row with its cases and their numbers."""
        numbered = enumerate(self.cases)
        for row, row_cases in groupby(numbered, key=lambda numbered_case: numbered_case[1].row):
            yield row, list(row_cases)

    def subset(
        self,
        n: int,
        seed: int,
    ) -> list[int]:
        """Numbers of n cases, drawn once for all dictionaries."""
        order = torch.randperm(len(self.cases), generator=torch.Generator().manual_seed(seed))
        return sorted(order[:n].tolist())


def prepare(
    model: Model,
    dictionaries: dict[int, dict[str, BilinearQKDictionary]],
    sizes: Sizes,
    seed: int = 0,
) -> list[LayerCases]:
    """Cases of each layer: P >= 0.1, query >= 8, key neither first nor BOS and before the query.

    Args:
        dictionaries: by layer and name; those of a layer share cases and layer inputs.
    """
    test_tokens, fit_tokens = text_rows(model, sizes)
    layers = [AttentionLayer(model, index) for index in dictionaries]
    test_x = _inputs(layers, test_tokens)
    fit_x = _inputs(layers, fit_tokens)
    prepared = []
    for layer in layers:
        x = test_x[layer.index]
        layer_cases = LayerCases(
            layer=layer,
            dictionaries=dictionaries[layer.index],
            tokens=test_tokens,
            x=x,
            fit_x=fit_x[layer.index],
            cases=sample_cases(layer.qk_weights, layer.spec, test_tokens, x, sizes.cases, seed),
        )
        prepared.append(layer_cases)
    return prepared


def text_rows(
    model: Model, sizes: Sizes
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "fit_row pos"]]:
    """Rows to explain and rows to fit on.

    Test and validation split of the corpus, or two parts of the sample that comes with the package.
    """
    if CORPUS in os.environ:
        test = token_rows(model, f"${CORPUS}/test.parquet", "text", _ALL_ROWS, sizes.context)
        fit = token_rows(model, f"${CORPUS}/validation.parquet", "text", _ALL_ROWS, sizes.context)
    else:
        sample = token_rows(model, "", "text", sizes.test_rows + sizes.fit_rows, sizes.context)
        test = sample[: sizes.test_rows]
        fit = sample[sizes.test_rows :]
    return _spread(test, sizes.test_rows), _spread(fit, sizes.fit_rows)


def sample_cases(
    weights: QKWeights, spec: AttentionSpec, tokens: Tensor, x: Tensor, n: int, seed: int
) -> list[Case]:
    """n cases, as many from each head as there are or as make n."""
    candidates: list[Tensor] = []
    for row in range(len(x)):
        row_x = x[row : row + 1]
        pattern = spec.pattern(spec.scores(weights.queries(row_x), weights.keys(row_x)))[0]
        mask = pattern.tril(diagonal=-1) >= LEAST_WEIGHT  # a key before the query
        mask[:, :FIRST_QUERY] = False
        mask[..., :FIRST_KEY] = False
        mask[..., tokens[row] == tokens[row, 0]] = False  # documents are joined by BOS
        positions = mask.nonzero()  # [case, (head, query, key)]
        rows = torch.full_like(positions[:, :1], row)
        candidates.append(torch.cat([rows, positions], dim=1))
    all_candidates = torch.cat(candidates)
    generator = torch.Generator().manual_seed(seed)
    cases: list[list[int]] = []
    for head in range(spec.n_heads):
        head_candidates = all_candidates[all_candidates[:, 1] == head]
        share = n * (head + 1) // spec.n_heads - n * head // spec.n_heads
        order = torch.randperm(len(head_candidates), generator=generator)
        cases += head_candidates[order[:share]].tolist()
    return [Case(*case) for case in sorted(cases)]


def _spread(
    rows: Tensor,
    n: int,
) -> Tensor:
    """n rows at equal distances."""
    return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows))).long()]


def _inputs(
    layers: list[AttentionLayer],
    tokens: Tensor,
) -> dict[int, Tensor]:
    """The tensor that W_Q and W_K multiply in each layer, from one pass."""
    model = layers[0].model
    names = [layer.names.input for layer in layers]
    last_layer = max(layer.index for layer in layers)
    batches: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}
    for batch in tokens.split(_BATCH_ROWS):
        _, values = run_recording(model, batch, names, stop_at_layer=last_layer + 1)
        for layer in layers:
            batches[layer.index].append(layer.complete(values[layer.names.input]))
    return {index: torch.cat(parts) for index, parts in batches.items()}
