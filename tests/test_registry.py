"""The registry: its table is true, one's own entries come on top, nothing malformed passes."""

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import sae_lens_qk as qk
from sae_lens_qk.__main__ import main
from sae_lens_qk.host.models import shipped_folder
from sae_lens_qk.pretrained.checksums import verify_folder
from sae_lens_qk.pretrained.registry import Entry, headline_metrics, recipe_file, registry

METRICS = ["pattern_kl", "ce_recovered", "logit_kl_recovered"]
COLUMNS = [
    "name",
    "model",
    "layer",
    "status",
    "d_query",
    "d_key",
    "n_pairs",
    *METRICS,
    "repo",
    "revision",
    "command",
]
PUBLISHED = {
    "status": "published",
    "repo": "org/repo",
    "folder": "mine",
    "revision": 20 * "a1",
    "sha256": 32 * "b2",
    "metrics": {"pattern_kl": 0.25, "ce_recovered": 0.75},
}
RECIPE = {
    "model_name": "gpt2-small",
    "layer": 3,
    "sae": {"d_query": 29, "d_key": 31},
    "mask": {"n_pairs": 37, "n_candidates": 41},
}
SHIPPED = [name for name, entry in registry().items() if entry.status == "shipped"]
UNPUBLISHED = [name for name, entry in registry().items() if entry.status == "unpublished"]

Own = Callable[..., Path]


@pytest.fixture
def own(tmp_path, monkeypatch) -> Own:
    """Write a registry of one's own (text, or entries), and name it in the environment.

    Recipes go into the folder next to it.
    """

    def write(content: str | dict[str, Any], **recipes: dict[str, Any]) -> Path:
        file = tmp_path / "own" / "mine.yaml"
        (file.parent / "recipes").mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        for name, values in recipes.items():
            (file.parent / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(values))
        monkeypatch.setenv("SAE_LENS_QK_REGISTRY", str(file))
        return file

    return write


def row(name: str) -> dict[str, Any]:
    table = qk.pretrained_dictionaries().set_index("name")
    assert table.index.is_unique
    return table.loc[name].to_dict()


def test_what_the_package_knows():
    assert SHIPPED == [
        "smollm2-135m-instruct-L23",
        "smollm2-135m-instruct-L17",
        "smollm2-135m-instruct-L1",
        "gpt2-3m-L2",
    ]
    assert UNPUBLISHED == [
        "gpt2-small-L2",
        "gpt2-small-L6",
        "gpt2-small-L10",
        "gpt2-small-L2-batchtopk",
        "gpt2-small-L6-batchtopk",
        "gpt2-small-L10-batchtopk",
    ]
    for name, entry in registry().items():
        assert (entry.name, entry.recipe) == (name, shipped_folder() / "recipes" / f"{name}.yaml")


