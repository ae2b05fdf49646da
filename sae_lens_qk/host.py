"""The one file that touches transformer_lens and sae_lens internals: reads a layer off a model, proves it, names hooks.

Supported: TransformerBridge (plain and in compatibility mode) and HookedTransformer (processed or not) with learned
positions (GPT-2), rotary embeddings in rotate-half order, full or partial (Llama, GPT-NeoX), and grouped keys. What is not
supported is refused by name in `_refuse_unsupported`; to support a variant, teach `AttentionSpec` and `attention.py` about
it, read it here, and drop its refusal. `check_host` then proves the reading on the model itself.
"""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

from sae_lens_qk.attention import AttentionSpec, allowed_keys, attention_scores, pattern_from_scores

logger = logging.getLogger("sae_lens_qk")

Model = TransformerBridge | HookedTransformer
Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]
"""What `model.run_with_hooks(tokens, fwd_hooks=...)` takes."""

TOLERANCE = 1e-5
"""Largest error of a rebuilt tensor, relative to max(1, largest score), in float32."""

# Relative distance of fingerprints: equal weights, weights rounded to bfloat16, the same model in another precision.
_SAME, _ROUNDED, _NEAR = 1e-5, 4e-3, 0.15
_FOLDED = ("bridge_compatibility", "hooked_processed")

_PROVEN: WeakKeyDictionary[Any, dict[int, tuple[float, ...]]] = WeakKeyDictionary()
"""Layers already proven by `check_host`, with the fingerprint they had: a memo, dropped with its model."""


class UnsupportedModelError(ValueError):
    """The model, or the way it is called, has something this package does not compute; the message names it."""


class HostMismatchError(RuntimeError):
    """What was rebuilt from the weights is not what the model's own hooks show."""


class FingerprintError(ValueError):
    """A dictionary meets weights it was not trained on."""


class HookNames(NamedTuple):
    """Canonical hook names of one attention layer, each verified to exist."""

    input: str
    queries: str
    keys: str
    scores: str
    pattern: str


