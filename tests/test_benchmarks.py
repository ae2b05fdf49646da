"""The benchmarks measure what they say: both sides compute the same, the data is as described, memory is seen."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_lens_qk.feature_map import SparseFeatureMap

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench
import dense_reference
import sparse_step
import synthetic_cases
from data import TOPIC_SHARE, make_case, make_spec
from peak_memory import PeakMemory
from report import render
from sizes import FULL, SMOKE

N_HEADS, N_ROWS, N_POS = 5, 2, 7
SPEC = make_spec(N_HEADS, d_head=3)


def exact_case(kind: str = "random"):
    return make_case(kind, SPEC, (11, 13), N_ROWS, N_POS, l0=4, dtype=torch.float64)


def with_one(acts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(acts, (0, 1), value=1.0)


def dense_problem(case):
    M = dense_reference.full_map(*case.decoders, case.spec.scale)
    return M, with_one(case.query_acts), with_one(case.key_acts)


@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_dense_reference_equals_the_package_in_float64(kind):
    case = exact_case(kind)
    everything = SparseFeatureMap.all_pairs(11, 13, N_HEADS, torch.float64)
    generator = torch.Generator().manual_seed(3)
    kept = everything.select(torch.rand(len(everything), generator=generator) < 0.4)
    weights = torch.rand(len(kept), generator=generator, dtype=torch.float64)
    kept = kept.reweighted(weights.masked_fill(weights < 0.1, 0.0))

    mask = kept.to_dense().requires_grad_()
    assert mask.count_nonzero() == kept.weights.count_nonzero() + N_HEADS, (
        "constant x constant is in every map"
    )
    dense_scores = dense_reference.masked_scores(mask, *dense_problem(case))
    dense_kl = dense_reference.mean_kl(dense_scores, *case.true)
    dense_kl.backward()

    trained = kept.weights.clone().requires_grad_()
    scores = kept.scores(case.query_acts, case.key_acts, case.decoders, SPEC, weights=trained)
    kl = case.true.kl(scores).mean()
    kl.backward()

    future = dense_reference.future_keys(N_POS)
    assert dense_scores[..., future].isneginf().all()
    assert torch.allclose(scores[..., ~future], dense_scores[..., ~future], rtol=0, atol=1e-12)
    assert abs(float(kl.detach()) - float(dense_kl.detach())) < 1e-12 * float(dense_kl.detach())
    assert mask.grad is not None
    expected = mask.grad[tuple(kept.indices.T)]
    assert float((trained.grad - expected).norm()) < 1e-11 * float(expected.norm())


def test_both_steps_train_the_same_mask():
    """Over all pairs; dense trains constant x constant as well, which changes nothing but the penalty."""
    case = exact_case()
    everything = SparseFeatureMap.all_pairs(11, 13, N_HEADS, torch.float64)
    sparse = sparse_step.make_step(case, everything)
    dense = dense_reference.make_step(
        *dense_problem(case), case.true, sparse_step.STRENGTH, sparse_step.LR
    )
    losses = np.array([(sparse(), dense()) for _ in range(5)])
    assert np.ptp(losses[:, 0]) > 1e-3
    assert np.abs(losses[:, 1] - losses[:, 0]).max() < 1.01 * sparse_step.STRENGTH * N_HEADS


@pytest.mark.parametrize("kind", synthetic_cases.KINDS)
def test_agreement_as_measured(kind):
    errors = synthetic_cases.agreement(kind, SMOKE)
    assert set(errors) == {"loss", "gradient", "kl_gradient"}
    assert max(errors.values()) < 1e-5


def test_activations_are_as_described():
    cases = {
        kind: make_case(kind, SPEC, (600, 601), 3, 101, l0=20) for kind in ("random", "clustered")
    }
    shared = {}
    for kind, case in cases.items():
        assert (case.query_acts.shape[-1], case.key_acts.shape[-1]) == (600, 601)
        for acts in (case.query_acts, case.key_acts):
            assert (acts > 0).sum(dim=-1).eq(20).all()
        fires = (case.query_acts > 0).float()
        shared[kind] = float((fires[:, 1:] * fires[:, :-1]).sum(dim=-1).mean())
        pattern = case.true.pattern
        assert torch.allclose(pattern.sum(dim=-1), torch.ones(3, N_HEADS, 101), atol=1e-5)
        assert torch.equal(
            case.true.log_pattern, make_case(kind, SPEC, (600, 601), 3, 101, l0=20).true.log_pattern
        )
    assert shared["random"] == pytest.approx(20 * 20 / 600, rel=0.3)
    of_topic = TOPIC_SHARE * 20
    assert shared["clustered"] > of_topic * of_topic / 60, (
        "neighbours draw from the same 60 features of their topic"
    )


def test_memory_that_is_freed_again_is_seen():
    with PeakMemory() as nothing:
        pass
    with PeakMemory() as memory:
        np.ones(20_000_000).sum()
    assert nothing.grown < 2e7
    assert 1.5e8 < memory.grown < 2.2e8


def test_few_rows_are_ranked():
    case = make_case("clustered", SPEC, (600, 601), 5, 13, l0=4)
    few, all_rows = sparse_step.rank(case, 100), sparse_step.rank(case, 100, n_rows=5)
    assert (few.n_rows, all_rows.n_rows) == (1, 5)
    assert len(few.candidates) == len(all_rows.candidates) == 100
    assert sparse_step.rank(case, 300_000).n_rows == 5


def test_report_shows_failures_and_what_was_skipped():
    results = {
        "step2.live.dense": {"failed": "out of memory"},
        "smollm2.load": {"skipped": "it is not installed"},
    }
    machine = {"cores": 2, "torch": "1.2.3"}
    text = render({"machine": machine, "smoke": False, "sizes": FULL._asdict(), "results": results})
    assert "2 CPU cores, torch 1.2.3" in text
    assert "- step2.live.dense: out of memory" in text
    assert "Skipped: it is not installed." in text
    assert "## Wide" not in text


def test_unknown_cases_are_refused():
    with pytest.raises(SystemExit, match=r"There is no case step3; cases are step2\.random\.dense"):
        bench._chosen(list(bench.all_cases(FULL)), ["step3"])


@pytest.mark.slow
def test_smoke(tmp_path):
    command = [sys.executable, bench.__file__, "--smoke", "--output", str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "made" / "cpu.json").read_text())
    assert list(report["results"]) == list(bench.all_cases(SMOKE))
    text = (tmp_path / "made" / "cpu.md").read_text()
    assert text == render(report)
    for heading in (
        "Step 2 against the dense computation",
        "Wide dictionaries",
        "What step 2 grows with",
        "SmolLM2",
    ):
        assert f"## {heading}" in text
