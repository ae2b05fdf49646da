"""The tensors of a dictionary as they lie in `sae_weights.safetensors`, and all checks of a file.

The host's loader casts all tensors to one dtype, so pair indices are stored as digits and
statistics as logarithms.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sae_lens_qk.feature_map import STATISTICS, SparseFeatureMap

_DIGITS = 4  # base 256: bfloat16 holds integers up to 256 exactly
_LEAST = 1e-30  # stands for zero where statistics are stored as logarithms


def to_stored_form(state_dict: dict[str, Any]) -> None:
    """Encode the map's indices and statistics, in place."""
    state_dict["feature_map.digits"] = pack_indices(state_dict.pop("feature_map.indices"))
    state_dict["feature_map.weights"] = state_dict["feature_map.weights"].clamp(0, 1)
    statistics = state_dict.pop("feature_map.statistics")
    if statistics.any():  # all zero: nothing was measured
        state_dict["feature_map.statistics"] = pack_statistics(statistics)
    # safetensors refuses views such as a transposed matrix
    for name, tensor in state_dict.items():
        state_dict[name] = tensor.contiguous()


def from_stored_form(
    state_dict: dict[str, Any], expected: Mapping[str, Tensor], sizes: tuple[int, int, int]
) -> None:
    """Decode the map's indices and statistics and check all values, in place.

    Args:
        expected: tensors of the names and shapes that the config asks for.
        sizes: d_query, d_key, n_heads.
    Raises:
        ValueError: missing or unexpected tensors, wrong shapes, values that are not finite, bad
            pair indices.
    """
    if "feature_map.digits" in state_dict:
        state_dict["feature_map.indices"] = unpack_indices(state_dict.pop("feature_map.digits"))
        weights = state_dict.get("feature_map.weights", torch.empty(0))
        packed = state_dict.get("feature_map.statistics")
        if packed is None:
            statistics = weights.new_zeros(len(weights), len(STATISTICS))
        else:
            statistics = unpack_statistics(packed)
        state_dict["feature_map.statistics"] = statistics
    _check_shapes(state_dict, expected)
    for name, tensor in state_dict.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"The weights hold values that are not finite, first in {name}: "
                "download or train again."
            )
    # its constructor checks the pairs and sorts them
    feature_map = SparseFeatureMap(
        state_dict["feature_map.indices"],
        state_dict["feature_map.weights"],
        *sizes,
        state_dict["feature_map.statistics"],
    )
    for name, tensor in feature_map.state_dict().items():
        state_dict[f"feature_map.{name}"] = tensor


def _check_shapes(
    state_dict: dict[str, Any],
    expected: Mapping[str, Tensor],
) -> None:
    for name in sorted({*expected, *state_dict}):
        expected_shape = tuple(expected[name].shape) if name in expected else None
        shape = tuple(state_dict[name].shape) if name in state_dict else None
        if shape != expected_shape:
            raise ValueError(
                f"The weights do not fit cfg.json: {name} should have shape {expected_shape}, "
                f"the file has {shape}. The folder is damaged or mixes two dictionaries."
            )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values: tells apart dictionaries and their results."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous()
        # viewed as bytes, because numpy has no bfloat16
        value_bytes = values.view(torch.uint8).numpy()
        sha.update(value_bytes.tobytes())
    return sha.hexdigest()


def pack_indices(indices: Int[Tensor, "pair 3"]) -> UInt8[Tensor, "pair 3 digit"]:
    """Base-256 digits as bytes, least significant first.

    Exact in every dtype that a loader may cast them to. Inverse: `unpack_indices`.
    """
    shifts = 8 * torch.arange(_DIGITS, device=indices.device)
    digits = (indices[..., None] >> shifts) & 255  # [pair, 3, digit]
    return digits.to(torch.uint8)


def unpack_indices(digits: Tensor) -> Int[Tensor, "pair 3"]:
    """Inverse of `pack_indices`.

    Raises:
        ValueError: not the digits of triples, as in a damaged file.
    """
    fit_a_byte = (digits >= 0) & (digits <= 255)  # false for NaN
    are_bytes = (fit_a_byte & (digits == digits.round())).all()
    if digits.shape[1:] != (3, _DIGITS) or not are_bytes:
        raise ValueError(
            f"Packed pairs must be integers 0 to 255 of shape [n_pairs, 3, {_DIGITS}], "
            f"got shape {list(digits.shape)} with other values or axes: the file is damaged."
        )
    shifts = 8 * torch.arange(_DIGITS, device=digits.device)
    shifted = digits.to(torch.int64) << shifts  # [pair, 3, digit]
    return shifted.sum(dim=-1)


def pack_statistics(statistics: Float[Tensor, "pair 3"]) -> Float[Tensor, "pair 3"]:
    """Importance and co-occurrence as logarithms: their range is beyond float16's.

    Inverse: `unpack_statistics`.
    """
    importance, effect, co_occurrence = _at_least_float32(statistics).unbind(dim=1)
    log_importance = importance.clamp(min=_LEAST).log()
    log_co_occurrence = co_occurrence.clamp(min=_LEAST).log()
    packed = torch.stack([log_importance, effect, log_co_occurrence], dim=1)
    return packed.to(statistics.dtype)


def unpack_statistics(packed: Float[Tensor, "pair 3"]) -> Float[Tensor, "pair 3"]:
    """Inverse of `pack_statistics`."""
    log_importance, effect, log_co_occurrence = _at_least_float32(packed).unbind(dim=1)
    importance = _exp(log_importance)
    co_occurrence = _exp(log_co_occurrence)
    statistics = torch.stack([importance, effect, co_occurrence], dim=1)
    return statistics.to(packed.dtype)


def _exp(logs: Tensor) -> Tensor:
    """The numbers that were packed; zero stays zero, also when half precision has rounded it."""
    is_zero = logs <= math.log(4 * _LEAST)
    return logs.exp().masked_fill(is_zero, 0.0)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
