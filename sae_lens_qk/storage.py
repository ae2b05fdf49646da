"""Smaller dictionaries: fewer features, keeping their old numbers, and fewer bits."""

import copy
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_qk.attention import log_pattern, pattern_kl
from sae_lens_qk.dictionary import BilinearQKDictionary, Source
from sae_lens_qk.feature_map import SparseFeatureMap


@torch.no_grad()
def compact(
    dictionary: BilinearQKDictionary,
    live_query: Bool[Tensor, " d_query"],
    live_key: Bool[Tensor, " d_key"],
) -> BilinearQKDictionary:
    """A dictionary of the live features alone; pairs of dropped features go with them.

    Its `cfg.query_numbers` and `cfg.key_numbers` hold the number each feature had at first, `cfg.original_sizes` how
    many there were. Figures (`metrics`) are not taken over: measure it anew.

    Args:
        live_query, live_key: True for features to keep; a feature that never fires can go without changing anything.
    Raises:
        ValueError: masks of the wrong length, or nothing left on a side.
    """
    lengths = (dictionary.cfg.d_query, dictionary.cfg.d_key)
    if (len(live_query), len(live_key)) != lengths or not (live_query.any() and live_key.any()):
        raise ValueError(f"compact needs masks of lengths {lengths} that keep a feature a side.")
    kept = [live.nonzero()[:, 0].to(dictionary.device) for live in (live_query, live_key)]
    numbers = [
        [before[i] for i in rows.tolist()] if before else rows.tolist()
        for before, rows in zip(
            (dictionary.cfg.query_numbers, dictionary.cfg.key_numbers), kept, strict=True
        )
    ]
    d_query_before, d_key_before = dictionary.cfg.original_sizes
    made = BilinearQKDictionary(
        replace(
            copy.deepcopy(dictionary.cfg),
            d_query=len(kept[0]),
            d_key=len(kept[1]),
            n_pairs=0,
            query_numbers=numbers[0],
            key_numbers=numbers[1],
            d_query_before=d_query_before,
            d_key_before=d_key_before,
        )
    )
    for half, new, rows in zip(
        (dictionary.query, dictionary.key), (made.query, made.key), kept, strict=True
    ):
        for name, tensor in half.state_dict().items():
            whole = {"W_enc": (slice(None), rows), "b_dec": (slice(None),)}.get(name, (rows,))
            new.get_parameter(name).copy_(tensor[whole])
    new_numbers = [torch.full((d + 1,), -1, device=dictionary.device) for d in lengths]
    for renumbered, rows in zip(new_numbers, kept, strict=True):
        renumbered[rows] = torch.arange(len(rows), device=dictionary.device)
        renumbered[-1] = len(rows)  # the constant
    old = dictionary.feature_map
    indices = torch.stack(
        [new_numbers[0][old.indices[:, 0]], new_numbers[1][old.indices[:, 1]], old.indices[:, 2]],
        dim=1,
    )
    stays = (indices >= 0).all(dim=1)
    sizes = made.cfg.d_query, made.cfg.d_key, dictionary.spec.n_heads
    made.set_feature_map(
        SparseFeatureMap(indices[stays], old.weights[stays], *sizes, old.statistics[stays])
    )
    made.runner_cfg = dictionary.runner_cfg
    return made.to(dictionary.device)


@torch.no_grad()
def rounding_loss(
    dictionary: BilinearQKDictionary, x: Float[Tensor, "batch pos d_model"]
) -> pd.DataFrame:
    """What storing in fewer bits costs: a dictionary saved in each dtype and loaded in float32, against this one.

    Args:
        x: the layer's input for full sequences.
    Returns:
        Index dtype (float32, bfloat16, float16) and source; megabytes of the weights, pattern_error, the largest absolute
        difference of a pattern entry, and pattern_kl = KL(pattern || stored pattern) in nats, mean over heads and queries
        but the first, whose pattern is trivially 1.
    """
    reference = copy.deepcopy(dictionary).to(torch.float32)
    sources: list[Source] = (
        ["transcoders", "feature_map"] if dictionary.has_feature_map else ["transcoders"]
    )
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stored = copy.deepcopy(dictionary).to(dtype)
        saved = stored.state_dict()
        stored.process_state_dict_for_saving(saved)
        size = sum(tensor.nbytes for tensor in saved.values())
        stored = stored.to(torch.float32)
        for source in sources:
            true, made = (log_pattern(d.scores(x, source).double()) for d in (reference, stored))
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "source": source,
                    "megabytes": size / 1e6,
                    "pattern_error": float((true.exp() - made.exp()).abs().max()),
                    "pattern_kl": float(pattern_kl(true, made)[:, :, 1:].mean()),
                }
            )
    return pd.DataFrame(rows).set_index(["dtype", "source"])
