"""Which features fire: the strength by which they compete, and the rule that decides.

    strength = (x W_enc + b_enc) * ||decoder row||

Training decides by rank (`Selection.fires`). The published form decides by a threshold on the same
strength, one per side: `calibrated_threshold` gives the one at which the mean L0 is k. Looking
changes nothing here; the moving average of the threshold is the training step's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_lens_qk.config import Activation

# Stride of the sample that tells about where the cutoff of a batch lies; prime, so that the sample
# meets every feature
_STRIDE = 61


def strengths(
    half: Transcoder, x: Float[Tensor, "tokens d_model"], dtype: torch.dtype | None = None
) -> Float[Tensor, "tokens d"]:
    """(x W_enc + b_enc) * ||decoder row||, by which features compete.

    Gradients reach the encoder, not the decoder norms.

    Args:
        dtype: of the product and of the result, such as bfloat16; default: that of the weights.
    """
    norms = half.W_dec.detach().norm(dim=1)
    dtype = norms.dtype if dtype is None else dtype
    # The norms are folded into the weights: these have fewer entries than the strengths.
    W_enc = (half.W_enc * norms).to(dtype)
    b_enc = (half.b_enc * norms).to(dtype)
    inputs = half.process_sae_in(x).to(dtype)
    return torch.addmm(b_enc, inputs, W_enc)


class Firing(NamedTuple):
    fires: Bool[Tensor, "tokens d"]
    cutoff: Float[Tensor, ""]
    """Strength of the weakest entry that fires by the rule batchtopk; 0 for other rules."""


@dataclass(frozen=True)
class Selection:
    """The rule by which the features of one side fire; positive strengths only.

        batchtopk  the k * tokens strongest entries of a batch
        topk       the k strongest entries of each token
        relu       all entries

    Args:
        rule: batchtopk, topk or relu.
        k: mean active features per token (batchtopk, topk).
        context_size: length of the sequences a batch is made of, if their position 0 takes no part:
            for query features, as its pattern is trivial. None: every position competes.
    """

    rule: Activation
    k: float | int = 0.0
    context_size: int | None = None

    @torch.no_grad()
    def strengths(
        self,
        half: Transcoder,
        x: Float[Tensor, "tokens d_model"],
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "tokens d"]:
        """`strengths` of whole sequences, -inf where a position takes no part."""
        strength = strengths(half, x, dtype)
        if self.context_size is not None:
            strength[:: self.context_size] = -torch.inf
        return strength

    @torch.no_grad()
    def fires(self, strength: Float[Tensor, "tokens d"]) -> Firing:
        """Which entries of a batch fire."""
        nothing = strength.new_zeros(())
        # clamped: entries that are not positive never fire, however few others there are
        if self.rule == "batchtopk":
            cutoff = batch_cutoff(strength, self.k).clamp(min=0)
            if cutoff > 0:
                return Firing(strength >= cutoff, cutoff)
        if self.rule == "topk":
            values, features = strength.topk(int(self.k), dim=1)  # [tokens, k]
            fires = torch.zeros_like(strength, dtype=torch.bool)
            return Firing(fires.scatter_(1, features, values > 0), nothing)
        return Firing(strength > 0, nothing)


def batch_cutoff(
    strength: Float[Tensor, "tokens d"],
    k: float | int,
) -> Float[Tensor, ""]:
    """The smallest of the k * tokens strongest entries of the whole batch.

    Selecting it among millions is slow, so a sample says first above which value about twice as
    many lie.
    """
    n = max(1, int(k * len(strength)))
    entries = strength.flatten()  # [tokens * d]
    sample = entries[::_STRIDE]
    expected = 2 * n * len(sample) // len(entries)
    n_sample = min(len(sample), max(1, expected))
    floor = sample.topk(n_sample).values[-1]
    above = entries[entries >= floor]
    if len(above) < n:  # the sample misled: nothing is lost but time
        above = entries
    return above.topk(n, sorted=False).values.min()


@torch.no_grad()
def calibrated_threshold(
    half: Transcoder, batches: Sequence[Float[Tensor, "tokens d_model"]], k: float | int
) -> Float[Tensor, ""]:
    """The strength that k features per token exceed, on average over the batches.

    Midway between the weakest entry that fires and the strongest that does not: the published form
    multiplies in another order, and rounding must not decide.

    Every position counts, position 0 of a sequence too: the published form does not know where a
    sequence begins.
    """
    # Only the strongest so far are carried along: memory does not grow with the batches.
    n_firing = int(k * sum(len(x) for x in batches))
    strongest = half.W_dec.new_empty(0)
    for x in batches:
        strength = strengths(half, x)
        strongest = torch.cat([strongest, strength[strength > 0]])
        strongest = strongest.topk(min(n_firing + 1, len(strongest))).values
    if len(strongest) <= n_firing:
        return strongest.new_zeros(())
    return strongest[-2:].mean()
