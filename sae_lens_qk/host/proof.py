"""The host is proven, not trusted: a layer rebuilt from weights against the model's hooks."""

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from sae_lens_qk.config import BilinearQKConfig
from sae_lens_qk.host.layer import TOLERANCE, AttentionLayer, check_mask, largest, run_recording
from sae_lens_qk.host.support import FOLDED_MODES, Hooks, Model, UnsupportedModelError

logger = logging.getLogger("sae_lens_qk")

# Relative distances of fingerprints
_SAME = 1e-5  # equal weights
_ROUNDED = 4e-3  # weights rounded to bfloat16
_NEAR = 0.15  # the same model in another precision

_PROVEN: WeakKeyDictionary[Any, dict[int, tuple[float, ...]]] = WeakKeyDictionary()
"""Layers already proven, with the fingerprint they had: a memo, dropped with its model."""


class HostMismatchError(RuntimeError):
    """What was rebuilt from the weights is not what the model's own hooks show."""


class FingerprintError(ValueError):
    """A dictionary meets weights it was not trained on."""


class HostReport(NamedTuple):
    """Largest absolute errors of what was rebuilt, against the model's own hooks."""

    queries: float
    keys: float
    scores: float
    pattern: float
    max_score: float
    logit_change: float
    """Largest change of a logit when the pattern is overwritten by the uniform one: the hook is
    live."""


@torch.no_grad()
def check_host(
    model: Model,
    layer: SupportsIndex,
    tokens: Tensor | None = None,
) -> HostReport:
    """Prove that this package computes what the model computes.

    q, k, scores and pattern are rebuilt from the weights. Models in reduced precision are proven on
    a float32 copy.

    Args:
        tokens: [batch, pos] to try on; default: two random sequences of 17.
    Returns:
        Largest errors; all within `TOLERANCE * max(1, max |score|)`.
    Raises:
        UnsupportedModelError: the model has a feature this package does not compute, or its pattern
            hook is inert.
        HostMismatchError: rebuilt and hooked tensors differ.
    """
    attention = AttentionLayer(model, layer)
    spec = attention.spec
    if attention.qk_weights.W_Q.dtype != torch.float32:
        attention = AttentionLayer(_float32_copy(model), layer)
    weights = attention.qk_weights
    names = attention.names
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        d_vocab = int(model.cfg.d_vocab)
        tokens = torch.randint(0, d_vocab, (2, 17), generator=generator)
    tokens = tokens.to(weights.W_Q.device)

    logits, values = run_recording(attention.model, tokens, names)
    record = attention.record_of(values)
    check_mask(record.scores, spec)

    queries = weights.queries(record.x)  # [batch, pos, head, d_head]
    keys = weights.keys(record.x)
    scores = spec.scores(queries, keys)
    allowed = spec.allowed_mask(scores.shape[-1], scores.device)
    max_score = largest(scores[..., allowed])
    # hosts show queries and keys by head or flat
    query_errors = queries.flatten(2) - values[names.queries].flatten(2)
    key_errors = keys.flatten(2) - values[names.keys].flatten(2)
    score_errors = scores - record.scores
    pattern_errors = spec.pattern(scores) - record.pattern
    errors = {
        "queries": largest(query_errors),
        "keys": largest(key_errors),
        "scores": largest(score_errors[..., allowed]),
        "pattern": largest(pattern_errors),
    }
    limit = TOLERANCE * max(1.0, max_score, largest(queries), largest(keys))
    for name, error in errors.items():
        if not error <= limit:  # NaN included
            raise HostMismatchError(
                f"Rebuilding layer {layer}: {name} differ from the model's own by {error:.2e}, "
                f"more than {limit:.2e}. This package does not compute this model's attention; "
                "please report the architecture."
            )
    change = _logit_change(attention, tokens, logits)
    if change == 0.0:
        raise UnsupportedModelError(
            f"Overwriting {names.pattern} does not change the logits: the hook is inert."
        )
    return HostReport(**errors, max_score=max_score, logit_change=change)