class QKWeights(NamedTuple):
    """W_Q and W_K of one layer, by head."""

    W_Q: Float[Tensor, "head d_model d_head"]
    b_Q: Float[Tensor, "head d_head"]
    W_K: Float[Tensor, "kv_head d_model d_head"]
    b_K: Float[Tensor, "kv_head d_head"]

    def queries(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch head d_head"]:
        """q[i,h] = x[i] W_Q[h] + b_Q[h]."""
        return (x @ self.W_Q.transpose(0, 1).flatten(1)).unflatten(-1, self.b_Q.shape) + self.b_Q

    def keys(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch kv_head d_head"]:
        """k[j,g] = x[j] W_K[g] + b_K[g]."""
        return (x @ self.W_K.transpose(0, 1).flatten(1)).unflatten(-1, self.b_K.shape) + self.b_K

    def to(self, *args: Any) -> "QKWeights":
        return QKWeights(*(tensor.to(*args) for tensor in self))

    def fingerprint(self) -> tuple[float, ...]:
        """W_Q r, then W_K r, for the fixed r_i = sin(i^2), to seven digits."""
        r = (
            torch.arange(1, self.W_Q.shape[1] + 1, dtype=torch.float64, device=self.W_Q.device)
            .square()
            .sin()
        )
        projected = torch.cat(
            [torch.einsum("hmd,m->hd", W.double(), r).flatten() for W in (self.W_Q, self.W_K)]
        )
        return tuple(float(f"{value:.7g}") for value in projected.tolist())


class OVWeights(NamedTuple):
    """W_V and W_O of one layer, by head: head h moves z[i,h] = sum_j P[h,i,j] v[j,g(h)] and writes z W_O[h]."""

    W_V: Float[Tensor, "kv_head d_model d_head"]
    b_V: Float[Tensor, "kv_head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"]

    def to(self, *args: Any) -> "OVWeights":
        return OVWeights(*(tensor.to(*args) for tensor in self))


class ResidualNames(NamedTuple):
    """Canonical hook names of what one layer reads from and writes to the residual stream."""

    resid_pre: str
    """What enters the layer; of layer 0 the embeddings."""
    z: str
    """What the heads move, before W_O: [batch, pos, head, d_head]."""
    mlp_out: str


class HostReport(NamedTuple):
    """Largest absolute errors of what was rebuilt from the weights, against the model's own hooks."""

    queries: float
    keys: float
    scores: float
    pattern: float
    max_score: float
    logit_change: float
    """Largest change of a logit when the pattern is overwritten by the uniform one: proof that the hook is live."""


def model_mode(model: Model) -> str:
    """bridge, bridge_compatibility, hooked or hooked_processed (LayerNorm folded)."""
    if isinstance(model, TransformerBridge):
        return "bridge_compatibility" if model.compatibility_mode else "bridge"
    if isinstance(model, HookedTransformer):
        folded = model.cfg.normalization_type in ("LNPre", "RMSPre")
        return "hooked_processed" if folded else "hooked"
    raise UnsupportedModelError(
        f"Expected a TransformerBridge or a HookedTransformer, got {type(model).__name__}: load it with qk.load_model."
    )


def attention_spec(model: Model, layer: int) -> AttentionSpec:
    """Read the layer's attention off the model.

    Raises:
        UnsupportedModelError: QK-norm, softcap, sliding window, ALiBi, scaled or adjacent-pair rotary, inert hooks.
        ValueError: layer out of range.
    """
    attn = _attention(model, layer)
    _refuse_unsupported(model, layer)
    weights = qk_weights(model, layer)
    n_heads, d_model, d_head = weights.W_Q.shape
    if isinstance(model, HookedTransformer):
        scale = 1.0 / attn.attn_scale
        inv_freq = _hooked_inv_freq(model)
    else:
        scale = getattr(attn.original_component, "scaling", None) or d_head**-0.5
        inv_freq = next((module.inv_freq for module in _rotary_modules(model)), torch.empty(0))
    return AttentionSpec(
        n_heads, len(weights.W_K), d_head, d_model, float(scale), tuple(inv_freq.float().tolist())
    )


def qk_weights(model: Model, layer: int) -> QKWeights:
    """W_Q, b_Q, W_K, b_K of one layer, detached; missing biases are zeros; grouped keys are not repeated."""
    attn = _attention(model, layer)
    grouped = isinstance(model, HookedTransformer) and hasattr(attn, "_W_K")
    W_Q, b_Q = attn.W_Q, attn.b_Q
    W_K, b_K = (attn._W_K, attn._b_K) if grouped else (attn.W_K, attn.b_K)
    zeros = [weight.new_zeros(weight.shape[0], weight.shape[2]) for weight in (W_Q, W_K)]
    biases = [zero if bias is None else bias for zero, bias in zip(zeros, (b_Q, b_K), strict=True)]
    return QKWeights(W_Q.detach(), biases[0].detach(), W_K.detach(), biases[1].detach())


def hook_names(model: Model, layer: int) -> HookNames:
    """Canonical hook names of the layer, checked: models silently ignore names they do not know.

    `input` is the tensor that W_Q and W_K multiply, except for an unprocessed HookedTransformer, which has no such
    hook: there it is the LayerNorm before its gain and bias, and `input_completion` completes it.
    """
    _attention(model, layer)
    block = f"blocks.{layer}"
    if isinstance(model, TransformerBridge):
        attn_names = ("hook_in", "q.hook_out", "k.hook_out", "hook_attn_scores", "hook_pattern")
        names = HookNames(*(f"{block}.attn.{name}" for name in attn_names))
    else:
        attn_names = ("hook_q", "hook_k", "hook_attn_scores", "hook_pattern")
        names = HookNames(
            f"{block}.ln1.hook_normalized", *(f"{block}.attn.{name}" for name in attn_names)
        )
    missing = [name for name in names if name not in model.hook_dict]
    if missing:
        raise UnsupportedModelError(f"The model has no hook {missing[0]}.")
    return names


def input_completion(model: Model, layer: int) -> Callable[[Tensor], Tensor]:
    """Function from the value at `hook_names(model, layer).input` to the tensor that W_Q and W_K multiply."""
    if model_mode(model) != "hooked":
        return lambda hooked: hooked
    norm: Any = model.blocks[layer].ln1
    bias = getattr(norm, "b", None)
    return lambda hooked: hooked * norm.w if bias is None else hooked * norm.w + bias


@torch.no_grad()
def run_recording(
    model: Model,
    tokens: Tensor,
    names: Sequence[str],
    fwd_hooks: Sequence[Any] = (),
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the model without gradients and keep what passes the named hooks.

    Args:
        tokens: [batch, pos].
        names: canonical hook names, see `hook_names`.
        fwd_hooks: hooks that act before the recording.
        **options: of `model.run_with_hooks`, such as stop_at_layer.
    Returns:
        Logits [batch, pos, d_vocab] (with stop_at_layer the residual stream), and a copy of each tensor by name.
    Raises:
        UnsupportedModelError: a hook does not fire.
    """
    seen: dict[str, Tensor] = {}
    recorders = [
        (name, lambda value, hook, name=name: seen.__setitem__(name, value.clone()))
        for name in names
    ]
    logits = model.run_with_hooks(
        tokens, fwd_hooks=[*fwd_hooks, *recorders], prepend_bos=False, **options
    )
    unheard = [name for name in names if name not in seen]
    if unheard:
        raise UnsupportedModelError(f"The hook {unheard[0]} never fires in this model.")
    return logits, seen


def layer_inputs(model: Model, layer: int, tokens: Tensor) -> Float[Tensor, "batch pos d_model"]:
    """The tensor that W_Q and W_K multiply, for tokens [batch, pos]; runs the model up to this layer only."""
    name = hook_names(model, layer).input
    _, seen = run_recording(model, tokens, [name], stop_at_layer=layer + 1)
    return input_completion(model, layer)(seen[name])


def ov_weights(model: Model, layer: int) -> OVWeights:
    """W_V, b_V, W_O, b_O of one layer, detached; missing biases are zeros; grouped values are not repeated."""
    attn = _attention(model, layer)
    grouped = isinstance(model, HookedTransformer) and hasattr(attn, "_W_V")
    W_V, b_V = (attn._W_V, attn._b_V) if grouped else (attn.W_V, attn.b_V)
    W_O, b_O = attn.W_O, attn.b_O
    b_V = W_V.new_zeros(W_V.shape[0], W_V.shape[2]) if b_V is None else b_V
    b_O = W_O.new_zeros(W_O.shape[2]) if b_O is None else b_O
    return OVWeights(W_V.detach(), b_V.detach(), W_O.detach(), b_O.detach())


def residual_names(model: Model, layer: int) -> ResidualNames:
    """Hook names of what the layer reads from and writes to the residual stream, checked to exist."""
    _attention(model, layer)
    bridge = isinstance(model, TransformerBridge)
    listed = (
        ("hook_in", "attn.o.hook_in", "mlp.hook_out")
        if bridge
        else ("hook_resid_pre", "attn.hook_z", "hook_mlp_out")
    )
    names = ResidualNames(*(f"blocks.{layer}.{name}" for name in listed))
    missing = [name for name in names if name not in model.hook_dict]
    if missing:
        raise UnsupportedModelError(f"The model has no hook {missing[0]}.")
    return names


@torch.no_grad()
def attention_input(
    model: Model, layer: int, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """What the attention of a layer would see of a residual stream: the norm before it."""
    _attention(model, layer)
    block: Any = model.blocks[layer]
    return block.ln1(residual)


@torch.no_grad()
def unembedded(
    model: Model, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_vocab"]:
    """Logits of a residual stream: final norm, then unembedding."""
    host: Any = model
    return host.unembed(host.ln_final(residual))


class LogitDirections(NamedTuple):
    """Linear in the residual stream: logit difference = <residual, directions> + constants."""

    directions: Float[Tensor, "prompt d_model"]
    constants: Float[Tensor, " prompt"]


def logit_directions(
    model: Model,
    residual: Float[Tensor, "prompt d_model"],
    plus: Int[Tensor, " prompt"],
    minus: Int[Tensor, " prompt"],
) -> LogitDirections:
    """logit(plus) - logit(minus) as a linear function of the last residual stream, the scale of the final norm held fixed.

    The direction is the gradient with the scale detached, so that it is right for every norm the hosts know.

    Args:
        residual: after the last layer.
        plus, minus: one token each a prompt.
    """
    host, at = cast(Any, model), torch.arange(len(residual), device=residual.device)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*hook_scale.*"
        )  # the bridge tells that it leaves the native norm
        varied = residual.detach().clone().requires_grad_(True)
        with host.hooks(fwd_hooks=[("ln_final.hook_scale", lambda scale, hook: scale.detach())]):
            logits = host.unembed(host.ln_final(varied))
        difference = logits[at, plus] - logits[at, minus]
        (directions,) = torch.autograd.grad(difference.sum(), varied)
    return LogitDirections(directions, difference.detach() - (directions * residual).sum(dim=-1))


class LayerReplay:
    """Runs a model once, then again and again from one layer on, under other hooks: what stands below does not change.

    Neither host starts at a layer in all its modes, so the blocks are called with what the layer received in the recorded
    pass. The first recorded pass is replayed without hooks; unless that gives its logits, every replay is a full pass.
    """

    def __init__(self, model: Model, layer: int):
        self.model, self.layer = model, layer
        self.exact: bool | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def record(self, tokens: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """`run_recording`, after which `run` replays these tokens."""
        options: dict[str, Any] = (
            {"use_cache": False} if isinstance(self.model, TransformerBridge) else {}
        )
        block: Any = self.model.blocks[self.layer]
        handle = block.register_forward_pre_hook(self._see_call, with_kwargs=True)
        try:
            logits, seen = run_recording(self.model, tokens, names, **options)
        finally:
            handle.remove()
        self._tokens = tokens
        if self.exact is None:
            self.exact = True
            self.exact = _largest(self.run([]) - logits) <= TOLERANCE * max(1.0, _largest(logits))
        return logits, seen

    def _see_call(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = args, kwargs

    @torch.no_grad()
    def run(
        self, fwd_hooks: Hooks, positions: slice = slice(None)
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the recorded tokens, at these positions, under hooks on this layer or later ones."""
        model: Any = self.model
        if not self.exact:
            return model.run_with_hooks(self._tokens, fwd_hooks=fwd_hooks, prepend_bos=False)[
                :, positions
            ]
        (residual, *args), kwargs = self._call
        with model.hooks(fwd_hooks=fwd_hooks):
            for block in model.blocks[self.layer :]:
                made = block(residual, *args, **kwargs)
                residual = made[0] if isinstance(made, tuple) else made
            return model.unembed(model.ln_final(residual[:, positions]))


def n_layers(model: Model) -> int:
    return int(model.cfg.n_layers)


def check_attention_call(x: Tensor, pattern_or_scores: Tensor) -> None:
    """Refuse calls whose pattern is not that of full, unpadded sequences from position 0.

    Raises:
        UnsupportedModelError: generation with a KV cache (one query row, shifted columns).
    """
    n_query, n_key = pattern_or_scores.shape[-2:]
    if not x.shape[1] == n_query == n_key:
        raise UnsupportedModelError(
            f"The pattern has {n_query} queries and {n_key} keys for {x.shape[1]} positions: generation with a KV cache "
            "is not supported, call the model on full sequences (use_past_kv_cache=False)."
        )


def check_allowed_keys(scores: Tensor) -> None:
    """Refuse scores masked otherwise than causally.

    Raises:
        UnsupportedModelError: padded input, or a window the spec does not know.
    """
    masked = (
        scores <= torch.finfo(scores.dtype).min / 2
    )  # hosts mask with -inf or with the smallest float
    if (masked == allowed_keys(scores.shape[-1], scores.device)).any():
        raise UnsupportedModelError(
            "The model masks more than future keys: padded input is not supported."
        )


@torch.no_grad()
def check_host(model: Model, layer: int, tokens: Tensor | None = None) -> HostReport:
    """Prove that this package computes what the model computes: rebuild q, k, scores and pattern from weights.

    Models in reduced precision are proven on a float32 copy. Success is remembered for the model and its weights.

    Args:
        tokens: [batch, pos] to try on; default: two random sequences of 17.
    Returns:
        Largest errors; all within `TOLERANCE * max(1, max |score|)`.
    Raises:
        UnsupportedModelError: the model has a feature this package does not compute, or its pattern hook is inert.
        HostMismatchError: rebuilt and hooked tensors differ.
    """
    spec = attention_spec(model, layer)
    if qk_weights(model, layer).W_Q.dtype != torch.float32:
        model = _float32_copy(model)
    weights, names, complete = (
        qk_weights(model, layer),
        hook_names(model, layer),
        input_completion(model, layer),
    )
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, int(model.cfg.d_vocab), (2, 17), generator=generator)
    tokens = tokens.to(weights.W_Q.device)

    logits, seen = run_recording(model, tokens, names)
    x = complete(seen[names.input])
    check_attention_call(x, seen[names.scores])
    check_allowed_keys(seen[names.scores])

    queries, keys = weights.queries(x), weights.keys(x)
    scores = attention_scores(queries, keys, spec)
    allowed = allowed_keys(scores.shape[-1], scores.device)
    max_score = float(scores[..., allowed].abs().max())
    errors = {
        "queries": _largest(queries.flatten(2) - seen[names.queries].flatten(2)),
        "keys": _largest(keys.flatten(2) - seen[names.keys].flatten(2)),
        "scores": _largest((scores - seen[names.scores])[..., allowed]),
        "pattern": _largest(pattern_from_scores(scores) - seen[names.pattern]),
    }
    limit = TOLERANCE * max(1.0, max_score, _largest(queries), _largest(keys))
    for name, error in errors.items():
        if not error <= limit:
            raise HostMismatchError(
                f"Rebuilding layer {layer}: {name} differ from the model's own by {error:.2e}, more than {limit:.2e}. "
                "This package does not compute this model's attention; please report the architecture."
            )

    uniform = allowed / allowed.sum(dim=-1, keepdim=True)
    overwrite: Hooks = [
        (names.pattern, lambda pattern, hook: uniform.to(pattern.dtype).expand_as(pattern))
    ]
    change = _largest(model.run_with_hooks(tokens, fwd_hooks=overwrite, prepend_bos=False) - logits)
    if change == 0.0:
        raise UnsupportedModelError(
            f"Overwriting {names.pattern} does not change the logits: the hook is inert."
        )
    return HostReport(**errors, max_score=max_score, logit_change=change)


def prove_once(model: Model, layer: int) -> None:
    """`check_host`, unless this layer of this model was proven with these weights before."""
    fingerprint = qk_weights(model, layer).fingerprint()
    proven = _PROVEN.setdefault(model, {})
    if proven.get(layer) != fingerprint:
        check_host(model, layer)
        proven[layer] = fingerprint


def check_fingerprint(
    expected: Sequence[float],
    model: Model,
    layer: int,
    trained_on: str,
    trained_mode: str = "bridge",
) -> None:
    """Compare a dictionary's fingerprint with a model's layer.

    Relative distance up to 1e-5: the same weights; up to 4e-3 (rounding to bfloat16): a notice in the log; up to 0.15:
    a warning with the distance (another precision of the same model); more: an error. Where LayerNorm is folded in one of
    the two only, x has another scale however near the weights are: there a warning is an error too.

    Raises:
        FingerprintError: other weights, another layer, or the same model with LayerNorm folded.
    """
    found = torch.tensor(qk_weights(model, layer).fingerprint(), dtype=torch.float64)
    wanted = torch.tensor(expected, dtype=torch.float64)
    distance = (
        math.inf if len(found) != len(wanted) else float((found - wanted).norm() / wanted.norm())
    )
    alike = (trained_mode in _FOLDED) == (model_mode(model) in _FOLDED)
    if not distance <= (_NEAR if alike else _ROUNDED):  # NaN weights included
        raise FingerprintError(
            f"This dictionary was trained on {trained_on}; layer {layer} of this model ({model_mode(model)}) has other "
            f"weights (relative distance {distance:.2g}). Load its own model with qk.load_model(d)."
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


def _attention(model: Model, layer: int) -> Any:
    model_mode(model)
    if not 0 <= layer < n_layers(model):
        raise ValueError(f"layer must lie in [0, {n_layers(model) - 1}], got {layer}.")
    blocks: Any = model.blocks
    return blocks[layer].attn


def _float32_copy(model: Model) -> Model:
    """A copy in float32; HookedTransformer's rotary tables, which were rounded with the weights, are made anew."""
    made: Any = copy.deepcopy(model).to(torch.float32, print_details=False)
    if isinstance(made, HookedTransformer) and made.cfg.positional_embedding_type == "rotary":
        for block in made.blocks:
            block.attn._extend_rotary_embeddings(len(block.attn.rotary_sin))
    return made


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _rotary_modules(model: TransformerBridge) -> list[Any]:
    """Rotary embeddings of the model underneath, without repeats."""
    original: Any = model.original_model
    modules = [
        module
        for module in original.modules()
        if isinstance(getattr(module, "inv_freq", None), Tensor)
    ]
    return list({module.inv_freq.data_ptr(): module for module in modules}.values())


def _hooked_inv_freq(model: HookedTransformer) -> Tensor:
    cfg = model.cfg
    if cfg.positional_embedding_type != "rotary" or cfg.rotary_dim is None:
        return torch.empty(0)
    exponent = torch.arange(cfg.rotary_dim // 2, dtype=torch.float32) / (cfg.rotary_dim / 2)
    return 1.0 / torch.as_tensor(cfg.rotary_base, dtype=torch.float32) ** exponent


def _refuse_unsupported(model: Model, layer: int) -> None:
    features = (
        _hooked_features(model, layer)
        if isinstance(model, HookedTransformer)
        else _bridge_features(model, layer)
    )
    present = [name for name, found in features.items() if found]
    if present:
        raise UnsupportedModelError(
            f"Layer {layer} of this model uses {present[0]}, which is not supported yet."
        )


def _hooked_features(model: HookedTransformer, layer: int) -> dict[str, bool]:
    cfg = model.cfg
    return {
        "QK-norm": bool(getattr(cfg, "use_qk_norm", False)),
        "a softcap on attention scores": cfg.attn_scores_soft_cap > 0,
        "a sliding window": model.blocks[layer].attn.attn_type == "local",
        "ALiBi": cfg.positional_embedding_type == "alibi",
        "positions that are neither learned nor rotary": cfg.positional_embedding_type
        not in ("standard", "rotary", "alibi"),
        "scaled rotary embeddings": bool(getattr(cfg, "use_NTK_by_parts_rope", False))
        or bool(getattr(cfg, "use_yarn_rope", False)),
        "rotary embeddings of adjacent pairs": cfg.positional_embedding_type == "rotary"
        and bool(cfg.rotary_adjacent_pairs),
        "bidirectional attention": cfg.attention_dir != "causal",
    }


def _bridge_features(model: TransformerBridge, layer: int) -> dict[str, bool]:
    attn, config = model.blocks[layer].attn, model.original_model.config
    component = attn.original_component
    window = getattr(component, "sliding_window", None)
    if window is None and not hasattr(
        component, "sliding_window"
    ):  # Mistral keeps it in the config alone
        layer_types = getattr(config, "layer_types", None)
        full = layer_types is not None and layer_types[layer] == "full_attention"
        window = None if full else getattr(config, "sliding_window", None)
    rotaries = _rotary_modules(model)
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "QK-norm": any(
            getattr(component, name, None) not in (None, False)
            for name in ("q_norm", "q_layernorm", "qk_layernorm")
        ),
        "a softcap on attention scores": getattr(component, "attn_logit_softcapping", None)
        is not None,
        "a sliding window": window is not None,
        "ALiBi": bool(getattr(config, "alibi", False))
        or getattr(config, "model_type", "") in ("bloom", "mpt"),
        "several rotary embeddings": len(rotaries) > 1,
        "scaled rotary embeddings": rope.get("rope_type", "default") != "default"
        or any(getattr(module, "attention_scaling", 1.0) != 1.0 for module in rotaries),
        "a pattern hook that is inert (the bridge runs the original attention)": type(attn).forward
        is AttentionBridge.forward,
    }
