"""The residual stream around a layer: what components read and write, norms, unembedding."""

import warnings
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_qk.host.layer import AttentionLayer, check_hooks_exist
from sae_lens_qk.host.support import Model


class ResidualNames(NamedTuple):
    """Canonical hook names of what one layer reads from and writes to the residual stream."""

    resid_pre: str
    """What enters the layer; of layer 0 the embeddings."""
    z: str
    """What the heads move, before W_O: [batch, pos, head, d_head]."""
    mlp_out: str


class LogitDirections(NamedTuple):
    """A logit difference as a linear function: <residual, directions> + constants."""

    directions: Float[Tensor, "prompt d_model"]
    constants: Float[Tensor, " prompt"]


def residual_names(layer: AttentionLayer) -> ResidualNames:
    """Hook names of what the layer reads and writes, checked to exist."""
    block = f"blocks.{layer.index}"
    if isinstance(layer.model, TransformerBridge):
        names = ResidualNames(
            f"{block}.hook_in", f"{block}.attn.o.hook_in", f"{block}.mlp.hook_out"
        )
    else:
        names = ResidualNames(
            f"{block}.hook_resid_pre", f"{block}.attn.hook_z", f"{block}.hook_mlp_out"
        )
    check_hooks_exist(layer.model, names)
    return names


@torch.no_grad()
def attention_input(
    layer: AttentionLayer, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """What the attention of the layer would see of a residual stream: the norm before it."""
    return layer.block.ln1(residual)


@torch.no_grad()
def unembedded(
    model: Model, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_vocab"]:
    """Logits of a residual stream: final norm, then unembedding."""
    host: Any = model
    return host.unembed(host.ln_final(residual))


def logit_directions(
    model: Model,
    residual: Float[Tensor, "prompt d_model"],
    plus: Int[Tensor, " prompt"],
    minus: Int[Tensor, " prompt"],
) -> LogitDirections:
    """logit(plus) - logit(minus), linear in the last residual stream at a fixed final norm scale.

    The direction is the gradient with the scale detached: right for every norm the hosts know.

    Args:
        residual: after the last layer.
        plus, minus: one token per prompt.
    """
    host = cast(Any, model)
    prompts = torch.arange(len(residual), device=residual.device)
    detach_scale = ("ln_final.hook_scale", lambda scale, hook: scale.detach())
    with torch.enable_grad(), warnings.catch_warnings():
        # the bridge tells that it leaves the native norm
        warnings.filterwarnings("ignore", message=".*hook_scale.*")
        varied = residual.detach().clone().requires_grad_(True)
        with host.hooks(fwd_hooks=[detach_scale]):
            logits = host.unembed(host.ln_final(varied))
        difference = logits[prompts, plus] - logits[prompts, minus]  # [prompt]
        # of the sum: prompts do not mix, so its gradient holds that of each prompt
        (directions,) = torch.autograd.grad(difference.sum(), varied)
    # what is left of the difference: biases of the norm and of the unembedding
    linear_part = (directions * residual).sum(dim=-1)
    constants = difference.detach() - linear_part
    return LogitDirections(directions, constants)
