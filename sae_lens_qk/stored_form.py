"""The tensors of a dictionary as they lie in `sae_weights.safetensors`, and every check of what a file could get wrong.

The host's loader casts all tensors to one dtype, so pair indices are stored as digits and statistics as logarithms.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae_lens_qk.feature_map import STATISTICS, SparseFeatureMap, pack_indices, pack_statistics, unpack_indices, unpack_statistics


def to_stored_form(state_dict: dict[str, Any]) -> None:
    """Encode the map's indices and statistics, in place."""
    state_dict["feature_map.digits"] = pack_indices(state_dict.pop("feature_map.indices"))
    state_dict["feature_map.weights"] = state_dict["feature_map.weights"].clamp(0, 1)
    statistics = state_dict.pop("feature_map.statistics")
    if statistics.any():  # measured
        state_dict["feature_map.statistics"] = pack_statistics(statistics)
    for name, tensor in state_dict.items():
        state_dict[name] = tensor.contiguous()


def from_stored_form(
    state_dict: dict[str, Any], wanted: Mapping[str, Tensor], sizes: tuple[int, int, int]
) -> None:
    """Decode the map's indices and statistics and check all values, in place.

    Args:
        wanted: tensors of the names and shapes that the config asks for.
        sizes: d_query, d_key, n_heads.
    Raises:
        ValueError: missing or unexpected tensors, wrong shapes, values that are not finite, bad pair indices.
    """
    if "feature_map.digits" in state_dict:
        state_dict["feature_map.indices"] = unpack_indices(state_dict.pop("feature_map.digits"))
        packed = state_dict.get("feature_map.statistics")
        weights = state_dict.get("feature_map.weights", torch.empty(0))
        unmeasured = weights.new_zeros(len(weights), len(STATISTICS))
        state_dict["feature_map.statistics"] = (
            unmeasured if packed is None else unpack_statistics(packed)
        )
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if expected != found:
        name = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise ValueError(
            f"The weights do not fit cfg.json: {name} should have shape {expected.get(name)}, the file has "
            f"{found.get(name)}. The folder is damaged or mixes two dictionaries."
        )
    broken = [name for name, tensor in state_dict.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"The weights hold values that are not finite, first in {broken[0]}: download or train again."
        )
    indices, weights, statistics = (
        state_dict[f"feature_map.{name}"] for name in ("indices", "weights", "statistics")
    )
    loaded = SparseFeatureMap(indices, weights, *sizes, statistics)
    state_dict.update(
        {f"feature_map.{name}": tensor for name, tensor in loaded.state_dict().items()}
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values: tells dictionaries apart where results are kept."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
