"""The benchmarks measure what they say.

Both sides compute the same, the data is as described, memory is seen.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speed import dense_reference, sparse_step, synthetic_cases
from benchmarks.speed.__main__ import all_cases, matching_cases
from benchmarks.speed.data import TOPIC_SHARE, Case, make_case, make_spec
from benchmarks.speed.peak_memory import PeakMemory
from benchmarks.speed.report import compare, render
from benchmarks.speed.sizes import FULL, SMOKE
from sae_lens_qk.feature_map import SparseFeatureMap

REPOSITORY = Path(__file__).parents[1]
N_HEADS = 5
N_ROWS = 2
N_POS = 7
SPEC = make_spec(N_HEADS, d_head=3)


def exact_case(kind: str = "random") -> Case:
    return make_case(kind, SPEC, (11, 13), N_ROWS, N_POS, l0=4, dtype=torch.float64)


def random_map() -> SparseFeatureMap:
    """Four in ten of all pairs, a tenth of them with weight 0."""
    every_pair = SparseFeatureMap.all_pairs(11, 13, N_HEADS, torch.float64)
    generator = torch.Generator().manual_seed(3)
    pairs = every_pair.select(torch.rand(len(every_pair), generator=generator) < 0.4)
    weights = torch.rand(len(pairs), generator=generator, dtype=torch.float64)
    return pairs.reweighted(weights.masked_fill(weights < 0.1, 0.0))


# Sparse and dense steps


@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_dense_reference_equals_the_package_in_float64(kind):
    case = exact_case(kind)
    pairs = random_map()
    mask = pairs.to_dense().requires_grad_()
    # constant x constant is in every map
    assert mask.count_nonzero() == pairs.weights.count_nonzero() + N_HEADS
    problem = synthetic_cases.dense_problem(case)
    dense_scores = problem.scores(mask)
    dense_kl = problem.mean_kl(dense_scores)
    dense_kl.backward()

    scorer = sparse_step.PairScorer(pairs.indices, case.decoders, case.spec)
    weights = pairs.weights.clone().requires_grad_()
    kl, _ = sparse_step.losses(scorer, weights, case)
    kl.backward()
    scores = pairs.scores(case.features, case.decoders, SPEC)

    future = dense_reference.future_keys(N_POS)
    assert dense_scores[..., future].isneginf().all()
    assert torch.allclose(scores[..., ~future], dense_scores[..., ~future], rtol=0, atol=1e-12)
    assert float(kl.detach()) == pytest.approx(float(dense_kl.detach()), rel=1e-12)
    assert mask.grad is not None
    expected = mask.grad[tuple(pairs.indices.T)]
    assert float((weights.grad - expected).norm()) < 1e-11 * float(expected.norm())


def test_both_steps_train_the_same_mask():
    """Over all pairs; dense trains constant x constant too, which only changes the penalty."""
    case = exact_case()
    every_pair = SparseFeatureMap.all_pairs(11, 13, N_HEADS, torch.float64)
    sparse = sparse_step.make_step(case, every_pair)
    problem = synthetic_cases.dense_problem(case)
    dense = dense_reference.make_step(problem, sparse_step.STRENGTH, sparse_step.LR)
    losses = np.array([(sparse(), dense()) for _ in range(5)])  # [step, side]
    assert np.ptp(losses[:, 0]) > 1e-3
    assert np.abs(losses[:, 1] - losses[:, 0]).max() < 1.01 * sparse_step.STRENGTH * N_HEADS


@pytest.mark.parametrize("kind", synthetic_cases.KINDS)
def test_agreement_as_measured(kind):
    errors = synthetic_cases.agreement(kind, SMOKE)
    assert set(errors) == {"loss", "gradient", "kl_gradient"}
    assert max(errors.values()) < 1e-5


def test_few_rows_are_ranked():
    case = make_case("clustered", SPEC, (600, 601), 5, 13, l0=4)
    few_rows = sparse_step.rank(case, 100)
    all_rows = sparse_step.rank(case, 100, n_rows=5)
    assert few_rows.n_rows == 1
    assert all_rows.n_rows == 5
    assert len(few_rows.candidates) == len(all_rows.candidates) == 100
    assert sparse_step.rank(case, 300_000).n_rows == 5


# Data and memory


@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_activations_are_as_described(kind):
    n_pos = 101
    l0 = 20
    case = make_case(kind, SPEC, (600, 601), 3, n_pos, l0=l0)
    assert case.query_acts.shape[-1] == 600
    assert case.key_acts.shape[-1] == 601
    for acts in case.features:
        assert (acts > 0).sum(dim=-1).eq(l0).all()
    sums = case.true.pattern.sum(dim=-1)
    assert torch.allclose(sums, torch.ones(3, N_HEADS, n_pos), atol=1e-5)
    same_case = make_case(kind, SPEC, (600, 601), 3, n_pos, l0=l0)
    assert torch.equal(case.true.log_pattern, same_case.true.log_pattern)
    fires = (case.query_acts > 0).float()
    n_shared = float((fires[:, 1:] * fires[:, :-1]).sum(dim=-1).mean())  # with the next token
    if kind == "random":
        assert n_shared == pytest.approx(l0 * l0 / 600, rel=0.3)
    else:  # neighbours draw from the same 60 features of their topic
        n_topical = TOPIC_SHARE * l0
        assert n_shared > n_topical * n_topical / 60


def test_memory_that_is_freed_again_is_seen():
    with PeakMemory() as nothing:
        pass
    with PeakMemory() as memory:
        np.ones(20_000_000).sum()
    assert nothing.grown < 2e7
    assert 1.5e8 < memory.grown < 2.2e8


# Reports


def report_of(results: dict) -> dict:
    machine = {"cores": 2, "torch": "1.2.3"}
    return {"machine": machine, "smoke": False, "sizes": FULL._asdict(), "results": results}


def test_report_shows_failures_and_what_was_skipped():
    results = {
        "step2.live.dense": {"failed": "out of memory"},
        "smollm2.load": {"skipped": "it is not installed"},
    }
    text = render(report_of(results))
    assert "2 CPU cores, torch 1.2.3" in text
    assert "- step2.live.dense: out of memory" in text
    assert "Skipped: it is not installed." in text
    assert "## Wide" not in text


def test_two_runs_side_by_side():
    """Cases that both have; a ratio above 1 is a gain."""
    before = {
        "wide.plain.1536": {"seconds": 2.0, "step_bytes": 3e9},
        "growth.plain.l0": {"rows": [{"value": 10, "seconds": 0.1, "step_bytes": 2e6}]},
        "gone": {"seconds": 1.0},
    }
    after = {
        "wide.plain.1536": {"seconds": 0.5, "step_bytes": 2e9},
        "growth.plain.l0": {"rows": [{"value": 10, "seconds": 0.2, "step_bytes": 2e6}]},
        "smollm2.step1": {"seconds": 1.0},
    }
    lines = compare(report_of(before), report_of(after)).splitlines()
    assert lines[2:] == [
        "| wide.plain.1536 | 2 s | 500 ms | **4x** | 3 GB | 2 GB | **1.5x** |",
        "| growth.plain.l0 10 | 100 ms | 200 ms | **0.5x** | 2 MB | 2 MB | **1x** |",
    ]


def test_runs_of_different_sizes_are_marked():
    smoke = {**report_of({}), "sizes": SMOKE._asdict()}
    assert compare(smoke, report_of({})).startswith("**The two runs have different sizes.**")


def test_cases_and_groups():
    names = list(all_cases(FULL))
    assert matching_cases(names, None) == names
    assert matching_cases(names, ["step2.live", "wide.plain.1536"]) == [
        "step2.live.dense",
        "step2.live.sparse",
        "step2.live.agreement",
        "wide.plain.1536",
    ]


def test_unknown_cases_are_refused():
    with pytest.raises(SystemExit, match=r"no case step3; cases are step2\."):
        matching_cases(list(all_cases(FULL)), ["step3"])


@pytest.mark.slow
def test_smoke(tmp_path):
    folder = tmp_path / "results"
    command = [sys.executable, "-m", "benchmarks.speed", "--smoke", "--output", str(folder)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, cwd=REPOSITORY
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads((folder / "cpu.json").read_text())
    assert list(report["results"]) == list(all_cases(SMOKE))
    text = (folder / "cpu.md").read_text()
    assert text == render(report)
    assert "## Failed" not in text
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "Step 2 against the dense computation",
        "Wide dictionaries",
        "What step 2 grows with",
        "SmolLM2-135M-Instruct, layer 23",
    ]
