"""The registry: every line of its table is true, entries of one's own come on top, and nothing malformed passes."""

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

COLUMNS = [
    "name",
    "model",
    "layer",
    "status",
    "d_query",
    "d_key",
    "n_pairs",
    "pattern_kl",
    "ce_recovered",
    "logit_kl_recovered",
    "repo",
    "revision",
    "command",
]
FIGURES = COLUMNS[7:10]
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
    """Write a registry of one's own (text, or entries), with recipes beside it, and name it in the environment."""

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
    config, metrics = (
        json.loads((shipped_folder() / name / file).read_text())
        for file in ("cfg.json", "metrics.json")
    )
    shown = row(name)
    for column, field in {"model": "model_name"}.items() | {
        c: c for c in ("layer", "d_query", "d_key", "n_pairs")
    }.items():
        assert shown[column] == config[field]
    for figure in FIGURES:
        assert shown[figure] == metrics["sources"]["feature_map"][figure]["value"]
    assert (shown["repo"], shown["revision"]) == (None, None)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_folder_is_verifiable(name):
    verify_folder(shipped_folder() / name, "strict")
    d = qk.BilinearQKDictionary.from_pretrained(name, verify="strict")
    assert (d.cfg.d_query, d.cfg.d_key, len(d.feature_map)) == tuple(
        row(name)[c] for c in ("d_query", "d_key", "n_pairs")
    )


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_an_unpublished_row_is_what_its_recipe_asks_for(name):
    asked = yaml.safe_load((shipped_folder() / "recipes" / f"{name}.yaml").read_text())
    shown = row(name)
    assert (shown["model"], shown["layer"]) == (asked["model_name"], asked["layer"])
    assert (shown["d_query"], shown["d_key"]) == (asked["sae"]["d_query"], asked["sae"]["d_key"])
    assert shown["n_pairs"] == asked["mask"]["n_pairs"]
    assert all(math.isnan(shown[figure]) for figure in FIGURES)
    assert shown["command"] == f"python -m sae_lens_qk train --config {name}"


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_an_unpublished_name_says_what_trains_it(name, hub):
    with pytest.raises(ValueError, match="is not published yet") as error:
        qk.BilinearQKDictionary.from_pretrained(name)
    said, command = str(error.value).split(" This trains it: ")
    assert said == f"{name} is not published yet: its weights exist nowhere."
    assert command == row(name)["command"]
    cfg = qk.BilinearQKRunnerConfig.from_file(recipe_file(command.split("--config ")[1]))
    assert (cfg.model_name, cfg.layer) == (row(name)["model"], row(name)["layer"])
    assert hub.requests == []


def test_entries_of_ones_own_come_on_top(own):
    before = registry()
    replaced = {**PUBLISHED, "recipe": "mine.yaml"}
    file = own({"mine": PUBLISHED, "gpt2-small-L6": replaced}, mine=RECIPE)
    entries = registry()
    assert list(entries) == [*before, "mine"]
    assert {name for name in before if entries[name] != before[name]} == {"gpt2-small-L6"}
    for name in ("mine", "gpt2-small-L6"):
        assert entries[name] == Entry(
            name=name, recipe=file.parent / "recipes" / "mine.yaml", **PUBLISHED
        )
        shown = row(name)
        assert (shown["status"], shown["repo"], shown["revision"]) == (
            "published",
            "org/repo",
            20 * "a1",
        )
        assert (shown["model"], shown["layer"]) == ("gpt2-small", 3)
        assert (shown["d_query"], shown["d_key"], shown["n_pairs"]) == (29, 31, 37)
        assert (shown["pattern_kl"], shown["ce_recovered"]) == (0.25, 0.75)
        assert math.isnan(shown["logit_kl_recovered"])


