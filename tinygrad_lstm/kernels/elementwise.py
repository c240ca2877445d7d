"""Elementwise expressions on arrays: one native loop where that wins, else NumPy.

The rules are static: the same call takes the same path every time, on every machine.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..errors import ArgumentError, ShapeError
from .expression import Expression, node_dtypes
from .pool import empty
from .table import LEAVES

__all__ = ["THRESHOLD", "evaluate", "fused", "lowerable"]

Kernel: TypeAlias = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], None]

# From this many elements on, `evaluate` takes the native loop.  Once compiled it wins at every size (64
# elements: 1.2 against 1.4 us for a + b * 2, 1.4 against 6.7 for sigmoid(a) * b; 4096: 1.7 against 2.4, 2.7
# against 15.8), but what only ever sees small arrays is not worth .3 s of compiling.
THRESHOLD = 4096
_ndarray = np.ndarray
_NATIVE_DTYPES = frozenset({"bool", "float32", "float64"})


_INTEGERS = frozenset({"int32", "int64"})
# What integers have an instruction for; where the result is a float, they are converted first.
_WHOLE_OPS = frozenset(
    {"input", "cast", "add", "subtract", "multiply", "negative", "square", "absolute", "sign", "maximum", "minimum",
     "where", "remainder", "floor_divide"}
)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def lowerable(expression: Expression, dtypes: tuple[np.dtype, ...], integers: bool = False) -> bool:
    """Whether native code can compute the expression: every value a bool, float32 or float64.

    With ``integers``, which row kernels have, also int32 and int64.
    """
    allowed = _NATIVE_DTYPES | _INTEGERS if integers else _NATIVE_DTYPES
    if not all(d.name in allowed and d.isnative for d in dtypes):
        return False
    found = node_dtypes(expression, dtypes)
    for node, dtype in zip(expression.nodes, found, strict=True):
        if not isinstance(dtype, np.dtype):
            continue  # a weak constant
        if dtype.name not in allowed:
            return False
        # bool + bool and maximum(bool, bool): NumPy makes logic of them.
        if dtype.kind == "b" and node.op in {"add", "multiply", "absolute", "maximum", "minimum"}:
            return False
        if dtype.kind == "i" and node.op not in _WHOLE_OPS:
            return False
        # A Python number that the integers it is compared with cannot hold.
        least = min((np.iinfo(found[k]).bits for k in node.args if np.dtype(found[k]).kind == "i"), default=64)
        numbers = [expression.nodes[k].param for k in node.args if expression.nodes[k].op == "constant"]
        if any(type(number) is int and not -(2 ** (least - 1)) <= number < 2 ** (least - 1) for number in numbers):
            return False
    return all(d.name in allowed for d in expression.result_dtypes(dtypes))


def _native_enabled() -> bool:
    return os.environ.get("TINYGRAD_LSTM_NATIVE", "1") != "0"


def evaluate(expression: Expression, arrays: Sequence[Any], out: Any = None) -> Any:
    """The value of ``expression`` on broadcastable arrays (Python numbers are weak): an array, or a tuple
    of arrays for several outputs.

    ``out`` is an array (or tuple of arrays) of the result's shape to write to; the dtype may differ within
    ``same_kind``, and it may be one of the inputs.
    """
    if expression.worth_compiling:
        for array in arrays:
            if type(array) is _ndarray and array.size >= THRESHOLD:
                return _large(expression, arrays, out)
    result = expression.numpy(*arrays)
    return result if out is None else _copy_to(expression, result, out)


def _copy_to(expression: Expression, result: Any, out: Any) -> Any:
    targets, values = ((out,), (result,)) if expression.single else (out, result)
    for target, value in zip(targets, values, strict=True):
        np.copyto(target, value, casting="same_kind")
    return out


def _large(expression: Expression, arrays: Sequence[Any], out: Any) -> Any:
    """Natively where everything about the arguments allows it."""
    if all(type(array) is np.ndarray for array in arrays) and _native_enabled():
        dtypes = tuple(array.dtype for array in arrays)
        shape = arrays[0].shape
        same = all(array.shape == shape for array in arrays)
        results = _pays(expression, dtypes)
        if results and (same or expression.uses_every_input):
            if out is None:
                if not same:
                    shape = np.broadcast(*arrays).shape
                targets = tuple([empty(shape, d) for d in results])
                _fused(expression, dtypes)(arrays, targets)
                return targets[0] if expression.single else targets
            _fused(expression, dtypes)(arrays, (out,) if expression.single else out)
            return out
    result = expression.numpy(*arrays)
    return result if out is None else _copy_to(expression, result, out)


@functools.lru_cache(maxsize=4096)
def _pays(expression: Expression, dtypes: tuple[np.dtype, ...]) -> tuple[np.dtype, ...]:
    """The dtypes of the outputs where native code wins, else nothing.

    The static table: the library's scalar functions (3 to 15 ns an element) lose to NumPy's vectorised ones,
    so every transcendental leaf must have a form of our own in the dtype.
    """
    if not lowerable(expression, dtypes):
        return ()
    found = node_dtypes(expression, dtypes)
    for node, dtype in zip(expression.nodes, found, strict=True):
        leaf = LEAVES.get(node.op)
        if leaf is None or not leaf.transcendental:
            continue
        power = leaf.name == "power" and expression.nodes[node.args[1]].op == "constant"
        if power and expression.nodes[node.args[1]].param in {-4, -3, -2, -1, 1, 2, 3, 4}:
            continue
        basis = {"sigmoid": "exp", "softplus": "exp"}.get(leaf.name, leaf.name)
        if str(dtype) not in LEAVES[basis].vector:
            return ()
    return expression.result_dtypes(dtypes)


@functools.lru_cache(maxsize=4096)
def _fused(expression: Expression, dtypes: tuple[np.dtype, ...]) -> Kernel:
    n_inputs, n_outputs = expression.n_inputs, len(expression.outputs)
    if len(dtypes) != n_inputs:
        raise ArgumentError(f"the expression has {n_inputs} inputs, found {len(dtypes)} dtypes")

    def slow(inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        result = expression.numpy(*inputs)
        for target, value in zip(outputs, (result,) if expression.single else result, strict=True):
            try:
                np.copyto(target, value, casting="same_kind")
            except ValueError:
                if not target.flags.writeable:
                    raise
                raise ShapeError(
                    f"fused kernel: an output has shape {target.shape}, the inputs "
                    f"{[np.shape(x) for x in inputs]} give {np.shape(value)}"
                ) from None

    def wrong(inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> ArgumentError:
        return ArgumentError(
            f"fused kernel: found {len(inputs)} inputs and {len(outputs)} outputs, expected {n_inputs} and {n_outputs}"
        )

    def first_call(*addresses: int) -> int:
        """Stands in for the native function until it is needed."""
        entry: Callable[..., int] = _always_slow
        if _native_enabled() and lowerable(expression, dtypes):
            from .native import compile_loop

            entry = compile_loop(expression, dtypes)
        namespace["entry"] = entry
        return entry(*addresses)

    a = [f"a{k}" for k in range(n_inputs)]
    b = [f"b{k}" for k in range(n_outputs)]
    # Written out for the number of operands: a loop or a star costs more than the native call itself.
    source = f"""def call(inputs, outputs):
    try:
        {", ".join(a)}, = inputs
        {", ".join(b)}, = outputs
    except ValueError:
        raise wrong(inputs, outputs) from None
    if entry(ndarray, {", ".join(f"id({name})" for name in a + b)}):
        slow(inputs, outputs)
"""
    namespace: dict[str, Any] = {"entry": first_call, "slow": slow, "wrong": wrong, "ndarray": id(np.ndarray)}
    exec(compile(source, "<fused elementwise>", "exec"), namespace)
    call: Kernel = namespace["call"]
    return call


def _always_slow(*addresses: int) -> int:
    return 1


def fused(expression: Expression, dtypes: Sequence[Any]) -> Kernel:
    """``callable(inputs, outputs) -> None``: all outputs of ``expression`` in one native loop.

    ``dtypes`` are those of the inputs.  All operands broadcast to the shape of the outputs (which must be
    equal).  Native are float32, float64 and bool arrays whose innermost stride is one element or zero and
    which collapse to at most three dimensions: whole arrays, column slices, time slices, ``(H,)``,
    ``(B, 1)`` and 0-d operands.  Everything else is computed by NumPy and copied, with the same result.
    An output may be one of the inputs.  The GIL is released.  Compiled at the first call.

    Raises ArgumentError for a wrong number of arrays, ShapeError for shapes that do not broadcast to the
    outputs.
    """
    return _fused(expression, tuple(np.dtype(d) for d in dtypes))
