"""Edited attention rows followed to the next token."""

import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from benchmarks.quality.causal_metrics import Removal, correlations, mean_interval
from sae_lens_qk.explain.removals import CONTROLS
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.support import Hooks

_BATCH = 16


@torch.no_grad()
def next_token_kl(
    layer: AttentionLayer,
    head: int,
    tokens: Int[Tensor, " pos"],
    patterns: Float[Tensor, "n pos"],
) -> Float[Tensor, " n"]:
    """KL(clean || patched) of the prediction after the last token, in nats.

    Patched: the last pattern row of one head is replaced. Earlier positions do not see the change,
    so they are run once, into a cache of keys and values.
    """
    model = layer.model
    options: dict[str, Any] = {"use_cache": True, "prepend_bos": False}
    cache = DynamicCache()
    model.run_with_hooks(tokens[None, :-1], past_key_values=cache, **options)

    def log_probs(
        n: int,
        hooks: Hooks,
    ) -> Float[Tensor, "n vocab"]:
        repeated: Any = copy.deepcopy(cache)  # a call extends its cache
        repeated.batch_repeat_interleave(n)
        last = tokens[None, -1:].expand(n, 1)
        logits = model.run_with_hooks(last, fwd_hooks=hooks, past_key_values=repeated, **options)
        return logits[:, -1].double().log_softmax(dim=-1)

    def overwrite(rows: Tensor) -> Hooks:
        def replace_row(
            pattern: Tensor,
            hook: Any,
        ) -> Tensor:
            patched = pattern.clone()
            patched[:, head, -1] = rows
            return patched

        return [(layer.names.pattern, replace_row)]

    clean = log_probs(1, [])
    differences = []
    for rows in patterns.split(_BATCH):
        differences.append(clean - log_probs(len(rows), overwrite(rows)))
    return (clean.exp() * torch.cat(differences)).sum(dim=-1)


def logit_metrics(
    kls: list[dict[Removal, float]],
    texts: list[int],
    ks: tuple[int, ...],
    n_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Means over cases by k; `predicted` is the KL of the predicted row.

    Args:
        kls: for each case, KL by removal.
        texts: the row of text of each.
    """
    text_rows = np.array(texts)

    def values(
        k: int,
        condition: str,
    ) -> np.ndarray:
        return np.array([case_kls.get(Removal(k, condition), np.nan) for case_kls in kls])

    results: dict[str, Any] = {}
    for k in ks:
        top = values(k, "top")
        predicted = values(k, "predicted")
        exists = np.isfinite(top)
        controls = {}
        for name in CONTROLS:
            control = values(k, name)
            has_control = np.isfinite(control)
            wins = (top > control)[has_control]
            controls[name] = {
                "n": int(has_control.sum()),
                "top": _mean(top[has_control]),
                "control": _mean(control[has_control]),
                "wins": mean_interval(wins, text_rows[has_control], n_bootstrap, seed),
            }
        results[str(k)] = {
            "n": int(exists.sum()),
            "top": mean_interval(top[exists], text_rows[exists], n_bootstrap, seed),
            "predicted": _mean(predicted[exists]),
            "prediction": correlations(predicted[exists], top[exists]),
            "controls": controls,
        }
    return results


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
