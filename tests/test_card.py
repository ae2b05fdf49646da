"""Model cards: headers the Hub can read, the figures as they were measured, code that runs, and nobody's text lost."""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_dictionaries import D_KEY, D_QUERY, N_DEAD, N_PAIRS, tiny_dictionary
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.pretrained.card import FolderSummary, dictionary_card, repository_card

TAGS = ["saelens", "sae", "bilinear-qk", "attention", "interpretability"]
DESCRIPTION = "Trained on *texts*, {{ x }}."
RUN = qk.BilinearQKRunnerConfig(
    seed=7,
    dataset_path="Skylion007/openwebtext",
    card=qk.CardConfig(license="mit", description=DESCRIPTION),
)
BEGIN, END = "<!-- dictionaries: written by push_to_hub -->", "<!-- end of dictionaries -->"


@pytest.fixture(scope="module")
def with_map(gpt2_bridge) -> qk.BilinearQKDictionary:
    d = tiny_dictionary(gpt2_bridge)
    d.metrics = qk.evaluate(d, gpt2_bridge, tiny_tokens(7, 13))
    d.runner_cfg = RUN.to_dict()
    return d


@pytest.fixture(scope="module")
def without_map(llama_bridge) -> qk.BilinearQKDictionary:
    """The transcoders of another model, measured; how they were trained is not known."""
    d = tiny_dictionary(llama_bridge, n_pairs=0, model_name="EleutherAI/pythia-70m")
    d.metrics = qk.evaluate(d, llama_bridge, tiny_tokens(7, 13))
    return d


def card(d: qk.BilinearQKDictionary, **changes: Any) -> ModelCard:
    """The card, read again; it ends with one newline."""
    values = {
        "cfg": d.cfg,
        "metrics": d.metrics,
        "runner_cfg": d.runner_cfg,
        "name": "tiny-L1",
        "source": '"org/repo", "tiny-L1"',
    }
    text = dictionary_card(**{**values, **changes})
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    return ModelCard(text)


def header(made: ModelCard) -> dict[str, Any]:
    return made.data.to_dict()


