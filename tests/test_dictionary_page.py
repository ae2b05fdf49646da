"""The page of a dictionary says what `evaluate` measures; its differences are paired over rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_dictionaries import D_KEY, D_QUERY, tiny_dictionary

import sae_lens_qk as qk
from benchmarks.dictionaries.page import firing, load, main, paired
from benchmarks.dictionaries.page_tables import frontier_figure, render, sorted_by_l0
from sae_lens_qk.results import Evaluation

CONTEXT = 23
N_ROWS = 11
BATCH = 5
PNG = b"\x89PNG"
OTHERS = "Next to other dictionaries"


@pytest.fixture(scope="module")
def folder(gpt2_folder, text_dataset, tmp_path_factory) -> Path:
    """A corpus of one split, three dictionaries, and the page of one of them with the others."""
    folder = tmp_path_factory.mktemp("page")
    text_dataset.to_parquet(str(folder / "held.parquet"))
    text_dataset.select([0]).to_parquet(str(folder / "short.parquet"))
    model = qk.load_model(str(gpt2_folder))
    for seed, (name, n_pairs) in enumerate({"ours": 200, "other": 150, "mapless": 0}.items()):
        d = tiny_dictionary(model, n_pairs, seed=seed, model_name=str(gpt2_folder))
        d.save_model(folder / name)
    ours, other, mapless = (str(folder / name) for name in ("ours", "other", "mapless"))
    size = ["--n_tokens", str(CONTEXT * N_ROWS + 5), "--context_size", str(CONTEXT)]
    size += ["--batch_size", str(BATCH)]
    others = ["--beside", other, mapless, "--frontier", mapless, ours]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QK_CORPUS", str(folder))
        main([ours, "--split", "held", *size, *others, "--output", str(folder / "pages")])
    return folder


@pytest.fixture(scope="module")
def report(folder) -> dict:
    return json.loads((folder / "pages" / "ours-held.json").read_text())


@pytest.fixture(scope="module")
def evaluations(folder, gpt2_folder) -> dict[str, Evaluation]:
    """What `evaluate` says of the same rows."""
    model = qk.load_model(str(gpt2_folder))
    tokens = qk.token_rows(model, str(folder / "held.parquet"), "text", N_ROWS, CONTEXT)
    results = {}
    for name in ("ours", "other", "mapless"):
        d = qk.BilinearQKDictionary.from_pretrained(str(folder / name))
        results[name] = qk.evaluate(d, model, tokens, batch_size=BATCH)
    return results


def table_rows(
    text: str,
    heading: str,
    number: int = 0,
) -> list[list[str]]:
    """Cells of the body of a table in a section."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = section.strip().split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    rows = []
    for line in tables[number][2:]:
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return rows


def numbers(*cells: str) -> list[float]:
    """Of "94.7 % (92.7, 96.9)" or "15.5 / 15.3"."""
    text = " ".join(cells)
    for sign in "()%,/":
        text = text.replace(sign, " ")
    return [float(part) for part in text.split()]


def rounded(
    *values: float,
    digits: int = 4,
    factor: float = 1,
) -> list:
    return [pytest.approx(factor * value, abs=0.51 * 10**-digits) for value in values]


def test_files(folder, report):
    pages = folder / "pages"
    pictures = ["ours-held.png", "ours-held-frontier.png"]
    names = {path.name for path in pages.iterdir()}
    assert names == {"ours-held.md", "ours-held.json", *pictures}
    text = (pages / "ours-held.md").read_text()
    assert text == render(report)
    for name in pictures:
        assert (pages / name).read_bytes().startswith(PNG)
        assert f"]({name})" in text
    command = f"python -m benchmarks.dictionaries.page {folder / 'ours'} --split held"
    assert f"\n    QK_CORPUS=... {command} --n_tokens 258 " in text
    assert f"{CONTEXT * N_ROWS} tokens in {N_ROWS} rows of {CONTEXT}, " in text


