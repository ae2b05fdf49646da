"""Running a model with a reconstructed, thinned or edited attention pattern, through its own hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_qk.attention import pattern_from_scores
from sae_lens_qk.dictionary import BilinearQKDictionary, Source
from sae_lens_qk.feature_map import Pairs, SparseFeatureMap, as_pairs
from sae_lens_qk.host import (
    Hooks,
    Model,
    check_allowed_keys,
    check_attention_call,
    check_fingerprint,
    hook_names,
    input_completion,
    prove_once,
)

PatchSource = Literal[Source, "model"]
ScoreFn = Callable[
    [Float[Tensor, "batch pos d_model"], Float[Tensor, "batch head pos_q pos_k"]], Tensor
]


def check_model(dictionary: BilinearQKDictionary, model: Model) -> None:
    """Prove the host and that these are the weights the dictionary was trained on.

    Raises:
        FingerprintError: another model, another layer, or folded LayerNorm.
        UnsupportedModelError, HostMismatchError: see `qk.check_host`.
    """
    cfg = dictionary.cfg
    trained_on = f"layer {cfg.layer} of {cfg.model_name} ({cfg.model_mode})"
    check_fingerprint(cfg.fingerprint, model, cfg.layer, trained_on, cfg.model_mode)
    prove_once(model, cfg.layer)


def fwd_hooks(
    dictionary: BilinearQKDictionary,
    model: Model,
    source: PatchSource = "feature_map",
    heads: Sequence[int] | None = None,
    ablate_pairs: Pairs | None = None,
    scale_pairs: Mapping[tuple[int, int, int], float] | None = None,
    keep_pairs: Pairs | None = None,
) -> Hooks:
    """Hooks for `model.run_with_hooks(tokens, fwd_hooks=...)` that replace the layer's attention pattern.

    The pattern becomes softmax of

        "transcoders"   s<R_i q_hat, R_j k_hat>, plus (factor - 1) times each edited pair's term c
        "feature_map"   the kept pairs' terms m c, edited pairs with factor * m
        "model"         the model's own scores, plus (factor - 1) times each edited pair's term c

    with c = query_acts[i,a] key_acts[j,b] M[a,b,h](i-j). Ablating is factor 0.

    Args:
        heads: query heads whose pattern is replaced; None: all.
        ablate_pairs: triples (query feature, key feature, head) whose terms are removed.
        scale_pairs: triple -> factor.
        keep_pairs: only these triples (and constant x constant) remain; "transcoders" and "feature_map" only.
    Returns:
        [(canonical hook name, hook)], verified to exist. Each call of the model must use full, unpadded sequences.
    Raises:
        ValueError: unknown source, contradictory or foreign pairs, heads out of range.
        FingerprintError, UnsupportedModelError: the model is not the dictionary's, or is called in an unsupported way.
    """
    check_model(dictionary, model)
    score_fn = _score_function(dictionary, source, ablate_pairs, scale_pairs, keep_pairs)
    return pattern_hooks(
        model,
        dictionary.cfg.layer,
        lambda x, scores: pattern_from_scores(score_fn(x, scores)),
        heads,
    )


@contextmanager
def patched(
    dictionary: BilinearQKDictionary,
    model: Model,
    source: PatchSource = "feature_map",
    **edits: Any,
) -> Iterator[Model]:
    """Context in which `model` attends as `fwd_hooks(dictionary, model, source, **edits)` says; undone on leaving."""
    with model.hooks(fwd_hooks=fwd_hooks(dictionary, model, source, **edits)):
        yield model


def pattern_hooks(
    model: Model,
    layer: int,
    pattern_fn: Callable[
        [Float[Tensor, "batch pos d_model"], Float[Tensor, "batch head pos_q pos_k"]], Tensor
    ],
    heads: Sequence[int] | None = None,
) -> Hooks:
    """Hooks that overwrite a layer's pattern with `pattern_fn(x, scores)`, x its input and scores the model's own."""
    names, complete = hook_names(model, layer), input_completion(model, layer)
    n_heads = int(model.cfg.n_heads)
    if heads is not None and not all(0 <= head < n_heads for head in heads):
        raise ValueError(f"heads must lie in [0, {n_heads - 1}], got {list(heads)}.")
    seen: dict[str, Tensor] = {}

    def see_input(value: Tensor, hook: Any) -> None:
        seen["x"] = complete(value)

    def see_scores(value: Tensor, hook: Any) -> None:
        check_attention_call(seen["x"], value)
        check_allowed_keys(value)
        seen["scores"] = value

    def overwrite(pattern: Tensor, hook: Any) -> Tensor:
        made = pattern_fn(seen.pop("x"), seen.pop("scores")).to(pattern.dtype)
        if heads is None:
            return made
        replaced = pattern.clone()
        replaced[:, list(heads)] = made[:, list(heads)]
        return replaced

    return [(names.input, see_input), (names.scores, see_scores), (names.pattern, overwrite)]


def _score_function(
    d: BilinearQKDictionary,
    source: PatchSource,
    ablate_pairs: Pairs | None,
    scale_pairs: Mapping[tuple[int, int, int], float] | None,
    keep_pairs: Pairs | None,
) -> ScoreFn:
    if source not in get_args(PatchSource):
        raise ValueError(f"source must be 'transcoders', 'feature_map' or 'model', got {source!r}.")
    edited, factors = _edits(ablate_pairs, scale_pairs)
    if keep_pairs is not None and (source == "model" or len(edited)):
        raise ValueError(
            "keep_pairs keeps nothing else: it takes no other edit, and source 'transcoders' or 'feature_map'."
        )
    if source == "model" and not len(edited):
        raise ValueError("source 'model' edits the true scores: give ablate_pairs or scale_pairs.")
    sizes = d.cfg.d_query, d.cfg.d_key, d.spec.n_heads
    changes = _AnyWeights(
        edited, factors - 1.0, *sizes
    )  # these two refuse foreign pairs, whatever the source
    only = None
    if keep_pairs is not None:
        pairs = as_pairs(keep_pairs)
        only = SparseFeatureMap(pairs, torch.ones(len(pairs)), *sizes)

    if source == "feature_map":
        d.require_feature_map()
        kept = d.feature_map
        if only is not None:
            kept = kept.select(_listed(kept, only.indices))
        elif len(edited):
            weights = kept.weights.clone()
            at = _listed(kept, edited)
            weights[at] = weights[at] * factors.to(weights.dtype)
            kept = _AnyWeights(kept.indices, weights, *sizes)
        return lambda x, scores: kept.scores(d.encode_query(x), d.encode_key(x), d.decoders, d.spec)

    if only is not None:
        return lambda x, scores: only.scores(d.encode_query(x), d.encode_key(x), d.decoders, d.spec)

    def edited_scores(x: Tensor, scores: Tensor) -> Tensor:
        base = scores if source == "model" else d.scores(x, "transcoders")
        if not len(changes):
            return base
        return base + changes.scores(
            d.encode_query(x), d.encode_key(x), d.decoders, d.spec, include_constant=False
        )

    return edited_scores


class _AnyWeights(SparseFeatureMap):
    """Pairs with factors that an intervention chose, in any range."""

    def _check_weights(self, weights: Tensor) -> None:
        if not weights.isfinite().all():
            raise ValueError("scale_pairs must be finite factors.")


def _edits(
    ablate_pairs: Pairs | None, scale_pairs: Mapping[tuple[int, int, int], float] | None
) -> tuple[Tensor, Tensor]:
    ablated = as_pairs([] if ablate_pairs is None else ablate_pairs)
    scaled = as_pairs(list(scale_pairs or {}))
    factors = torch.tensor(list((scale_pairs or {}).values()), dtype=torch.float32)
    edited = torch.cat([ablated, scaled])
    if len(edited.unique(dim=0)) < len(edited):
        raise ValueError("ablate_pairs and scale_pairs together must name each pair once.")
    return edited, torch.cat([torch.zeros(len(ablated)), factors])


def _listed(feature_map: SparseFeatureMap, pairs: Tensor) -> Tensor:
    at = feature_map.find(pairs)
    if (at < 0).any():
        raise ValueError(
            f"The feature map does not keep the pair {tuple(pairs[at < 0][0].tolist())}; see d.pair_frame()."
        )
    return at