def table(text: str) -> dict[str, dict[str, str]]:
    """A Markdown table's cells, by first column and heading."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    assert all(len(row) == len(head) for row in rows)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"-?[\d,]*\d(?:\.\d+)?", text)]


def calls(text: str, function: str) -> list[list[str]]:
    """Arguments of a function in the Python blocks of a text, which have to parse."""
    trees = [ast.parse(block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    found = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [
        node
        for node in found
        if isinstance(node.func, ast.Attribute) and node.func.attr == function
    ]
    return [[ast.literal_eval(argument) for argument in node.args] for node in named]


# One dictionary


def test_header(with_map, without_map, hub):
    made = card(with_map)
    assert header(made) == {
        "library_name": "saelens",
        "tags": TAGS,
        "base_model": "tiny",
        "license": "mit",
        "datasets": ["Skylion007/openwebtext"],
    }
    assert header(card(without_map)) == {
        "library_name": "saelens",
        "tags": TAGS,
        "base_model": "EleutherAI/pythia-70m",
    }
    for d in (with_map, without_map):
        card(d).validate()  # by the Hub


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"dataset_path": "org/texts"}, ["org/texts"]),
        (
            {"card": qk.CardConfig(datasets=["a/b", "c/d"]), "dataset_path": "org/texts"},
            ["a/b", "c/d"],
        ),
        *(
            ({"dataset_path": path}, None)
            for path in ("", "$QK_CORPUS/train.parquet", "data/train.parquet", "/data/texts")
        ),
        *(({"dataset_path": path}, None) for path in ("./texts", "../texts", "a/b/c")),
    ],
)
def test_datasets_are_those_on_the_hub(run, expected, with_map):
    made = card(with_map, runner_cfg=replace(RUN, **{"card": qk.CardConfig(), **run}).to_dict())
    assert header(made).get("datasets") == expected


@pytest.mark.parametrize(
    ("model_name", "expected"),
    [
        ("gpt2-small", "gpt2"),
        ("smollm2-135m-instruct-q4_1", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m"),
        ("/models/mine", None),
    ],
)
def test_base_model_is_the_hubs_name(model_name, expected, with_map):
    made = card(with_map, cfg=replace(with_map.cfg, model_name=model_name))
    assert header(made).get("base_model") == expected
    assert f"of layer 1 of {model_name}:" in made.text


def test_figures_are_the_measured_ones(with_map):
    made, metrics = card(with_map), with_map.metrics
    shown = table(made.text)
    assert list(shown) == ["transcoders", "feature map", "zero", "mean", "uniform", "shuffled"]
    for name, row in shown.items():
        measured = metrics["sources"][name.replace(" ", "_")]
        for column, figure, scale in (
            ("pattern KL (nats)", "pattern_kl", 1),
            ("loss recovered", "ce_recovered", 100),
            ("logit KL recovered", "logit_kl_recovered", 100),
        ):
            interval = measured[figure]
            expected = (
                [scale * interval[bound] for bound in ("value", "low", "high")] if interval else []
            )
            assert numbers(
                row[column].replace("-", "") if not interval else row[column]
            ) == pytest.approx(expected, abs=0.051 if scale == 100 else 5.1e-5)
        agreement = measured["argmax_agreement"]
        assert numbers(row["argmax agreement"]) == (
            [] if agreement is None else [pytest.approx(100 * agreement, abs=0.051)]
        )
    assert (shown["zero"]["pattern KL (nats)"], shown["zero"]["argmax agreement"]) == ("-", "-")


def line(made: ModelCard, start: str) -> list[float]:
    """Numbers of the one line that starts so."""
    (found,) = [text for text in made.text.splitlines() if text.startswith(start)]
    return numbers(found)


def test_sizes_are_the_measured_ones(with_map):
    made, metrics = card(with_map), with_map.metrics
    features, pairs = metrics["features"], metrics["feature_map"]
    assert line(made, "Measured on") == [
        7 * 13,
        7,
        pytest.approx(metrics["ce_clean"], abs=5.1e-5),
        95,
    ]
    assert line(made, "Active features") == pytest.approx(
        [features[name] for name in ("l0_query", "l0_key", "live_query", "live_key")], abs=0.051
    )
    assert line(made, "Pairs:") == [
        pytest.approx(100 * (1 - pairs["sparsity_of_all"]), abs=5.1e-4),
        pytest.approx(100 * (1 - pairs["sparsity_of_live"]), abs=5.1e-4),
        pytest.approx(pairs["active_pairs"], abs=0.51),
    ]
    about = made.text.split("\n\n")[1]
    assert f"of the attention of layer 1 of tiny: {D_QUERY} query features" in about
    assert (
        f"{D_KEY} key features, and the {N_PAIRS} feature pairs over 3 heads that carry its pattern"
        in about
    )
    assert "Stored in float32." in about


def test_large_numbers_have_separators(with_map):
    made = card(with_map, cfg=replace(with_map.cfg, d_query=2400, d_key=19_200, n_pairs=50_000))
    assert "2,400 query features" in made.text
    assert "19,200 key features, and the 50,000 feature pairs" in made.text


def test_without_a_map_there_is_nothing_about_pairs(without_map):
    made = card(without_map)
    assert f"{D_KEY} key features (no feature map)." in made.text
    assert list(table(made.text)) == ["transcoders", "zero", "mean", "uniform", "shuffled"]
    assert "airs" not in made.text


def test_what_is_not_known_is_said(with_map):
    made = card(with_map, metrics=None, runner_cfg=None)
    assert (
        "## Metrics\n\nNot measured yet: `d.metrics = qk.evaluate(d, model, tokens)`" in made.text
    )
    assert "## Training\n\nNot recorded.\n" in made.text
    assert "|" not in made.text
    assert header(made) == {"library_name": "saelens", "tags": TAGS, "base_model": "tiny"}


def test_the_description_stands_under_the_heading(with_map):
    before, _ = card(with_map).text.split(DESCRIPTION)
    assert "\n# tiny-L1\n" in before
    assert "```" not in before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {},
            "Step 1, transcoders: batchtopk with k = 16.0, 5,000,000 tokens, 2,048 per step, learning rate 0.004 "
            "(cosineannealing), data initialisation.\nStep 2, mask: 1,000,000 tokens, from 200,000 candidates to at most "
            "50,000 pairs.\nData: `Skylion007/openwebtext`, rows of 256 tokens, BOS first. Seed 7.",
        ),
        (
            {
                "sae": qk.TranscodersTrainingConfig(
                    d_in=1, activation="relu", initialization="kaiming"
                )
            },
            "transcoders: relu with the sqrt penalty at 0.0031, 5,000,000 tokens, 2,048 per step, learning rate 0.004 "
            "(cosineannealing), kaiming initialisation.",
        ),
        (
            {"mask": qk.MaskStepConfig(fine_tune_lr=3e-4)},
            "50,000 pairs, transcoders tuned along at learning rate 0.0003.\n",
        ),
        (
            {"mask": qk.MaskStepConfig(train_batch_size_tokens=512)},
            "Step 2, mask: 1,000,000 tokens, 512 per step, from 200,000 candidates",
        ),
        ({"mask": qk.MaskStepConfig(training_tokens=0)}, "data initialisation.\nData: "),
        ({"from_pretrained_path": "org/tiny"}, "the transcoders of `org/tiny`.\nStep 2, mask: "),
        (
            {"dataset_path": "", "prepend_bos": False},
            "Data: `given in code`, rows of 256 tokens. Seed 7.",
        ),
    ],
    ids=["both steps", "relu", "tuned", "batch of step 2", "step 1", "step 2", "data in code"],
)
def test_training_is_told(changes, said, with_map):
    told = card(with_map, runner_cfg=replace(RUN, **changes).to_dict()).text.split(
        "## Training\n\n"
    )[1]
    assert said in told
    assert ("Step 1, transcoders" in told) == ("from_pretrained_path" not in changes)
    assert "\n\n\n" not in told


def test_settings_of_saelenss_own_runner_are_accepted(with_map):
    """Which knows no second step; its `runner_cfg.json` is read with the dictionary."""
    stock = {
        name: value
        for name, value in RUN.to_dict().items()
        if name not in ("mask", "card", "from_pretrained_path")
    }
    assert "5,000,000 tokens" in card(with_map, runner_cfg=stock).text


def test_compaction_is_told(with_map):
    assert "query_numbers" not in card(with_map).text
    live = torch.arange(D_QUERY) < D_QUERY - N_DEAD, torch.arange(D_KEY) < D_KEY - N_DEAD
    made = card(with_map.compact(*live))
    assert f"{D_QUERY - N_DEAD} query features" in made.text
    assert f"{D_QUERY} query and {D_KEY} key features were trained" in made.text
    assert "`cfg.query_numbers` and `cfg.key_numbers` hold the old numbers." in made.text


@pytest.mark.parametrize(
    "source", [["org/repo", "folder/tiny-L1"], ["gpt2-small-L10"], ["path/to/tiny-L1"]]
)
def test_the_snippet_names_the_source(source, with_map, without_map):
    for d in (with_map, without_map):
        made = card(d, source=", ".join(f'"{part}"' for part in source))
        assert calls(made.text, "from_pretrained") == [source]


def test_the_snippet_runs(with_map, without_map, tmp_path, gpt2_bridge, llama_bridge, monkeypatch):
    for d, model in ((with_map, gpt2_bridge), (without_map, llama_bridge)):
        d.save_model(tmp_path)
        text = card(d, source=repr(str(tmp_path))).text
        monkeypatch.setattr(qk, "load_model", lambda loaded, model=model: model)
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        found: dict[str, Any] = {}
        exec(code, found)
        assert found["logits"].shape[-1] == model.cfg.d_vocab
        assert ("pairs" in found) == d.has_feature_map


def test_a_saved_folder_has_its_card(with_map, tmp_path):
    with_map.save_model(tmp_path / "mine")
    expected = dictionary_card(
        with_map.cfg, with_map.metrics, with_map.runner_cfg, "mine", '"path/to/mine"'
    )
    assert (tmp_path / "mine" / "README.md").read_text() == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"metrics": {"pattern_kl": 0.25}},
        {"metrics": {"sources": None}},
        {"runner_cfg": {"seed": 7}},
        {"runner_cfg": {"card": "mit"}},
    ],
    ids=str,
)
def test_figures_and_settings_of_another_shape_are_refused(wrong, with_map):
    with pytest.raises(
        ValueError,
        match=r"^metrics must be .*evaluate\(...\)\.to_dict\(\).*, runner_cfg .* \(.+\)\.$",
    ):
        card(with_map, **wrong)


# A repository


@pytest.fixture(scope="module")
def listed(with_map, without_map) -> dict[str, FolderSummary]:
    return {
        "b/wide": FolderSummary(
            str(card(with_map)), with_map.cfg.to_dict(), json.loads(json.dumps(with_map.metrics))
        ),
        "a": FolderSummary(str(card(without_map)), without_map.cfg.to_dict(), without_map.metrics),
    }


def repository(existing: str | None, folders: Mapping[str, FolderSummary]) -> ModelCard:
    """The card, read again; writing it once more changes nothing, and there is one section."""
    text = repository_card(existing, "org/repo", folders)
    assert repository_card(text, "org/repo", folders) == text
    assert (
        text.count(BEGIN)
        == text.count(END)
        == text.count("QK dictionaries, loaded by folder:")
        == 1
    )
    assert text.index(BEGIN) < text.index("QK dictionaries") < text.index(END)
    return ModelCard(text)


def test_a_new_repository(listed, with_map, without_map, hub):
    made = repository(None, listed)
    made.validate()
    assert header(made) == {
        "library_name": "saelens",
        "tags": TAGS,
        "base_model": ["EleutherAI/pythia-70m", "tiny"],
        "license": "mit",
        "datasets": ["Skylion007/openwebtext"],
    }
    assert made.text.startswith(f"\n# repo\n\n{BEGIN}\n")
    assert made.text.endswith(f"{END}\n")
    assert calls(made.text, "from_pretrained") == [["org/repo", "a"]]
    shown = table(made.text)
    assert list(shown) == ["[a](a/README.md)", "[b/wide](b/wide/README.md)"]
    for row, d, source in zip(
        shown.values(), (without_map, with_map), ("transcoders", "feature_map"), strict=True
    ):
        assert (row["model"], row["layer"]) == (d.cfg.model_name, "1")
        assert numbers(row["features (query / key)"]) == [D_QUERY, D_KEY]
        assert numbers(row["pairs"]) == [len(d.feature_map)]
        measured = d.metrics["sources"][source]
        assert numbers(row["pattern KL"]) == [
            pytest.approx(measured["pattern_kl"]["value"], abs=5.1e-5)
        ]
        for column, figure in (
            ("loss recovered", "ce_recovered"),
            ("logit KL recovered", "logit_kl_recovered"),
        ):
            assert numbers(row[column]) == [
                pytest.approx(100 * measured[figure]["value"], abs=0.051)
            ]


def test_the_order_of_folders_does_not_matter(listed):
    assert repository_card(None, "org/repo", dict(reversed(listed.items()))) == repository_card(
        None, "org/repo", listed
    )


def test_dictionaries_come_and_go(listed):
    """The section is written anew; what stands around it stays."""
    first = repository(None, {"a": listed["a"]})
    around = str(first).replace("# repo\n", "# repo\n\nBefore.\n") + "\nAfter.\n"
    both = repository(around, listed)
    assert list(table(both.text)) == ["[a](a/README.md)", "[b/wide](b/wide/README.md)"]
    again = repository(str(both), {"a": listed["a"]})
    assert again.text == ModelCard(around).text
    assert both.text.startswith("\n# repo\n\nBefore.\n")
    assert both.text.endswith(f"{END}\n\nAfter.\n")


OWN = """---
license: apache-2.0
language: [en, de]
tags: mine
datasets: [own/texts, Skylion007/openwebtext]
custom: {deep: [1, 2]}
---
# Ours

