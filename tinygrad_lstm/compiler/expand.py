"""Composite reductions taken apart: softmax, log-sum-exp, norms and sums over several axes become maxima,
sums of one axis and elementwise equations, which the fusing pass puts into one loop over a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.constants import fill
from tinygrad_lstm.compiler.simplify import simplify
from tinygrad_lstm.primitive import REGISTRY, Aval
from tinygrad_lstm.program import Program, lower, sourced
from tinygrad_lstm.tape import recording
from tinygrad_lstm.tensor import Tensor
from tinygrad_lstm.trace import Trace

__all__ = ["expand"]


def expand(program: Program) -> Program:
    """The same program with composite reductions as several equations."""
    if not any(_wanted(program, equation) for equation in program.equations):
        return program
    recorder = Trace()
    environment: dict[int, Any] = {}
    with recording(enabled=True, tapes=(), names=None, trace=recorder):
        sources = []
        for slot in (*program.inputs, *program.captures):
            environment[slot] = recorder.new(Aval(program.avals[slot].shape, program.avals[slot].dtype))
            sources.append(environment[slot])
        for equation in program.equations:
            operands = tuple(environment[o] if o.__class__ is int else o.value for o in equation.operands)
            rule = _wanted(program, equation)
            if rule is not None:
                out = rule(*operands, equation.params)
            else:
                out = equation.primitive.bind(operands, dict(equation.params))
            values = out if isinstance(out, tuple) else (out,)
            sourced(values[0], equation.source)
            environment.update(zip(equation.outputs, values, strict=True))
        results = [environment[o] if o.__class__ is int else Tensor(np.asarray(o.value)) for o in program.outputs]
        expanded, constants = lower(recorder.entries, sources, results)
    recorder.close()
    n_inputs = len(program.inputs)
    expanded = expanded.replaced(
        inputs=expanded.inputs[:n_inputs], captures=(*expanded.inputs[n_inputs:], *expanded.captures)
    )
    return simplify(fill(expanded, constants))


Rule = Callable[..., Any]


def _wanted(program: Program, equation: Any) -> Rule | None:
    name = equation.primitive.name
    if name in {"sum", "max", "min"}:
        return _one_axis_at_a_time(name) if len(equation.params["axis"]) > 1 else None
    if name == "einsum":
        return _einsum if _is_product(equation.params["subscripts"]) else None
    return _RULES.get(name)


def _is_product(subscripts: str) -> bool:
    """Whether an einsum has two operands, and sums only over what both of them have."""
    terms, out = subscripts.split("->")
    parts = terms.split(",")
    if len(parts) != 2 or len(out) == 0:
        return False
    return all(c in out or (c in parts[0] and c in parts[1]) for c in parts[0] + parts[1])


def _one_axis_at_a_time(name: str) -> Rule:
    return lambda x, params: _closed(_reduced(name, x, params), params)


def _softmax(x: Any, params: Mapping[str, Any]) -> Any:
    axis = (params["axis"],)
    ops = REGISTRY
    weights = ops["exp"](x - ops["max"](x, axis=axis, keepdims=True))
    return weights / ops["sum"](weights, axis=axis, keepdims=True)


def _log_softmax(x: Any, params: Mapping[str, Any]) -> Any:
    axis = (params["axis"],)
    ops = REGISTRY
    shifted = x - ops["max"](x, axis=axis, keepdims=True)
    return shifted - ops["log"](ops["sum"](ops["exp"](shifted), axis=axis, keepdims=True))


def _closed(x: Any, params: Mapping[str, Any]) -> Any:
    """Without the reduced axes, which are kept with length 1 so far."""
    if params["keepdims"]:
        return x
    axes = params["axis"]
    return REGISTRY["reshape"](x, shape=tuple(n for k, n in enumerate(x.shape) if k - x.ndim not in axes))


def _reduced(name: str, x: Any, params: Mapping[str, Any]) -> Any:
    for axis in sorted(params["axis"], reverse=True):
        x = REGISTRY[name](x, axis=(axis,), keepdims=True)
    return x


def _norm(x: Any, params: Mapping[str, Any]) -> Any:
    return _closed(REGISTRY["sqrt"](_reduced("sum", x * x, params)), params)


def _logsumexp(x: Any, params: Mapping[str, Any]) -> Any:
    ops = REGISTRY
    peak = _reduced("max", x, params)
    peak = ops["where"](ops["isfinite"](peak), peak, 0.0)
    return _closed(ops["log"](_reduced("sum", ops["exp"](x - peak), params)) + peak, params)


def _sum_to(x: Any, params: Mapping[str, Any]) -> Any:
    shape = params["shape"]
    extra = x.ndim - len(shape)
    axes = [k - x.ndim for k in range(extra)]
    axes += [k - len(shape) for k, n in enumerate(shape) if n == 1 and x.shape[k + extra] != 1]
    return REGISTRY["reshape"](_reduced("sum", x, {"axis": tuple(axes)}), shape=tuple(shape))


def _einsum(a: Any, b: Any, params: Mapping[str, Any]) -> Any:
    """Two operands as one matrix product: (shared, left, summed) @ (shared, summed, right)."""
    (first, second), out = params["subscripts"].split("->")[0].split(","), params["subscripts"].split("->")[1]
    shared = [c for c in out if c in first and c in second]
    summed = [c for c in first if c in second and c not in out]
    left = [c for c in first if c not in second]
    right = [c for c in second if c not in first]
    sizes = {**dict(zip(first, a.shape, strict=True)), **dict(zip(second, b.shape, strict=True))}

    def arranged(t: Any, term: str, order: list[str], *groups: list[str]) -> Any:
        axes = tuple(term.index(c) - len(term) for c in order)
        shape = tuple(math.prod(sizes[c] for c in group) for group in groups)
        lead = tuple(sizes[c] for c in shared)
        return REGISTRY["reshape"](REGISTRY["transpose"](t, axes=axes), shape=(*lead, *shape))

    product = REGISTRY["matmul"](
        arranged(a, first, [*shared, *left, *summed], left, summed),
        arranged(b, second, [*shared, *summed, *right], summed, right),
    )
    found = [*shared, *left, *right]
    opened = REGISTRY["reshape"](product, shape=tuple(sizes[c] for c in found))
    return REGISTRY["transpose"](opened, axes=tuple(found.index(c) - len(found) for c in out))


_RULES: dict[str, Rule] = {
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "norm": _norm,
    "logsumexp": _logsumexp,
    "sum_to": _sum_to,
}