def test_json_holds_what_evaluate_measures(report, evaluations):
    assert report["evaluation"] == evaluations["ours"].to_dict()
    assert list(report["beside"]) == ["other", "mapless"]
    for name, other in report["beside"].items():
        assert other["evaluation"] == evaluations[name].to_dict()
    assert list(report["frontier"]) == ["mapless", "ours"]
    assert report["frontier"]["mapless"] == evaluations["mapless"].to_dict()


def test_table_of_sources(report, evaluations):
    rows = table_rows(render(report), "What it reproduces")
    names = ["transcoders", "feature map", "zero", "mean", "uniform", "shuffled"]
    assert [row[0] for row in rows] == names
    assert rows[2][-1] == "0.0 % (0.0, 0.0)"
    for row, result in zip(rows, evaluations["ours"].sources.values(), strict=True):
        _, kl, tv, argmax, loss, logit_kl, loss_recovered, logit_kl_recovered = row
        expected = rounded(result.pattern_tv, result.ce_loss, result.logit_kl)
        assert numbers(tv, loss, logit_kl) == expected
        assert numbers(loss_recovered) == rounded(*result.ce_recovered, digits=1, factor=100)
        expected = rounded(*result.logit_kl_recovered, digits=1, factor=100)
        assert numbers(logit_kl_recovered) == expected
        if result.pattern_kl is None:
            assert (kl, argmax) == ("-", "-")
        else:
            expected = rounded(*result.pattern_kl, result.argmax_agreement)
            assert numbers(kl, argmax) == expected


def test_table_of_heads(report, evaluations):
    ours = evaluations["ours"]
    sources = [ours.sources["transcoders"], ours.sources["feature_map"]]
    pairs_per_head = ours.feature_map.pairs_per_head
    rows = table_rows(render(report), "Heads")
    assert len(rows) == len(pairs_per_head) == 3
    for head, (name, kl, explained, unweighted, norm, pairs) in enumerate(rows):
        assert int(name) == head
        assert int(pairs) == pairs_per_head[head]
        assert numbers(kl) == rounded(*(source.pattern_kl_per_head[head] for source in sources))
        shares = {
            "score_explained": explained,
            "score_explained_unweighted": unweighted,
            "norm_share": norm,
        }
        for metric, cell in shares.items():
            values = [getattr(source, metric)[head] for source in sources]
            assert numbers(cell) == rounded(*values, digits=1, factor=100)


@pytest.mark.parametrize(("number", "side", "n"), [(0, "query", D_QUERY), (1, "key", D_KEY)])
def test_table_of_features(folder, gpt2_folder, report, evaluations, number, side, n):
    d = qk.BilinearQKDictionary.from_pretrained(str(folder / "ours"))
    model = qk.load_model(str(gpt2_folder))
    tokens = qk.token_rows(model, str(folder / "held.parquet"), "text", N_ROWS, CONTEXT)
    x = qk.AttentionLayer(model, d.cfg.layer).inputs(tokens)
    acts = getattr(d.features(x), side)
    counts = (acts > 0).sum(dim=(0, 1)).tolist()
    assert report["features"][side]["tokens"] == counts
    densities = [count / (N_ROWS * CONTEXT) for count in counts if count]
    evaluated = evaluations["ours"].features
    row = table_rows(render(report), "Features")[number]
    assert row[:3] == [side, str(n), str(getattr(evaluated, f"live_{side}"))]
    assert numbers(row[3]) == rounded(getattr(evaluated, f"l0_{side}"), digits=2)
    assert int(row[4]) == sum(density > 0.9 for density in densities)
    median = 100 * float(np.median(densities))
    assert numbers(row[7]) == [pytest.approx(median, rel=6e-3)]
    assert f"at least once in these {N_ROWS * CONTEXT} tokens" in render(report)


def test_firing_by_hand():
    result = firing(np.array([10, 0, 9, 1, 2, 3]), 10)
    assert result["n"] == 6
    assert result["live"] == 5
    assert result["always_on"] == 1
    assert result["l0"] == pytest.approx(2.5)
    quantiles = {"0.05": 0.12, "0.25": 0.2, "0.5": 0.3, "0.75": 0.9, "0.95": 0.98}
    assert result["density_quantiles"] == pytest.approx(quantiles)


