"""Model cards: headers the Hub can read, metrics as evaluated, code that runs, no text lost."""

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
BEGIN = "<!-- dictionaries: written by push_to_hub -->"
END = "<!-- end of dictionaries -->"


@pytest.fixture(scope="module")
def mapped(gpt2_bridge) -> qk.BilinearQKDictionary:
    d = tiny_dictionary(gpt2_bridge)
    d.metrics = qk.evaluate(d, gpt2_bridge, tiny_tokens(7, 13))
    d.runner_cfg = RUN.to_dict()
    return d


@pytest.fixture(scope="module")
def unmapped(llama_bridge) -> qk.BilinearQKDictionary:
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


def header(model_card: ModelCard) -> dict[str, Any]:
    return model_card.data.to_dict()


def table(text: str) -> dict[str, dict[str, str]]:
    """A Markdown table's cells, by first column and heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = rows[0][1:]
    return {row[0]: dict(zip(columns, row[1:], strict=True)) for row in rows[2:]}


def numbers(text: str) -> list[float]:
    digits = re.findall(r"-?[\d,]*\d(?:\.\d+)?", text)
    return [float(number.replace(",", "")) for number in digits]


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def loading_arguments(text: str) -> list[list[str]]:
    """Arguments of every `from_pretrained` in the Python blocks, which have to parse."""
    arguments = []
    for snippet in snippets(text):
        for node in ast.walk(ast.parse(snippet)):
            is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_method and node.func.attr == "from_pretrained":
                arguments.append([ast.literal_eval(argument) for argument in node.args])
    return arguments


# One dictionary


def test_header(mapped, unmapped, hub):
    model_card = card(mapped)
    assert header(model_card) == {
        "library_name": "saelens",
        "tags": TAGS,
        "base_model": "tiny",
        "license": "mit",
        "datasets": ["Skylion007/openwebtext"],
    }
    assert header(card(unmapped)) == {
        "library_name": "saelens",
        "tags": TAGS,
        "base_model": "EleutherAI/pythia-70m",
    }
    for d in (mapped, unmapped):
        card(d).validate()  # by the Hub


OTHER_PATHS = [
    "",
    "$QK_CORPUS/train.parquet",
    "data/train.parquet",
    "/data/texts",
    "./texts",
    "../texts",
    "a/b/c",
]


@pytest.mark.parametrize(
    ("path", "about", "expected"),
    [
        ("org/texts", qk.CardConfig(), ["org/texts"]),
        ("org/texts", qk.CardConfig(datasets=["a/b", "c/d"]), ["a/b", "c/d"]),
        *((path, qk.CardConfig(), None) for path in OTHER_PATHS),
    ],
)
def test_datasets_are_those_on_the_hub(path, about, expected, mapped):
    run = replace(RUN, dataset_path=path, card=about)
    model_card = card(mapped, runner_cfg=run.to_dict())
    assert header(model_card).get("datasets") == expected


@pytest.mark.parametrize(
    ("model_name", "expected"),
    [
        ("gpt2-small", "gpt2"),
        ("smollm2-135m-instruct-q4_1", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m"),
        ("/models/mine", None),
    ],
)
def test_base_model_is_the_hubs_name(model_name, expected, mapped):
    model_card = card(mapped, cfg=replace(mapped.cfg, model_name=model_name))
    assert header(model_card).get("base_model") == expected
    assert f"of layer 1 of {model_name}:" in model_card.text


def percentages(interval: dict[str, float]) -> list[float]:
    return [100 * interval[bound] for bound in ("value", "low", "high")]


def test_the_table_shows_what_evaluate_returned(mapped):
    rows = table(card(mapped).text)
    names = ["transcoders", "feature map", "zero", "mean", "uniform", "shuffled"]
    assert list(rows) == names
    for name, row in rows.items():
        source = mapped.metrics["sources"][name.replace(" ", "_")]
        loss_recovered = percentages(source["ce_recovered"])
        logit_kl_recovered = percentages(source["logit_kl_recovered"])
        assert numbers(row["loss recovered"]) == pytest.approx(loss_recovered, abs=0.051)
        assert numbers(row["logit KL recovered"]) == pytest.approx(logit_kl_recovered, abs=0.051)
        if name == "zero":  # which has no pattern
            assert row["pattern KL (nats)"] == "-"
            assert row["argmax agreement"] == "-"
            continue
        kl = [source["pattern_kl"][bound] for bound in ("value", "low", "high")]
        assert numbers(row["pattern KL (nats)"]) == pytest.approx(kl, abs=5.1e-5)
        agreement = [100 * source["argmax_agreement"]]
        assert numbers(row["argmax agreement"]) == pytest.approx(agreement, abs=0.051)


def line_numbers(
    model_card: ModelCard,
    start: str,
) -> list[float]:
    """Numbers of the one line that starts so."""
    (line,) = [line for line in model_card.text.splitlines() if line.startswith(start)]
    return numbers(line)


def test_sizes_are_those_that_evaluate_counted(mapped):
    model_card = card(mapped)
    metrics = mapped.metrics
    features = metrics["features"]
    pairs = metrics["feature_map"]
    loss = pytest.approx(metrics["ce_clean"], abs=5.1e-5)
    assert line_numbers(model_card, "Measured on") == [7 * 13, 7, loss, 95]
    counts = [features[name] for name in ("l0_query", "l0_key", "live_query", "live_key")]
    assert line_numbers(model_card, "Active features") == pytest.approx(counts, abs=0.051)
    share, live_share, active = line_numbers(model_card, "Pairs:")
    assert share == pytest.approx(100 * (1 - pairs["sparsity_of_all"]), abs=5.1e-4)
    assert live_share == pytest.approx(100 * (1 - pairs["sparsity_of_live"]), abs=5.1e-4)
    assert active == pytest.approx(pairs["active_pairs"], abs=0.51)


def test_the_first_paragraph_says_what_it_is(mapped):
    paragraph = card(mapped).text.split("\n\n")[1]
    assert f"of the attention of layer 1 of tiny: {D_QUERY} query features" in paragraph
    assert f"{D_KEY} key features, and the {N_PAIRS} feature pairs over 3 heads" in paragraph
    assert "Stored in float32." in paragraph


def test_large_numbers_have_separators(mapped):
    model_card = card(
        mapped,
        cfg=replace(
            mapped.cfg,
            d_query=2400,
            d_key=19_200,
            n_pairs=50_000,
        ),
    )
    assert "2,400 query features" in model_card.text
    assert "19,200 key features, and the 50,000 feature pairs" in model_card.text


def test_without_a_map_there_is_nothing_about_pairs(unmapped):
    model_card = card(unmapped)
    assert f"{D_KEY} key features (no feature map)." in model_card.text
    assert list(table(model_card.text)) == ["transcoders", "zero", "mean", "uniform", "shuffled"]
    assert "airs" not in model_card.text


def test_what_is_not_known_is_said(mapped):
    model_card = card(mapped, metrics=None, runner_cfg=None)
    assert "## Metrics\n\nNot measured yet: `d.metrics = qk.evaluate(" in model_card.text
    assert "## Training\n\nNot recorded.\n" in model_card.text
    assert "|" not in model_card.text
    assert header(model_card) == {"library_name": "saelens", "tags": TAGS, "base_model": "tiny"}


def test_the_description_stands_under_the_heading(mapped):
    before, _ = card(mapped).text.split(DESCRIPTION)
    assert "\n# tiny-L1\n" in before
    assert "```" not in before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {},
            "Step 1, transcoders: batchtopk with k = 16.0, 5,000,000 tokens, 2,048 per step, "
            "learning rate 0.004 (cosineannealing), data initialisation.\n"
            "Step 2, mask: 1,000,000 tokens, from 200,000 candidates to at most 50,000 pairs.\n"
            "Data: `Skylion007/openwebtext`, rows of 256 tokens, BOS first. Seed 7.",
        ),
        (
            {
                "sae": qk.TranscodersTrainingConfig(
                    d_in=1, activation="relu", initialization="kaiming"
                )
            },
            "transcoders: relu with the sqrt penalty at 0.0031, 5,000,000 tokens, 2,048 per step, "
            "learning rate 0.004 (cosineannealing), kaiming initialisation.",
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
def test_the_training_section(changes, text, mapped):
    run = replace(RUN, **changes)
    model_card = card(mapped, runner_cfg=run.to_dict())
    section = model_card.text.split("## Training\n\n")[1]
    assert text in section
    assert ("Step 1, transcoders" in section) == ("from_pretrained_path" not in changes)
    assert "\n\n\n" not in section


def test_settings_of_saelenss_own_runner_are_accepted(mapped):
    """Which knows no second step; its `runner_cfg.json` is read with the dictionary."""
    stock = RUN.to_dict()
    for name in ("mask", "card", "from_pretrained_path"):
        del stock[name]
    assert "5,000,000 tokens" in card(mapped, runner_cfg=stock).text


def test_compaction_is_told(mapped):
    assert "query_numbers" not in card(mapped).text
    live_query = torch.arange(D_QUERY) < D_QUERY - N_DEAD
    live_key = torch.arange(D_KEY) < D_KEY - N_DEAD
    text = card(mapped.compact(live_query, live_key)).text
    assert f"{D_QUERY - N_DEAD} query features" in text
    assert f"{D_QUERY} query and {D_KEY} key features were trained" in text
    assert "`cfg.query_numbers` and `cfg.key_numbers` hold the old numbers." in text


@pytest.mark.parametrize(
    "source", [["org/repo", "folder/tiny-L1"], ["gpt2-small-L10"], ["path/to/tiny-L1"]]
)
def test_the_snippet_names_the_source(source, mapped, unmapped):
    for d in (mapped, unmapped):
        model_card = card(d, source=", ".join(f'"{part}"' for part in source))
        assert loading_arguments(model_card.text) == [source]


def test_the_snippet_runs(mapped, unmapped, tmp_path, gpt2_bridge, llama_bridge, monkeypatch):
    for d, model in ((mapped, gpt2_bridge), (unmapped, llama_bridge)):
        d.save_model(tmp_path)
        text = card(d, source=repr(str(tmp_path))).text
        monkeypatch.setattr(qk, "load_model", lambda dictionary, model=model: model)
        (snippet,) = snippets(text)
        variables: dict[str, Any] = {}
        exec(snippet, variables)
        assert variables["logits"].shape[-1] == model.cfg.d_vocab
        assert ("pairs" in variables) == d.has_feature_map


def test_a_saved_folder_has_its_card(mapped, tmp_path):
    mapped.save_model(tmp_path / "mine")
    expected = dictionary_card(
        mapped.cfg, mapped.metrics, mapped.runner_cfg, "mine", '"path/to/mine"'
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
def test_metrics_and_settings_of_another_shape_are_refused(wrong, mapped):
    with pytest.raises(ValueError, match=r"^metrics must be .*, runner_cfg .* \(.+\)\.$"):
        card(mapped, **wrong)


# A repository


@pytest.fixture(scope="module")
def folders(mapped, unmapped) -> dict[str, FolderSummary]:
    summaries = {}
    for name, d in (("b/wide", mapped), ("a", unmapped)):
        metrics = json.loads(json.dumps(d.metrics))
        summaries[name] = FolderSummary(str(card(d)), d.cfg.to_dict(), metrics)
    return summaries


def repository(
    existing: str | None,
    folders: Mapping[str, FolderSummary],
) -> ModelCard:
    """The card, read again; writing it once more changes nothing, and there is one section."""
    text = repository_card(existing, "org/repo", folders)
    assert repository_card(text, "org/repo", folders) == text
    for once in (BEGIN, END, "QK dictionaries, loaded by folder:"):
        assert text.count(once) == 1
    assert text.index(BEGIN) < text.index("QK dictionaries") < text.index(END)
    return ModelCard(text)


def test_a_new_repository(folders, mapped, unmapped, hub):
    model_card = repository(None, folders)
    model_card.validate()
    assert header(model_card) == {
        "library_name": "saelens",
        "tags": TAGS,
        "base_model": ["EleutherAI/pythia-70m", "tiny"],
        "license": "mit",
        "datasets": ["Skylion007/openwebtext"],
    }
    assert model_card.text.startswith(f"\n# repo\n\n{BEGIN}\n")
    assert model_card.text.endswith(f"{END}\n")
    assert loading_arguments(model_card.text) == [["org/repo", "a"]]
    rows = table(model_card.text)
    assert list(rows) == ["[a](a/README.md)", "[b/wide](b/wide/README.md)"]
    check_row(rows["[a](a/README.md)"], unmapped, "transcoders")
    check_row(rows["[b/wide](b/wide/README.md)"], mapped, "feature_map")


def check_row(
    row: dict[str, str],
    d: qk.BilinearQKDictionary,
    source: str,
) -> None:
    assert row["model"] == d.cfg.model_name
    assert row["layer"] == "1"
    assert numbers(row["features (query / key)"]) == [D_QUERY, D_KEY]
    assert numbers(row["pairs"]) == [len(d.feature_map)]
    metrics = d.metrics["sources"][source]
    kl = metrics["pattern_kl"]["value"]
    loss_recovered = 100 * metrics["ce_recovered"]["value"]
    logit_kl_recovered = 100 * metrics["logit_kl_recovered"]["value"]
    assert numbers(row["pattern KL"]) == [pytest.approx(kl, abs=5.1e-5)]
    assert numbers(row["loss recovered"]) == [pytest.approx(loss_recovered, abs=0.051)]
    assert numbers(row["logit KL recovered"]) == [pytest.approx(logit_kl_recovered, abs=0.051)]


def test_the_order_of_folders_does_not_matter(folders):
    backwards = dict(reversed(folders.items()))
    expected = repository_card(None, "org/repo", folders)
    assert repository_card(None, "org/repo", backwards) == expected


def test_dictionaries_come_and_go(folders):
    """The section is written anew; what stands around it stays."""
    first = repository(None, {"a": folders["a"]})
    around = str(first).replace("# repo\n", "# repo\n\nBefore.\n") + "\nAfter.\n"
    both = repository(around, folders)
    assert list(table(both.text)) == ["[a](a/README.md)", "[b/wide](b/wide/README.md)"]
    again = repository(str(both), {"a": folders["a"]})
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
def test_a_readme_keeps_its_text_and_header(own, folders):
    model_card = repository(own, folders)
    assert model_card.text.startswith(ModelCard(own).text.rstrip())
    fields = header(model_card)
    assert fields["base_model"] == ["EleutherAI/pythia-70m", "tiny"]
    if own is OWN:
        assert fields["license"] == "apache-2.0"
        assert fields["language"] == ["en", "de"]
        assert fields["custom"] == {"deep": [1, 2]}
        assert fields["tags"] == ["mine", *TAGS]
        assert fields["datasets"] == ["own/texts", "Skylion007/openwebtext"]
    else:
        assert fields["license"] == "mit"
        assert fields["tags"] == TAGS


@pytest.mark.parametrize("mark", [BEGIN, END])
def test_a_lost_mark_doubles_nothing(mark, folders):
    model_card = repository(f"# Ours\n\nOnce.\n\n{mark}\n\nAfter.\n", folders)
    assert model_card.text.count("Once.") == model_card.text.count("After.") == 1


DAMAGED = {
    "nothing": {},
    "no sources": {"sources": {}},
    "sources null": {"sources": None},
    "metric null": {"sources": {"feature_map": {"pattern_kl": None}}},
    "metric number": {"sources": {"feature_map": {"pattern_kl": 0.25}}},
    "metric text": {"sources": {"feature_map": {"pattern_kl": {"value": "low"}}}},
    "source text": {"sources": {"feature_map": "pattern_kl"}},
}


@pytest.mark.parametrize("metrics", [None, *DAMAGED.values()], ids=["none", *DAMAGED])
def test_damaged_metrics_are_left_out(metrics, folders):
    """Of somebody else's folder, which must not stop a push."""
    damaged = folders["a"]._replace(metrics=metrics)
    rows = table(repository(None, {**folders, "a": damaged}).text)
    for column in ("pattern KL", "loss recovered", "logit KL recovered"):
        assert rows["[a](a/README.md)"][column] == "-"
        assert numbers(rows["[b/wide](b/wide/README.md)"][column])


def test_a_folder_without_a_card_is_listed(folders):
    model_card = repository(None, {**folders, "a": folders["a"]._replace(card="")})
    assert "[a](a/README.md)" in table(model_card.text)
    assert header(model_card)["base_model"] == ["tiny"]
