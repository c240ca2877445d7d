"""From a recorded step to expressions: equations folded into each other, splits pushed down to the parameters.

An expression is a tree of :class:`Node`.  What a reader knows by a name of its own (values named with ``tg.name``,
the state, what is used more than once and is long) stays a name; everything else is written where it is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.primitive import REGISTRY
from tinygrad_lstm.program import Equation, Literal, Program

__all__ = ["Cut", "Node", "call", "expression_of", "number", "part_of", "size", "walk"]

ARITHMETIC = frozenset({"add", "subtract", "multiply", "divide", "negative", "power", "matmul"})
ROW = {"axis": (-1,), "keepdims": True}
# What a call means when it is written without parameters: reductions are over a row, and keep its axis.
PLAIN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("sum", "mean", "var", "max", "min", "norm", "logsumexp"), ROW),
    "softmax": {"axis": -1}, "log_softmax": {"axis": -1}, "cumsum": {"axis": -1},
    "leaky_relu": {"negative_slope": 0.01}, "elu": {"alpha": 1.0},
}  # fmt: skip


class Cut(NamedTuple):
    """The elements ``low .. high - 1`` of an axis (0: rows of a matrix, -1: the last one); ``split`` made it."""

    low: int
    high: int
    axis: int
    split: int


class Node(NamedTuple):
    """An operation on nodes, or a leaf.

    ``op`` is a name in ``ARITHMETIC``, or "value" (data: name, time), "parameter" (data: name), "number", "call"
    (data: function, parameters), "transpose", "part" (data: a Cut), "index" (data: what stands in brackets), "lookup"
    (rows of a table), "row" (a concatenation along the last axis).
    """

    op: str
    args: tuple[Node, ...] = ()
    shape: tuple[int, ...] = ()
    data: Any = None


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    yield node
    for arg in node.args:
        yield from walk(arg)


def size(node: Node) -> int:
    """How long it is to write, in operations and leaves."""
    return sum(1 for _ in walk(node))


def call(name: str, args: tuple[Node, ...], shape: tuple[int, ...], params: dict[str, Any]) -> Node:
    """A function by its name; parameters that it is understood to have are left out."""
    shown = {} if PLAIN.get(name) == params else params
    return Node("call", args, shape, (name, tuple(sorted(shown.items()))))


def number(value: Any) -> Node:
    """A number."""
    return Node("number", (), (), value.item() if isinstance(value, (np.generic, np.ndarray)) else value)


# ---------------------------------------------------------------------------- one equation


def expression_of(equation: Equation, program: Program, read: Callable[[Any], Node]) -> list[Node]:
    """The expressions of an equation's outputs, given those of its operands."""
    name, params = equation.primitive.name, dict(equation.params)
    args = tuple(number(o.value) if isinstance(o, Literal) else read(o) for o in equation.operands)
    shapes = [program.avals[slot].shape for slot in equation.outputs]
    shape = shapes[0]
    if name == "split" and (params["axis"] == -1 or (params["axis"] == -2 and len(args[0].shape) == 2)):
        axis, split = -1 if params["axis"] == -1 else 0, equation.outputs[0]
        return [part_of(args[0], Cut(low, high, axis, split)) for low, high in _bounds(params["sizes"])]
    if name in ARITHMETIC:
        return [_arithmetic(name, args, shape)]
    if name == "square":
        return [_arithmetic("power", (args[0], number(2)), shape)]
    if name == "alias" or equation.primitive.only_checks:
        return [args[0]]
    if name == "transpose" and len(shape) == 2 and params["axes"] == (-1, -2):
        return [Node("transpose", args, shape)]
    if name == "concatenate" and params["axis"] == -1:
        return [Node("row", args, shape)]
    if name == "take" and params["axis"] == -2 and len(args[0].shape) == 2:
        return [Node("lookup", args, shape)]
    if name == "reshape":
        return [_reshaped(args, shape, params)]
    if name == "getitem":
        return [_indexed(args, shape, params["template"], equation.outputs[0])]
    if len(shapes) > 1:
        whole = call(name, args, (), params)
        return [Node("index", (whole,), each, str(k)) for k, each in enumerate(shapes)]
    return [call(name, args, shape, params)]


