"""Arrays out of the tensors of other libraries.

Known by their methods, so nothing is imported: a torch tensor has ``detach``, ``cpu`` and ``numpy``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm.errors import DTypeError

__all__ = ["array_of", "widened"]


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, given as its bits (uint16), as float32: the same numbers, since it is float32 without its last 16 bits.

    >>> widened(np.array([0x3FC0], np.uint16)).tolist()
    [1.5]
    """
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def array_of(name: str, value: Any, who: str) -> np.ndarray:
    """The array of real numbers in an array, a Tensor of this package, a torch tensor, or lists of numbers.

    It may share memory with ``value``.  NumPy has no bfloat16, so that becomes float32, which loses nothing; every
    other dtype is kept.

    Raises
    ------
    DTypeError
        ``who: name ...`` is no dense tensor of real numbers.
    """
    try:
        array = _converted(value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        shown = f"a {value.dtype} tensor" if hasattr(value, "dtype") else f"of type {type(value).__name__}"
        raise DTypeError(f"{who}: {name} is {shown}, expected a dense tensor or array of real numbers") from None
    if array.dtype.name == "bfloat16":  # an array of the package ml_dtypes
        array = widened(array.view(np.uint16))
    if array.dtype.kind not in "fiub":
        found = f"has dtype {array.dtype}" if array.dtype.kind != "O" else f"is of type {type(value).__name__}"
        raise DTypeError(f"{who}: {name} {found}, expected real numbers")
    return array


def _converted(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    for method in ("detach", "cpu"):
        if hasattr(value, method):
            value = getattr(value, method)()
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        value = value.float()
    for method in ("resolve_conj", "resolve_neg"):  # torch's lazy views, which NumPy cannot take
        if hasattr(value, method):
            value = getattr(value, method)()
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)
