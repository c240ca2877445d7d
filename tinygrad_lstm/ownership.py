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

__all__ = ["counted", "is_pending_alone", "is_sole", "settle"]


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
    whole = 0  # references to what the array is a view of
    if not has_own_memory(array):
        base = array.base
        if base is None or base.__class__ is not np.ndarray or not base.flags.owndata or base.nbytes != array.nbytes:
            return False
        whole = sys.getrefcount(base)
    return (sys.getrefcount(cotangent), sys.getrefcount(array), whole) in _SOLE


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
