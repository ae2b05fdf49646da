"""AttentionLayer: one attention layer of a model, the only way from a model to this package.

Hook names, weights and spec are read off the host here; passes are recorded and replayed here, and
hooks that replace the pattern are made here. `proof.py` shows that the reading is right.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from operator import index as whole_number
from typing import Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.host.support import (
    Hooks,
    Model,
    UnsupportedModelError,
    model_mode,
    n_layers,
    refuse_unsupported,
    rotary_modules,
)
from sae_lens_qk.weights import OVWeights, QKWeights

TOLERANCE = 1e-5
"""Largest error of a rebuilt tensor, relative to max(1, largest score), in float32."""

PatternFn = Callable[
    [Float[Tensor, "batch pos d_model"], Float[Tensor, "batch head pos_q pos_k"]], Tensor
]
"""(layer input x, the model's own scores) -> pattern [batch, head, pos_q, pos_k]."""


class HookNames(NamedTuple):
    """Canonical hook names of one attention layer, each verified to exist."""

    input: str
    """The tensor that W_Q and W_K multiply; `AttentionLayer.complete` says where that is not so."""
    queries: str
    keys: str
    scores: str
    pattern: str


class LayerRecord(NamedTuple):
    """What a layer saw and computed in one pass of the model."""

    x: Float[Tensor, "batch pos d_model"]
    """The tensor that W_Q and W_K multiply."""
    scores: Float[Tensor, "batch head pos_q pos_k"]
    """The model's own, scaled; at keys that are not allowed whatever the host puts there."""
    pattern: Float[Tensor, "batch head pos_q pos_k"]


class AttentionLayer:
    """One attention layer of a model.

    Args:
        model: TransformerBridge or HookedTransformer.
        index: number of the layer.
    Raises:
        UnsupportedModelError: another kind of model.
        ValueError: the model has no such layer.
    """

    def __init__(
        self,
        model: Model,
        index: SupportsIndex,
    ):
        self.mode = model_mode(model)
        self.model = model
        self.index = whole_number(index)
        if not 0 <= self.index < n_layers(model):
            raise ValueError(f"layer must lie in [0, {n_layers(model) - 1}], got {index}.")

    def __repr__(self) -> str:
        return f"AttentionLayer({self.index} of {self.model.cfg.model_name}, {self.mode})"

    @property
    def block(self) -> Any:
        """The host's transformer block."""
        blocks: Any = self.model.blocks
        return blocks[self.index]

    @property
    def n_heads(self) -> int:
        return int(self.model.cfg.n_heads)

    @cached_property
    def names(self) -> HookNames:
        """Canonical hook names, checked: models silently ignore names they do not know.

        Raises:
            UnsupportedModelError: a hook is missing.
        """
        block = f"blocks.{self.index}"
        attn = f"{block}.attn"
        if isinstance(self.model, TransformerBridge):
            names = HookNames(
                input=f"{attn}.hook_in",
                queries=f"{attn}.q.hook_out",
                keys=f"{attn}.k.hook_out",
                scores=f"{attn}.hook_attn_scores",
                pattern=f"{attn}.hook_pattern",
            )
        else:
            names = HookNames(
                input=f"{block}.ln1.hook_normalized",
                queries=f"{attn}.hook_q",
                keys=f"{attn}.hook_k",
                scores=f"{attn}.hook_attn_scores",
                pattern=f"{attn}.hook_pattern",
            )
        check_hooks_exist(self.model, names)
        return names

    @cached_property
    def spec(self) -> AttentionSpec:
        """The layer's attention, read off the model.

        Raises:
            UnsupportedModelError: it has something this package does not compute.
        """
        refuse_unsupported(self.model, self.index)
        weights = self.qk_weights
        n_heads, d_model, d_head = weights.W_Q.shape
        if isinstance(self.model, HookedTransformer):
            # it divides by its `attn_scale`
            scale = 1.0 / self.block.attn.attn_scale
            inv_freq = _hooked_inv_freq(self.model)
        else:
            component = self.block.attn.original_component
            # not every Hugging Face attention keeps its scale as an attribute
            scale = getattr(component, "scaling", None) or d_head**-0.5
            rotaries = rotary_modules(self.model)
            inv_freq = rotaries[0].inv_freq if rotaries else torch.empty(0)
        return AttentionSpec(
            n_heads=n_heads,
            n_kv_heads=len(weights.W_K),
            d_head=d_head,
            d_model=d_model,
            scale=float(scale),
            rotary_inv_freq=tuple(inv_freq.float().tolist()),
        )

    @property
    def qk_weights(self) -> QKWeights:
        """W_Q, b_Q, W_K, b_K, detached; missing biases are zeros, grouped keys not repeated."""
        attn = self.block.attn
        W_K, b_K = self._grouped("K")
        return QKWeights(
            W_Q=attn.W_Q.detach(),
            b_Q=_bias_or_zeros(attn.b_Q, attn.W_Q),
            W_K=W_K.detach(),
            b_K=_bias_or_zeros(b_K, W_K),
        )

    @property
    def ov_weights(self) -> OVWeights:
        """W_V, b_V, W_O, b_O, detached; missing biases are zeros, grouped values not repeated."""
        attn = self.block.attn
        W_V, b_V = self._grouped("V")
        W_O = attn.W_O.detach()
        if attn.b_O is None:
            b_O = W_O.new_zeros(W_O.shape[2])  # [d_model]
        else:
            b_O = attn.b_O.detach()
        return OVWeights(
            W_V=W_V.detach(),
            b_V=_bias_or_zeros(b_V, W_V),
            W_O=W_O,
            b_O=b_O,
        )

    def _grouped(self, name: str) -> tuple[Tensor, Tensor | None]:
        """W and b of keys or values; HookedTransformer keeps the grouped ones under `_W_K`."""
        attn = self.block.attn
        if isinstance(self.model, HookedTransformer) and hasattr(attn, f"_W_{name}"):
            return getattr(attn, f"_W_{name}"), getattr(attn, f"_b_{name}")
        return getattr(attn, f"W_{name}"), getattr(attn, f"b_{name}")

    def complete(self, hooked: Tensor) -> Tensor:
        """From the value at `names.input` to the tensor that W_Q and W_K multiply.

        They differ in an unprocessed HookedTransformer alone, which has a hook on the LayerNorm
        before its gain and bias, and none after.
        """
        if self.mode != "hooked":
            return hooked
        norm = self.block.ln1
        bias = getattr(norm, "b", None)
        scaled = hooked * norm.w
        return scaled if bias is None else scaled + bias

    # Passes

    def inputs(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The tensor that W_Q and W_K multiply; runs the model up to this layer only."""
        name = self.names.input
        stop = self.index + 1
        _, values = run_recording(self.model, tokens, [name], stop_at_layer=stop)
        return self.complete(values[name])

    def record(
        self, tokens: Int[Tensor, "batch pos"], fwd_hooks: Sequence[Any] = ()
    ) -> LayerRecord:
        """Run the model up to this layer and keep its input, scores and pattern.

        Args:
            tokens: full, unpadded sequences from position 0.
            fwd_hooks: hooks that act before the recording.
        Raises:
            UnsupportedModelError: a hook does not fire, or the pattern has another shape.
        """
        names = (self.names.input, self.names.scores, self.names.pattern)
        stop = self.index + 1
        _, values = run_recording(self.model, tokens, names, fwd_hooks, stop_at_layer=stop)
        return self.record_of(values)

    def record_of(self, values: dict[str, Tensor]) -> LayerRecord:
        """The record in what `run_recording` kept of this layer's hooks."""
        x = self.complete(values[self.names.input])
        scores = values[self.names.scores]
        check_attention_call(x, scores)
        return LayerRecord(x, scores, values[self.names.pattern])

    def pattern_hooks(
        self, pattern_fn: PatternFn, heads: Iterable[SupportsIndex] | None = None
    ) -> Hooks:
        """Hooks that overwrite the layer's pattern with `pattern_fn(x, scores)`.

        Args:
            pattern_fn: of the layer's input and the model's own scores.
            heads: query heads whose pattern is replaced; None: all.
        Raises:
            ValueError: heads out of range.
            UnsupportedModelError: (when the model runs) padded input, or a KV cache.
        """
        chosen_heads = None if heads is None else [whole_number(head) for head in heads]
        if chosen_heads and not all(0 <= head < self.n_heads for head in chosen_heads):
            raise ValueError(f"heads must lie in [0, {self.n_heads - 1}], got {chosen_heads}.")
        spec = self.spec
        # What one call of the model has shown so far: the three hooks fire in this order.
        call: dict[str, Tensor] = {}

        def keep_input(
            value: Tensor,
            hook: Any,
        ) -> None:
            call["x"] = self.complete(value)

        def keep_scores(
            value: Tensor,
            hook: Any,
        ) -> None:
            check_attention_call(call["x"], value)
            check_mask(value, spec)
            call["scores"] = value

        def overwrite(
            pattern: Tensor,
            hook: Any,
        ) -> Tensor:
            # popped: nothing of this call outlives it
            rebuilt = pattern_fn(call.pop("x"), call.pop("scores"))
            rebuilt = rebuilt.to(pattern.dtype)
            if chosen_heads is None:
                return rebuilt
            # cloned: the host may still need its own pattern for a backward pass
            patched = pattern.clone()
            patched[:, chosen_heads] = rebuilt[:, chosen_heads]
            return patched

        names = self.names
        return [
            (names.input, keep_input),
            (names.scores, keep_scores),
            (names.pattern, overwrite),
        ]


class LayerReplay:
    """Runs a model once, then again and again from one layer on, under other hooks.

    What stands below the layer does not change. Neither host starts at a layer in all its modes, so
    the blocks are called with what the layer received in the recorded pass. The first recorded pass
    is replayed without hooks; unless that gives its logits, every replay is a full pass.
    """

    def __init__(self, layer: AttentionLayer):
        self.layer = layer
        self.exact: bool | None = None
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}

    def record(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], LayerRecord]:
        """Logits and the layer's record of a full pass, after which `run` replays these tokens."""
        model = self.layer.model
        names = self.layer.names
        options: dict[str, Any] = {}
        if isinstance(model, TransformerBridge):
            # a cache among the recorded arguments would grow with every replay
            options["use_cache"] = False

        def keep_arguments(
            block: Any,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
        ) -> None:
            self._args = args
            self._kwargs = kwargs

        handle = self.layer.block.register_forward_pre_hook(keep_arguments, with_kwargs=True)
        try:
            recorded_names = (names.input, names.scores, names.pattern)
            logits, values = run_recording(model, tokens, recorded_names, **options)
        finally:
            handle.remove()
        self._tokens = tokens
        if self.exact is None:
            self.exact = True  # for the moment, so that `run` replays
            error = largest(self.run([]) - logits)
            self.exact = error <= TOLERANCE * max(1.0, largest(logits))
        return logits, self.layer.record_of(values)

    @torch.no_grad()
    def run(
        self, fwd_hooks: Hooks, positions: slice = slice(None)
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the recorded tokens, at these positions, under hooks on this layer or later."""
        model: Any = self.layer.model
        if not self.exact:
            logits = model.run_with_hooks(self._tokens, fwd_hooks=fwd_hooks, prepend_bos=False)
            return logits[:, positions]
        residual, *args = self._args  # [batch, pos, d_model] and what all blocks get
        with model.hooks(fwd_hooks=fwd_hooks):
            for block in model.blocks[self.layer.index :]:
                output = block(residual, *args, **self._kwargs)
                # Hugging Face blocks may return (residual, attention weights)
                residual = output[0] if isinstance(output, tuple) else output
            # only these positions: the unembedding is the largest product of a small model
            return model.unembed(model.ln_final(residual[:, positions]))


@torch.no_grad()
def run_recording(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    names: Sequence[str],
    fwd_hooks: Sequence[Any] = (),
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the model without gradients and keep what passes the named hooks.

    Args:
        names: canonical hook names.
        fwd_hooks: hooks that act before the recording.
        **options: of `model.run_with_hooks`, such as stop_at_layer.
    Returns:
        Logits [batch, pos, d_vocab] (with stop_at_layer the residual stream), and a copy of each
        tensor by name.
    Raises:
        UnsupportedModelError: a hook does not fire.
    """
    values: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def keep(
            value: Tensor,
            hook: Any,
        ) -> None:
            # cloned: later layers may write into the tensor in place
            values[name] = value.clone()

        return keep

    recorders = [(name, recorder(name)) for name in names]
    # hooks run in order: what is recorded is what the given ones leave
    hooks = [*fwd_hooks, *recorders]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks, prepend_bos=False, **options)
    silent = [name for name in names if name not in values]
    if silent:
        raise UnsupportedModelError(f"The hook {silent[0]} never fires in this model.")
    return logits, values


