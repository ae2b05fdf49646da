"""A sweep trains every combination once, and its figures are those of the dictionaries it saves."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

import sae_lens_qk as qk
from sae_lens_qk.attention import pattern_kl
from sae_lens_qk.host.layer import layer_inputs, qk_weights
from sae_lens_qk.text import token_rows

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.sweep import combinations, configured, main, rendered

CONTEXT, N_ROWS, STEP = 23, 5, 23 * 8


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
        sae=dict(d_query=29, d_key=31, k=4.0),
        mask=dict(training_tokens=STEP),
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(folder: Path):
    return main(
        [
            str(folder / "recipe.yaml"),
            "--vary",
            "sae.d=17,19",
            "lr=1e-3,2e-3",
            "--set",
            "sae.k=3.0",
            "--text",
            str(folder / "text.parquet"),
            "--n_rows",
            str(N_ROWS),
            "--live_rows",
            "16",
            "--output",
            str(folder / "out"),
        ]
    )


def test_every_combination_is_trained_once_and_measured_as_saved(folder):
    results = run(folder)
    assert results["name"].tolist() == [
        f"sae.d={d}_lr={lr}" for d in (17, 19) for lr in ("1e-3", "2e-3")
    ]
    assert run(folder).equals(results)
    assert len((folder / "out" / "sweep.jsonl").read_text().splitlines()) == 4
    row = results.iloc[2]
    d = qk.BilinearQKDictionary.from_pretrained(str(folder / "out" / row["name"]))
    assert (d.cfg.d_query, d.cfg.d_key, d.runner_cfg["lr"], d.runner_cfg["sae"]["k"]) == (
        19,
        19,
        1e-3,
        3,
    )
    model = qk.load_model(d)
    weights, tokens = (
        qk_weights(model, 1),
        token_rows(model, str(folder / "text.parquet"), "text", N_ROWS, CONTEXT),
    )
    x = layer_inputs(model, 1, tokens)
    with torch.no_grad():
        true = d.spec, weights.queries(x), weights.keys(x)
        kl = pattern_kl(
            *(made.log_softmax(-1) for made in (masked(*true), masked(d.spec, *halves(d, x))))
        )
    assert row["pattern_kl"] == pytest.approx(float(kl[..., 1:].mean()), rel=1e-4)
    assert row["l0_key"] == pytest.approx(
        float((d.encode_key(x) > 0).sum(-1).float().mean()), rel=1e-6
    )
    assert 0 < row["live_query"] <= 19
    assert row["name"] in rendered(results)
    assert (folder / "out" / "sweep.md").read_text() == rendered(results)


def halves(d, x):
    return d.spec.split_queries(d.query(x)), d.spec.split_keys(d.key(x))


def masked(spec, queries, keys):
    n = queries.shape[1]
    scores = torch.einsum("bihd,bjhd->bhij", queries, keys) * spec.scale
    return scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)


def test_combinations_and_configs_by_hand(folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    made = list(combinations([], ["lr=5e-3"]))
    assert made == [("as_it_is", {"lr": "5e-3"})]
    cfg = configured(recipe, made[0][1], folder / "one")
    assert (cfg.lr, cfg.mask.training_tokens, cfg.checkpoint_path) == (5e-3, 0, None)
    assert cfg.input_cache_path == str(folder / "inputs")
    with pytest.raises(ValueError, match=r"Unknown config key sae\.width"):
        configured(recipe, {"sae.width": 3}, folder / "one")
    assert json.dumps(recipe) == json.dumps(yaml.safe_load((folder / "recipe.yaml").read_text()))