def _bounds(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    ends = np.cumsum((0, *sizes)).tolist()
    return list(itertools.pairwise(ends))


def _arithmetic(name: str, args: tuple[Node, ...], shape: tuple[int, ...]) -> Node:
    """Arithmetic in the form in which it is usually written: ``a + -b`` as ``a - b``, ``a * (1 / b)`` as ``a / b``."""
    if name == "add":
        a, b = args
        if b.op == "negative":
            return Node("subtract", (a, b.args[0]), shape)
        if b.op == "number" and b.data < 0:
            return Node("subtract", (a, number(-b.data)), shape)
    if name == "multiply":
        a, b = args
        if b.op == "divide" and b.args[0].op == "number" and b.args[0].data == 1:
            return Node("divide", (a, b.args[1]), shape)
    if name == "divide":
        a, b = args
        if a.op == "call" and a.data[0] == "sum" and b.op == "number" and a.args[0].shape:
            axes = dict(a.data[1] or ROW.items())["axis"]
            if b.data == math.prod(a.args[0].shape[axis] for axis in axes):
                return _mean(a.args[0], a.data[1], shape)
    return Node(name, args, shape)


def _mean(x: Node, params: tuple[Any, ...], shape: tuple[int, ...]) -> Node:
    """A mean; of the squared distance from the mean, the variance."""
    if x.op == "power" and x.args[1] == number(2) and x.args[0].op == "subtract":
        inner, centre = x.args[0].args
        if centre.op == "call" and centre.data[0] == "mean" and centre.args == (inner,):
            return Node("call", (inner,), shape, ("var", params))
    return Node("call", (x,), shape, ("mean", params))


def _reshaped(args: tuple[Node, ...], shape: tuple[int, ...], params: dict[str, Any]) -> Node:
    """Axes of length 1 come and go as in an index; a first axis that stays is as long as the batch at hand."""
    old = args[0].shape
    longer, shorter, item = (shape, old, "None") if len(shape) > len(old) else (old, shape, "0")
    texts: list[str] = []
    kept = 0
    for n in longer:
        if kept < len(shorter) and shorter[kept] == n:
            texts.append(":")
            kept += 1
        elif n == 1:
            texts.append(item)
        else:
            break
    if len(texts) == len(longer) and kept == len(shorter) < len(longer):
        return Node("index", args, shape, ", ".join(texts))
    if len(shape) > 1 and old[:1] == shape[:1] and 0 not in shape:
        params = {**params, "shape": (-1, *shape[1:])}
    return call("reshape", args, shape, params)


def _indexed(args: tuple[Node, ...], shape: tuple[int, ...], template: tuple[Any, ...], slot: int) -> Node:
    x = args[0]
    last = template[-1] if template else None
    whole = ("slice", None, None, None)
    full = len(template) == len(x.shape) and all(item == whole for item in template[:-1])
    if (
        (full or template[:-1] == (Ellipsis,))
        and last.__class__ is tuple
        and last[0] == "slice"
        and last[3] in (1, None)
    ):
        low, high, _ = slice(*last[1:]).indices(x.shape[-1])
        return part_of(x, Cut(low, max(low, high), -1, slot))
    if len(args) > 1:
        return call("getitem", args, shape, {"template": template})
    if (
        len(x.shape) == 2
        and template[0].__class__ is tuple
        and template[0][3] in (1, None)
        and template[1:] in ((), (whole,))
    ):
        low, high, _ = slice(*template[0][1:]).indices(x.shape[0])
        return _plain_part(x, Cut(low, max(low, high), 0, slot))
    texts = [_index_text(item) for item in template]
    if any(":" in text for text in texts) and Ellipsis not in template:  # all axes: [1:3] alone would be a part
        texts += [":"] * (len(x.shape) - sum(item is not None for item in template))
    return Node("index", args, shape, ", ".join(texts))


def _index_text(item: Any) -> str:
    if item.__class__ is tuple:
        start, stop, step = ("" if bound is None else str(bound) for bound in item[1:])
        return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
    return "..." if item is Ellipsis else str(item)


# ---------------------------------------------------------------------------- parts


def part_of(node: Node, cut: Cut) -> Node:
    """A part of a value, as an expression of parts of what it is made of: the parts of a sum are sums of parts.

    This is exact: elementwise operations act on each element alone, a column of a product is the left matrix times a
    column of the right one.
    """
    if cut.axis != -1 or not node.shape:
        return _plain_part(node, cut)
    width = node.shape[-1]
    shape = (*node.shape[:-1], cut.high - cut.low)
    if (cut.low, cut.high) == (0, width):
        return node
    if node.op == "part" and node.data.axis == -1:  # a part of a part
        return _plain_part(node.args[0], cut._replace(low=node.data.low + cut.low, high=node.data.low + cut.high))
    if _is_elementwise(node):
        args = tuple(part_of(a, cut) if a.shape and a.shape[-1] == width else a for a in node.args)
        return node._replace(args=args, shape=shape)
    if node.op == "matmul" and len(node.args[1].shape) >= 2:
        return node._replace(args=(node.args[0], part_of(node.args[1], cut)), shape=shape)
    if node.op == "transpose":
        return node._replace(args=(_plain_part(node.args[0], cut._replace(axis=0)),), shape=shape)
    if node.op == "row":
        ends = np.cumsum([0, *(arg.shape[-1] for arg in node.args)]).tolist()
        if cut.low in ends and cut.high in ends:
            inside = node.args[ends.index(cut.low) : ends.index(cut.high)]
            return inside[0] if len(inside) == 1 else node._replace(args=inside, shape=shape)
    return _plain_part(node, cut)


def _plain_part(node: Node, cut: Cut) -> Node:
    shape = list(node.shape)
    if shape:
        shape[cut.axis] = cut.high - cut.low
    return Node("part", (node,), tuple(shape), cut)


def _is_elementwise(node: Node) -> bool:
    if node.op == "call":
        primitive = REGISTRY.get(node.data[0])
        return primitive is not None and primitive.is_elementwise
    return node.op in ARITHMETIC and node.op != "matmul"
