"""Every head of a model on indirect objects: what it attends to, copies, and does to the logits.

With z what a head moves at END, and u the direction of logit(IO) - logit(S) in the last residual
stream, the scale of the final norm held fixed:

    direct effect   <z W_O, u>; with those of MLPs, embedding and biases they add up to the logit
                    difference
    copy score      share of names that are among the 5 highest logits of r W_V W_O, r the residual
                    stream after layer 0 at the name; negative copy score: of - r W_V W_O

Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593), sections 3.1 and 3.4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from examples.ioi.prompts import IOIPrompts
from sae_lens_qk.host.layer import AttentionLayer, run_recording
from sae_lens_qk.host.proof import HostMismatchError
from sae_lens_qk.host.residual import (
    attention_input,
    logit_directions,
    residual_names,
    unembedded,
)
from sae_lens_qk.host.support import Model, n_layers

COPIED_RANK = 5
"""A head copies a name whose logit is among this many highest."""

_TOLERANCE = 1e-3
"""Of the parts' sum, in logits: residual streams are large sums of small parts."""


class HeadScan(NamedTuple):
    """Every head of a model on IOI; means over prompts."""

    heads: pd.DataFrame
    """layer, head, attention_io, attention_s1, attention_s2 (from END), direct_effect (on the logit
    difference), copy_score, negative_copy_score."""
    parts: pd.DataFrame
    """part ("embedding", "heads", "attention_bias", "mlp", "constant"), layer (missing: of none),
    direct_effect; they add up to the logit difference."""
    logit_difference: float
    """Mean of logit(IO) - logit(S)."""
    accuracy: float
    """Share of prompts in which it is positive."""
    first: float
    """Share of prompts in which IO is the likeliest of all tokens."""


@torch.no_grad()
def scan_heads(
    model: Model,
    batches: Sequence[IOIPrompts],
    n_names: int = 32,
) -> HeadScan:
    """Attention to the names, direct effect and copy score of every head; see the module.

    Args:
        n_names: different names for the copy score, at most.
    Raises:
        HostMismatchError: the parts do not add up to the model's own logit difference.
    """
    scans = [_scan_batch(model, batch) for batch in batches]

    def mean(name: str) -> Tensor:
        return torch.cat([getattr(scan, name) for scan in scans]).float().mean(dim=0).cpu()

    attention = mean("attention")  # [layer, head, name]
    layers, heads = attention.shape[:2]
    index = pd.MultiIndex.from_product([range(layers), range(heads)], names=["layer", "head"])
    columns = ["attention_io", "attention_s1", "attention_s2"]
    head_frame = pd.DataFrame(attention.flatten(0, 1).numpy(), index, columns)
    head_frame["direct_effect"] = mean("effects").flatten().numpy()
    copies = copy_scores(model, batches, n_names).flatten(0, 1).cpu().numpy()
    head_frame[["copy_score", "negative_copy_score"]] = copies
    # parts in the order of `_Scan.parts`
    labels: list[tuple[str, int | None]] = [("embedding", None), ("constant", None)]
    for layer in range(layers):
        labels += [(part, layer) for part in ("heads", "attention_bias", "mlp")]
    part_frame = pd.DataFrame(labels, columns=["part", "layer"]).astype({"layer": "Int64"})
    part_frame["direct_effect"] = mean("parts").numpy()
    differences = torch.cat([scan.difference for scan in scans])
    return HeadScan(
        heads=head_frame.reset_index(),
        parts=part_frame,
        logit_difference=float(differences.float().mean()),
        accuracy=float((differences > 0).float().mean()),
        first=float(mean("first")),
    )


class _Scan(NamedTuple):
    """A batch of prompts through the model."""

    attention: Float[Tensor, "prompt layer head name"]
    effects: Float[Tensor, "prompt layer head"]
    parts: Float[Tensor, "prompt part"]
    difference: Float[Tensor, " prompt"]
    """The model's own logit difference."""
    first: Bool[Tensor, " prompt"]
    """Whether IO is the likeliest of all tokens."""


class _ResidualParts(NamedTuple):
    """What adds up to the last residual stream at END."""

    embedding: Float[Tensor, "prompt d_model"]
    heads: Float[Tensor, "prompt layer head d_model"]
    biases: Float[Tensor, "layer d_model"]
    mlps: Float[Tensor, "prompt layer d_model"]

    @property
    def residual(self) -> Float[Tensor, "prompt d_model"]:
        biases = self.biases.sum(dim=0)
        return self.embedding + self.heads.sum(dim=(1, 2)) + biases + self.mlps.sum(dim=1)


