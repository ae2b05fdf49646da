"""The page of a dictionary says what `evaluate` measures, and its differences are paired over rows."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_dictionaries import D_KEY, D_QUERY, tiny_dictionary

import sae_lens_qk as qk
from sae_lens_qk.text import token_rows

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.dictionary_page import firing, load, main, paired
from benchmarks.dictionary_tables import by_l0, frontier_figure, render

CONTEXT, N_ROWS, BATCH = 23, 11, 5
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def folder(gpt2_folder, text_dataset, tmp_path_factory) -> Path:
    """A corpus of one split, three dictionaries, and the page of one of them beside the others."""
    folder = tmp_path_factory.mktemp("page")
    text_dataset.to_parquet(str(folder / "held.parquet"))
    text_dataset.select([0]).to_parquet(str(folder / "short.parquet"))
    model = qk.load_model(str(gpt2_folder))
    for seed, (name, n_pairs) in enumerate({"ours": 200, "other": 150, "mapless": 0}.items()):
        tiny_dictionary(model, n_pairs, seed=seed, model_name=str(gpt2_folder)).save_model(
            folder / name
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QK_CORPUS", str(folder))
        main(
            [
                str(folder / "ours"),
                "--split",
                "held",
                "--n_tokens",
                str(CONTEXT * N_ROWS + 5),
                "--context_size",
                str(CONTEXT),
                "--batch_size",
                str(BATCH),
                "--beside",
                str(folder / "other"),
                str(folder / "mapless"),
                "--frontier",
                str(folder / "mapless"),
                str(folder / "ours"),
                "--output",
                str(folder / "pages"),
            ]
        )
    return folder


@pytest.fixture(scope="module")
def report(folder) -> dict:
    return json.loads((folder / "pages" / "ours-held.json").read_text())


@pytest.fixture(scope="module")
def evaluations(folder, gpt2_folder) -> dict[str, qk.evals.Evaluation]:
    """What `evaluate` says of the same rows."""
    model = qk.load_model(str(gpt2_folder))
    tokens = token_rows(model, str(folder / "held.parquet"), "text", N_ROWS, CONTEXT)
    return {
        name: qk.evaluate(
            qk.BilinearQKDictionary.from_pretrained(str(folder / name)),
            model,
            tokens,
            batch_size=BATCH,
        )
        for name in ("ours", "other", "mapless")
    }


def table_after(text: str, heading: str, number: int = 0) -> list[list[str]]:
    """Cells of the body of a table in the section."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = [
        block.splitlines() for block in section.strip().split("\n\n") if block.startswith("|")
    ]
    return [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in blocks[number][2:]
    ]


def numbers(cell: str) -> list[float]:
    """Of "94.7 % (92.7, 96.9)" or "15.5 / 15.3"."""
    for sign in "()%,/":
        cell = cell.replace(sign, " ")
    return [float(part) for part in cell.split()]


def rounded(*values: float, digits: int = 4, times: float = 1) -> list:
    return [pytest.approx(times * value, abs=0.51 * 10**-digits) for value in values]


def test_files(folder, report):
    pages = folder / "pages"
    assert {path.name for path in pages.iterdir()} == {
        "ours-held.md",
        "ours-held.json",
        "ours-held.png",
        "ours-held-frontier.png",
    }
    for name in ("ours-held.png", "ours-held-frontier.png"):
        assert (pages / name).read_bytes().startswith(PNG)
        assert f"]({name})" in render(report)
    text = (pages / "ours-held.md").read_text()
    assert text == render(report)
    command = f"QK_CORPUS=... python -m benchmarks.dictionary_page {folder / 'ours'} --split held --n_tokens 258 "
    assert f"\n    {command}" in text
    assert f"{CONTEXT * N_ROWS} tokens in {N_ROWS} rows of {CONTEXT}, " in text


