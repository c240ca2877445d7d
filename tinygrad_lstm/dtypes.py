"""Which dtypes tensors have, and which of them a number says nothing about."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm.errors import DTypeError

__all__ = ["as_dtype", "check_differentiable", "is_weak"]


def check_differentiable(dtype: np.dtype) -> None:
    """Raise unless gradients exist for this dtype."""
    if dtype.kind != "f":
        raise DTypeError(f"requires_grad needs a floating dtype, found {dtype}; convert with astype(np.float32)")


def _only_python_numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_only_python_numbers(item) for item in value)
    return not isinstance(value, (np.generic, np.ndarray))


def is_weak(array: np.ndarray, value: Any) -> bool:
    """Whether an array was read from Python floats: its dtype is for others to say."""
    return array.dtype == np.float64 and _only_python_numbers(value)


def as_dtype(dtype: Any) -> np.dtype:
    """A dtype that a tensor can have, from whatever names one."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise DTypeError(f"{dtype!r} is no dtype; expected something like np.float32 or 'int64'") from None
    if found.kind not in "fiub":
        raise DTypeError(f"a tensor holds real numbers, integers or booleans; found the dtype {found}")
    return found
