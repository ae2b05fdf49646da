"""The cases on synthetic activations: `step2` (against the dense reference), `wide`, `growth`."""

from collections.abc import Callable
from typing import Any

import torch
from data import Case, Whole, among, make_case, make_spec
from dense_reference import full_map, masked_scores, mean_kl, penalty
from dense_reference import make_step as make_dense_step
from measure import measure, process_peak_bytes, time_of
from sizes import Sizes
from sparse_step import LR, STRENGTH, Ranking, active_pairs, loss_of, make_step, rank
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.scoring.scorer import PairScorer
from sae_lens_qk.scoring.entries import with_constant
from sae_lens_qk.training.losses import TruePattern

Result = dict[str, Any]
KINDS = ("random", "clustered", "live")


def cases(sizes: Sizes) -> dict[str, Callable[[], Result]]:
    """Name -> measurement."""
    made: dict[str, Callable[[], Result]] = {}
    for kind in KINDS:
        made[f"step2.{kind}.dense"] = lambda kind=kind: dense_step(kind, sizes)
        made[f"step2.{kind}.sparse"] = lambda kind=kind: sparse_step(kind, sizes)
        made[f"step2.{kind}.agreement"] = lambda kind=kind: agreement(kind, sizes)
    for d in sizes.wide:
        made[f"wide.plain.{d}"] = lambda d=d: wide(d, False, sizes)
    made[f"wide.rotary.{sizes.wide[-1]}"] = lambda: wide(sizes.wide[-1], True, sizes)
    for rotary in (False, True):
        for axis, _ in sizes.growing:
            name = f"growth.{'rotary' if rotary else 'plain'}.{axis}"
            made[name] = lambda axis=axis, rotary=rotary: growth(axis, rotary, sizes)
    return made


def dense_step(kind: str, sizes: Sizes) -> Result:
    warm_up(make_spec(sizes.n_heads, sizes.d_head), dense=True)
    case = step2_case(kind, sizes)[1].case
    step = _dense_step_of(case)
    return {**measure(step, sizes.dense_steps), "entries": full_size(case)}


def sparse_step(kind: str, sizes: Sizes) -> Result:
    case, whole = step2_case(kind, sizes)
    warm_up(case.spec)
    ranking = step2_candidates(kind, case, sizes)
    result = measure(make_step(case, ranking.candidates), sizes.steps)
    return {
        **result,
        "pairs": len(ranking.candidates),
        "ranking_seconds": ranking.seconds,
        "active_pairs": active_pairs(case, ranking.candidates),
        "entries": full_size(whole.case),
    }


def agreement(kind: str, sizes: Sizes) -> Result:
    """Loss and gradient of both on the same pairs with the same random weights; the dense mask is zero elsewhere."""
    case, whole = step2_case(kind, sizes)
    indices = step2_candidates(kind, case, sizes).candidates.indices
    weights = torch.rand(len(indices), generator=torch.Generator().manual_seed(2))
    mask = weights.clone().requires_grad_()
    found = gradients(mask, *loss_of(PairScorer(indices, case.decoders, case.spec), mask, case))

    numbers = (whole.query_numbers[indices[:, 0]], whole.key_numbers[indices[:, 1]], indices[:, 2])
    d_query, d_key = (len(W) - 1 for W in whole.case.decoders)
    dense_mask = torch.zeros(d_query + 1, d_key + 1, sizes.n_heads)
    dense_mask[numbers], dense_mask[d_query, d_key] = weights, 1.0
    dense_mask.requires_grad_()
    scores = masked_scores(dense_mask, *_dense_problem(whole.case)[:3])
    losses = mean_kl(scores, *whole.case.true), STRENGTH * penalty(dense_mask[numbers])
    loss, of_kl, of_loss = gradients(dense_mask, *losses)
    expected = loss, of_kl[numbers], of_loss[numbers]
    names = "loss", "kl_gradient", "gradient"
    return {name: _relative_error(f, e) for name, f, e in zip(names, found, expected, strict=True)}


