"""Forward mode: the tangent of one application of a primitive.

An elementwise primitive pushes with the same rules it pulls with, a linear one is its own derivative, a few
declare a ``jvp``; for all others the VJP, which is linear in the cotangent, is transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.errors import DTypeError, GraphError, ShapeError
from tinygrad_lstm.primitive import REGISTRY, Primitive, aval_of, zeros
from tinygrad_lstm.pullback import described
from tinygrad_lstm.record import recording
from tinygrad_lstm.tape import differentiate
from tinygrad_lstm.tensor import Tensor, asarray

__all__ = ["push"]


class Values(NamedTuple):
    """The view of an application of a primitive that a rule reads from; a Record has the same fields."""

    saved: tuple[Any, ...]
    params: Mapping[str, Any]
    shapes: Any
    primitive: Primitive


class Application(NamedTuple):
    saved: tuple[Any, ...]
    params: Mapping[str, Any]
    shapes: Any
    primitive: Primitive
    parents: tuple[Any, ...]
    output_avals: Any


def push(
    prim: Primitive,
    inputs: Sequence[Any],
    outputs: Sequence[Tensor],
    params: Mapping[str, Any],
    tangents: Sequence[Any],
) -> Any:
    """The tangents of the outputs (a list, None for zero), given those of the inputs (None for zero)."""
    shapes = tuple(
        (np.shape(a), getattr(a, "dtype", None)) if not isinstance(a, Tensor) else (a.shape, a.dtype) for a in inputs
    )
    if not prim.differentiable or all(t is None for t in tangents):
        return [None] * len(outputs)
    if prim._jvp is not None:
        result = prim._jvp(list(tangents), *inputs, outputs[0] if len(outputs) == 1 else list(outputs), **params)
        return _checked(prim, list(result) if isinstance(result, (list, tuple)) else [result], outputs)
    if prim.is_elementwise:
        values = Values((*inputs, outputs[0]), params, shapes, prim)
        terms = [
            rule(values, i, t)
            for i, (rule, t) in enumerate(zip(prim._fetch, tangents, strict=True))
            if t is not None and rule is not None
        ]
        return [_spread(_total(terms), outputs[0])]
    if prim.linear == "jointly":
        moved = tuple(zeros(aval_of(a)) if t is None else t for a, t in zip(inputs, tangents, strict=True))
        result = prim.bind(moved, dict(params))
        return list(result) if isinstance(result, tuple) else [result]
    if prim.linear == "each":
        terms = [
            prim.bind((*inputs[:i], t, *inputs[i + 1 :]), dict(params)) for i, t in enumerate(tangents) if t is not None
        ]
        if len(outputs) == 1:
            return [_total(terms)]
        return [_total([term[k] for term in terms]) for k in range(len(outputs))]
    return _push_by_double_vjp(prim, inputs, outputs, params, shapes, tangents)


def _checked(prim: Primitive, found: list[Any], outputs: Sequence[Tensor]) -> list[Any]:
    """The tangents that a ``jvp`` returned, one per output and in its dtype."""
    if len(found) != len(outputs):
        raise GraphError(
            f"the jvp of {prim.name} returned {len(found)} tangents, expected {len(outputs)}: one per output, None "
            "for zero"
        )
    for k, (tangent, out) in enumerate(zip(found, outputs, strict=True)):
        if tangent is None:
            continue
        which = f"output {k}" if len(outputs) > 1 else "the output"
        try:
            tangent = found[k] = asarray(tangent)
        except DTypeError:
            raise DTypeError(
                f"the jvp of {prim.name} returned {described(tangent)} for {which}, expected a Tensor of shape "
                f"{out.shape}"
            ) from None
        if tangent.shape != out.shape:
            raise ShapeError(
                f"the jvp of {prim.name} returned a tangent of shape {tangent.shape} for {which}, expected {out.shape}"
            )
        if tangent.dtype != out.dtype and out.dtype.kind == "f":
            found[k] = tangent.astype(out.dtype)
    return found


def _push_by_double_vjp(
    prim: Primitive, inputs: Any, outputs: Any, params: Any, shapes: Any, tangents: Any
) -> list[Any]:
    """The VJP is linear in the cotangent u; its own VJP with respect to u is the JVP."""
    with recording(enabled=True):
        dummies = [Tensor(np.zeros(o.shape, o.dtype), requires_grad=True) for o in outputs]
        saved = tuple(a for a in inputs)
        out = outputs[0] if len(outputs) == 1 else tuple(outputs)
        parents = tuple(a if isinstance(a, Tensor) else None for a in inputs)
        single = not prim.several(len(outputs))
        avals = None if single else tuple(aval_of(o) for o in outputs)
        values = Application((*saved, out), params, shapes, prim, parents, avals)
        wanted = [t is not None for t in tangents]
        shares = prim.pull(values, dummies[0] if single else list(dummies), wanted)
    pairs = [
        (s, t) for s, t in zip(shares, tangents, strict=True) if s is not None and t is not None and s.requires_grad
    ]
    if not pairs:
        return [None] * len(outputs)
    return differentiate([s for s, _ in pairs], [t for _, t in pairs], dummies)


def _total(terms: Sequence[Any]) -> Any:
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _spread(tangent: Any, output: Tensor) -> Any:
    if tangent is None:
        return None
    if tangent.shape != output.shape:
        tangent = REGISTRY["broadcast_to"].bind((tangent,), {"shape": output.shape})
    return tangent if tangent.dtype == output.dtype else tangent.astype(output.dtype)
