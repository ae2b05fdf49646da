"""Every head of a model on indirect-object identification: what it attends to, what it copies, what it does to the logits.

With z what a head moves at END, and u the direction of logit(IO) - logit(S) in the last residual stream, the scale of the
final norm held fixed:

    direct effect   <z W_O, u>; with those of MLPs, embedding and biases they add up to the logit difference
    copy score      share of names that are among the 5 highest logits of r W_V W_O, r the residual stream after layer 0 at
                    the name; negative copy score: of - r W_V W_O

Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593), sections 3.1 and 3.4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_qk.analysis.ioi_prompts import IOIPrompts
from sae_lens_qk.host.proof import HostMismatchError
from sae_lens_qk.host.support import Model, n_layers
from sae_lens_qk.host.residual import attention_input, logit_directions, residual_names, unembedded
from sae_lens_qk.host.layer import hook_names, ov_weights, run_recording

COPIED_RANK = 5
"""A head copies a name whose logit is among this many highest."""

_TOLERANCE = 1e-3
"""Of the parts' sum, in logits: residual streams are large sums of small parts."""


class HeadScan(NamedTuple):
    """Every head of a model on IOI; means over prompts.

    Attributes:
        heads: layer, head, attention_io, attention_s1, attention_s2 (from END), direct_effect (on the logit difference),
            copy_score, negative_copy_score.
        parts: part ("embedding", "heads", "attention_bias", "mlp", "constant"), layer (missing: of none), direct_effect;
            they add up to the logit difference.
        logit_difference: mean of logit(IO) - logit(S).
        accuracy: share of prompts in which it is positive.
        first: share of prompts in which IO is the likeliest of all tokens.
    """

    heads: pd.DataFrame
    parts: pd.DataFrame
    logit_difference: float
    accuracy: float
    first: float


@torch.no_grad()
def scan_heads(model: Model, batches: Sequence[IOIPrompts], n_names: int = 32) -> HeadScan:
    """Attention to the names, direct effect and copy score of every head; see the module.

    Args:
        n_names: different names for the copy score, at most.
    Raises:
        HostMismatchError: the parts do not add up to the model's own logit difference.
    """
    scanned = [_Scanned.of(model, batch) for batch in batches]
    means = _Scanned(
        *(
            torch.cat(of_batches).float().mean(dim=0).cpu()
            for of_batches in zip(*scanned, strict=True)
        )
    )
    correct = torch.cat([batch.difference > 0 for batch in scanned]).float().mean()
    at = pd.MultiIndex.from_product(
        [range(n) for n in means.effects.shape], names=["layer", "head"]
    )
    heads = pd.DataFrame(
        means.attention.flatten(0, 1).numpy(), at, ["attention_io", "attention_s1", "attention_s2"]
    )
    heads["direct_effect"] = means.effects.flatten().numpy()
    heads[["copy_score", "negative_copy_score"]] = (
        copy_scores(model, batches, n_names).flatten(0, 1).cpu().numpy()
    )
    of_layers = [
        (part, layer)
        for layer in range(n_layers(model))
        for part in ("heads", "attention_bias", "mlp")
    ]
    parts = pd.DataFrame(
        [("embedding", None), ("constant", None), *of_layers], columns=["part", "layer"]
    )
    parts["direct_effect"] = means.parts.numpy()
    return HeadScan(
        heads.reset_index(),
        parts.astype({"layer": "Int64"}),
        float(means.difference),
        float(correct),
        float(means.first),
    )