def test_the_table_has_a_row_for_every_entry():
    table = qk.pretrained_dictionaries()
    assert list(table.columns) == COLUMNS
    assert dict(zip(table["name"], table["status"], strict=True)) == {
        name: entry.status for name, entry in registry().items()
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_row_is_what_its_folder_holds(name):
    folder = shipped_folder() / name
    config = json.loads((folder / "cfg.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    shipped = row(name)
    assert shipped["model"] == config["model_name"]
    for column in ("layer", "d_query", "d_key", "n_pairs"):
        assert shipped[column] == config[column]
    for metric in METRICS:
        assert shipped[metric] == metrics["sources"]["feature_map"][metric]["value"]
    assert shipped["repo"] is None
    assert shipped["revision"] is None


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_folder_is_verifiable(name):
    verify_folder(shipped_folder() / name, "strict")
    d = qk.BilinearQKDictionary.from_pretrained(name, verify="strict")
    shipped = row(name)
    assert d.cfg.d_query == shipped["d_query"]
    assert d.cfg.d_key == shipped["d_key"]
    assert len(d.feature_map) == shipped["n_pairs"]


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_an_unpublished_row_is_what_its_recipe_asks_for(name):
    recipe = yaml.safe_load((shipped_folder() / "recipes" / f"{name}.yaml").read_text())
    unpublished = row(name)
    assert unpublished["model"] == recipe["model_name"]
    assert unpublished["layer"] == recipe["layer"]
    assert unpublished["d_query"] == recipe["sae"]["d_query"]
    assert unpublished["d_key"] == recipe["sae"]["d_key"]
    assert unpublished["n_pairs"] == recipe["mask"]["n_pairs"]
    for metric in METRICS:
        assert math.isnan(unpublished[metric])
    assert unpublished["command"] == f"python -m sae_lens_qk train --config {name}"


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_an_unpublished_name_says_what_trains_it(name, hub):
    with pytest.raises(ValueError, match="is not published yet") as error:
        qk.BilinearQKDictionary.from_pretrained(name)
    message, command = str(error.value).split(" This trains it: ")
    assert message == f"{name} is not published yet: its weights exist nowhere."
    unpublished = row(name)
    assert command == unpublished["command"]
    recipe = command.split("--config ")[1]
    cfg = qk.BilinearQKRunnerConfig.from_file(recipe_file(recipe))
    assert cfg.model_name == unpublished["model"]
    assert cfg.layer == unpublished["layer"]
    assert hub.requests == []


def test_entries_of_ones_own_come_on_top(own):
    before = registry()
    replaced = {**PUBLISHED, "recipe": "mine.yaml"}
    file = own({"mine": PUBLISHED, "gpt2-small-L6": replaced}, mine=RECIPE)
    entries = registry()
    assert list(entries) == [*before, "mine"]
    for name in before:
        assert (entries[name] != before[name]) == (name == "gpt2-small-L6")
    recipe = file.parent / "recipes" / "mine.yaml"
    for name in ("mine", "gpt2-small-L6"):
        assert entries[name] == Entry(name=name, recipe=recipe, **PUBLISHED)
        published = row(name)
        check_place(published)
        assert published["model"] == "gpt2-small"
        assert published["layer"] == 3
        assert published["d_query"] == 29
        assert published["d_key"] == 31
        assert published["n_pairs"] == 37
        assert published["pattern_kl"] == 0.25
        assert published["ce_recovered"] == 0.75
        assert math.isnan(published["logit_kl_recovered"])


def check_place(published: dict[str, Any]) -> None:
    for column in ("status", "repo", "revision"):
        assert published[column] == PUBLISHED[column]


def test_a_published_entry_needs_no_recipe(own):
    """`push` prints an entry to paste, and there may be none."""
    entry = dict(PUBLISHED)
    del entry["metrics"]
    own({"mine": entry})
    published = row("mine")
    check_place(published)
    for metric in METRICS:
        assert math.isnan(published[metric])
    assert row("gpt2-small-L10")["d_query"] == 2400


def test_the_registry_is_read_when_it_is_asked_for(own, monkeypatch):
    before = registry()
    own({"mine": PUBLISHED})
    assert "mine" in registry()
    own("# nothing yet\n")
    assert registry() == before
    own({"mine": PUBLISHED})
    monkeypatch.setenv("SAE_LENS_QK_REGISTRY", "")
    assert registry() == before


def test_a_command_trains_what_it_names(own, capsys):
    """Of an own entry it names the file, which no other folder has by that name."""
    unpublished = {"status": "unpublished"}
    recipes = {"mine": RECIPE, "gpt2-small-L10": {**RECIPE, "layer": 5}}
    file = own({"mine": unpublished, "gpt2-small-L10": unpublished}, **recipes)
    folder = file.parent / "recipes"
    configs = {
        "mine": (folder / "mine.yaml", 3),
        "gpt2-small-L10": (folder / "gpt2-small-L10.yaml", 5),
        "gpt2-small-L2": ("gpt2-small-L2", 2),
    }
    for name, (config, layer) in configs.items():
        command = registry()[name].command
        assert command == f"python -m sae_lens_qk train --config {config}"
        arguments = shlex.split(command)[3:]
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*arguments, "--help"])
        page = " ".join(capsys.readouterr().out.split())
        assert f"--layer int Layer whose attention is decomposed. (default: {layer})" in page


def test_a_file_comes_before_a_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = shipped_folder() / "recipes" / "gpt2-small-L10.yaml"
    Path("gpt2-small-L10").mkdir()  # as an output folder may be called
    assert recipe_file("gpt2-small-L10") == shipped
    Path("gpt2-small-L10").rmdir()
    Path("gpt2-small-L10").write_text("layer: 3")
    assert recipe_file("gpt2-small-L10") == Path("gpt2-small-L10")
    assert registry()["gpt2-small-L10"].command == f"python -m sae_lens_qk train --config {shipped}"
    assert recipe_file("other.yaml") == recipe_file(Path("other.yaml")) == Path("other.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repo", None),
        ("repo", "gpt2"),
        ("repo", "org/repo/folder"),
        ("folder", ""),
        ("revision", "main"),
        ("revision", 7),
        ("revision", 39 * "a"),
        ("revision", 40 * "A"),
        ("sha256", None),
        ("sha256", 63 * "b"),
    ],
)
def test_a_bad_place_is_refused(name, value, own):
    own({"mine": {**PUBLISHED, name: value}})
    with pytest.raises(ValueError, match=f"^Registry entry mine .*: {name} must match") as error:
        registry()
    assert str(error.value).endswith(f", got {value!r}.")