Words, `code`, | tables |, --- and {{ braces }}.
"""


@pytest.mark.parametrize("own", [OWN, OWN.split("---\n", 2)[2], "---\n---\n# Ours\n", "Ours", "\n"])
def test_a_readme_keeps_its_text_and_header(own, listed):
    made, theirs = repository(own, listed), ModelCard(own)
    assert made.text.startswith(theirs.text.rstrip())
    found = header(made)
    if own is OWN:
        assert (found["license"], found["language"], found["custom"]) == (
            "apache-2.0",
            ["en", "de"],
            {"deep": [1, 2]},
        )
        assert found["tags"] == ["mine", *TAGS]
        assert found["datasets"] == ["own/texts", "Skylion007/openwebtext"]
    else:
        assert (found["license"], found["tags"]) == ("mit", TAGS)
    assert found["base_model"] == ["EleutherAI/pythia-70m", "tiny"]


@pytest.mark.parametrize("mark", [BEGIN, END])
def test_a_lost_mark_doubles_nothing(mark, listed):
    made = repository(f"# Ours\n\nOnce.\n\n{mark}\n\nAfter.\n", listed)
    assert made.text.count("Once.") == made.text.count("After.") == 1


DAMAGED = {
    "nothing": {},
    "no sources": {"sources": {}},
    "sources null": {"sources": None},
    "figure null": {"sources": {"feature_map": {"pattern_kl": None}}},
    "figure number": {"sources": {"feature_map": {"pattern_kl": 0.25}}},
    "figure text": {"sources": {"feature_map": {"pattern_kl": {"value": "low"}}}},
    "source text": {"sources": {"feature_map": "pattern_kl"}},
}


@pytest.mark.parametrize("metrics", [None, *DAMAGED.values()], ids=["none", *DAMAGED])
def test_damaged_figures_are_left_out(metrics, listed):
    """Of somebody else's folder, which must not stop a push."""
    shown = table(repository(None, {**listed, "a": listed["a"]._replace(metrics=metrics)}).text)
    damaged, good = shown["[a](a/README.md)"], shown["[b/wide](b/wide/README.md)"]
    for figure in ("pattern KL", "loss recovered", "logit KL recovered"):
        assert damaged[figure] == "-"
        assert numbers(good[figure])


def test_a_folder_without_a_card_is_listed(listed):
    made = repository(None, {**listed, "a": listed["a"]._replace(card="")})
    assert "[a](a/README.md)" in table(made.text)
    assert header(made)["base_model"] == ["tiny"]