def wide(d: int, rotary: bool, sizes: Sizes) -> Result:
    """Step 2 on many features; the dense map is only counted."""
    case = synthetic(sizes, "clustered", rotary, d)
    warm_up(case.spec)
    ranking = rank(case, sizes.wide_pairs)
    result = measure(make_step(case, ranking.candidates), sizes.steps)
    return {
        **result,
        **_about(case, ranking),
        "d": d,
        "entries": full_size(case),
        "process_bytes": process_peak_bytes(),
        "active_pairs": active_pairs(case, ranking.candidates),
    }


def growth(axis: str, rotary: bool, sizes: Sizes) -> Result:
    """Step 2 while one of L0, context, pairs grows; the tokens of a step stay the same."""
    rows = []
    for value in dict(sizes.growing)[axis]:
        changed = {axis: value} if axis != "pairs" else {}
        case = synthetic(sizes, "clustered", rotary, sizes.d, **changed)
        if not rows:
            warm_up(case.spec)
        ranking = rank(case, value if axis == "pairs" else sizes.growth_pairs)
        rows.append(
            {
                "value": value,
                **measure(make_step(case, ranking.candidates), sizes.steps),
                **_about(case, ranking),
            }
        )
    return {"rows": rows}


def _about(case: Case, ranking: Ranking) -> Result:
    return {
        "pairs": len(ranking.candidates),
        "ranking_seconds": ranking.seconds,
        "ranking_rows": ranking.n_rows,
    }


def synthetic(
    sizes: Sizes, kind: str, rotary: bool, d: int, l0: int | None = None, context: int | None = None
) -> Case:
    """A case of `n_tokens` tokens with d features a side."""
    spec = make_spec(sizes.n_heads, sizes.d_head, sizes.n_frequencies if rotary else 0)
    n_pos = context or sizes.context
    return make_case(kind, spec, (d, d), sizes.n_tokens // n_pos, n_pos, l0 or sizes.l0)


def step2_case(kind: str, sizes: Sizes) -> tuple[Case, Whole]:
    """What ours computes on, and what the dense reference does: for `live` the same function among dead features."""
    if kind != "live":
        case = synthetic(sizes, kind, False, sizes.d)
        return case, Whole(case, torch.arange(sizes.d + 1), torch.arange(sizes.d + 1))
    spec, n_rows = make_spec(sizes.n_heads, sizes.d_head), sizes.n_tokens // sizes.context
    case = make_case("random", spec, sizes.live, n_rows, sizes.context, sizes.l0)
    return case, among(case, sizes.d)


def step2_candidates(kind: str, case: Case, sizes: Sizes) -> Ranking:
    if kind == "live":
        return Ranking(SparseFeatureMap.all_pairs(*sizes.live, sizes.n_heads), 0, 0.0)
    return rank(case, sizes.n_candidates, n_rows=len(case.query_acts))


def warm_up(spec: AttentionSpec, dense: bool = False) -> None:
    """Compile, and let the libraries make their threads, on a tiny problem of the same types and heads."""
    case = make_case("random", spec, (31, 37), n_rows=2, n_pos=13, l0=3)
    step = _dense_step_of(case) if dense else make_step(case, rank(case, 500).candidates)
    time_of(step, 2)


def full_size(case: Case) -> int:
    """Entries of the full map, constants included."""
    return len(case.decoders.query) * len(case.decoders.key) * case.spec.n_heads


def gradients(mask: Tensor, kl: Tensor, sparsity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the KL alone, gradient of the loss."""
    of_kl, of_sparsity = (torch.autograd.grad(part, mask)[0] for part in (kl, sparsity))
    return (kl + sparsity).detach(), of_kl, of_kl + of_sparsity


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _dense_problem(case: Case) -> tuple[Tensor, Tensor, Tensor, TruePattern]:
    M = full_map(*case.decoders, case.spec.scale)
    return M, with_constant(case.query_acts), with_constant(case.key_acts), case.true


def _dense_step_of(case: Case) -> Callable[[], float]:
    return make_dense_step(*_dense_problem(case), STRENGTH, LR)
