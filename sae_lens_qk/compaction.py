"""Smaller dictionaries: features that never fire are dropped, the others keep their old numbers."""

import copy
from dataclasses import replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Int
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_lens_qk.config import BilinearQKConfig
from sae_lens_qk.feature_map import SparseFeatureMap


class Compactable:
    """Mixin of a dictionary: a copy with fewer features."""

    cfg: BilinearQKConfig
    query: Transcoder
    key: Transcoder
    feature_map: SparseFeatureMap
    runner_cfg: dict[str, Any] | None

    @torch.no_grad()
    def compact(
        self, live_query: Bool[Tensor, " d_query"], live_key: Bool[Tensor, " d_key"]
    ) -> Self:
        """A dictionary of the live features alone; pairs of dropped features go with them.

        Its `cfg.query_numbers` and `cfg.key_numbers` hold the number each feature had at first,
        `cfg.original_sizes` how many there were. Metrics are not taken over: measure it anew.

        Args:
            live_query, live_key: True for features to keep; a feature that never fires can go
                without changing anything.
        Raises:
            ValueError: masks of the wrong length, or nothing left on a side.
        """
        cfg = self.cfg
        live_query = torch.as_tensor(live_query, dtype=torch.bool)
        live_key = torch.as_tensor(live_key, dtype=torch.bool)
        lengths = (len(live_query), len(live_key))
        is_empty = not (live_query.any() and live_key.any())
        if lengths != (cfg.d_query, cfg.d_key) or is_empty:
            raise ValueError(
                f"compact needs masks of lengths {cfg.d_query} and {cfg.d_key} "
                "that keep a feature per side."
            )
        device = self.feature_map.indices.device
        # old number of each live feature, ascending: pairs stay in order
        query_rows = live_query.nonzero()[:, 0].to(device)
        key_rows = live_key.nonzero()[:, 0].to(device)
        d_query_before, d_key_before = cfg.original_sizes
        # copied deeply: the metadata would be shared otherwise
        smaller_cfg = replace(
            copy.deepcopy(cfg),
            d_query=len(query_rows),
            d_key=len(key_rows),
            n_pairs=0,
            query_numbers=_original_numbers(cfg.query_numbers, query_rows),
            key_numbers=_original_numbers(cfg.key_numbers, key_rows),
            d_query_before=d_query_before,
            d_key_before=d_key_before,
        )
        dictionary_class: Any = type(self)
        smaller = dictionary_class(smaller_cfg)
        _copy_features(self.query, smaller.query, query_rows)
        _copy_features(self.key, smaller.key, key_rows)
        smaller.set_feature_map(_renumbered(self.feature_map, query_rows, key_rows))
        smaller.runner_cfg = self.runner_cfg
        return smaller.to(device)


def _original_numbers(
    numbers: list[int],
    rows: Int[Tensor, " live"],
) -> list[int]:
    """Number that each live feature had before any compaction; `numbers` is empty before that."""
    return [numbers[row] if numbers else row for row in rows.tolist()]


def _copy_features(
    half: Transcoder,
    smaller: Transcoder,
    rows: Int[Tensor, " live"],
) -> None:
    """Copy the weights of the live features; the decoder bias belongs to none."""
    for name, tensor in half.state_dict().items():
        if name == "W_enc":  # [d_in, d_sae]
            tensor = tensor[:, rows]
        elif name != "b_dec":
            tensor = tensor[rows]
        smaller.get_parameter(name).copy_(tensor)


def _renumbered(
    feature_map: SparseFeatureMap, query_rows: Int[Tensor, " live"], key_rows: Int[Tensor, " live"]
) -> SparseFeatureMap:
    """The pairs of live features under their new numbers; the constants stay last."""
    query, key, head = feature_map.indices.unbind(dim=1)
    new_query = _new_numbers(feature_map.d_query, query_rows)[query]
    new_key = _new_numbers(feature_map.d_key, key_rows)[key]
    indices = torch.stack([new_query, new_key, head], dim=1)
    live = (indices >= 0).all(dim=1)  # [pair], False where a feature was dropped
    return SparseFeatureMap(
        indices[live],
        feature_map.weights[live],
        len(query_rows),
        len(key_rows),
        feature_map.n_heads,
        feature_map.statistics[live],
    )


def _new_numbers(
    d: int,
    rows: Int[Tensor, " live"],
) -> Int[Tensor, " d_1"]:
    """New number of each old feature and of the constant; -1: dropped."""
    numbers = torch.full((d + 1,), -1, device=rows.device)
    numbers[rows] = torch.arange(len(rows), device=rows.device)
    numbers[d] = len(rows)
    return numbers