def test_firing_of_dead_features():
    assert set(firing(np.zeros(3, int), 10)["density_quantiles"].values()) == {None}


def test_table_of_pairs(report, evaluations):
    feature_map = evaluations["ours"].feature_map
    text = render(report)
    values = [row[1] for row in table_rows(text, "Pairs")]
    assert values[:3] == ["200", "160", "40"]
    per_head = feature_map.pairs_per_head
    assert values[3] == f"{min(per_head)} to {max(per_head)}"
    assert numbers(values[4]) == rounded(1 - 160 / (D_QUERY * D_KEY * 3), factor=100)
    assert numbers(values[5]) == rounded(feature_map.sparsity_of_live, factor=100)
    assert numbers(values[6]) == rounded(feature_map.active_pairs, digits=1)
    assert f"all {D_QUERY} x {D_KEY} x 3 entries" in text


def test_other_dictionaries(report, evaluations):
    rows = table_rows(render(report), OTHERS)
    assert [row[:2] for row in rows] == [
        ["ours", "transcoders"],
        ["ours", "feature map"],
        ["other", "transcoders"],
        ["other", "feature map"],
        ["mapless", "transcoders"],
    ]
    assert [row[4] for row in rows] == ["-", "200", "-", "150", "-"]
    features = evaluations["other"].features
    result = evaluations["other"].sources["feature_map"]
    l0, live, _, kl, loss, logit_kl, loss_recovered, logit_kl_recovered = rows[3][2:]
    assert numbers(l0) == rounded(features.l0_query, features.l0_key, digits=1)
    assert numbers(live) == [features.live_query, features.live_key]
    expected = rounded(*result.pattern_kl, result.ce_loss, result.logit_kl)
    assert numbers(kl, loss, logit_kl) == expected
    assert numbers(loss_recovered) == rounded(*result.ce_recovered, digits=1, factor=100)
    expected = rounded(*result.logit_kl_recovered, digits=1, factor=100)
    assert numbers(logit_kl_recovered) == expected


def test_differences_are_the_others_minus_ours(report, evaluations):
    rows = table_rows(render(report), OTHERS, 1)
    assert [row[:2] for row in rows] == [
        ["other", "transcoders"],
        ["other", "feature map"],
        ["mapless", "transcoders"],
    ]
    for name, source_label, *cells in rows:
        source = source_label.replace(" ", "_")
        ours = evaluations["ours"].sources[source]
        other = evaluations[name].sources[source]
        expected = {
            "pattern_kl": other.pattern_kl.value - ours.pattern_kl.value,
            "ce_loss": other.ce_loss - ours.ce_loss,
            "logit_kl": other.logit_kl - ours.logit_kl,
        }
        differences = report["beside"][name]["difference"][source]
        for (metric, value), cell in zip(expected.items(), cells, strict=True):
            interval = differences[metric]
            assert interval["value"] == pytest.approx(value, abs=1e-7)
            assert interval["low"] < value < interval["high"]
            assert numbers(cell) == rounded(*interval.values())
            assert cell[0] in "+-"


def test_a_difference_of_two_rows_by_hand():
    """Resampled means: the first row's, the mean's and the second's, 1 : 2 : 1."""
    ours = np.array([[1.0, 3.0], [50.0, 70.0]])  # two heads each
    other = ours + np.array([[0.1, 0.3], [0.5, 0.7]])
    assert paired(ours, other) == pytest.approx((0.4, 0.2, 0.6))


def test_rows_are_paired():
    """Rows that differ by far more than the dictionaries do.

    The interval is that of the differences, 1.96 s / sqrt(n).
    """
    n = 997
    generator = np.random.default_rng(5)
    ours = 10 * generator.standard_normal(n)
    difference = 0.2 + 0.3 * generator.standard_normal(n)
    interval = paired(ours, ours + difference)
    half_width = 1.96 * difference.std() / n**0.5
    assert interval.value == pytest.approx(difference.mean())
    assert interval.value - interval.low == pytest.approx(half_width, rel=0.1)
    assert interval.high - interval.value == pytest.approx(half_width, rel=0.1)
    assert paired(ours, ours + difference) == interval


