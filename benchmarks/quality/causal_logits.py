"""Edited attention rows followed to the next token."""

import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from sae_lens_qk.explain.removals import CONTROLS
from sae_lens_qk.host.support import Hooks, Model
from sae_lens_qk.host.layer import hook_names

from .causal_figures import correlations, mean_interval, share

_AT_ONCE = 16


@torch.no_grad()
def next_token_kl(
    model: Model,
    layer: int,
    head: int,
    tokens: Int[Tensor, " pos"],
    patterns: Float[Tensor, "n pos"],
) -> Float[Tensor, " n"]:
    """KL(clean || patched) of the prediction after the last token, nats, when its pattern row of one head is replaced.

    Earlier positions do not see the change, so they are run once, into a cache of keys and values.
    """
    cache, name = DynamicCache(), hook_names(model, layer).pattern
    options: dict[str, Any] = {"use_cache": True, "prepend_bos": False}
    model.run_with_hooks(tokens[None, :-1], past_key_values=cache, **options)

    def log_probs(n: int, hooks: Hooks) -> Float[Tensor, "n vocab"]:
        repeated: Any = copy.deepcopy(cache)  # a call extends its cache
        repeated.batch_repeat_interleave(n)
        last = tokens[None, -1:].expand(n, 1)
        logits = model.run_with_hooks(last, fwd_hooks=hooks, past_key_values=repeated, **options)
        return logits[:, -1].double().log_softmax(dim=-1)

    def overwrite(rows: Tensor) -> Hooks:
        def hooked(pattern: Tensor, hook: Any) -> Tensor:
            made = pattern.clone()
            made[:, head, -1] = rows
            return made

        return [(name, hooked)]

    clean = log_probs(1, [])
    parts = [clean - log_probs(len(rows), overwrite(rows)) for rows in patterns.split(_AT_ONCE)]
    return (clean.exp() * torch.cat(parts)).sum(dim=-1)


def logit_figures(
    kls: list[dict[tuple[int, str], float]],
    texts: list[int],
    ks: tuple[int, ...],
    n_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Means over cases by k; `predicted` is the KL of the predicted row.

    Args:
        kls: for each case, KL by (k, condition).
        texts: the row of text of each.
    """
    made: dict[str, Any] = {}
    for k in ks:
        top, predicted = (
            np.array([kl.get((k, name), np.nan) for kl in kls]) for name in ("top", "predicted")
        )
        there = np.isfinite(top)
        figures = made[str(k)] = {
            "n": int(there.sum()),
            "top": mean_interval(top[there], np.array(texts)[there], n_bootstrap, seed)
            if there.any()
            else None,
            "predicted": float(predicted[there].mean()) if there.any() else None,
            "prediction": correlations(predicted[there], top[there]),
            "controls": {},
        }
        for name in CONTROLS:
            control = np.array([kl.get((k, name), np.nan) for kl in kls])
            counted = np.isfinite(control)
            figures["controls"][name] = {
                "n": int(counted.sum()),
                "top": float(top[counted].mean()) if counted.any() else None,
                "control": float(control[counted].mean()) if counted.any() else None,
                "wins": share(
                    (top > control)[counted], np.array(texts)[counted], n_bootstrap, seed
                ),
            }
    return made
