"""Lengths that depend on the sizes of the inputs: one program out of recordings at several sizes.

A recorded Program has fixed shapes.  Recorded at a few sizes of an axis, everything about it that is the same stays,
and every integer that changes must be a polynomial in the sizes (``T``, ``T - 1``, ``T * B``): a :class:`Size`.
:func:`unified` makes one Program of several, with Sizes in place of those integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Equation, Literal, Program

__all__ = ["Differs", "Size", "Varying", "fit", "samples_of", "unified", "varying"]

Sample = Mapping[str, int]


class Differs(Exception):
    """Recordings at different sizes are not one program.  Never shown: the axis then keeps its size."""


class Size(NamedTuple):
    """A sum of products of axis lengths: ``((2, ("T", "B")), (-1, ()))`` is ``2 * T * B - 1``."""

    terms: tuple[tuple[int, tuple[str, ...]], ...]

    def __str__(self) -> str:
        def shown(factor: int, symbols: tuple[str, ...]) -> str:
            return "*".join([str(factor)] * (factor != 1 or not symbols) + list(symbols))

        return " + ".join(shown(*term) for term in self.terms)

    @property
    def symbol(self) -> str | None:
        """The one symbol that this is, if it is one."""
        (factor, symbols), *rest = self.terms
        return symbols[0] if not rest and factor == 1 and len(symbols) == 1 else None


def _monomials(symbols: Sequence[str]) -> list[tuple[str, ...]]:
    """The products that a size may be made of; of many symbols only products of two."""
    most = len(symbols) if len(symbols) <= 3 else 2
    return [m for count in range(most + 1) for m in itertools.combinations(symbols, count)]


def _value(monomial: Sequence[str], sample: Sample) -> int:
    return math.prod(sample[symbol] for symbol in monomial)


def samples_of(symbols: Sequence[str]) -> list[dict[str, int]]:
    """Sizes at which to record so that :func:`fit` has one answer: one sample more than there are unknowns."""
    if not symbols:
        return [{}, {}]
    monomials = _monomials(symbols)
    draw = np.random.default_rng(0)
    while True:
        # Distinct and above 2, so that no axis is broadcast or mistaken for another one.
        samples = [
            dict(
                zip(
                    symbols,
                    draw.choice(np.arange(3, 30 + len(symbols)), len(symbols), replace=False).tolist(),
                    strict=True,
                )
            )
            for _ in range(len(monomials) + 1)
        ]
        matrix = np.array([[_value(m, sample) for m in monomials] for sample in samples], float)
        if np.linalg.matrix_rank(matrix[:-1]) == len(monomials) and samples[-1] not in samples[:-1]:
            return samples


def fit(values: Sequence[int], samples: Sequence[Sample]) -> int | Size:
    """The integer, or the polynomial in the sizes, that takes these values; raises Differs where there is none.

    >>> at = samples_of(["T", "B"])
    >>> str(fit([2 * s["T"] * s["B"] for s in at], at)), fit([7] * len(at), at)
    ('2*T*B', 7)
    """
    if len(set(values)) == 1:
        return values[0]
    monomials = _monomials(list(samples[0]))
    matrix = np.array([[_value(m, sample) for m in monomials] for sample in samples], float)
    factors = np.rint(np.linalg.lstsq(matrix, np.array(values, float), rcond=None)[0]).astype(int).tolist()
    terms = tuple((f, m) for f, m in reversed(list(zip(factors, monomials, strict=True))) if f)
    for value, sample in zip(values, samples, strict=True):
        if sum(f * _value(m, sample) for f, m in terms) != value:
            raise Differs(f"the lengths {list(values)}")
    return Size(terms)


# ---------------------------------------------------------------------------- programs


def unified(programs: Sequence[Program], samples: Sequence[Sample]) -> Program:
    """One program with :class:`Size` in place of what depends on the sizes; raises Differs."""
    first = programs[0]
    same = all(
        len(p.avals) == len(first.avals)
        and len(p.equations) == len(first.equations)
        and (p.inputs, p.captures, p.outputs) == (first.inputs, first.captures, first.outputs)
        for p in programs
    )
    if not same:
        raise Differs("the number of operations")
    avals = [_aval(group, samples) for group in zip(*(p.avals for p in programs), strict=True)]
    equations = [_equation(group, samples) for group in zip(*(p.equations for p in programs), strict=True)]
    return first.replaced(avals=avals, equations=equations)


def _aval(group: Sequence[Aval], samples: Sequence[Sample]) -> Aval:
    shapes = [aval.shape for aval in group]
    if len({np.dtype(aval.dtype) for aval in group}) > 1 or len(set(map(len, shapes))) > 1:
        raise Differs(f"the shapes {shapes}")
    return Aval(tuple(fit(lengths, samples) for lengths in zip(*shapes, strict=True)), group[0].dtype)  # type: ignore[misc]


def _equation(group: Sequence[Equation], samples: Sequence[Sample]) -> Equation:
    first = group[0]
    if any(e.primitive is not first.primitive or e.outputs != first.outputs for e in group):
        raise Differs(f"the operation {first.primitive.name}")
    operands = _common([e.operands for e in group], samples)
    return first._replace(operands=operands, params=_common([dict(e.params) for e in group], samples))


def _common(values: Sequence[Any], samples: Sequence[Sample]) -> Any:
    """What operands and parameters have in common."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise Differs(f"the parameters {values}")
    if isinstance(first, Program):
        return unified(values, samples)
    if isinstance(first, Literal):
        return Literal(_common([value.value for value in values], samples))
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise Differs("the parameters")
        return {key: _common([value[key] for value in values], samples) for key in first}
    if isinstance(first, (tuple, list)):
        if any(len(value) != len(first) for value in values):
            raise Differs(f"the parameters {values}")
        parts = [_common(group, samples) for group in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if isinstance(first, int) and not isinstance(first, bool):
        return fit(values, samples)
    if isinstance(first, np.ndarray):
        if all(np.array_equal(value, first) for value in values):
            return first
    elif all(value is first or value == first for value in values):
        return first
    raise Differs(f"the parameters {values}")


# ---------------------------------------------------------------------------- constants


class Varying(NamedTuple):
    """A constant whose shape depends on sizes: ``part`` repeated along those axes, or counted along one of them.

    ``step`` None repeats; else the value at k along the (only) growing axis is ``part + k * step``.
    """

    part: np.ndarray  # of length 1 along every growing axis
    shape: tuple[int | Size, ...]
    step: Any = None

    @property
    def growing(self) -> list[int]:
        """The axes whose lengths depend on sizes."""
        return [axis for axis, length in enumerate(self.shape) if isinstance(length, Size)]


def varying(arrays: Sequence[np.ndarray], samples: Sequence[Sample]) -> np.ndarray | Varying:
    """One constant out of those of several recordings; raises Differs."""
    first = arrays[0]
    shape = _aval([Aval(a.shape, a.dtype) for a in arrays], samples).shape
    found = Varying(first[tuple(slice(0, 1) if isinstance(n, Size) else slice(None) for n in shape)], shape)
    growing = found.growing
    if not growing:
        if not all(np.array_equal(a, first, equal_nan=a.dtype.kind == "f") for a in arrays):
            raise Differs("the values of a constant")
        return first
    if all(np.array_equal(a, np.broadcast_to(found.part, a.shape), equal_nan=a.dtype.kind == "f") for a in arrays):
        return found
    if len(growing) == 1 and first.dtype.kind in "iuf":
        axis = growing[0]
        step = (np.take(first, -1, axis) - np.take(first, 0, axis)).reshape(-1)[0] / (first.shape[axis] - 1)
        step = np.asarray(step, first.dtype)
        near = 0.0 if first.dtype.kind != "f" else 4 * float(np.finfo(first.dtype).eps)
        if all(np.allclose(_counted(found.part, step, axis, a.shape), a, rtol=near, atol=0.0) for a in arrays):
            return found._replace(step=step)
    raise Differs("the values of a constant")


def _counted(part: np.ndarray, step: Any, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    index = np.arange(shape[axis]).reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return part + (index * step).astype(part.dtype)