def prove_once(layer: AttentionLayer) -> None:
    """`check_host`, unless this layer of this model was proven with these weights before."""
    fingerprint = layer.qk_weights.fingerprint()
    proven = _PROVEN.setdefault(layer.model, {})
    if proven.get(layer.index) != fingerprint:
        check_host(layer.model, layer.index)
        proven[layer.index] = fingerprint


def proven_layer(
    cfg: BilinearQKConfig,
    model: Model,
) -> AttentionLayer:
    """The layer a dictionary belongs to: the host proven, the weights those it was trained on.

    Raises:
        FingerprintError: another model, another layer, or folded LayerNorm.
        UnsupportedModelError, HostMismatchError: see `check_host`.
    """
    layer = AttentionLayer(model, cfg.layer)
    trained_on = f"layer {cfg.layer} of {cfg.model_name} ({cfg.model_mode})"
    check_fingerprint(cfg.fingerprint, layer, trained_on, cfg.model_mode)
    prove_once(layer)
    return layer


def check_fingerprint(
    expected: Sequence[float], layer: AttentionLayer, trained_on: str, trained_mode: str = "bridge"
) -> None:
    """Compare a dictionary's fingerprint with a model's layer.

    Relative distance up to 1e-5: the same weights; up to 4e-3 (rounding to bfloat16): a notice in
    the log; up to 0.15: a warning with the distance (another precision of the same model); more: an
    error. Where LayerNorm is folded in one of the two only, x has another scale however near the
    weights are: there a warning is an error too.

    Raises:
        FingerprintError: other weights, another layer, or the same model with LayerNorm folded.
    """
    actual_values = torch.tensor(layer.qk_weights.fingerprint(), dtype=torch.float64)
    expected_values = torch.tensor(expected, dtype=torch.float64)
    distance = math.inf
    if len(actual_values) == len(expected_values):
        difference = (actual_values - expected_values).norm()
        distance = float(difference / expected_values.norm())
    same_folding = (trained_mode in FOLDED_MODES) == (layer.mode in FOLDED_MODES)
    limit = _NEAR if same_folding else _ROUNDED
    if not distance <= limit:  # NaN weights included
        raise FingerprintError(
            f"This dictionary was trained on {trained_on}; layer {layer.index} of this model "
            f"({layer.mode}) has other weights (relative distance {distance:.2g}). "
            "Load its own model with qk.load_model(d)."
        )
    if distance > _ROUNDED:
        logger.warning(
            "the model's W_Q, W_K differ from those of %s by %.2g (relative)", trained_on, distance
        )
    elif distance > _SAME:
        logger.info(
            "the model's W_Q, W_K are those of %s, rounded (relative distance %.2g)",
            trained_on,
            distance,
        )


def _logit_change(
    layer: AttentionLayer,
    tokens: Tensor,
    logits: Tensor,
) -> float:
    """Largest change of a logit when the layer attends uniformly to the allowed keys."""
    n_pos = tokens.shape[1]
    allowed = layer.spec.allowed_mask(n_pos, tokens.device)
    uniform = allowed / allowed.sum(dim=-1, keepdim=True)  # [pos_q, pos_k]

    def overwrite(
        pattern: Tensor,
        hook: Any,
    ) -> Tensor:
        return uniform.to(pattern.dtype).expand_as(pattern)

    hooks: Hooks = [(layer.names.pattern, overwrite)]
    changed = layer.model.run_with_hooks(tokens, fwd_hooks=hooks, prepend_bos=False)
    return largest(changed - logits)


def _float32_copy(model: Model) -> Model:
    """A copy in float32, HookedTransformer's rounded rotary tables computed anew."""
    duplicate: Any = copy.deepcopy(model).to(torch.float32, print_details=False)
    if not isinstance(duplicate, HookedTransformer):
        return duplicate
    if duplicate.cfg.positional_embedding_type == "rotary":
        for block in duplicate.blocks:
            block.attn._extend_rotary_embeddings(len(block.attn.rotary_sin))
    return duplicate
