"""The cases on synthetic activations: `step2` (against the dense reference), `wide`, `growth`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.speed import dense_reference
from benchmarks.speed.data import Case, WideCase, add_dead_features, make_case, make_spec
from benchmarks.speed.dense_reference import DenseProblem
from benchmarks.speed.measure import measure, process_peak_bytes, step_times
from benchmarks.speed.sizes import Sizes
from benchmarks.speed.sparse_step import (
    LR,
    STRENGTH,
    Ranking,
    active_pairs,
    losses,
    make_step,
    rank,
)
from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.scoring.entries import with_constant
from sae_lens_qk.scoring.scorer import PairScorer

Result = dict[str, Any]
KINDS = ("random", "clustered", "live")


class Gradients(NamedTuple):
    """Loss, gradient of the KL alone, gradient of the loss."""

    loss: Tensor
    kl_gradient: Tensor
    gradient: Tensor


def cases(sizes: Sizes) -> dict[str, Callable[[], Result]]:
    """Name -> measurement."""
    measurements: dict[str, Callable[[], Result]] = {}
    for kind in KINDS:
        measurements[f"step2.{kind}.dense"] = partial(dense_step, kind, sizes)
        measurements[f"step2.{kind}.sparse"] = partial(sparse_step, kind, sizes)
        measurements[f"step2.{kind}.agreement"] = partial(agreement, kind, sizes)
    for d in sizes.wide:
        measurements[f"wide.plain.{d}"] = partial(wide, d, False, sizes)
    widest = sizes.wide[-1]
    measurements[f"wide.rotary.{widest}"] = partial(wide, widest, True, sizes)
    for rotary in (False, True):
        positions = "rotary" if rotary else "plain"
        for axis, _ in sizes.growing:
            measurements[f"growth.{positions}.{axis}"] = partial(growth, axis, rotary, sizes)
    return measurements


def dense_step(
    kind: str,
    sizes: Sizes,
) -> Result:
    warm_up(make_spec(sizes.n_heads, sizes.d_head), dense=True)
    _, wide_case = step2_case(kind, sizes)
    step = dense_reference.make_step(dense_problem(wide_case.case), STRENGTH, LR)
    return {**measure(step, sizes.dense_steps), "entries": full_size(wide_case.case)}


def sparse_step(
    kind: str,
    sizes: Sizes,
) -> Result:
    case, wide_case = step2_case(kind, sizes)
    warm_up(case.spec)
    ranking = step2_candidates(kind, case, sizes)
    result = measure(make_step(case, ranking.candidates), sizes.steps)
    return {
        **result,
        "pairs": len(ranking.candidates),
        "ranking_seconds": ranking.seconds,
        "active_pairs": active_pairs(case, ranking.candidates),
        "entries": full_size(wide_case.case),
    }


def agreement(
    kind: str,
    sizes: Sizes,
) -> Result:
    """Relative errors of loss and gradients on the same pairs with the same random weights.

    The dense mask is zero at all other entries.
    """
    case, wide_case = step2_case(kind, sizes)
    indices = step2_candidates(kind, case, sizes).candidates.indices
    weights = torch.rand(len(indices), generator=torch.Generator().manual_seed(2))
    mask = weights.clone().requires_grad_()
    scorer = PairScorer(indices, case.decoders, case.spec)
    sparse = gradients(mask, *losses(scorer, mask, case))

    # where the same pairs stand in the dense mask
    entries = (
        wide_case.query_numbers[indices[:, 0]],
        wide_case.key_numbers[indices[:, 1]],
        indices[:, 2],
    )
    problem = dense_problem(wide_case.case)
    dense_mask = torch.zeros_like(problem.M)
    dense_mask[entries] = weights
    dense_mask[-1, -1] = 1.0  # constant x constant
    dense_mask.requires_grad_()
    kl = problem.mean_kl(problem.scores(dense_mask))
    penalty = STRENGTH * dense_reference.penalty(dense_mask[entries])
    dense = gradients(dense_mask, kl, penalty)
    return {
        "loss": _relative_error(sparse.loss, dense.loss),
        "kl_gradient": _relative_error(sparse.kl_gradient, dense.kl_gradient[entries]),
        "gradient": _relative_error(sparse.gradient, dense.gradient[entries]),
    }


def wide(
    d: int,
    rotary: bool,
    sizes: Sizes,
) -> Result:
    """Step 2 on many features; the dense map is only counted."""
    case = synthetic(sizes, "clustered", rotary, d)
    warm_up(case.spec)
    ranking = rank(case, sizes.wide_pairs)
    result = measure(make_step(case, ranking.candidates), sizes.steps)
    return {
        **result,
        **_ranking_facts(ranking),
        "d": d,
        "entries": full_size(case),
        "process_bytes": process_peak_bytes(),
        "active_pairs": active_pairs(case, ranking.candidates),
    }


def growth(
    axis: str,
    rotary: bool,
    sizes: Sizes,
) -> Result:
    """Step 2 while one of L0, context, pairs grows; the tokens per step stay the same."""
    rows = []
    for value in dict(sizes.growing)[axis]:
        n_pairs = value if axis == "pairs" else sizes.growth_pairs
        changes = {} if axis == "pairs" else {axis: value}
        case = synthetic(sizes, "clustered", rotary, sizes.d, **changes)
        if not rows:
            warm_up(case.spec)
        ranking = rank(case, n_pairs)
        result = measure(make_step(case, ranking.candidates), sizes.steps)
        rows.append({"value": value, **result, **_ranking_facts(ranking)})
    return {"rows": rows}


def _ranking_facts(ranking: Ranking) -> Result:
    return {
        "pairs": len(ranking.candidates),
        "ranking_seconds": ranking.seconds,
        "ranking_rows": ranking.n_rows,
    }


def synthetic(
    sizes: Sizes, kind: str, rotary: bool, d: int, l0: int | None = None, context: int | None = None
) -> Case:
    """A case of `n_tokens` tokens with d features per side."""
    spec = make_spec(sizes.n_heads, sizes.d_head, sizes.n_frequencies if rotary else 0)
    n_pos = context or sizes.context
    return make_case(kind, spec, (d, d), sizes.n_tokens // n_pos, n_pos, l0 or sizes.l0)


def step2_case(
    kind: str,
    sizes: Sizes,
) -> tuple[Case, WideCase]:
    """What the package computes on, and what the dense reference does.

    For `live` the dense reference has the same function among dead features.
    """
    if kind != "live":
        case = synthetic(sizes, kind, False, sizes.d)
        numbers = torch.arange(sizes.d + 1)
        return case, WideCase(case, numbers, numbers)
    spec = make_spec(sizes.n_heads, sizes.d_head)
    n_rows = sizes.n_tokens // sizes.context
    case = make_case("random", spec, sizes.live, n_rows, sizes.context, sizes.l0)
    return case, add_dead_features(case, sizes.d)


def step2_candidates(
    kind: str,
    case: Case,
    sizes: Sizes,
) -> Ranking:
    if kind == "live":
        return Ranking(SparseFeatureMap.all_pairs(*sizes.live, sizes.n_heads), 0, 0.0)
    return rank(case, sizes.n_candidates, n_rows=len(case.query_acts))


def warm_up(
    spec: AttentionSpec,
    dense: bool = False,
) -> None:
    """Compile, and let the libraries make their threads.

    Runs on a tiny problem of the same types and heads.
    """
    case = make_case(
        "random",
        spec,
        (31, 37),
        n_rows=2,
        n_pos=13,
        l0=3,
    )
    if dense:
        step = dense_reference.make_step(dense_problem(case), STRENGTH, LR)
    else:
        step = make_step(case, rank(case, 500).candidates)
    step_times(step, 2)


def full_size(case: Case) -> int:
    """Entries of the full map, constants included."""
    return len(case.decoders.query) * len(case.decoders.key) * case.spec.n_heads


def dense_problem(case: Case) -> DenseProblem:
    """The case as the dense reference sees it."""
    return DenseProblem(
        M=dense_reference.full_map(case.decoders.query, case.decoders.key, case.spec.scale),
        query_acts=with_constant(case.query_acts),
        key_acts=with_constant(case.key_acts),
        pattern=case.true.pattern,
        log_pattern=case.true.log_pattern,
    )


def gradients(
    mask: Tensor,
    kl: Tensor,
    penalty: Tensor,
) -> Gradients:
    (kl_gradient,) = torch.autograd.grad(kl, mask)
    (penalty_gradient,) = torch.autograd.grad(penalty, mask)
    return Gradients((kl + penalty).detach(), kl_gradient, kl_gradient + penalty_gradient)


def _relative_error(
    actual: Tensor,
    expected: Tensor,
) -> float:
    error = actual.double() - expected.double()
    return float(error.norm() / expected.double().norm())
