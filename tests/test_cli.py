"""The command line: help from signatures and configs, one line per mistake, commands end to end."""

import json
import shlex
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
from sae_lens_qk.statistics.activations import ActivationStatistics
from sae_lens_qk.text import token_rows

BATCH = 23 * 8
COMMANDS = "train,evaluate,explain,report,list,push"


def run(line: str) -> int:
    """Exit code of a command line."""
    try:
        return main(shlex.split(line))
    except SystemExit as stop:
        return -1 if stop.code is None else int(stop.code)


def help_text(line: str, capsys) -> str:
    assert run(f"{line} --help") == 0
    return " ".join(capsys.readouterr().out.split())


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
    output = tmp_path / "dictionary"
    metrics = tmp_path / "metrics.json"
    options = "--mask.n_pairs 90 --sae.kl_full_coefficient 2.5 --lr 3e-3"
    assert run(f"train --config {config} {options}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"saved to {output}"
    settings = json.loads((output / "runner_cfg.json").read_text())
    assert settings["mask"]["n_pairs"] == 90  # from the command line
    assert settings["sae"]["kl_full_coefficient"] == 2.5
    assert settings["lr"] == 3e-3
    assert settings["mask"]["n_candidates"] == 300  # from the file
    assert settings["sae"]["d_query"] == 29
    assert settings["layer"] == 1
    dictionary = qk.BilinearQKDictionary.from_pretrained(str(output))
    assert 0 < len(dictionary.feature_map) <= 90
    assert dictionary.cfg.model_name == str(gpt2_folder)

    text = "--dataset_path $QK_TEXTS/texts.parquet --n_tokens 230 --context_size 23"
    options = f"--batch_size 5 --baselines uniform --output {metrics}"
    assert run(f"evaluate {output} {text} {options}") == 0
    printed = capsys.readouterr().out
    assert "230 tokens in 10 rows" in printed
    for piece in ("transcoders", "feature_map", "zero", "uniform", "L0", "pairs"):
        assert piece in printed
    model = qk.load_model(dictionary)
    tokens = token_rows(model, "$QK_TEXTS/texts.parquet", "text", 10, 23)
    assert tokens.shape == (10, 23)
    assert (tokens[:, 0] == model.tokenizer.bos_token_id).all()
    expected = qk.evaluate(dictionary, model, tokens, batch_size=5, baselines=("uniform",))
    assert json.loads(metrics.read_text()) == json.loads(json.dumps(expected.to_dict()))
    transcoders = expected.sources["transcoders"].pattern_kl
    uniform = expected.sources["uniform"].pattern_kl
    assert transcoders is not None
    assert uniform is not None
    assert transcoders.value < uniform.value


@pytest.mark.parametrize(
    ("prefix", "config_class"),
    [
        ("", qk.BilinearQKRunnerConfig),
        ("sae.", qk.TranscodersTrainingConfig),
        ("mask.", qk.MaskStepConfig),
        ("card.", qk.CardConfig),
    ],
)
def test_train_help_lists_every_field(prefix, config_class, capsys):
    text = help_text("train", capsys)
    blocks = ("sae", "mask", "card", "logger")
    for field in fields(config_class):
        option = f"--{prefix}{field.name} "
        assert field.name in blocks or f" {option}" in text or f"[{option}" in text


@pytest.mark.parametrize(
    ("command", "doc"),
    [
        ("train", "--config str YAML or JSON file with config fields"),
        ("train", "--layer int Layer whose attention is decomposed. (default: 23)"),
        ("train", "--sae.d_query int Number of query features. (default: 2400)"),
        ("train", "--mask.n_pairs int Pairs left at the end, at most. (default: 50000)"),
        ("evaluate", "Name (see `list`) or folder."),
        ("evaluate", "--n_tokens int Tokens to evaluate on, whole rows. (default: 8192)"),
        ("report", "--limits.contexts int Contexts per feature. (default: 8)"),
    ],
)
def test_help_explains_options(command, doc, capsys):
    assert doc in help_text(command, capsys)


def test_help_shows_the_values_of_the_config_file(config, capsys):
    text = help_text(f"train --config {config}", capsys)
    assert "--mask.n_pairs int Pairs left at the end, at most. (default: 150)" in text


def test_help_lists_the_commands(capsys):
    assert f"[--debug] {{{COMMANDS}}}" in help_text("", capsys)
    assert run("--debug") == 2
    assert f"[--debug] {{{COMMANDS}}}" in capsys.readouterr().out


def test_debug_shows_where_an_error_comes_from(capsys):
    with pytest.raises(ValueError, match="There is no dictionary 'nowhere'"):
        run("--debug evaluate nowhere")
    assert run("evaluate nowhere") == 2
    assert "There is no dictionary 'nowhere'" in one_line(capsys)


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("sae_lens_qk: ")
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evalute", f"unknown command 'evalute': use one of {COMMANDS.replace(',', ', ')}"),
        ("train --laier 3", "unrecognized arguments: --laier 3"),
        ("train --layer three", "invalid int value: 'three'"),
        ("train --sae.activation gelu", "invalid choice: 'gelu'"),
        ("train --config", "argument --config: expected one argument"),
        ("train --config nowhere.yaml", "There is no config file nowhere.yaml"),
        ("train --mask.n_candidates 3", "must be at least mask.n_pairs, got 3 and 50000"),
        ("evaluate", "the following arguments are required"),
        ("evaluate nowhere", "There is no dictionary 'nowhere'"),
        ("evaluate nowhere --tokens 3", "unrecognized arguments: --tokens 3"),
        ("evaluate nowhere --save", "--save needs a dictionary's folder"),
        ("report --limits.cells 0", "cells must be at least 1, got 0"),
    ],
)
def test_mistakes_take_one_line(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(line) == 2
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
    assert run(f"train --config {path}") == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layer 7", "layer must lie in [0, 1], got 7"),
        ("--dataset_path nowhere.parquet", "There is no file nowhere.parquet (dataset_path)"),
        ("--dataset_path $QK_UNSET/texts.parquet", "an environment variable that is not set"),
        ("--text_column words", "has the columns ['text'], not 'words': set text_column"),
        ("--model_name nobody/nothing", "huggingface.co"),
    ],
)
def test_runs_that_cannot_start_take_one_line(config, options, message, capfd):
    assert run(f"train --config {config} {options}") == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("sae_lens_qk: ")
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)
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
def test_push_then_load_by_name(
    hub, token, hub_cache, folder, dtype, tmp_path, capsys, monkeypatch
):
    options = f"--dtype {dtype} --private --commit_message Ours"
    assert run(f"push {folder} {REPO} {FOLDER} {options}") == 0
    url, title, entry = capsys.readouterr().out.split("\n", 2)
    newest = hub.commits(REPO)[0]
    sums = newest.files[f"{FOLDER}/{SUMS}"]
    assert url == f"{hub.url}/{REPO}/commit/{newest.oid}"
    assert title == "for a registry:"
    assert newest.message == "Ours"
    assert yaml.safe_load(entry)[FOLDER] == {
        "status": "published",
        "repo": REPO,
        "folder": FOLDER,
        "revision": newest.oid,
        "sha256": sha256(sums).hexdigest(),
    }

    add_registry(tmp_path, entry, monkeypatch)
    d = qk.BilinearQKDictionary.from_pretrained(FOLDER, dtype=None, cache_dir=hub_cache)
    stored = qk.BilinearQKDictionary.load_from_disk(folder)
    assert same(d, stored if dtype == "stored" else stored.to(torch.float16))


