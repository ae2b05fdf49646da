"""Assertions that several test files share."""

from typing import Any

import torch


def assert_near(
    actual: Any,
    expected: Any,
    tolerance: float = 1e-5,
) -> None:
    """Every entry within an absolute tolerance, same shape and dtype; no relative part."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
