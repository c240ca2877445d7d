"""Whose a cotangent is: one that nobody else refers to may be added to in place, or handed out as a gradient.

Reference counts tell.  How many of them a call itself holds differs between interpreters, so what is sole is measured
once, in the way in which it is asked later.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_lstm.kernels.pool import has_own_memory

__all__ = ["counted", "is_array_alone", "is_pending_alone", "is_sole", "is_sole_array", "settle"]


class _Cotangent:
    """Stands for a tensor."""

    __slots__ = ("_data",)

    def __init__(self, data: np.ndarray) -> None:
        self._data = data


# ---------------------------------------------------------------------------- pending in a replay


def counted(cotangent: Any) -> tuple[int, int]:
    """How many references there are to a cotangent, and to its array."""
    return sys.getrefcount(cotangent), sys.getrefcount(cotangent._data)


def _asked(pending: dict[Any, Any], node: Any) -> tuple[int, int]:
    present = pending.get(node)
    return counted(present)


_PENDING = _asked({0: _Cotangent(np.empty(1))}, 0)


def is_pending_alone(references: tuple[int, int], present: Any) -> bool:
    """Whether nobody but a table of pending cotangents refers to this one, to its array, or to the memory of that.

    ``references`` is what :func:`counted` said where the table was looked into.
    """
    return references == _PENDING and present._data.flags.writeable and has_own_memory(present._data)


# ---------------------------------------------------------------------------- finished


def settle(found: dict[Any, Any], into: Callable[[Any, Any], None]) -> None:
    """Hand out finished cotangents, each together with the last reference to it."""
    while found:
        leaf, cotangent = found.popitem()
        into(leaf, cotangent)


def is_sole(cotangent: Any) -> bool:
    """Asked by what :func:`settle` hands a cotangent to: whether its array is nobody else's, and all of its memory.

    Cotangents may be shared (both operands of an addition get the same one) or be views.
    """
    array = cotangent._data
    return (sys.getrefcount(cotangent), sys.getrefcount(array), _viewed(array)) in _SOLE


def _viewed(array: np.ndarray) -> int:
    """References to the array of which this is a view of all; 0 where it has its own memory, -1 for other views."""
    if array.base is None:
        return 0 if array.flags.owndata else -1
    if has_own_memory(array):  # counts references: there is none of ours yet
        return 0
    base = array.base
    if base.__class__ is not np.ndarray or not base.flags.owndata or base.nbytes != array.nbytes:
        return -1
    return sys.getrefcount(base)


_SOLE: set[tuple[int, int, int]] = set()


def _measure() -> None:
    """What is said of an array, and of a view, that only a cotangent refers to."""

    class Looking(set[tuple[int, int, int]]):
        def __contains__(self, counts: Any) -> bool:
            self.add(counts)
            return True

    global _SOLE
    _SOLE = seen = Looking()
    settle({k: _Cotangent(a) for k, a in enumerate((np.empty(2), np.empty(2).reshape(1, 2)))}, _look)
    _SOLE = set(seen)


def _look(leaf: Any, cotangent: Any) -> None:
    is_sole(cotangent)


_measure()


# ---------------------------------------------------------------------------- arrays in a known replay


def is_array_alone(array: np.ndarray) -> bool:
    """Asked of its argument by a function that a replay on arrays calls: whether only that replay's variable refers to
    the array, and nobody else to its memory."""
    return sys.getrefcount(array) == _ALONE and array.flags.writeable and has_own_memory(array)


def is_sole_array(array: np.ndarray) -> bool:
    """The same question of a finished cotangent: as :func:`is_sole`."""
    return (sys.getrefcount(array), _viewed(array)) in _SOLE_ARRAYS


_ALONE = 0
_SOLE_ARRAYS: set[tuple[int, int]] = set()


def _measure_arrays() -> None:
    """What is said of arrays that one variable refers to, asked by a function that is given them."""

    class Looking(set[tuple[int, int]]):
        def __contains__(self, counts: Any) -> bool:
            self.add(counts)
            return True

    class Alone(int):
        count = 0

        def __eq__(self, other: Any) -> bool:
            Alone.count = other
            return False

        def __hash__(self) -> int:
            return 0

    def alone(present: np.ndarray, share: Any) -> bool:
        return is_array_alone(present)

    def sole(leaf: Any, present: np.ndarray) -> bool:
        return is_sole_array(present)

    global _ALONE, _SOLE_ARRAYS
    _ALONE = Alone()
    one, view = np.empty(2), np.empty(2).reshape(1, 2)
    alone(one, None)
    _ALONE = Alone.count
    _SOLE_ARRAYS = seen = Looking()
    sole(None, one)
    sole(None, view)
    _SOLE_ARRAYS = set(seen)


_measure_arrays()