class _Scanned(NamedTuple):
    """A batch of prompts through the model."""

    attention: Float[Tensor, "prompt layer head name"]
    effects: Float[Tensor, "prompt layer head"]
    parts: Float[Tensor, "prompt part"]
    difference: Float[Tensor, " prompt"]
    """The model's own logit difference."""
    first: Bool[Tensor, " prompt"]
    """Whether IO is the likeliest of all tokens."""

    @classmethod
    def of(cls, model: Model, batch: IOIPrompts) -> "_Scanned":
        layers = range(n_layers(model))
        names, weights = (
            [residual_names(model, layer) for layer in layers],
            [ov_weights(model, layer) for layer in layers],
        )
        patterns = [hook_names(model, layer).pattern for layer in layers]
        wanted = [
            names[0].resid_pre,
            *patterns,
            *(name for layer in names for name in (layer.z, layer.mlp_out)),
        ]
        logits, seen = run_recording(model, batch.tokens, wanted)
        rows = torch.stack([seen[name][:, :, -1] for name in patterns], dim=1)
        embedding, biases = seen[names[0].resid_pre][:, -1], torch.stack([W.b_O for W in weights])
        written = [
            torch.einsum("nhd,hdm->nhm", seen[at.z][:, -1], W.W_O)
            for at, W in zip(names, weights, strict=True)
        ]
        of_heads = torch.stack(written, dim=1)  # [prompt, layer, head, d_model]
        of_mlps = torch.stack([seen[at.mlp_out][:, -1] for at in names], dim=1)
        residual = embedding + of_heads.sum(dim=(1, 2)) + biases.sum(dim=0) + of_mlps.sum(dim=1)
        u, constants = logit_directions(model, residual, batch.io_token, batch.s_token)
        effects, mlps = (
            torch.einsum("nlhm,nm->nlh", of_heads, u),
            torch.einsum("nlm,nm->nl", of_mlps, u),
        )
        of_layers = torch.stack([effects.sum(dim=2), u @ biases.T, mlps], dim=2).flatten(1)
        parts = torch.cat(
            [(embedding * u).sum(dim=1, keepdim=True), constants[:, None], of_layers], dim=1
        )
        own = batch.logit_difference(logits[:, -1])
        if not torch.allclose(parts.sum(dim=1), own, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise HostMismatchError(
                f"Heads, MLPs and embedding give the logit differences {parts.sum(dim=1)[:3].tolist()}, the model "
                f"{own[:3].tolist()}: it writes to its residual stream in a way this package does not compute."
            )
        first = logits[:, -1].argmax(dim=-1) == batch.io_token
        return cls(
            rows.take_along_dim(batch.positions[:, None, None], dim=3), effects, parts, own, first
        )


@torch.no_grad()
def copy_scores(
    model: Model, batches: Sequence[IOIPrompts], n_names: int = 32
) -> Float[Tensor, "layer head 2"]:
    """Copy score and negative copy score of every head, in [0, 1]; see the module.

    The residual stream passes the norm before the head's layer and, after W_O, the final norm; biases of W_V and W_O play no
    part. Negating what the final norm takes in negates what it gives, around its value for zero.

    Args:
        n_names: different names, as indirect objects of prompts, at most.
    """
    residuals: dict[int, Tensor] = {}
    for batch in batches:
        residual, _ = run_recording(model, batch.tokens, [], stop_at_layer=1)
        at_names = residual.take_along_dim(batch.io_pos[:, None, None], dim=1)[:, 0]
        residuals |= dict(zip(batch.io_token.tolist(), at_names, strict=True))
    names = torch.tensor(list(residuals)[:n_names])
    residual = torch.stack([residuals[name] for name in names.tolist()])
    made = []
    for layer in tqdm(range(n_layers(model)), desc="copy scores", leave=False):
        W = ov_weights(model, layer)
        values = torch.einsum("nm,gmd->ngd", attention_input(model, layer, residual), W.W_V)
        values = values.repeat_interleave(len(W.W_O) // len(W.W_V), dim=1)
        written = torch.einsum("nhd,hdm->nhm", values, W.W_O)
        of_zero = unembedded(model, torch.zeros_like(written[:1, :1]))
        logits = unembedded(model, written)
        both = torch.stack([logits, 2 * of_zero - logits])
        of_names = both.take_along_dim(names[:, None, None].expand(2, -1, both.shape[2], 1), dim=3)
        made.append(((both > of_names).sum(dim=3) < COPIED_RANK).float().mean(dim=1).T)
    return torch.stack(made)
