"""Active entries: the features that fire, position by position, as the compiled loops read them."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_qk.scoring import kernels


class ActiveEntries(NamedTuple):
    """Active features by position of the flattened batch, the constant feature last at each."""

    start: np.ndarray
    """[batch * pos + 1]"""
    feature: np.ndarray
    """[entry]"""
    value: np.ndarray
    """[entry]"""

    def scatter(
        self,
        values: np.ndarray,
        shape: torch.Size,
    ) -> Tensor:
        """Numbers by entry as a dense tensor [batch, pos, d], zero elsewhere, without constants."""
        batch, n_pos, d = shape
        dense = np.zeros((batch * n_pos, d + 1), values.dtype)
        positions = np.repeat(np.arange(batch * n_pos), np.diff(self.start))
        dense[positions, self.feature] = values
        return torch.from_numpy(dense[:, :d]).view(shape)


def active_entries(acts: Float[Tensor, "batch pos d"]) -> ActiveEntries:
    """The non-zero activations of a CPU batch, and a constant of 1 at every position."""
    flat = acts.detach().flatten(0, 1).contiguous().numpy()
    counts = np.empty(len(flat), np.int64)
    kernels.count_active(counts, flat)
    start = np.concatenate([[0], np.cumsum(counts + 1)])
    feature = np.empty(start[-1], np.int32)
    value = np.empty(start[-1], flat.dtype)
    kernels.list_active(feature, value, start, flat)
    return ActiveEntries(start, feature, value)


def with_constant(acts: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d_1"]:
    """Append the constant feature, activation 1."""
    return torch.cat([acts, acts.new_ones(*acts.shape[:-1], 1)], dim=-1)
