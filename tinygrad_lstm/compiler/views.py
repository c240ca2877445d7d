"""Where the values of a compiled loop live: buffers, and views of one row of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Root", "Unsupported", "View", "contiguous", "dense", "is_contiguous"]


class Unsupported(Exception):
    """An equation that native code is not made for; the executor runs the loop instead."""

    def __init__(self, equation: Any, why: str) -> None:
        super().__init__(why)
        self.equation = equation
        self.why = why


class Root(NamedTuple):
    """A buffer.

    ``kind``: ``x`` (a sequence value, its row of this step), ``v`` (an invariant), ``i`` and ``o`` (a carry before
    and after the step), ``y`` (what is stacked, the row of this step), ``s`` (a sum over the steps),
    ``t`` (scratch), ``n`` (what lies elsewhere at every step of an inner loop).
    """

    kind: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.number}"


@dataclass(frozen=True)
class View:
    """One row of a value: an offset, lengths and strides in bytes within a buffer.

    ``rowed``: whether the address moves from row to row (an invariant may be the same for all rows).
    """

    root: Root
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype
    rowed: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def moved(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> View:
        """Another view of the same buffer."""
        return View(self.root, self.offset + offset, tuple(shape), tuple(strides), self.dtype, self.rowed)

    def broadcast(self, shape: tuple[int, ...]) -> View:
        """Repeated along new axes and axes of length 1."""
        extra = len(shape) - len(self.shape)
        strides = [0] * extra
        for n, m, stride in zip(self.shape, shape[extra:], self.strides, strict=True):
            strides.append(stride if n == m and n != 1 else 0)
        return self.moved(0, shape, tuple(strides))

    def reshaped(self, shape: tuple[int, ...]) -> View | None:
        """The same elements in another shape, or None where that takes a copy."""
        squeezed = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n != 1]
        wanted = [n for n in shape if n != 1]
        if [n for n, _ in squeezed] == wanted:
            rest = iter(squeezed)
            return self.moved(0, shape, tuple(0 if n == 1 else next(rest)[1] for n in shape))
        return self.moved(0, shape, contiguous(shape, self.dtype.itemsize)) if is_contiguous(self) else None


def contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides of a C-contiguous array."""
    strides = []
    step = itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def is_contiguous(view: View) -> bool:
    """Whether the elements of a row follow one another."""
    expected = contiguous(view.shape, view.dtype.itemsize)
    return all(n == 1 or s == e for n, s, e in zip(view.shape, view.strides, expected, strict=True))


def dense(view: View) -> bool:
    """Whether neighbours in the last axis are neighbours in memory."""
    return not view.shape or view.shape[-1] == 1 or view.strides[-1] == view.dtype.itemsize
