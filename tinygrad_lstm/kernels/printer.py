"""The NumPy printer of expressions: straight-line source, one line an operation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .table import LEAVES

if TYPE_CHECKING:
    from .expression import Expression

__all__ = ["HELPERS", "literal", "numpy_source"]


def _copy(x: Any) -> Any:
    return np.array(x)[()]


def _cast(x: Any, dtype: str) -> Any:
    return np.asarray(x).astype(dtype)[()]


def _fill(value: float, *inputs: Any) -> Any:
    shape = np.broadcast_shapes(*(np.shape(x) for x in inputs))
    return np.full(shape, value, dtype=np.result_type(*inputs, value))[()]


# What the printed source uses besides the leaves.
HELPERS: dict[str, Any] = {"inf": math.inf, "nan": math.nan, "copy": _copy, "fill": _fill, "cast": _cast}


def numpy_source(expression: Expression) -> str:
    """A module text that defines ``expression(x0, x1, ...)``."""
    nodes = expression.nodes
    arguments = ", ".join(f"x{i}" for i in range(expression.n_inputs))
    names: list[str] = []
    lines = [f"def expression({arguments}):"]
    once = expression.single and nodes[expression.outputs[0]].op in LEAVES
    for index, node in enumerate(nodes):
        if node.op == "input":
            names.append(f"x{node.param}")
            continue
        if node.op == "constant":
            names.append(repr(node.param))
            continue
        inside = ", ".join(names[i] for i in node.args)
        if node.op == "cast":
            inside += f", {node.param!r}"
        call = f"{node.op}({inside})"
        if once and index == expression.outputs[0]:
            lines.append(f"    return {call}")
            return "\n".join(lines) + "\n"
        names.append(f"t{len(lines) - 1}")
        lines.append(f"    {names[-1]} = {call}")
    results = []
    for index in expression.outputs:
        name, op = names[index], nodes[index].op
        results.append(f"copy({name})" if op == "input" else f"fill({name}, {arguments})" if op == "constant" else name)
    lines.append(f"    return {results[0]}" if expression.single else f"    return ({', '.join(results)},)")
    return "\n".join(lines) + "\n"


def literal(value: Any) -> str:
    """A Python number as text of generated code: every bit of a float, infinities and NaN too."""
    return f'float.fromhex("{value.hex()}")' if isinstance(value, float) else repr(value)
