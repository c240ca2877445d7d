"""One table: primitive -> ONNX nodes.

A rule takes the builder, the equation, its operands (values; Python numbers as arrays) and the avals of its outputs,
and returns one value for each output.  Axes in parameters count from the end, as everywhere in a Program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.errors import UnsupportedError
from tinygrad_lstm.interop.graph import Builder, Length, Shape, Value
from tinygrad_lstm.interop.sizes import Size
from tinygrad_lstm.primitive import Aval

__all__ = ["RULES", "Applied", "rule"]

_END = np.iinfo(np.int64).max


class Applied(NamedTuple):
    """One application of a primitive."""

    b: Builder
    args: list[Value]
    shapes: Sequence[Shape]  # of the operands
    params: Mapping[str, Any]
    outs: list[Aval]

    @property
    def out(self) -> Aval:
        """The only output."""
        return self.outs[0]


Rule = Callable[[Applied], list[Value]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Callable[[Applied], Any]], Callable[[Applied], Any]]:
    """Enter a function that returns one value, or a list of them, into the table."""

    def enter(function: Callable[[Applied], Any]) -> Callable[[Applied], Any]:
        def listed(a: Applied) -> list[Value]:
            made = function(a)
            return made if isinstance(made, list) else [made]

        RULES.update(dict.fromkeys(names, listed))
        return function

    return enter


def ints(*values: int) -> np.ndarray:
    """A vector of int64."""
    return np.array(values, np.int64)


# ---------------------------------------------------------------------------- shapes


@rule("reshape")
def _reshape(a: Applied) -> Value:
    return a.b.reshape(a.args[0], a.out.shape)


@rule("broadcast_to")
def _broadcast_to(a: Applied) -> Value:
    return a.b.expand(a.args[0], a.out.shape)


@rule("sum_to")
def _sum_to(a: Applied) -> Value:
    shape = a.shapes[0]
    extra = len(shape) - len(a.out.shape)
    axes = [*range(extra), *(k + extra for k, n in enumerate(a.out.shape) if n == 1 and shape[k + extra] != 1)]
    return a.b.reshape(reduced(a.b, "ReduceSum", a.args[0], axes, False, a.out.dtype), a.out.shape)


@rule("transpose")
def _transpose(a: Applied) -> Value:
    rank, axes = len(a.shapes[0]), a.params["axes"]
    order = [*range(rank - len(axes)), *(axis + rank for axis in axes)]
    return a.b.one("Transpose", a.args, a.out.dtype, perm=order)


@rule("concatenate")
def _concatenate(a: Applied) -> Value:
    return a.b.one("Concat", [a.b.cast(x, a.out.dtype) for x in a.args], a.out.dtype, axis=a.params["axis"])


@rule("split")
def _split(a: Applied) -> list[Value]:
    sizes = a.b.shape(a.params["sizes"])
    return a.b.node("Split", [a.args[0], sizes], [o.dtype for o in a.outs], axis=a.params["axis"])


@rule("flip")
def _flip(a: Applied) -> Value:
    axes = a.params["axis"]
    if not axes:
        return a.args[0]
    count = len(axes)
    bounds = [ints(*[-1] * count), ints(*[-_END] * count), ints(*axes), ints(*[-1] * count)]
    return a.b.one("Slice", [a.args[0], *bounds], a.out.dtype)


@rule("roll")
def _roll(a: Applied) -> Value:
    value = a.args[0]
    for shift, axis in zip(a.params["shift"], a.params["axis"], strict=True):
        # The last `shift` elements come to the front; Mod has the sign of the divisor.
        length = a.b.length(a.shapes[0][axis])
        if isinstance(shift, Size):
            raise UnsupportedError("a roll by a number that depends on a length has no ONNX form")
        start = a.b.one("Mod", [ints(-shift), length], np.int64)
        tail = a.b.one("Slice", [value, start, ints(_END), ints(axis)], a.out.dtype)
        head = a.b.one("Slice", [value, ints(0), start, ints(axis)], a.out.dtype)
        value = a.b.one("Concat", [tail, head], a.out.dtype, axis=axis)
    return value


def _as_value(b: Builder, operand: Value | np.ndarray) -> Value:
    return operand if isinstance(operand, Value) else b.constant(operand)


@rule("astype")
def _astype(a: Applied) -> Value:
    return _as_value(a.b, a.b.cast(a.args[0], a.out.dtype))


@rule("lengths_in_range")
def _lengths_in_range(a: Applied) -> Value:
    return _as_value(a.b, a.b.cast(a.args[0], np.int64))


@rule("alias", "stop_gradient", "stop_nan")
def _same(a: Applied) -> Value:
    return a.args[0]


@rule("full")
def _full(a: Applied) -> Value:
    return a.b.expand(np.asarray(a.params["value"], a.out.dtype), a.out.shape)


# ---------------------------------------------------------------------------- reductions


def reduced(b: Builder, op: str, x: Value, axes: Sequence[int], keepdims: bool, dtype: Any) -> Value:
    """A reduction over axes, computed in the dtype of its result."""
    value = _as_value(b, b.cast(x, dtype))
    return b.one(op, [value, ints(*axes)], dtype, keepdims=int(keepdims)) if axes else value


def _reduction(name: str, op: str) -> None:
    @rule(name)
    def _(a: Applied) -> Value:
        if a.out.dtype == np.bool_:  # the largest of booleans: ONNX reduces numbers
            found = reduced(a.b, op, a.args[0], a.params["axis"], a.params["keepdims"], np.int32)
            return _as_value(a.b, a.b.cast(found, np.bool_))
        return reduced(a.b, op, a.args[0], a.params["axis"], a.params["keepdims"], a.out.dtype)


_reduction("sum", "ReduceSum")
_reduction("max", "ReduceMax")
_reduction("min", "ReduceMin")
_reduction("logsumexp", "ReduceLogSumExp")


def _truth(name: str, op: str) -> None:
    @rule(name)
    def _(a: Applied) -> Value:
        flags = a.b.cast(_as_value(a.b, a.b.cast(a.args[0], np.bool_)), np.int32)
        found = reduced(a.b, op, _as_value(a.b, flags), a.params["axis"], a.params["keepdims"], np.int32)
        return _as_value(a.b, a.b.cast(found, np.bool_))


_truth("all", "ReduceMin")
_truth("any", "ReduceMax")


def _bits(name: str, op: str, logic: str) -> None:
    @rule(name)
    def _(a: Applied) -> Value:
        args = [a.b.cast(x, a.out.dtype) for x in a.args]
        return a.b.one(logic if a.out.dtype == np.bool_ else op, args, a.out.dtype)


_bits("bitwise_and", "BitwiseAnd", "And")
_bits("bitwise_or", "BitwiseOr", "Or")
_bits("bitwise_xor", "BitwiseXor", "Xor")
_bits("invert", "BitwiseNot", "Not")


@rule("prod")
def _prod(a: Applied) -> Value:
    return reduced(a.b, "ReduceProd", a.args[0], [-1], False, a.out.dtype)


@rule("norm")
def _norm(a: Applied) -> Value:
    square = a.b.one("Mul", [a.args[0], a.args[0]], a.out.dtype)
    total = reduced(a.b, "ReduceSum", square, a.params["axis"], a.params["keepdims"], a.out.dtype)
    return a.b.one("Sqrt", [total], a.out.dtype)


@rule("cumsum")
def _cumsum(a: Applied) -> Value:
    value = a.b.cast(a.args[0], a.out.dtype)
    return a.b.one("CumSum", [value, np.array(a.params["axis"], np.int64)], a.out.dtype)


def _arg(name: str, op: str) -> None:
    @rule(name)
    def _(a: Applied) -> Value:
        value = a.b.cast(a.args[0], np.int32) if a.args[0].dtype == np.bool_ else a.args[0]
        return a.b.one(op, [value], np.int64, axis=a.params["axis"], keepdims=int(a.params["keepdims"]))


_arg("argmax", "ArgMax")
_arg("argmin", "ArgMin")


@rule("softmax")
def _softmax(a: Applied) -> Value:
    return a.b.one("Softmax", a.args, a.out.dtype, axis=a.params["axis"])


@rule("log_softmax")
def _log_softmax(a: Applied) -> Value:
    return a.b.one("LogSoftmax", a.args, a.out.dtype, axis=a.params["axis"])


# ---------------------------------------------------------------------------- products


@rule("matmul")
def _matmul(a: Applied) -> Value:
    return a.b.one("MatMul", [a.b.cast(x, a.out.dtype) for x in a.args], a.out.dtype)


@rule("einsum")
def _einsum(a: Applied) -> Value:
    cast = [a.b.cast(x, a.out.dtype) for x in a.args]
    return a.b.one("Einsum", cast, a.out.dtype, equation=a.params["subscripts"])


# ---------------------------------------------------------------------------- indexing


@rule("take")
def _take(a: Applied) -> Value:
    return a.b.one("Gather", [a.args[0], _index(a.b, a.args[1])], a.out.dtype, axis=a.params["axis"])


def _index(b: Builder, indices: Value) -> Value:
    """Indices in a dtype that ONNX takes."""
    return indices if indices.dtype == np.int32 else _as_value(b, b.cast(indices, np.int64))


@rule("take_along_axis")
def _take_along_axis(a: Applied) -> Value:
    axis, (x, indices) = a.params["axis"], a.shapes
    place = axis + len(x)
    values = list(a.args)
    for k, own in enumerate((x, indices)):
        wanted = tuple(own[place] if at == place else n for at, n in enumerate(a.out.shape))
        if own != wanted:
            values[k] = a.b.expand(values[k], wanted)
    return a.b.one("GatherElements", [values[0], _index(a.b, values[1])], a.out.dtype, axis=axis)


@rule("one_hot")
def _one_hot(a: Applied) -> Value:
    classes = a.b.constant(np.arange(a.params["n"], dtype=np.int64))
    opened = a.b.one("Unsqueeze", [a.b.cast(a.args[0], np.int64), ints(-1)], np.int64)
    return _as_value(a.b, a.b.cast(a.b.one("Equal", [opened, classes], np.bool_), a.out.dtype))


@rule("scatter_add")
def _scatter_add(a: Applied) -> Value:
    target, indices, updates = a.args
    rows = a.b.expand(a.b.cast(updates, a.out.dtype), (*a.shapes[1], *a.shapes[0][1:]))
    places = a.b.one("Unsqueeze", [_index(a.b, indices), ints(-1)], np.int64)
    return _added(a.b, a.b.cast(target, a.out.dtype), places, rows, a.out.dtype)


def _added(b: Builder, target: Any, places: Value, rows: Value, dtype: Any) -> Value:
    places = _as_value(b, b.cast(places, np.int64))
    return b.one("ScatterND", [target, places, rows], dtype, reduction="add")


@rule("getitem")
def _getitem(a: Applied) -> Value:
    basic = _Basic(a.b, a.args[0], a.shapes[0], a.params["template"])
    if not a.args[1:]:
        return basic.done()
    return _gathered(a, basic)


class _Basic:
    """The part of an index that is made of slices, ints, None and ...: sliced first, reshaped at the end."""

    def __init__(self, b: Builder, x: Value, shape: Shape, template: Sequence[Any]) -> None:
        used = sum(item is not None and item is not Ellipsis for item in template)
        open_ = [("slice", None, None, None)] * (len(shape) - used)
        at = template.index(Ellipsis) if Ellipsis in template else len(template)
        items = [*template[:at], *open_, *template[at + 1 :]]
        self.b, self.items = b, items
        self.value = self._sliced(x, [item for item in items if item is not None])

    def _sliced(self, x: Value, items: Sequence[Any]) -> Value:
        starts: list[Length] = []
        ends: list[Length] = []
        axes: list[int] = []
        steps: list[int] = []
        for axis, item in enumerate(items):
            if isinstance(item, (int, Size)) or item[0] != "slice":
                continue
            _, start, stop, step = item
            if (start, stop, step) == (None, None, None):
                continue
            step = 1 if step is None else step
            if isinstance(step, Size):
                raise UnsupportedError("a slice whose step depends on a length has no ONNX form")
            forward = step > 0
            starts.append((0 if forward else _END) if start is None else start)
            ends.append((_END if forward else -_END) if stop is None else stop)
            axes.append(axis)
            steps.append(step)
        if not axes:
            return x
        bounds = [self.b.shape(starts), self.b.shape(ends), ints(*axes), ints(*steps)]
        return self.b.one("Slice", [x, *bounds], x.dtype)

    def done(self) -> Value:
        """Without arrays: ints and None change the axes."""
        value = self.value
        axis = 0
        gone, new, place = [], [], 0
        for item in self.items:
            if item is None:
                new.append(place)
                place += 1
                continue
            if isinstance(item, (int, Size)):
                start = self.b.shape([item])
                # -1 ends at the last element: there is no 0 behind it
                end = self.b.shape([_END if item == -1 else _plus_one(item)])
                value = self.b.one("Slice", [value, start, end, ints(axis)], value.dtype)
                gone.append(axis)
            else:
                place += 1
            axis += 1
        if gone:
            value = self.b.one("Squeeze", [value, ints(*gone)], value.dtype)
        if new:
            value = self.b.one("Unsqueeze", [value, ints(*new)], value.dtype)
        return value


def _plus_one(item: Length) -> Length:
    if not isinstance(item, Size):
        return item + 1
    constant = sum(factor for factor, symbols in item.terms if not symbols) + 1
    rest = tuple(term for term in item.terms if term[1])
    return Size((*rest, (constant, ()))) if constant else Size(rest)


def _gathered(a: Applied, basic: _Basic) -> Value:
    """Integer arrays among the parts of an index: GatherND on those axes, brought to the front."""
    b = a.b
    if any(np.dtype(x.dtype).kind == "b" for x in a.args[1:]):
        raise UnsupportedError("an index that is an array of booleans has no ONNX form; use ops.where")
    if None in basic.items:
        raise UnsupportedError("an index with None beside arrays has no ONNX form; use ops.expand_dims")
    arrays = iter(zip(a.args[1:], a.shapes[1:], strict=True))
    found: list[tuple[int, Any]] = []
    rank = max((len(shape) for shape in a.shapes[1:]), default=0)
    for axis, item in enumerate(basic.items):
        if item == ("array",):
            found.append((axis, _index(b, next(arrays)[0])))
        elif isinstance(item, (int, Size)):
            found.append((axis, b.reshape(b.length(item), ())))
    axes = [axis for axis, _ in found]
    others = [axis for axis in range(len(basic.items)) if axis not in axes]
    value = basic.value
    if axes != list(range(len(axes))):
        value = b.one("Transpose", [value], value.dtype, perm=[*axes, *others])
    together = axes == list(range(axes[0], axes[0] + len(axes)))
    front = axes[0] if together else 0  # NumPy: where the arrays stood side by side, else in front
    broadcast = a.out.shape[front : front + rank]
    columns = []
    for _, index in found:
        whole = b.expand(b.cast(index, np.int64), broadcast)
        columns.append(b.one("Unsqueeze", [whole, ints(-1)], np.int64))
    where = columns[0] if len(columns) == 1 else b.one("Concat", columns, np.int64, axis=-1)
    value = b.one("GatherND", [value, where], value.dtype)
    if front:
        order = [*range(rank, rank + front), *range(rank), *range(rank + front, len(a.out.shape))]
        value = b.one("Transpose", [value], value.dtype, perm=order)
    return value


@rule("put")
def _put(a: Applied) -> Value:
    template, shape = a.params["template"], a.params["shape"]
    count = len(template)
    if any(item != ("array",) for item in template) or any(x.dtype.kind not in "iu" for x in a.args[1:]):
        raise UnsupportedError("adding at an index that is not made of integer arrays has no ONNX form")
    b, spread = a.b, a.shapes[0][: len(a.shapes[0]) - (len(shape) - count)]
    columns = [
        b.one("Unsqueeze", [b.expand(b.cast(index, np.int64), spread), ints(-1)], np.int64) for index in a.args[1:]
    ]
    places = columns[0] if count == 1 else b.one("Concat", columns, np.int64, axis=-1)
    empty = b.expand(np.zeros((), a.out.dtype), shape)
    return _added(b, empty, places, a.args[0], a.out.dtype)
