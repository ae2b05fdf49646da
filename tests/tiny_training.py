"""Tiny training runs: configs, runners and interruptions that several test files share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens.saes.sae import TrainStepInput
from tiny_models import tiny_model
from torch import Tensor

import sae_lens_qk as qk

CONTEXT = 23
D_QUERY = 29
D_KEY = 31
BATCH = CONTEXT * 8
"""Tokens."""


def tiny_config(
    folder: Path,
    sae: dict[str, Any] | None = None,
    mask: dict[str, Any] | None = None,
    **changes: Any,
) -> qk.BilinearQKRunnerConfig:
    """40 steps of step 1, 12 of step 2."""
    sae_values = {"d_in": 1, "d_query": D_QUERY, "d_key": D_KEY, "k": 4.0}
    mask_values = {
        "training_tokens": BATCH * 12,
        "n_pairs": 400,
        "n_candidates": 1500,
        "ranking_tokens": BATCH * 2,
    }
    values = {
        "layer": 1,
        "model_name": "tiny",
        "context_size": CONTEXT,
        "train_batch_size_tokens": BATCH,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 8,
        "training_tokens": BATCH * 40,
        "lr": 3e-3,
        "lr_warm_up_steps": 0,
        "dead_feature_window": 10,
        "n_checkpoints": 3,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "output"),
    }
    return qk.BilinearQKRunnerConfig(
        sae=qk.TranscodersTrainingConfig(**{**sae_values, **(sae or {})}),
        mask=qk.MaskStepConfig(**{**mask_values, **(mask or {})}),
        **{**values, **changes},
    )


def tiny_runner(
    folder: Path, dataset: Dataset, kind: str = "llama", seed: int = 0, **changes: Any
) -> qk.BilinearQKTrainingRunner:
    """A run on a tiny model, with changes of `tiny_config`."""
    cfg = tiny_config(folder, **changes)
    model = tiny_model(kind, seed=seed)
    return qk.BilinearQKTrainingRunner(cfg, override_model=model, override_dataset=dataset)


def step_input(x: Tensor, **coefficients: float) -> TrainStepInput:
    """The first step on a batch of tokens, no dead features."""
    return TrainStepInput(x, coefficients, None, 0, is_logging_step=False)


def stop_at_step(
    run: Callable[[], Any],
    step: int,
    sae_class: type,
) -> None:
    """Run with inputs that are NaN at one step: training stops there."""
    forward = sae_class.training_forward_pass

    def poisoned(self, step_input: TrainStepInput):
        if step_input.n_training_steps == step:
            step_input = replace(step_input, sae_in=step_input.sae_in * torch.nan)
        return forward(self, step_input)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_class, "training_forward_pass", poisoned)
        run()


def training_rows(
    runner: qk.BilinearQKTrainingRunner,
    n_rows: int = 160,
) -> Tensor:
    """[row, pos, d_model], the first rows of the data."""
    return torch.cat(list(runner.first_rows(n_rows)))


@torch.no_grad()
def mean_kl(
    d: qk.BilinearQKDictionary,
    runner: qk.BilinearQKTrainingRunner,
    source: str,
) -> float:
    """Divergence of the true pattern on the training rows, nats per query."""
    x = training_rows(runner)
    weights = runner.layer.qk_weights
    true = d.spec.log_pattern(d.spec.scores(weights.queries(x), weights.keys(x)))
    return float(d.spec.kl(true, d.pattern(x, source).log()).mean())


def assert_same_weights(
    actual: qk.BilinearQKDictionary,
    expected: qk.BilinearQKDictionary,
):
    expected_state = expected.state_dict()
    for name, tensor in actual.state_dict().items():
        assert torch.equal(tensor, expected_state[name]), name