def check_hooks_exist(
    model: Model,
    names: Iterable[str],
) -> None:
    """Refuse names that the model would silently ignore.

    Raises:
        UnsupportedModelError: a hook is missing.
    """
    for name in names:
        if name not in model.hook_dict:
            raise UnsupportedModelError(f"The model has no hook {name}.")


def check_attention_call(
    x: Tensor,
    pattern_or_scores: Tensor,
) -> None:
    """Refuse calls whose pattern is not that of full, unpadded sequences from position 0.

    Raises:
        UnsupportedModelError: generation with a KV cache (one query row, shifted columns).
    """
    n_query, n_key = pattern_or_scores.shape[-2:]
    if not x.shape[1] == n_query == n_key:
        raise UnsupportedModelError(
            f"The pattern has {n_query} queries and {n_key} keys for {x.shape[1]} positions: "
            "generation with a KV cache is not supported, call the model on full sequences "
            "(use_past_kv_cache=False)."
        )


def check_mask(
    scores: Tensor,
    spec: AttentionSpec,
) -> None:
    """Refuse scores that are masked otherwise than the spec says.

    Raises:
        UnsupportedModelError: padded input, or a mask the spec does not know.
    """
    # hosts mask with -inf or with the smallest float
    masked = scores <= torch.finfo(scores.dtype).min / 2
    allowed = spec.allowed_mask(scores.shape[-1], scores.device)
    # a key must be either masked or allowed
    if (masked == allowed).any():
        raise UnsupportedModelError(
            "The model masks other keys than its spec says: padded input is not supported."
        )


def largest(tensor: Tensor) -> float:
    """Largest absolute value."""
    return float(tensor.abs().max())


def _bias_or_zeros(
    bias: Tensor | None,
    weight: Float[Tensor, "heads _ d_head"],
) -> Tensor:
    if bias is None:
        return weight.new_zeros(weight.shape[0], weight.shape[2])
    return bias.detach()


def _hooked_inv_freq(model: HookedTransformer) -> Float[Tensor, " freq"]:
    cfg = model.cfg
    if cfg.positional_embedding_type != "rotary" or cfg.rotary_dim is None:
        return torch.empty(0)
    frequencies = torch.arange(cfg.rotary_dim // 2, dtype=torch.float32)
    exponent = frequencies / (cfg.rotary_dim / 2)
    base = torch.as_tensor(cfg.rotary_base, dtype=torch.float32)
    return 1.0 / base**exponent