def test_json_holds_what_evaluate_measures(report, evaluations):
    assert report["evaluation"] == evaluations["ours"].to_dict()
    assert {name: other["evaluation"] for name, other in report["beside"].items()} == {
        name: evaluations[name].to_dict() for name in ("other", "mapless")
    }
    assert list(report["frontier"]) == ["mapless", "ours"]
    assert report["frontier"]["mapless"] == evaluations["mapless"].to_dict()


def test_table_of_sources(report, evaluations):
    rows = table_after(render(report), "What it reproduces")
    assert rows[2][-1] == "0.0 % (0.0, 0.0)"
    assert [row[0] for row in rows] == [
        "transcoders",
        "feature map",
        "zero",
        "mean",
        "uniform",
        "shuffled",
    ]
    for (_, *cells), found in zip(rows, evaluations["ours"].sources.values(), strict=True):
        kl, tv, argmax, loss, logit_kl, loss_recovered, logit_kl_recovered = cells
        assert numbers(tv) + numbers(loss) + numbers(logit_kl) == rounded(
            found.pattern_tv, found.ce_loss, found.logit_kl
        )
        assert numbers(loss_recovered) == rounded(*found.ce_recovered, digits=1, times=100)
        assert numbers(logit_kl_recovered) == rounded(
            *found.logit_kl_recovered, digits=1, times=100
        )
        if found.pattern_kl is None:
            assert (kl, argmax) == ("–", "–")
        else:
            assert numbers(kl) + numbers(argmax) == rounded(
                *found.pattern_kl, found.argmax_agreement
            )


def test_table_of_heads(report, evaluations):
    sources = [evaluations["ours"].sources[name] for name in ("transcoders", "feature_map")]
    per_head = evaluations["ours"].feature_map.pairs_per_head
    rows = table_after(render(report), "Heads")
    assert len(rows) == len(per_head) == 3
    for head, (name, kl, explained, unweighted, norm, pairs) in enumerate(rows):
        assert (int(name), int(pairs)) == (head, per_head[head])
        assert numbers(kl) == rounded(*(source.pattern_kl_per_head[head] for source in sources))
        for cell, figure in (
            (explained, "score_explained"),
            (unweighted, "score_explained_unweighted"),
            (norm, "norm_share"),
        ):
            assert numbers(cell) == rounded(
                *(getattr(source, figure)[head] for source in sources), digits=1, times=100
            )


def test_table_of_features(folder, gpt2_folder, report, evaluations):
    d = qk.BilinearQKDictionary.from_pretrained(str(folder / "ours"))
    model = qk.load_model(str(gpt2_folder))
    x = qk.host.layer_inputs(
        model, d.cfg.layer, token_rows(model, str(folder / "held.parquet"), "text", N_ROWS, CONTEXT)
    )
    found = evaluations["ours"].features
    rows = table_after(render(report), "Features")
    expected = (
        ("query", D_QUERY, found.live_query, found.l0_query),
        ("key", D_KEY, found.live_key, found.l0_key),
    )
    for row, (side, n, live, l0), acts in zip(
        rows, expected, (d.encode_query(x), d.encode_key(x)), strict=True
    ):
        counts = (acts > 0).sum(dim=(0, 1))
        assert report["features"][side]["tokens"] == counts.tolist()
        densities = sorted(count / (N_ROWS * CONTEXT) for count in counts.tolist() if count)
        assert row[:3] == [side, str(n), str(live)]
        assert numbers(row[3]) == rounded(l0, digits=2)
        assert int(row[4]) == sum(density > 0.9 for density in densities)
        assert numbers(row[7]) == [pytest.approx(100 * float(np.median(densities)), rel=6e-3)]
    assert f"at least once in these {N_ROWS * CONTEXT} tokens" in render(report)