def test_dictionaries_in_the_order_of_l0(report, evaluations):
    rows = table_rows(render(report), "By L0")
    l0 = {}
    for name in ("ours", "mapless"):
        features = evaluations[name].features
        l0[name] = (features.l0_query + features.l0_key) / 2
    order = sorted(l0, key=l0.get)
    assert list(sorted_by_l0(report["frontier"])) == order
    assert list(dict.fromkeys(row[0] for row in rows)) == order


@pytest.mark.parametrize("panel", [0, 1, 2])
@pytest.mark.parametrize(
    ("label", "owners"), [("transcoders", ["ours", "mapless"]), ("feature map", ["ours"])]
)
def test_frontier_shows_values_and_intervals(report, evaluations, panel, label, owners):
    metric = ("pattern_kl", "ce_recovered", "logit_kl_recovered")[panel]
    points = []  # L0, value, low, high
    for name in owners:
        features = evaluations[name].features
        source = evaluations[name].sources[label.replace(" ", "_")]
        l0 = (features.l0_query + features.l0_key) / 2
        points.append([l0, *getattr(source, metric)])
    expected = np.array(sorted(points))
    ax = frontier_figure(report["frontier"]).axes[panel]
    [bars] = [bars for bars in ax.containers if bars.get_label() == label]
    assert bars.lines[0].get_xydata() == pytest.approx(expected[:, :2])
    segments = bars.lines[2][0].get_segments()
    ends = np.array([segment[:, 1] for segment in segments])
    assert ends == pytest.approx(expected[:, 2:])


def test_without_a_feature_map_and_of_all_rows(folder, gpt2_folder, monkeypatch):
    monkeypatch.setenv("QK_CORPUS", str(folder))
    output = folder / "mapless-pages"
    size = ["--split", "short", "--context_size", "29"]
    main([str(folder / "mapless"), *size, "--output", str(output)])
    text = (output / "mapless-short.md").read_text()
    report = json.loads((output / "mapless-short.json").read_text())
    model = qk.load_model(str(gpt2_folder))
    all_rows = qk.token_rows(model, str(folder / "short.parquet"), "text", 10**6, 29)
    assert report["evaluation"]["n_rows"] == len(all_rows) > 5
    names = [row[0] for row in table_rows(text, "What it reproduces")]
    assert names == ["transcoders", "zero", "mean", "uniform", "shuffled"]
    for row in table_rows(text, "Heads"):
        assert "/" not in "".join(row)
        assert row[-1] == "-"
    assert "\nTranscoders. *Score explained*" in text
    assert "\n## Pairs\n\nThere is no feature map.\n" in text
    assert OTHERS not in text
    assert "By L0" not in text


def test_dictionaries_of_one_page(folder):
    ours = str(folder / "ours")
    dictionaries = load([ours, f"{ours}/", str(folder / "other")])
    assert list(dictionaries) == ["ours", "other"]


def test_dictionaries_of_one_name_are_refused(folder, tmp_path):
    d = qk.BilinearQKDictionary.from_pretrained(str(folder / "ours"))
    d.save_model(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"\S+/ours and \S+/ours are alike"):
        load([str(folder / "ours"), str(tmp_path / "ours")])


def test_dictionaries_of_two_layers_are_refused(folder, gpt2_folder, tmp_path):
    model = qk.load_model(str(gpt2_folder))
    d = tiny_dictionary(model, 0, layer=0, model_name=str(gpt2_folder))
    d.save_model(tmp_path / "layer-0")
    with pytest.raises(ValueError, match=r"of one layer, got \{'ours': 1, 'layer-0': 0\}"):
        load([str(folder / "ours"), str(tmp_path / "layer-0")])
