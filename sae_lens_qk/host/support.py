"""Which models are supported: what a layer has that this package does not compute, by name.

Supported are TransformerBridge (plain and in compatibility mode) and HookedTransformer (processed
or not) with learned positions (GPT-2), rotary embeddings in rotate-half order, full or partial
(Llama, GPT-NeoX), and grouped keys. To support a variant: give `AttentionSpec` its field and
equation, read it in `layer.py`, and drop its line here; `proof.py` then proves the reading on the
model itself.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

Model = TransformerBridge | HookedTransformer
Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]
"""What `model.run_with_hooks(tokens, fwd_hooks=...)` takes."""

FOLDED_MODES = ("bridge_compatibility", "hooked_processed")
"""Modes in which LayerNorm's gain and bias are folded into the weights."""


class UnsupportedModelError(ValueError):
    """The model, or the way it is called, has something this package does not compute."""


def model_mode(model: Model) -> str:
    """bridge, bridge_compatibility, hooked or hooked_processed (LayerNorm folded)."""
    if isinstance(model, TransformerBridge):
        return "bridge_compatibility" if model.compatibility_mode else "bridge"
    if isinstance(model, HookedTransformer):
        folded = model.cfg.normalization_type in ("LNPre", "RMSPre")
        return "hooked_processed" if folded else "hooked"
    raise UnsupportedModelError(
        f"Expected a TransformerBridge or a HookedTransformer, got {type(model).__name__}: "
        "load it with qk.load_model."
    )


def n_layers(model: Model) -> int:
    return int(model.cfg.n_layers)


def refuse_unsupported(
    model: Model,
    layer: int,
) -> None:
    """Refuse a layer whose attention this package does not compute.

    Raises:
        UnsupportedModelError: names the first such feature.
    """
    if isinstance(model, HookedTransformer):
        features = _hooked_features(model, layer)
    else:
        features = _bridge_features(model, layer)
    for name, is_present in features.items():
        if is_present:
            raise UnsupportedModelError(
                f"Layer {layer} of this model uses {name}, which is not supported yet."
            )


def rotary_modules(model: TransformerBridge) -> list[Any]:
    """Rotary embeddings of the model underneath, without repeats."""
    original: Any = model.original_model
    candidates = (
        module
        for module in original.modules()
        if isinstance(getattr(module, "inv_freq", None), Tensor)
    )
    # modules that share their frequencies are one embedding
    unique = {module.inv_freq.data_ptr(): module for module in candidates}
    return list(unique.values())


def _hooked_features(
    model: HookedTransformer,
    layer: int,
) -> dict[str, bool]:
    """What a HookedTransformer's layer has besides plain attention, by name."""
    cfg = model.cfg
    positions = cfg.positional_embedding_type
    scaled = (getattr(cfg, name, False) for name in ("use_NTK_by_parts_rope", "use_yarn_rope"))
    return {
        "QK-norm": bool(getattr(cfg, "use_qk_norm", False)),
        "a softcap on attention scores": cfg.attn_scores_soft_cap > 0,
        "a sliding window": model.blocks[layer].attn.attn_type == "local",
        "ALiBi": positions == "alibi",
        "positions that are neither learned nor rotary": positions
        not in ("standard", "rotary", "alibi"),
        "scaled rotary embeddings": any(scaled),
        "rotary embeddings of adjacent pairs": positions == "rotary"
        and bool(cfg.rotary_adjacent_pairs),
        "bidirectional attention": cfg.attention_dir != "causal",
    }


def _bridge_features(
    model: TransformerBridge,
    layer: int,
) -> dict[str, bool]:
    """What a bridge's layer has besides plain attention, by name."""
    attn = model.blocks[layer].attn
    component = attn.original_component
    config = model.original_model.config
    rotaries = rotary_modules(model)
    rope = getattr(config, "rope_parameters", None) or {}
    # architectures call it differently
    norm_names = ("q_norm", "q_layernorm", "qk_layernorm")
    norms = (getattr(component, name, None) for name in norm_names)
    amplitudes = (getattr(module, "attention_scaling", 1.0) for module in rotaries)
    # such a bridge computes no pattern of its own that a hook could replace
    runs_original = type(attn).forward is AttentionBridge.forward
    return {
        "QK-norm": any(norm not in (None, False) for norm in norms),
        "a softcap on attention scores": getattr(component, "attn_logit_softcapping", None)
        is not None,
        "a sliding window": _bridge_window(component, config, layer) is not None,
        "ALiBi": bool(getattr(config, "alibi", False))
        or getattr(config, "model_type", "") in ("bloom", "mpt"),
        "several rotary embeddings": len(rotaries) > 1,
        "scaled rotary embeddings": rope.get("rope_type", "default") != "default"
        or any(amplitude != 1.0 for amplitude in amplitudes),
        "a pattern hook that is inert (the bridge runs the original attention)": runs_original,
    }


def _bridge_window(
    component: Any,
    config: Any,
    layer: int,
) -> int | None:
    """Sliding window of the layer, None where it has none."""
    if hasattr(component, "sliding_window"):
        return component.sliding_window
    # Mistral keeps it in the config alone
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] == "full_attention":
        return None
    return getattr(config, "sliding_window", None)