@pytest.mark.parametrize("name", ["repo", "folder", "revision", "sha256"])
def test_a_published_entry_needs_its_place(name):
    values = {key: value for key, value in PUBLISHED.items() if key != name}
    values |= {"name": "mine", "recipe": Path("mine.yaml")}
    with pytest.raises(ValueError, match=f"{name} must match .*, got None"):
        Entry(**values)
    unpublished = Entry(**{**values, "status": "unpublished"})
    assert unpublished.repo == values.get("repo")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("mine: {status: unpublished", "while parsing a flow mapping .* expected ',' or '}'.*"),
        ("mine:\n  status: unpublished\n layer: 3\n", "while parsing a block mapping .*"),
        ("mine: {status: unpublished, layer: 3}\n", ".* unexpected keyword argument 'layer'"),
        ("mine: {repo: org/repo}\n", ".* missing 1 required .*: 'status'"),
        ("- mine\n", ".+"),
        ("mine\n", ".+"),
        ("mine: unpublished\n", ".+"),
        ("mine:\n", ".+"),
        ("mine: {recipe: 3}\n", ".+"),
    ],
)
def test_a_malformed_registry_is_refused_in_one_line(text, detail, own):
    file = own(text)
    expected = rf"^{re.escape(str(file))} is not a registry of dictionaries \({detail}\)\.$"
    with pytest.raises(ValueError, match=expected):
        registry()


def test_a_missing_registry_is_refused(own):
    file = own("")
    file.unlink()
    expected = f"There is no registry file {file}: $SAE_LENS_QK_REGISTRY must name a YAML file."
    readers = [
        registry,
        qk.pretrained_dictionaries,
        lambda: qk.BilinearQKDictionary.from_pretrained("gpt2-small-L10"),
    ]
    for reader in readers:
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            reader()


def source_metrics(value: float) -> dict[str, Any]:
    return {name: {"value": value, "low": 0.0, "high": 1.0} for name in METRICS}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"transcoders": source_metrics(0.25)}, dict.fromkeys(METRICS, 0.25)),
        (
            {"transcoders": source_metrics(0.25), "feature_map": source_metrics(0.5)},
            dict.fromkeys(METRICS, 0.5),
        ),
        ({"feature_map": {"pattern_kl": {"value": 0.5}}}, {"pattern_kl": 0.5}),
        ({}, {}),
    ],
)
def test_headline_metrics_are_those_of_the_map_where_there_is_one(sources, expected):
    assert headline_metrics({"sources": {**sources, "zero": {"pattern_kl": None}}}) == expected
    assert headline_metrics({}) == {}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"status": "ready"}, "status must be one of"),
        ({"status": "shipped"}, "calls mine shipped: only the package ships"),
        ({"status": "unpublished"}, "names mine, unpublished, and there is no recipe"),
        ({**PUBLISHED, "metrics": None}, "metrics must map some of"),
        ({**PUBLISHED, "metrics": {"pattern_kl": "low"}}, "metrics must map some of"),
        ({**PUBLISHED, "metrics": {"patern_kl": 0.1}}, "metrics must map some of"),
    ],
)
def test_entries_that_could_not_work_are_refused(own, entry, message):
    own({"mine": entry})
    with pytest.raises(ValueError, match=message):
        registry()


def test_sizes_stay_whole_numbers_next_to_unknown_ones(own):
    own({"mine": PUBLISHED})
    table = qk.pretrained_dictionaries().set_index("name")
    assert table["d_query"].isna()["mine"]
    assert str(table["layer"]["gpt2-small-L10"]) == "10"