def _scan_batch(
    model: Model,
    batch: IOIPrompts,
) -> _Scan:
    layers = [AttentionLayer(model, index) for index in range(n_layers(model))]
    names = [residual_names(layer) for layer in layers]
    recorded_names = [names[0].resid_pre]
    for layer, layer_names in zip(layers, names, strict=True):
        recorded_names += [layer.names.pattern, layer_names.z, layer_names.mlp_out]
    logits, values = run_recording(model, batch.tokens, recorded_names)
    parts = _residual_parts(layers, values)
    u, constants = logit_directions(model, parts.residual, batch.io_token, batch.s_token)
    effects = torch.einsum("nlhm,nm->nlh", parts.heads, u)
    mlp_effects = torch.einsum("nlm,nm->nl", parts.mlps, u)
    layer_effects = torch.stack([effects.sum(dim=2), u @ parts.biases.T, mlp_effects], dim=2)
    embedding_effect = (parts.embedding * u).sum(dim=1, keepdim=True)
    part_effects = torch.cat(
        [embedding_effect, constants[:, None], layer_effects.flatten(1)], dim=1
    )
    own_difference = batch.logit_difference(logits[:, -1])
    _check_sum(part_effects.sum(dim=1), own_difference)
    # pattern rows of END: [prompt, layer, head, key]
    rows = torch.stack([values[layer.names.pattern][:, :, -1] for layer in layers], dim=1)
    return _Scan(
        attention=rows.take_along_dim(batch.positions[:, None, None], dim=3),
        effects=effects,
        parts=part_effects,
        difference=own_difference,
        first=logits[:, -1].argmax(dim=-1) == batch.io_token,
    )


def _residual_parts(
    layers: list[AttentionLayer],
    values: dict[str, Tensor],
) -> _ResidualParts:
    """From what the hooks of all layers recorded."""
    head_outputs = []
    mlp_outputs = []
    biases = []
    for layer in layers:
        names = residual_names(layer)
        weights = layer.ov_weights
        z = values[names.z][:, -1]  # [prompt, head, d_head]
        head_outputs.append(torch.einsum("nhd,hdm->nhm", z, weights.W_O))
        mlp_outputs.append(values[names.mlp_out][:, -1])
        biases.append(weights.b_O)
    return _ResidualParts(
        embedding=values[residual_names(layers[0]).resid_pre][:, -1],
        heads=torch.stack(head_outputs, dim=1),
        biases=torch.stack(biases),
        mlps=torch.stack(mlp_outputs, dim=1),
    )


def _check_sum(
    parts: Float[Tensor, " prompt"],
    own: Float[Tensor, " prompt"],
) -> None:
    if not torch.allclose(parts, own, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise HostMismatchError(
            f"Heads, MLPs and embedding give the logit differences {parts[:3].tolist()}, the model "
            f"{own[:3].tolist()}: it writes to its residual stream in a way this package does not "
            "compute."
        )


@torch.no_grad()
def copy_scores(
    model: Model, batches: Sequence[IOIPrompts], n_names: int = 32, rank: int = COPIED_RANK
) -> Float[Tensor, "layer head 2"]:
    """Copy score and negative copy score of every head, in [0, 1]; see the module.

    The residual stream passes the norm before the head's layer and, after W_O, the final norm;
    biases of W_V and W_O play no part. Negating what the final norm takes in negates what it gives,
    around its value for zero.

    Args:
        n_names: different names, as indirect objects of prompts, at most.
        rank: a name is copied if its logit is among this many highest.
    """
    residuals: dict[int, Tensor] = {}  # by name token
    for batch in batches:
        residual, _ = run_recording(model, batch.tokens, [], stop_at_layer=1)
        io_residual = residual.take_along_dim(batch.io_pos[:, None, None], dim=1)[:, 0]
        residuals |= dict(zip(batch.io_token.tolist(), io_residual, strict=True))
    names = list(residuals)[:n_names]
    residual = torch.stack([residuals[name] for name in names])  # [name, d_model]
    name_index = torch.tensor(names, device=residual.device)[:, None, None]
    scores = []
    for index in tqdm(range(n_layers(model)), desc="copy scores", leave=False):
        layer = AttentionLayer(model, index)
        weights = layer.ov_weights
        values = torch.einsum("nm,gmd->ngd", attention_input(layer, residual), weights.W_V)
        values = values.repeat_interleave(layer.spec.heads_per_kv, dim=1)
        outputs = torch.einsum("nhd,hdm->nhm", values, weights.W_O)
        zero_logits = unembedded(model, torch.zeros_like(outputs[:1, :1]))
        logits = unembedded(model, outputs)  # [name, head, d_vocab]
        both = torch.stack([logits, 2 * zero_logits - logits])
        name_logits = both.take_along_dim(name_index.expand(2, -1, both.shape[2], 1), dim=3)
        is_copied = (both > name_logits).sum(dim=3) < rank
        scores.append(is_copied.float().mean(dim=1).T)
    return torch.stack(scores)
