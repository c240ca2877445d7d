"""One update rule over many tensors: a table of arrays, a few numbers, one native call.

A *rule* is a function on symbolic scalars, as every elementwise expression here.  It takes the elements of the
arrays that are overwritten, of one that is only read, and some numbers which are the same for all tensors, and
returns the new elements of the written arrays.  What depends on the numbers alone is computed once per call, in
double precision; the rest is a loop.  NumPy and native code get the same expression and the same numbers, and
give the same bits unless the rule has transcendental functions.

The native function gets the addresses of the array objects and looks at them itself, as in :mod:`.layout`.  The
numbers are read from memory: a new learning rate compiles nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..errors import ArgumentError
from .elementwise import THRESHOLD, _native_enabled, lowerable
from .expression import Expr, Expression, build

__all__ = ["ARRAY_WEIGHT", "MultiTensor", "multi_tensor", "sums_of_squares", "worth_a_kernel"]

Entry: TypeAlias = Callable[..., int]

# How many elements a tensor counts in addition to its own.  NumPy needs some 10 us for the ufuncs of an Adam update
# whatever the size, so a layer and what reads it (6 tensors) pay for .1 s of compiling within 2,000 steps, and later
# processes have the code already.
ARRAY_WEIGHT = 512


def worth_a_kernel(tensors: int, elements: int) -> bool:
    """Whether so many tensors of so many elements in total are handled natively: a static rule."""
    return elements + ARRAY_WEIGHT * tensors >= THRESHOLD and _native_enabled()


def _split(expression: Expression, n_arrays: int) -> tuple[Expression | None, Expression]:
    """(what depends on the numbers alone, or None; the rest, a function of the arrays and of those results)."""
    nodes, n_inputs = expression.nodes, expression.n_inputs
    varies: list[bool] = []
    for k, node in enumerate(nodes):
        varies.append(k < n_arrays if node.op == "input" else any(varies[i] for i in node.args))
    read = {i for k, node in enumerate(nodes) if varies[k] for i in node.args} | set(expression.outputs)
    hoisted = [i for i in sorted(read) if not varies[i] and nodes[i].op != "constant"]

    def replay(known: dict[int, Expr], wanted: Sequence[int]) -> tuple[Expr, ...]:
        for k, node in enumerate(nodes):
            if k not in known and node.op != "input" and all(i in known for i in node.args):
                known[k] = Expr(node.op, tuple(known[i] for i in node.args), node.param)
        return tuple(known[i] for i in wanted)

    def body(*x: Expr) -> tuple[Expr, ...]:
        return replay(dict(zip([*range(n_arrays), *hoisted], x, strict=True)), expression.outputs)

    def before(*x: Expr) -> tuple[Expr, ...]:
        return replay(dict(zip(range(n_arrays, n_inputs), x, strict=True)), hoisted)

    return build(before, n_inputs - n_arrays) if hoisted else None, build(body, n_arrays + len(hoisted))


class MultiTensor:
    """A rule, ready to be applied to the arrays of many tensors; made by :func:`multi_tensor`."""

    def __init__(self, rule: Callable[..., Any], n_written: int, n_read: int, n_numbers: int) -> None:
        if n_written < 1 or n_read not in (0, 1):
            raise ArgumentError(f"multi_tensor: {n_written} written and {n_read} read arrays, expected 1.. and 0 or 1")
        self.n_written, self.n_arrays, self.n_numbers = n_written, n_written + n_read, n_numbers
        expression = build(rule, self.n_arrays + n_numbers)
        if len(expression.outputs) != n_written:
            raise ArgumentError(f"multi_tensor: {len(expression.outputs)} results for {n_written} written arrays")
        self._before, self.body = _split(expression, self.n_arrays)
        self._entries: dict[str, Entry | None] = {}

    def _values(self, numbers: Sequence[float]) -> list[float]:
        """What the loop reads, from the numbers of the rule."""
        if len(numbers) != self.n_numbers:
            raise ArgumentError(f"multi_tensor: found {len(numbers)} numbers, expected {self.n_numbers}")
        return [] if self._before is None else [float(x) for x in self._before.numpy(*map(float, numbers))]

    def __call__(self, arrays: Sequence[np.ndarray], numbers: Sequence[float], elements: int | None = None) -> None:
        """Overwrite the written arrays.

        Parameters
        ----------
        arrays : sequence of ndarrays
            For one tensor after the other: the written arrays, then the read one; all of a tensor's have one
            shape.  Native are contiguous arrays of one dtype, float32 or float64; the read one may also be the
            transpose of a contiguous matrix.  All others go through NumPy, one tensor at a time.
        numbers : sequence of floats
        elements : int, optional
            How many elements the first written arrays have in total, if it is known.
        """
        k = self.n_arrays
        count = len(arrays) // k
        if count * k != len(arrays):
            raise ArgumentError(f"multi_tensor: {len(arrays)} arrays, expected a multiple of {k}")
        if not count:
            return
        if elements is None:
            elements = sum([a.size for a in arrays[::k]])
        with np.errstate(all="ignore"):
            values = self._values(numbers)
            entry = self._entry(arrays[0].dtype) if worth_a_kernel(count, elements) else None
            if entry is None:
                for row in range(count):
                    self._plain(arrays[k * row : k * row + k], values)
                return
            words, held = _addresses(arrays), np.array(values, arrays[0].dtype)
            if entry(words, held, shares(arrays[::k], elements)):
                self._rest(arrays, words, entry, held, values)

    def _rest(self, arrays: Sequence[np.ndarray], words: np.ndarray, entry: Entry, held: Any, values: Any) -> None:
        """The tensors that the native loop left alone: once more with a contiguous copy of what is read, else NumPy."""
        k = self.n_arrays
        for row in np.flatnonzero(words[::k] == 0).tolist():
            own = list(arrays[k * row : k * row + k])
            if k > self.n_written and own[-1].dtype == own[0].dtype:
                # What is read may share memory with what is written, hence a copy in every case.
                own[-1] = np.array(own[-1], order="C")
            if entry(_addresses(own), held, (0, 1)):
                self._plain(own, values)

    def _plain(self, own: Sequence[np.ndarray], values: Sequence[float]) -> None:
        for target, value in zip(own, self.body.numpy(*own, *values), strict=False):
            np.copyto(target, value, casting="same_kind")

    def _entry(self, dtype: np.dtype) -> Entry | None:
        """The native function for arrays of a dtype, None where there is none; compiled when it is first asked for."""
        try:
            return self._entries[dtype.str]
        except KeyError:
            n = self.body.n_inputs
            fits = dtype.isnative and dtype.name in ("float32", "float64") and lowerable(self.body, (dtype,) * n)
            if fits and any(d != dtype for d in self.body.result_dtypes((dtype,) * n)):
                fits = False
            entry = None
            if fits:
                from .multi_native import compile_update

                entry = compile_update(self.body, self.n_arrays, dtype)
            self._entries[dtype.str] = entry
            return entry


@functools.lru_cache(maxsize=256)
def multi_tensor(rule: Callable[..., Any], n_written: int, n_read: int, n_numbers: int) -> MultiTensor:
    """``rule(*written, *read, *numbers) -> new values of the written arrays`` for many tensors at once.

    >>> import numpy as np
    >>> from tinygrad_lstm.kernels.multi import multi_tensor
    >>> descend = multi_tensor(lambda p, g, rate: (p - rate * g,), 1, 1, 1)
    >>> p, q = np.ones(2), np.zeros(3)
    >>> descend([p, np.ones(2), q, np.ones(3)], [0.5])
    >>> p.tolist(), q.tolist()
    ([0.5, 0.5], [-0.5, -0.5, -0.5])

    Raises ArgumentError for wrong numbers of arrays, numbers or results.
    """
    return MultiTensor(rule, n_written, n_read, n_numbers)


PART = 1 << 16  # elements that are worth another thread


def shares(arrays: Sequence[np.ndarray], elements: int) -> list[int]:
    """The first array of every thread's part, and behind the last: parts of about as many elements."""
    from . import threads

    parts = min(threads.count(), elements // PART) if elements >= 2 * PART else 1
    bounds, total = [0], 0
    for k, array in enumerate(arrays if parts > 1 else ()):
        if total >= len(bounds) * elements / parts:
            bounds.append(k)
        total += array.size
    return [*bounds, len(arrays)]


def _addresses(objects: Sequence[Any]) -> np.ndarray:
    return np.fromiter(map(id, objects), np.int64, len(objects))


def sums_of_squares(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of the squares of every array, float64.

    Every sum is accumulated in double precision in one fixed order (that of memory for contiguous arrays, else
    C order): the same bits at every call.

    >>> import numpy as np
    >>> from tinygrad_lstm.kernels.multi import sums_of_squares
    >>> sums_of_squares([np.array([3.0, 4.0]), np.ones((2, 2), np.float32)]).tolist()
    [25.0, 4.0]
    """
    sums = np.empty(len(arrays))
    if not arrays:
        return sums
    dtype = arrays[0].dtype
    native = dtype.isnative and dtype.name in ("float32", "float64")
    if native and worth_a_kernel(len(arrays), elements := sum([a.size for a in arrays])):
        from .multi_native import compile_sums

        words = _addresses(arrays)
        if not compile_sums()(words, sums, dtype, shares(arrays, elements)):
            return sums
        left = np.flatnonzero(words == 0).tolist()
    else:
        left = list(range(len(arrays)))
    with np.errstate(all="ignore"):
        for k in left:
            wide = np.ascontiguousarray(arrays[k], np.result_type(arrays[k], np.float64)).reshape(-1)
            sums[k] = np.add.reduce(np.square(wide))
    return sums
