"""The command line: help from the configs, one line for every mistake, and both commands end to end."""

import json
import subprocess
import sys
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from hub_cases import FOLDER, REPO, SUMS, measured_dictionary, same
from tiny_dictionaries import tiny_dictionary

import sae_lens_qk as qk
from sae_lens_qk.__main__ import main
from sae_lens_qk.explain.attribution import overview
from sae_lens_qk.text import token_rows

BATCH = 23 * 8


def run(*arguments) -> int:
    """Exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return -1 if stop.code is None else int(stop.code)


@pytest.fixture
def config(tmp_path, gpt2_folder, text_dataset, monkeypatch) -> Path:
    """A config file for a few steps on the tiny model and a local text."""
    text_dataset.to_parquet(str(tmp_path / "texts.parquet"))
    monkeypatch.setenv("QK_TEXTS", str(tmp_path))
    values = {
        "model_name": str(gpt2_folder),
        "layer": 1,
        "dataset_path": "$QK_TEXTS/texts.parquet",
        "context_size": 23,
        "train_batch_size_tokens": BATCH,
        "n_batches_in_buffer": 8,
        "training_tokens": BATCH * 20,
        "lr_warm_up_steps": 0,
        "checkpoint_path": None,
        "output_path": str(tmp_path / "dictionary"),
        "sae": {"d_query": 29, "d_key": 31, "k": 4.0},
        "mask": {
            "training_tokens": BATCH * 5,
            "n_pairs": 150,
            "n_candidates": 300,
            "ranking_tokens": BATCH,
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_train_then_evaluate(config, tmp_path, gpt2_folder, capsys):
    output, figures = tmp_path / "dictionary", tmp_path / "figures.json"
    assert (
        run(
            "train",
            "--config",
            config,
            "--mask.n_pairs",
            90,
            "--sae.kl_full_coefficient",
            2.5,
            "--lr",
            "3e-3",
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"saved to {output}"
    written = json.loads((output / "runner_cfg.json").read_text())
    assert (written["mask"]["n_pairs"], written["sae"]["kl_full_coefficient"], written["lr"]) == (
        90,
        2.5,
        3e-3,
    )
    assert (written["mask"]["n_candidates"], written["sae"]["d_query"], written["layer"]) == (
        300,
        29,
        1,
    )
    dictionary = qk.BilinearQKDictionary.from_pretrained(str(output))
    assert 0 < len(dictionary.feature_map) <= 90
    assert dictionary.cfg.model_name == str(gpt2_folder)

    options = (
        "--dataset_path",
        "$QK_TEXTS/texts.parquet",
        "--n_tokens",
        230,
        "--context_size",
        23,
        "--batch_size",
        5,
    )
    assert run("evaluate", output, *options, "--baselines", "uniform", "--output", figures) == 0
    shown = capsys.readouterr().out
    assert "230 tokens in 10 rows" in shown
    for piece in ("transcoders", "feature_map", "zero", "uniform", "L0", "pairs"):
        assert piece in shown
    model = qk.load_model(dictionary)
    tokens = token_rows(model, "$QK_TEXTS/texts.parquet", "text", 10, 23)
    assert tokens.shape == (10, 23)
    assert (tokens[:, 0] == model.tokenizer.bos_token_id).all()
    expected = qk.evaluate(dictionary, model, tokens, batch_size=5, baselines=("uniform",))
    assert json.loads(figures.read_text()) == json.loads(json.dumps(expected.to_dict()))
    transcoders, uniform = (
        expected.sources[name].pattern_kl for name in ("transcoders", "uniform")
    )
    assert transcoders is not None
    assert uniform is not None
    assert transcoders.value < uniform.value


def test_train_help_lists_every_field_with_its_doc(capsys):
    assert run("train", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    blocks = (
        ("", qk.BilinearQKRunnerConfig),
        ("sae.", qk.TranscodersTrainingConfig),
        ("mask.", qk.MaskStepConfig),
        ("card.", qk.CardConfig),
    )
    for prefix, config_class in blocks:
        for name in (
            f.name for f in fields(config_class) if f.name not in ("sae", "mask", "card", "logger")
        ):
            assert f" --{prefix}{name} " in shown or f"[--{prefix}{name} " in shown, (
                f"--{prefix}{name}"
            )
    for doc in (
        "--config str YAML or JSON file with config fields",
        "--layer int Layer whose attention is decomposed. (default: 23)",
        "--sae.d_query int Number of query features. (default: 2400)",
        "--mask.n_pairs int Pairs kept, at most. (default: 50000)",
    ):
        assert doc in shown


def test_help_shows_the_values_of_the_config_file(config, capsys):
    assert run("train", "--config", config, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--mask.n_pairs int Pairs kept, at most. (default: 150)" in shown


def test_other_help(capsys):
    assert run("--help") == 0
    assert "{train,evaluate,explain,dashboard,list,push}" in capsys.readouterr().out
    assert run("evaluate", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Name (see `list`) or folder." in shown
    assert "--n_tokens int Tokens to evaluate on, whole rows. (default: 8192)" in shown


def test_debug_shows_where_an_error_comes_from(capsys):
    assert run("--debug") == 2
    assert "[--debug] {train,evaluate,explain,dashboard,list,push}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="There is no dictionary 'nowhere'"):
        run("--debug", "evaluate", "nowhere")
    assert run("evaluate", "nowhere") == 2
    assert "There is no dictionary 'nowhere'" in one_line(capsys)


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("sae_lens_qk: ")
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evalute"],
            "unknown command 'evalute': use one of train, evaluate, explain, dashboard, list, push",
        ),
        (["train", "--laier", "3"], "unrecognized arguments: --laier 3"),
        (["train", "--layer", "three"], "invalid int value: 'three'"),
        (["train", "--sae.activation", "gelu"], "invalid choice: 'gelu'"),
        (["train", "--config"], "argument --config: expected one argument"),
        (["train", "--config", "nowhere.yaml"], "There is no config file nowhere.yaml"),
        (
            ["train", "--mask.n_candidates", "3"],
            "n_candidates must be at least mask.n_pairs, got 3 and 50000",
        ),
        (["evaluate"], "the following arguments are required"),
        (["evaluate", "nowhere"], "There is no dictionary 'nowhere'"),
        (["evaluate", "nowhere", "--tokens", "3"], "unrecognized arguments: --tokens 3"),
    ],
)
def test_mistakes_take_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainig_tokens: 3", "Unknown config key trainig_tokens. Close to it: "),
        ("sae: {activatoin: topk}", "Unknown config key sae.activatoin. Close to it: activation."),
        ("layer: [1,", "is neither YAML nor JSON"),
        ("lr: '1e-3'", "lr must be float, got the text '1e-3'"),
        ("- 1", "must hold a mapping of config fields, got list"),
    ],
)
def test_mistakes_in_the_config_file_take_one_line(text, message, capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert run("train", "--config", path) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "7"], "layer must lie in [0, 1], got 7"),
        (["--dataset_path", "nowhere.parquet"], "There is no file nowhere.parquet (dataset_path)"),
        (
            ["--dataset_path", "$QK_UNSET/texts.parquet"],
            "names an environment variable that is not set",
        ),
        (["--text_column", "words"], "has the columns ['text'], not 'words': set text_column"),
        (["--model_name", "nobody/nothing"], "huggingface.co"),
    ],
)
def test_runs_that_cannot_start_take_one_line(config, options, message, capfd):
    assert run("train", "--config", config, *options) == 2
    err = capfd.readouterr().err.splitlines()
    assert err[-1].startswith("sae_lens_qk: ")
    assert message in err[-1]
    assert not any("Traceback" in line for line in err)
    assert not (config.parent / "dictionary").exists()


@pytest.fixture
def folder(gpt2_bridge, tmp_path) -> Path:
    """A saved dictionary."""
    measured_dictionary(gpt2_bridge).save_model(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def token(hub, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_owner")


@pytest.mark.parametrize("dtype", ["stored", "float16"])
def test_push_then_list_then_load_by_name(
    hub, token, hub_cache, folder, dtype, tmp_path, capsys, monkeypatch
):
    assert (
        run("push", folder, REPO, FOLDER, "--dtype", dtype, "--private", "--commit_message", "Ours")
        == 0
    )
    url, title, entry = capsys.readouterr().out.split("\n", 2)
    newest = hub.commits(REPO)[0]
    assert (url, title) == (f"{hub.url}/{REPO}/commit/{newest.oid}", "for a registry:")
    assert newest.message == "Ours"
    assert yaml.safe_load(entry)[FOLDER] == {
        "status": "published",
        "repo": REPO,
        "folder": FOLDER,
        "revision": newest.oid,
        "sha256": sha256(newest.files[f"{FOLDER}/{SUMS}"]).hexdigest(),
    }

    own = tmp_path / "own"
    (own / "recipes").mkdir(parents=True)
    (own / "registry.yaml").write_text(entry)
    (own / "recipes" / f"{FOLDER}.yaml").write_text("model_name: gpt2\nlayer: 1")
    monkeypatch.setenv("SAE_LENS_QK_REGISTRY", str(own / "registry.yaml"))
    assert run("list", "--output", tmp_path / "table.csv") == 0
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if FOLDER in line]
    assert {"gpt2", "published"} <= set(row.split())
    for name, status in qk.pretrained_dictionaries()[["name", "status"]].to_numpy():
        command = f"{name} is not published yet; this trains it: python -m sae_lens_qk train --config {name}"
        assert (command in shown) == (status == "unpublished")
    table = pd.read_csv(tmp_path / "table.csv").set_index("name")
    assert (table.loc[FOLDER, "repo"], table.loc[FOLDER, "revision"]) == (REPO, newest.oid)

    found = qk.BilinearQKDictionary.from_pretrained(FOLDER, dtype=None, cache_dir=hub_cache)
    stored = qk.BilinearQKDictionary.load_from_disk(folder)
    assert same(found, stored if dtype == "stored" else stored.to(torch.float16))


def test_push_as_a_pull_request(hub, token, folder, capsys):
    hub.create_repo(REPO)
    assert run("push", folder, REPO, FOLDER, "--create_pr", "True", "--revision", "dev") == 0
    pull = hub.commits(REPO, "refs/pr/1")[0]
    shown = capsys.readouterr().out
    assert shown.startswith(f"{hub.url}/{REPO}/discussions/1\nfor a registry:\n")
    assert yaml.safe_load(shown.split("registry:")[1])[FOLDER]["revision"] == pull.oid
    assert [len(hub.commits(REPO, branch)) for branch in ("main", "dev")] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["{folder}", REPO], "the following arguments are required"),
        (["{folder}", REPO, FOLDER, "--dtype", "int8"], "invalid choice: 'int8'"),
        (["nowhere", REPO, FOLDER], "There is no dictionary 'nowhere'"),
        (["gpt2-small-L2", REPO, FOLDER], "gpt2-small-L2 is not published yet"),
        (["{folder}", REPO, "../x"], "The folder must be a plain path inside the repository"),
        (["{folder}", "org/repo/x", FOLDER], "Repo id must be in the form"),
        (
            ["{folder}", "stranger/repo", FOLDER],
            "The Hub refuses this token for stranger/repo (403)",
        ),
    ],
)
def test_a_push_that_cannot_be_takes_one_line(hub, token, folder, arguments, message, capsys):
    assert run("push", *(argument.format(folder=folder) for argument in arguments)) == 2
    assert message in one_line(capsys)
    assert all(request.status in (403, 404) for request in hub.requests)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_x", "The Hub refuses this token for org/repo (401)"),
        (None, "The Hub refuses this token"),
    ],
)
def test_a_push_without_a_good_token_takes_one_line(
    hub, folder, token, message, capsys, monkeypatch
):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert run("push", folder, REPO, FOLDER) == 2
    assert message in one_line(capsys)


def test_a_push_to_a_hub_that_is_gone_takes_one_line(hub, token, folder, capsys, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: None))
    hub.stop()
    assert run("push", folder, REPO, FOLDER) == 2
    assert "The Hub cannot be reached for org/repo" in one_line(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no registry file"),
        ("- 1", "is not a registry of dictionaries"),
        ("a: [1,", "is not a registry of dictionaries"),
        (
            "a: {status: nope}",
            "Registry entry a: status must be one of ('shipped', 'published', 'unpublished'), got 'nope'",
        ),
        (
            "a: {status: published, repo: org/repo}",
            "Registry entry a is published: folder must match",
        ),
        ("a: {status: unpublished}", "a.yaml"),
        ("a: {status: unpublished, weights: 3}", "weights"),
    ],
    ids=["missing", "list", "no YAML", "status", "incomplete", "no recipe", "unknown field"],
)
def test_mistakes_in_a_registry_take_one_line(text, message, tmp_path, capsys, monkeypatch):
    path = tmp_path / "registry.yaml"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("SAE_LENS_QK_REGISTRY", str(path))
    assert run("list") == 2
    assert message in one_line(capsys)


def test_the_process_exits_with_2():
    command = [sys.executable, "-m", "sae_lens_qk", "evalute"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr
        == "sae_lens_qk: unknown command 'evalute': use one of train, evaluate, explain, dashboard, list, push\n"
    )


@pytest.fixture(scope="module")
def saved(gpt2_folder, tmp_path_factory) -> Path:
    """A dictionary of the tiny model in a folder."""
    folder = tmp_path_factory.mktemp("dictionary")
    model = qk.load_model(str(gpt2_folder))
    d = tiny_dictionary(model, model_name=str(gpt2_folder))
    d.feature_map.statistics[:, [0, 2]] = torch.rand(len(d.feature_map), 2)  # as measured
    d.save_model(folder)
    return folder


def test_explain_shows_one_attention_weight_and_writes_it(saved, tmp_path, capsys):
    output = tmp_path / "terms.json"
    assert (
        run(
            "explain",
            "w[h9b",
            "--dictionary",
            saved,
            "--head",
            1,
            "--query",
            -1,
            "--key",
            "h",
            "--output",
            output,
        )
        == 0
    )
    shown = capsys.readouterr().out
    d = qk.BilinearQKDictionary.from_pretrained(str(saved))
    model = qk.load_model(d)
    prompt = qk.Prompt.of(d, model, "w[h9b")
    a = qk.attribute(d, model, prompt, 1, -1, prompt.words.index("h"))
    assert str(a) in shown and "supporting pairs" in shown and "where each head looks" not in shown
    assert f"{a.top(1)['pattern_effect'].iloc[0]:+.3f}" in shown
    assert json.loads(output.read_text()) == json.loads(a.to_json())


def test_explain_finds_a_head_and_a_key_itself(saved, capsys):
    assert run("explain", "w[h9b", "--dictionary", saved, "--form", "full") == 0
    shown = capsys.readouterr().out
    d = qk.BilinearQKDictionary.from_pretrained(str(saved))
    looks = overview(qk.Prompt.of(d, qk.load_model(d), "w[h9b"))
    head = int(looks["attention"].idxmax())
    assert "where each head looks" in shown and f"head {head}: " in shown
    assert f"attends to {looks['key'][head]!r} ({looks['key_pos'][head]})" in shown


def test_explain_reads_a_prompt_from_a_file(saved, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("w[h9b")
    assert run("explain", tmp_path / "prompt.txt", "--dictionary", saved, "--head", 0) == 0
    assert "head 0: 'b'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--key", "Zeus"), "The token 'Zeus' is not among"),
        (("--head", 9), "head must lie in [0, 2], got 9"),
        (("--query", 1, "--key", 4, "--head", 0), "got query 1 and key 4"),
    ],
)
def test_explain_says_what_is_wrong(saved, capsys, options, message):
    assert run("explain", "w[h9b", "--dictionary", saved, *options) == 2
    assert message in capsys.readouterr().err


def test_dashboard_writes_a_report(saved, tmp_path, capsys):
    output = tmp_path / "report.html"
    options = (
        "--n_tokens",
        230,
        "--context_size",
        23,
        "--n_features",
        20,
        "--n_pairs",
        30,
        "--output",
        output,
    )
    assert run("dashboard", "--dictionary", saved, "--prompts", "w[h9b", *options) == 0
    assert f"wrote {output}" in capsys.readouterr().out
    assert output.read_text().startswith("<!doctype html>") or output.read_text().startswith(
        "<!DOCTYPE html>"
    )