def test_firing_by_hand():
    found = firing(np.array([10, 0, 9, 1, 2, 3]), 10)
    assert {name: found[name] for name in ("n", "live", "always_on")} == {
        "n": 6,
        "live": 5,
        "always_on": 1,
    }
    assert found["l0"] == pytest.approx(2.5)
    assert found["density_quantiles"] == pytest.approx(
        {"0.05": 0.12, "0.25": 0.2, "0.5": 0.3, "0.75": 0.9, "0.95": 0.98}
    )
    assert set(firing(np.zeros(3, int), 10)["density_quantiles"].values()) == {None}


def test_table_of_pairs(report, evaluations):
    found, values = (
        evaluations["ours"].feature_map,
        [row[1] for row in table_after(render(report), "Pairs")],
    )
    assert values[:3] == ["200", "160", "40"]
    assert values[3] == f"{min(found.pairs_per_head)} to {max(found.pairs_per_head)}"
    assert numbers(values[4]) == rounded(1 - 160 / (D_QUERY * D_KEY * 3), times=100)
    assert numbers(values[5]) == rounded(found.sparsity_of_live, times=100)
    assert numbers(values[6]) == rounded(found.active_pairs, digits=1)
    assert f"all {D_QUERY} x {D_KEY} x 3 entries" in render(report)


def test_others_beside(report, evaluations):
    rows = table_after(render(report), "Beside other dictionaries")
    assert [row[:2] for row in rows] == [
        ["ours", "transcoders"],
        ["ours", "feature map"],
        ["other", "transcoders"],
        ["other", "feature map"],
        ["mapless", "transcoders"],
    ]
    assert [row[4] for row in rows] == ["–", "200", "–", "150", "–"]
    other = evaluations["other"]
    l0, live, _, kl, loss, logit_kl, loss_recovered, logit_kl_recovered = rows[3][2:]
    found = other.sources["feature_map"]
    assert numbers(l0) == rounded(other.features.l0_query, other.features.l0_key, digits=1)
    assert numbers(live) == [other.features.live_query, other.features.live_key]
    assert numbers(kl) + numbers(loss) + numbers(logit_kl) == rounded(
        *found.pattern_kl, found.ce_loss, found.logit_kl
    )
    assert numbers(loss_recovered) == rounded(*found.ce_recovered, digits=1, times=100)
    assert numbers(logit_kl_recovered) == rounded(*found.logit_kl_recovered, digits=1, times=100)


def test_differences_are_the_others_minus_ours(report, evaluations):
    rows = table_after(render(report), "Beside other dictionaries", 1)
    assert [row[:2] for row in rows] == [
        ["other", "transcoders"],
        ["other", "feature map"],
        ["mapless", "transcoders"],
    ]
    for name, source, *cells in rows:
        source = source.replace(" ", "_")
        ours, other = (evaluations[one].sources[source] for one in ("ours", name))
        expected = {
            "pattern_kl": other.pattern_kl.value - ours.pattern_kl.value,
            "ce_loss": other.ce_loss - ours.ce_loss,
            "logit_kl": other.logit_kl - ours.logit_kl,
        }
        found = report["beside"][name]["difference"][source]
        for (figure, value), cell in zip(expected.items(), cells, strict=True):
            assert found[figure]["value"] == pytest.approx(value, abs=1e-7)
            assert found[figure]["low"] < value < found[figure]["high"]
            assert numbers(cell) == rounded(*found[figure].values())
            assert cell[0] in "+-"


def test_a_difference_of_two_rows_by_hand():
    """Resampled means: the first row's difference, their mean or the second's, a quarter, a half and a quarter of times."""
    ours = np.array([[1.0, 3.0], [50.0, 70.0]])  # two heads each
    assert paired(ours, ours + np.array([[0.1, 0.3], [0.5, 0.7]])) == pytest.approx((0.4, 0.2, 0.6))


