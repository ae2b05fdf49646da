"""A sweep trains every combination once; its metrics are those of the dictionaries it saves."""

import copy
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import sae_lens_qk as qk
from benchmarks.dictionaries.sweep import changed_config, combinations, main, render

CONTEXT = 23
N_ROWS = 5
STEP = 23 * 8


@pytest.fixture(scope="module")
def folder(gpt2_folder, text_dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    text_dataset.to_parquet(str(folder / "text.parquet"))
    recipe = dict(
        model_name=str(gpt2_folder),
        layer=1,
        dataset_path=str(folder / "text.parquet"),
        context_size=CONTEXT,
        train_batch_size_tokens=STEP,
        training_tokens=3 * STEP,
        lr_warm_up_steps=0,
        sae=dict(
            d_query=29,
            d_key=31,
            k=4.0,
        ),
        mask=dict(training_tokens=STEP),
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def sweep(folder: Path) -> pd.DataFrame:
    """Two widths at two learning rates."""
    recipe = str(folder / "recipe.yaml")
    settings = ["--vary", "sae.d=17,19", "lr=1e-3,2e-3", "--set", "sae.k=3.0"]
    text = ["--text", str(folder / "text.parquet"), "--n_rows", str(N_ROWS), "--live_rows", "16"]
    return main([recipe, *settings, *text, "--output", str(folder / "out")])


def test_every_combination_is_trained_once_and_measured_as_saved(folder):
    results = sweep(folder)
    assert results["name"].tolist() == [
        "sae.d=17_lr=1e-3",
        "sae.d=17_lr=2e-3",
        "sae.d=19_lr=1e-3",
        "sae.d=19_lr=2e-3",
    ]
    assert sweep(folder).equals(results)
    assert len((folder / "out" / "sweep.jsonl").read_text().splitlines()) == 4
    assert (folder / "out" / "sweep.md").read_text() == render(results)

    row = results.iloc[2]
    d = qk.BilinearQKDictionary.from_pretrained(str(folder / "out" / row["name"]))
    assert (d.cfg.d_query, d.cfg.d_key) == (19, 19)
    assert (d.runner_cfg["lr"], d.runner_cfg["sae"]["k"]) == (1e-3, 3)
    model = qk.load_model(d)
    text = str(folder / "text.parquet")
    layer = qk.AttentionLayer(model, 1)
    x = layer.inputs(qk.token_rows(model, text, "text", N_ROWS, CONTEXT))
    weights = layer.qk_weights
    with torch.no_grad():
        true = log_pattern(d.spec, weights.queries(x), weights.keys(x))
        rebuilt = log_pattern(d.spec, *d.reconstruct(x))
        l0_key = (d.encode_key(x) > 0).sum(dim=-1).float().mean()
    difference = (true - rebuilt).nan_to_num(0.0)  # -inf minus -inf at future keys
    kl = (true.exp() * difference).sum(dim=-1)[..., 1:].mean()
    assert row["pattern_kl"] == pytest.approx(float(kl), rel=1e-4)
    assert row["l0_key"] == pytest.approx(float(l0_key), rel=1e-6)
    assert 0 < row["live_query"] <= 19
    assert row["name"] in render(results)


def log_pattern(
    spec,
    queries: torch.Tensor,
    keys: torch.Tensor,
) -> torch.Tensor:
    """Causal softmax without rotary embeddings, as GPT-2 has it."""
    n_pos = queries.shape[1]
    scores = torch.einsum("bihd,bjhd->bhij", queries, keys) * spec.scale
    future = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -torch.inf).log_softmax(dim=-1)


def test_one_setting_for_all(folder):
    [(name, changes)] = combinations([], ["lr=5e-3"])
    assert name == "as_it_is"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    original = copy.deepcopy(recipe)
    cfg = changed_config(recipe, changes, folder / "one")
    assert cfg.lr == 5e-3
    assert cfg.mask.training_tokens == 0
    assert cfg.checkpoint_path is None
    assert cfg.input_cache_path == str(folder / "inputs")
    assert json.dumps(recipe) == json.dumps(original), "the recipe itself must not change"


def test_unknown_settings_are_refused(folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    with pytest.raises(ValueError, match=r"Unknown config key sae\.width"):
        changed_config(recipe, {"sae.width": 3}, folder / "one")
