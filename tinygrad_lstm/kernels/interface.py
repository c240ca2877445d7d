"""Whether array objects are laid out as native code reads them; raises ImportError where they are not."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


def _check_interface() -> None:
    """Raises ImportError where array objects are not laid out as NumPy's binary interface says."""
    array = np.zeros((3, 5), np.float32)[:, 1:]
    head = object.__basicsize__

    def at(address: int, kind: Any = ctypes.c_int64) -> int:
        return int(kind.from_address(address).value)

    start = id(array)
    right = (
        np.ndarray.__basicsize__ >= head + 56
        and at(start + head - 8) == id(np.ndarray)
        and at(start + head) == array.ctypes.data
        and at(start + head + 8, ctypes.c_int32) == 2
        and at(start + head + 40) == id(array.dtype)
        and at(start + head + 48, ctypes.c_int32) == array.flags.num
        and at(id(array.dtype) + head + 12, ctypes.c_int32) == array.dtype.num
        and [at(at(start + head + 16) + 8 * i) for i in range(2)] == list(array.shape)
        and [at(at(start + head + 24) + 8 * i) for i in range(2)] == list(array.strides)
    )
    if not right:
        raise ImportError("this NumPy lays out its arrays in an unknown way")


_check_interface()
