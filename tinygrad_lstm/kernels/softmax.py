"""Softmax over the rows of a matrix, the part of a cross-entropy that is worth native code.

Large float32 matrices go through one native loop over rows, in which a row stays in the L1 cache between its
maximum, its exponentials and their sum; all others go through NumPy.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from . import expression as e
from .elementwise import _native_enabled
from .expression import Expression, build
from .pool import empty

if TYPE_CHECKING:
    from .codecache import Program

__all__ = ["COMPILE_FROM", "exp_sums", "scaled_softmax"]

# So many elements pay for the compiler (.5 s) within a few thousand calls; below, NumPy is good enough.
COMPILE_FROM = 1 << 16

_identity = build(lambda x: (x,), 1)
_exponential = build(lambda x, top: (e.exp(x - top),), 2)
_ratio = build(lambda total, scale: (scale / total,), 2)
_product = build(lambda value, factor: (value * factor,), 2)


def exp_sums(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The maximum m of every row and the sum of ``exp(x - m)`` over it; ``log(sum) + m`` is the row's logsumexp.

    ``rows`` is (N, C), floating, C at least 1; the results are (N,) of its dtype.

    >>> import numpy as np
    >>> from tinygrad_lstm.kernels.softmax import exp_sums
    >>> [a.tolist() for a in exp_sums(np.array([[1000.0, 1000.0], [0.0, -np.inf]]))]
    [[1000.0, 0.0], [2.0, 1.0]]
    """
    if _natively(rows):
        rows = np.require(rows, None, ["C", "A"])
        top, total = np.empty(len(rows), rows.dtype), np.empty(len(rows), rows.dtype)
        _over_rows("sums", rows, top, total)
        return top, total
    top = np.maximum.reduce(rows, axis=-1)
    return top, np.add.reduce(_exponential.numpy(rows, top[:, None])[0], axis=-1)


def scaled_softmax(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``scale[:, None] * softmax(rows)`` as a new array; ``rows`` is (N, C), ``scale`` (N,) of the same dtype.

    >>> import numpy as np
    >>> from tinygrad_lstm.kernels.softmax import scaled_softmax
    >>> scaled_softmax(np.array([[1e4, 1e4], [0.0, -1e4]]), np.array([1.0, 3.0])).tolist()
    [[0.5, 0.5], [3.0, 0.0]]
    """
    out = empty(rows.shape, rows.dtype)
    if _natively(rows) and scale.dtype == rows.dtype:
        rows, scale = np.require(rows, None, ["C", "A"]), np.require(scale, None, ["C", "A"])
        _over_rows("softmax", rows, scale, out)
        return out
    top = np.maximum.reduce(rows, axis=-1, keepdims=True)
    np.exp(np.subtract(rows, top, out=out), out=out)
    factor = _ratio.numpy(np.add.reduce(out, axis=-1), scale)[0]
    return np.multiply(out, factor[:, None], out=out)


def _natively(rows: np.ndarray) -> bool:
    single = rows.dtype.name == "float32" and rows.dtype.isnative
    return single and rows.size >= COMPILE_FROM and rows.shape[1] > 1 and _native_enabled()


def _call(expression: Expression, along: tuple[bool, ...], reductions: tuple[str, ...], columns: int) -> str:
    """The text that makes a row kernel of an expression with one result; it is written, or reduced, or both."""
    nodes = ", ".join(repr((node.op, node.args, node.param)) for node in expression.nodes)
    dtypes = ("float32",) * expression.n_inputs
    outputs, targets = expression.outputs * len(reductions), tuple(range(len(reductions)))
    return (
        f"row_kernel({expression.n_inputs}, ({nodes},), {outputs!r}, {dtypes!r}, {along!r}, {reductions!r}, "
        f"{targets!r}, {columns})"
    )


def _over_rows(kind: str, rows: np.ndarray, *others: np.ndarray) -> None:
    """One of the native functions, with the rows shared out among threads."""
    from . import threads

    count, columns = rows.shape
    threads.over_rows(_compiled(columns).address(kind), count, columns, id(rows), *map(id, others))


def _part_of(*names: str) -> str:
    """The text that finds a part's rows, and the arrays, in the table of :func:`.threads.over_rows`."""
    lines = ["chunk = load64(table + 8)", "stop = min(load64(table), (part + 1) * chunk)"]
    lines += [f"{name} = load64(load64(table + {16 + 8 * k}) + HEAD)" for k, name in enumerate(names)]
    return "\n".join(f"    {line}" for line in lines)


@functools.cache
def _compiled(columns: int) -> Program:
    from . import codecache

    # Stage by stage for so many rows: one row's maximum need not wait for the sum of the row before it, and the
    # rows stay in the L1 cache.
    block = max(1, min(16, 8192 // (4 * columns)))
    source = f'''"""Generated softmax over rows of {columns} float32."""
from tinygrad_lstm.kernels.memory import load64, stack
from tinygrad_lstm.kernels.rows import row_kernel
from tinygrad_lstm.kernels.dialect import exported

HEAD = object.__basicsize__
maximum = {_call(_identity, (True,), ("max",), columns)}
exponential_sum = {_call(_exponential, (True, False), ("sum",), columns)}
exponential = {_call(_exponential, (True, False), ("", "sum"), columns)}
ratio = {_call(_ratio, (False, False), ("",), 1)}
product = {_call(_product, (True, False), ("",), columns)}


@exported
def sums(table, part):
{_part_of("x", "top", "total")}
    for first in range(part * chunk, stop, {block}):
        last = min(first + {block}, stop)
        for k in range(first, last):
            maximum(x + {4 * columns} * k, top + 4 * k)
        for k in range(first, last):
            exponential_sum(x + {4 * columns} * k, top + 4 * k, total + 4 * k)
    return 0


@exported
def softmax(table, part):
{_part_of("x", "scale", "out")}
    top, total = stack({block}), stack({block})
    for first in range(part * chunk, stop, {block}):
        last = min(first + {block}, stop)
        for k in range(first, last):
            maximum(x + {4 * columns} * k, top + 8 * (k - first))
        for k in range(first, last):
            exponential(x + {4 * columns} * k, top + 8 * (k - first), out + {4 * columns} * k, total + 8 * (k - first))
        for k in range(first, last):
            ratio(total + 8 * (k - first), scale + 4 * k, total + 8 * (k - first))
        for k in range(first, last):
            product(out + {4 * columns} * k, total + 8 * (k - first), out + {4 * columns} * k)
    return 0
'''
    return codecache.load(source, stem="softmax")