def test_a_published_entry_needs_no_recipe(own):
    """`push` prints an entry to paste, and there may be none."""
    own({"mine": {key: value for key, value in PUBLISHED.items() if key != "metrics"}})
    shown = row("mine")
    assert (shown["status"], shown["repo"], shown["revision"]) == (
        "published",
        "org/repo",
        20 * "a1",
    )
    assert all(math.isnan(shown[figure]) for figure in FIGURES)
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
    file = own(
        {"mine": {"status": "unpublished"}, "gpt2-small-L10": {"status": "unpublished"}},
        **{"mine": RECIPE, "gpt2-small-L10": {**RECIPE, "layer": 5}},
    )
    for name, layer in (("mine", 3), ("gpt2-small-L10", 5), ("gpt2-small-L2", 2)):
        command = registry()[name].command
        assert command.endswith(name if layer == 2 else f" {file.parent / 'recipes' / name}.yaml")
        program, option, *arguments = shlex.split(command)
        assert (program, option, arguments[:2]) == ("python", "-m", ["sae_lens_qk", "train"])
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*arguments[1:], "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert f"--layer int Layer whose attention is decomposed. (default: {layer})" in shown


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
    ("values", "message"),
    [
        (
            {"status": "ready"},
            r"mine: status must be one of \('shipped', 'published', 'unpublished'\), got 'ready'\.$",
        ),
        (
            {**PUBLISHED, "repo": None},
            r"mine is published: repo must match \[\^/\]\+/\[\^/\]\+, got None\.$",
        ),
        ({**PUBLISHED, "repo": "gpt2"}, "mine is published: repo must match .*, got 'gpt2'"),
        (
            {**PUBLISHED, "repo": "org/repo/folder"},
            "mine is published: repo must match .*, got 'org/repo/folder'",
        ),
        ({**PUBLISHED, "folder": ""}, "mine is published: folder must match .*, got ''"),
        (
            {**PUBLISHED, "revision": "main"},
            "mine is published: revision must match .*, got 'main'",
        ),
        (
            {**PUBLISHED, "revision": 39 * "a"},
            "mine is published: revision must match .*, got 'a{39}'",
        ),
        (
            {**PUBLISHED, "revision": 40 * "A"},
            "mine is published: revision must match .*, got 'A{40}'",
        ),
        (
            {**PUBLISHED, "sha256": None},
            r"mine is published: sha256 must match \[0-9a-f\]\{64\}, got None",
        ),
        ({**PUBLISHED, "sha256": 63 * "b"}, "mine is published: sha256 must match .*, got 'b{63}'"),
    ],
)
def test_wrong_entries_are_refused(values, message, own):
    own({"mine": values})
    with pytest.raises(ValueError, match=f"^Registry entry {message}"):
        registry()


@pytest.mark.parametrize("name", ["repo", "folder", "revision", "sha256"])
def test_a_published_entry_needs_its_place(name):
    values = {key: value for key, value in PUBLISHED.items() if key != name}
    with pytest.raises(
        ValueError, match=f"^Registry entry mine is published: {name} must match .*, got None"
    ):
        Entry(name="mine", recipe=Path("mine.yaml"), **values)
    assert Entry(
        name="mine", recipe=Path("mine.yaml"), **{**values, "status": "unpublished"}
    ).repo == values.get("repo")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("mine: {status: unpublished", "while parsing a flow mapping .* expected ',' or '}'.*"),
        ("mine:\n  status: unpublished\n layer: 3\n", "while parsing a block mapping .*"),
        ("mine: {status: unpublished, layer: 3}\n", ".* unexpected keyword argument 'layer'"),
        ("mine: {repo: org/repo}\n", ".* missing 1 required .*: 'status'"),
        *(
            (text, ".+")
            for text in (
                "- mine\n",
                "mine\n",
                "mine: unpublished\n",
                "mine:\n",
                "mine: {recipe: 3}\n",
            )
        ),
    ],
)
def test_a_malformed_registry_is_refused_in_one_line(text, detail, own):
    file = own(text)
    with pytest.raises(
        ValueError,
        match=rf"^{re.escape(str(file))} is not a registry of dictionaries \({detail}\)\.$",
    ):
        registry()


def test_a_missing_registry_is_refused(own):
    file = own("")
    file.unlink()
    expected = f"There is no registry file {file}: $SAE_LENS_QK_REGISTRY must name a YAML file."
    for read in (
        registry,
        qk.pretrained_dictionaries,
        lambda: qk.BilinearQKDictionary.from_pretrained("gpt2-small-L10"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            read()


def test_headline_metrics_are_those_of_the_map_where_there_is_one():
    interval = {"low": 0.0, "high": 1.0}
    transcoders, feature_map = (
        {name: {"value": value, **interval} for name in FIGURES} for value in (0.25, 0.5)
    )
    both = {
        "sources": {
            "transcoders": transcoders,
            "feature_map": feature_map,
            "zero": {"pattern_kl": None},
        }
    }
    assert headline_metrics(both) == dict.fromkeys(FIGURES, 0.5)
    assert headline_metrics({"sources": {"transcoders": transcoders}}) == dict.fromkeys(
        FIGURES, 0.25
    )
    assert headline_metrics({"sources": {"feature_map": {"pattern_kl": {"value": 0.5}}}}) == {
        "pattern_kl": 0.5
    }
    assert headline_metrics({}) == headline_metrics({"sources": {}}) == {}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"status": "shipped"}, "calls mine shipped: only the package ships"),
        ({"status": "unpublished"}, "names mine, unpublished, and there is no recipe"),
        ({**PUBLISHED, "metrics": None}, "metrics must map some of"),
        ({**PUBLISHED, "metrics": {"pattern_kl": "low"}}, "metrics must map some of"),
        ({**PUBLISHED, "metrics": {"patern_kl": 0.1}}, "metrics must map some of"),
        ({**PUBLISHED, "revision": 7}, "revision must match"),
    ],
)
def test_entries_that_could_not_work_are_refused(own, entry, message):
    own({"mine": entry})
    with pytest.raises(ValueError, match=message):
        registry()


def test_sizes_stay_whole_numbers_beside_unknown_ones(own):
    own({"mine": PUBLISHED})
    listed = qk.pretrained_dictionaries().set_index("name")
    assert listed["d_query"].isna()["mine"]
    assert str(listed["layer"]["gpt2-small-L10"]) == "10"