def add_registry(tmp_path, entry, monkeypatch) -> None:
    """A registry file with a published entry and its recipe."""
    recipes = tmp_path / "own" / "recipes"
    recipes.mkdir(parents=True)
    (recipes / f"{FOLDER}.yaml").write_text("model_name: gpt2\nlayer: 1")
    registry = recipes.parent / "registry.yaml"
    registry.write_text(entry)
    monkeypatch.setenv("SAE_LENS_QK_REGISTRY", str(registry))


def test_list_shows_every_dictionary(tmp_path, capsys, monkeypatch):
    place = {"repo": REPO, "folder": FOLDER, "revision": 40 * "0", "sha256": 64 * "0"}
    entry = yaml.safe_dump({FOLDER: {"status": "published", **place}})
    add_registry(tmp_path, entry, monkeypatch)
    assert run(f"list --output {tmp_path}/table.csv") == 0
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if FOLDER in line]
    assert {"gpt2", "published"} <= set(row.split())
    for name, status in qk.pretrained_dictionaries()[["name", "status"]].to_numpy():
        notice = f"{name} is not published yet; this trains it: "
        command = f"python -m sae_lens_qk train --config {name}"
        assert (notice + command in printed) == (status == "unpublished")
    table = pd.read_csv(tmp_path / "table.csv").set_index("name")
    assert table.loc[FOLDER, "repo"] == REPO


def test_push_as_a_pull_request(hub, token, folder, capsys):
    hub.create_repo(REPO)
    assert run(f"push {folder} {REPO} {FOLDER} --create_pr True --revision dev") == 0
    pull = hub.commits(REPO, "refs/pr/1")[0]
    url, entry = capsys.readouterr().out.split("\nfor a registry:\n")
    assert url == f"{hub.url}/{REPO}/discussions/1"
    assert yaml.safe_load(entry)[FOLDER]["revision"] == pull.oid
    assert len(hub.commits(REPO, "main")) == 1
    assert len(hub.commits(REPO, "dev")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required"),
        (f"{{folder}} {REPO}", "the following arguments are required"),
        (f"{{folder}} {REPO} {FOLDER} --dtype int8", "invalid choice: 'int8'"),
        (f"nowhere {REPO} {FOLDER}", "There is no dictionary 'nowhere'"),
        (f"gpt2-small-L2 {REPO} {FOLDER}", "gpt2-small-L2 is not published yet"),
        (f"{{folder}} {REPO} ../x", "must be a plain path inside the repository"),
        (f"{{folder}} org/repo/x {FOLDER}", "Repo id must be in the form"),
        (f"{{folder}} stranger/repo {FOLDER}", "refuses this token for stranger/repo (403)"),
    ],
)
def test_a_push_that_cannot_be_takes_one_line(hub, token, folder, arguments, message, capsys):
    assert run(f"push {arguments.format(folder=folder)}") == 2
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
    assert run(f"push {folder} {REPO} {FOLDER}") == 2
    assert message in one_line(capsys)


