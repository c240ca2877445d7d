"""Composite operations taken apart: softmax, log-sum-exp, norms and sums over several axes become maxima,
sums of one axis and elementwise equations, which the fusing pass puts into one loop over a row; einsums become matrix
products."""

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

__all__ = ["expand", "products"]

Rule = Callable[..., Any]


def expand(program: Program) -> Program:
    """The same program with composite reductions as several equations."""
    return _expanded(program, _wanted)


def products(program: Program) -> Program:
    """The same program with einsums as matrix products: other passes know those."""
    return _expanded(program, lambda _, e: _wanted(program, e) if e.primitive.name == "einsum" else None)


def _expanded(program: Program, rule_of: Callable[[Program, Any], Rule | None]) -> Program:
    if not any(rule_of(program, equation) for equation in program.equations):
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
            rule = rule_of(program, equation)
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


def _wanted(program: Program, equation: Any) -> Rule | None:
    name = equation.primitive.name
    if name in {"sum", "max", "min"}:
        return _one_axis_at_a_time(name) if len(equation.params["axis"]) != 1 else None
    if name == "einsum":
        return _einsum if _is_product(equation.params["subscripts"]) else None
    if name in {"softmax", "log_softmax"} and not program.aval(equation.operands[0]).shape[equation.params["axis"]]:
        return None  # of no elements, of which there is no maximum
    return _RULES.get(name)


def _is_product(subscripts: str) -> bool:
    """Whether an einsum takes no diagonals, and gives an array."""
    terms, out = subscripts.split("->")
    return len(out) > 0 and all(len({*term}) == len(term) for term in terms.split(","))


def _one_axis_at_a_time(name: str) -> Rule:
    def rule(x: Any, params: Mapping[str, Any]) -> Any:
        if params["axis"]:
            return _closed(_reduced(name, x, params), params)
        # Over no axes (of a 0-d value): x, small integers as long ones.
        long = np.add.reduce(np.zeros(1, x.dtype)).dtype if name == "sum" else x.dtype
        return REGISTRY["alias"](x) if x.dtype == long else REGISTRY["astype"](x, dtype=long)

    return rule


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


def _einsum(*operands: Any) -> Any:
    """Matrix products and multiplications of two operands at a time, in the order that NumPy finds cheapest."""
    *tensors, params = operands
    left, out = params["subscripts"].split("->")
    terms = list(zip(left.split(","), tensors, strict=True))
    like = [np.broadcast_to(np.float32(0), t.shape) for t in tensors]
    for pair in np.einsum_path(params["subscripts"], *like, optimize="greedy")[0][1:]:
        chosen = [terms[k] for k in sorted(pair)]
        terms = [term for k, term in enumerate(terms) if k not in pair]
        while chosen:
            (term, t), *chosen = chosen
            needed = {*out, *(c for other, _ in (*terms, *chosen) for c in other)}
            term, t = _without(term, t, needed)
            if chosen:
                (other, u), *chosen = chosen
                needed = {*out, *(c for other, _ in (*terms, *chosen) for c in other)}
                other, u = _without(other, u, {*needed, *term})
                chosen = [_contracted(*_in_order(term, t, other, u, out), needed), *chosen]
            else:
                terms.append((term, t))
    term, t = _without(*terms[0], set(out))
    return REGISTRY["transpose"](t, axes=tuple(term.index(c) - len(term) for c in out))


def _without(term: str, t: Any, needed: set[str]) -> tuple[str, Any]:
    """Summed over the axes that nobody needs."""
    for place in range(len(term) - 1, -1, -1):
        if term[place] not in needed:
            t = REGISTRY["sum"](t, axis=(place - len(term),), keepdims=False)
            term = term[:place] + term[place + 1 :]
    return term, t


def _in_order(first: str, a: Any, second: str, b: Any, out: str) -> tuple[str, Any, str, Any]:
    """The operands so that a product has its letters as the result has them: rows of the batch stay rows."""
    left = [out.index(c) for c in first if c in out and c not in second]
    right = [out.index(c) for c in second if c in out and c not in first]
    turned = bool(left and right) and min(right) < min(left)
    return (second, b, first, a) if turned else (first, a, second, b)


def _contracted(first: str, a: Any, second: str, b: Any, needed: set[str]) -> tuple[str, Any]:
    """One matrix product, (shared, left, summed) @ (shared, summed, right); where nothing is summed, a
    multiplication."""
    common = [c for c in first if c in second]
    shared, summed = [c for c in common if c in needed], [c for c in common if c not in needed]
    left, right = [c for c in first if c not in second], [c for c in second if c not in first]
    sizes = dict(zip(first, a.shape, strict=True))
    sizes.update({c: max(n, sizes.get(c, 0)) for c, n in zip(second, b.shape, strict=True) if sizes.get(c) != 0})
    found = [*shared, *left, *right]

    def arranged(t: Any, term: str, order: list[str], shape: Any) -> Any:
        t = REGISTRY["transpose"](t, axes=tuple(term.index(c) - len(term) for c in order))
        full = tuple(sizes[c] for c in order)
        if t.shape != full:  # a length of 1 is as good as any other
            t = REGISTRY["broadcast_to"](t, shape=full)
        return REGISTRY["reshape"](t, shape=(*(sizes[c] for c in shared), *shape))

    def length(letters: list[str]) -> int:
        return math.prod(sizes[c] for c in letters)

    if not summed:
        product = REGISTRY["multiply"](
            arranged(a, first, [*shared, *left], (*(sizes[c] for c in left), *(1 for _ in right))),
            arranged(b, second, [*shared, *right], (*(1 for _ in left), *(sizes[c] for c in right))),
        )
        return "".join(found), product
    product = REGISTRY["matmul"](
        arranged(a, first, [*shared, *left, *summed], (length(left), length(summed))),
        arranged(b, second, [*shared, *summed, *right], (length(summed), length(right))),
    )
    return "".join(found), REGISTRY["reshape"](product, shape=tuple(sizes[c] for c in found))


_RULES: dict[str, Rule] = {
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "norm": _norm,
    "logsumexp": _logsumexp,
    "sum_to": _sum_to,
}
