"""Active entries: the features that fire, position by position, as the compiled loops read them."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.scoring import kernels


class ActiveEntries(NamedTuple):
    """Active features by position of the flattened batch, the constant feature last at each."""

    start: np.ndarray
    """[batch * pos + 1]"""
    feature: np.ndarray
    value: np.ndarray


def active_entries(acts: Float[Tensor, "batch pos d"]) -> ActiveEntries:
    """The non-zero activations of a CPU batch, and a constant of 1 at every position."""
    flat = acts.detach().flatten(0, 1).contiguous().numpy()
    counts = np.empty(len(flat), np.int64)
    kernels.count_active(counts, flat)
    start = np.concatenate([[0], np.cumsum(counts + 1)])
    feature, value = np.empty(start[-1], np.int32), np.empty(start[-1], flat.dtype)
    kernels.list_active(start, feature, value, flat)
    return ActiveEntries(start, feature, value)


def with_constant(acts: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d_1"]:
    """Append the constant feature, activation 1."""
    return torch.cat([acts, acts.new_ones(*acts.shape[:-1], 1)], dim=-1)


def _active(
    acts: Float[Tensor, "batch pos d"],
) -> tuple[Int[Tensor, "2 entry"], Float[Tensor, " entry"]]:
    """(position in the flattened batch, feature) and value of every active entry, constants included."""
    flat = with_constant(acts).flatten(0, 1)
    at = flat.detach().nonzero().T
    return at, flat[at[0], at[1]]


def _dense_gradient(by_entry: np.ndarray, entries: ActiveEntries, shape: torch.Size) -> Tensor:
    """Gradient of the activations [batch, pos, d] from that of their entries; the constant's falls away."""
    batch, n_pos, d = shape
    dense = np.zeros((batch * n_pos, d + 1), by_entry.dtype)
    dense[np.repeat(np.arange(batch * n_pos), np.diff(entries.start)), entries.feature] = by_entry
    return torch.from_numpy(dense[:, :d]).view(shape)