def test_a_push_to_a_hub_that_is_gone_takes_one_line(hub, token, folder, capsys, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: None))
    hub.stop()
    assert run(f"push {folder} {REPO} {FOLDER}") == 2
    assert "The Hub cannot be reached for org/repo" in one_line(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no registry file"),
        ("- 1", "is not a registry of dictionaries"),
        ("a: [1,", "is not a registry of dictionaries"),
        ("a: {status: nope}", "Registry entry a: status must be one of ('shipped', "),
        ("a: {status: published, repo: org/repo}", "entry a is published: folder must match"),
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


@pytest.mark.slow
def test_the_process_exits_with_2():
    process = subprocess.run(
        [sys.executable, "-m", "sae_lens_qk", "evalute"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("sae_lens_qk: unknown command 'evalute': use one of train,")


@pytest.fixture(scope="module")
def saved(gpt2_folder, tmp_path_factory) -> Path:
    """A dictionary of the tiny model in a folder."""
    folder = tmp_path_factory.mktemp("dictionary")
    model = qk.load_model(str(gpt2_folder))
    d = tiny_dictionary(model, model_name=str(gpt2_folder))
    generator = torch.Generator().manual_seed(0)
    measured = torch.rand(len(d.feature_map), 2, generator=generator)
    d.feature_map.statistics[:, [0, 2]] = measured  # importance and co-occurrence
    d.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def prompt(saved) -> qk.RecordedPrompt:
    d = qk.BilinearQKDictionary.from_pretrained(str(saved))
    return qk.RecordedPrompt.record(d, qk.load_model(d), "w[h9b")


def attribution(prompt, *position):
    return qk.attribute(prompt.dictionary, prompt.model, prompt, *position)


def test_explain_shows_one_attention_weight_and_writes_it(saved, prompt, tmp_path, capsys):
    output = tmp_path / "terms.json"
    options = f"--dictionary {saved} --head 1 --query -1 --key h --output {output}"
    assert run(f"explain w[h9b {options}") == 0
    printed = capsys.readouterr().out
    expected = attribution(prompt, 1, -1, prompt.words.index("h"))
    assert str(expected) in printed
    assert "supporting pairs" in printed
    assert "where each head looks" not in printed
    assert f"{expected.top(1)['pattern_effect'].iloc[0]:+.3f}" in printed
    assert json.loads(output.read_text()) == json.loads(expected.to_json())


def test_explain_finds_a_head_and_a_key_itself(saved, prompt, capsys):
    assert run(f"explain w[h9b --dictionary {saved} --source transcoders") == 0
    printed = capsys.readouterr().out
    heads = overview(prompt)
    head = int(heads["attention"].idxmax())
    assert "where each head looks" in printed
    assert f"head {head}: " in printed
    assert f"attends to {heads['key'][head]!r} ({heads['key_pos'][head]})" in printed


def test_explain_checks_and_writes_the_check(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SAE_LENS_QK_CACHE", str(tmp_path))
    output = tmp_path / "terms.json"
    assert run(f"explain w[h9b --dictionary {saved} --head 1 --check --output {output}") == 0
    verdict = json.loads(output.read_text())["check"]["verdict"]
    assert f"the explanation {verdict}" in capsys.readouterr().out


def test_explain_reads_a_prompt_from_a_file(saved, tmp_path, capsys):
    path = tmp_path / "prompt.txt"
    path.write_text("w[h9b")
    assert run(f"explain {path} --dictionary {saved} --head 0") == 0
    assert "head 0: 'b'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--key Zeus", "The token 'Zeus' is not among"),
        ("--head 9", "head must lie in [0, 2], got 9"),
        ("--query 1 --key 4 --head 0", "got query 1 and key 4"),
    ],
)
def test_explain_says_what_is_wrong(saved, capsys, options, message):
    assert run(f"explain w[h9b --dictionary {saved} {options}") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "dashboard"])
def test_report_writes_a_file(saved, tmp_path, capsys, command):
    output = tmp_path / "report.html"
    text = f"--n_tokens 230 --context_size 23 --statistics {tmp_path / 'statistics'}"
    limits = "--limits.features 20 --limits.pairs 30 --checks 0"
    options = f"--dictionary {saved} {text} {limits} --output {output}"
    assert run(f"{command} --prompts w[h9b bh {options}") == 0
    printed = capsys.readouterr()
    assert f"wrote {output}" in printed.out
    renamed = "sae_lens_qk: the command dashboard is now report"
    assert (renamed in printed.err) == (command == "dashboard")
    html = output.read_text()
    assert html.startswith("<!doctype html>")
    assert "Prompts</a>" in html
    statistics = ActivationStatistics.load(tmp_path / "statistics")
    assert statistics.tokens.shape == (10, 23)