def test_rows_are_paired():
    """Rows that differ by far more than the dictionaries do: the interval is that of the differences, 1.96 s / sqrt(n)."""
    generator = np.random.default_rng(5)
    ours, difference = (
        10 * generator.standard_normal(997),
        0.2 + 0.3 * generator.standard_normal(997),
    )
    value, low, high = paired(ours, ours + difference)
    half = 1.96 * difference.std() / 997**0.5
    assert value == pytest.approx(difference.mean())
    assert (value - low, high - value) == (
        pytest.approx(half, rel=0.1),
        pytest.approx(half, rel=0.1),
    )
    assert paired(ours, ours + difference) == paired(ours, ours + difference)


def test_by_l0(report, evaluations):
    rows = table_after(render(report), "By L0")
    mean = {name: sum(found.features[:2]) / 2 for name, found in evaluations.items()}
    order = sorted(("ours", "mapless"), key=lambda name: mean[name])
    assert list(by_l0(report["frontier"])) == list(dict.fromkeys(row[0] for row in rows)) == order
    figure = frontier_figure(report["frontier"])
    for ax, name in zip(
        figure.axes, ("pattern_kl", "ce_recovered", "logit_kl_recovered"), strict=True
    ):
        curves = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in ax.containers}
        for label, owners in (("transcoders", order), ("feature map", ["ours"])):
            sources = [evaluations[owner].sources[label.replace(" ", "_")] for owner in owners]
            points = [
                (mean[owner], getattr(source, name).value)
                for owner, source in zip(owners, sources, strict=True)
            ]
            assert np.array(curves[label]) == pytest.approx(np.array(points))
            bars = next(bars for bars in ax.containers if bars.get_label() == label)
            ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
            assert np.array(ends) == pytest.approx(
                np.array([getattr(source, name)[1:] for source in sources])
            )


def test_without_a_feature_map_and_of_all_rows(folder, gpt2_folder, monkeypatch, capsys):
    monkeypatch.setenv("QK_CORPUS", str(folder))
    output = folder / "mapless-pages"
    main(
        [
            str(folder / "mapless"),
            "--split",
            "short",
            "--context_size",
            "29",
            "--output",
            str(output),
        ]
    )
    assert {path.name for path in output.iterdir()} == {
        "mapless-short.md",
        "mapless-short.json",
        "mapless-short.png",
    }
    assert "wrote mapless-short.md" in capsys.readouterr().out
    text = (output / "mapless-short.md").read_text()
    report = json.loads((output / "mapless-short.json").read_text())
    all_rows = token_rows(
        qk.load_model(str(gpt2_folder)), str(folder / "short.parquet"), "text", 10**6, 29
    )
    assert report["evaluation"]["n_rows"] == len(all_rows) > 5
    assert [row[0] for row in table_after(text, "What it reproduces")] == [
        "transcoders",
        "zero",
        "mean",
        "uniform",
        "shuffled",
    ]
    heads = table_after(text, "Heads")
    assert all("/" not in "".join(row) and row[-1] == "–" for row in heads)
    assert "\nTranscoders. *Score explained*" in text
    assert "\n## Pairs\n\nThere is no feature map.\n" in text
    assert "Beside" not in text and "By L0" not in text


def test_dictionaries_of_one_page(folder, gpt2_folder):
    ours = str(folder / "ours")
    assert list(load([ours, f"{ours}/", str(folder / "other")])) == ["ours", "other"]
    d = tiny_dictionary(qk.load_model(str(gpt2_folder)), 0, layer=0, model_name=str(gpt2_folder))
    d.save_model(folder / "below" / "ours")
    with pytest.raises(
        ValueError, match=r"by their folder's name: \S+/ours and \S+/below/ours are alike"
    ):
        load([ours, str(folder / "below" / "ours")])
    (folder / "below" / "ours").rename(folder / "below" / "layer-0")
    with pytest.raises(ValueError, match=r"of one layer, got \{'ours': 1, 'layer-0': 0\}"):
        load([ours, str(folder / "below" / "layer-0")])
