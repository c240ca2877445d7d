"""Declaring primitives: elementwise ones from a scalar expression, users' own from outside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.kernels import build, evaluate
from tinygrad_lstm.primitive import Primitive, Rule, signature_of

__all__ = ["elementwise", "forward_of", "primitive"]


def elementwise(
    name: str,
    expression: Callable[..., Any],
    rules: Sequence[Rule | None] | Rule | None,
    *,
    forward: Callable[..., Any] | None = None,
    doc: str | None = None,
) -> Primitive:
    """Declare an elementwise primitive from its scalar expression and its partial derivatives.

    ``expression`` works on symbolic scalars; the NumPy function, the single-op kernel and the fused code
    all come from it.  Each rule multiplies its first argument by the partial derivative: applied to a
    cotangent it is the VJP, applied to a tangent the JVP.
    """
    return Primitive(
        name, forward or forward_of(expression), rules, expression=expression, is_elementwise=True, doc=doc
    )  # fmt: skip


def forward_of(expression: Callable[..., Any]) -> Callable[..., Any]:
    """The array function of a scalar expression: the bare ufunc where it is one, else NumPy or a kernel by size."""
    arguments, _, parameters = signature_of(expression)
    count = len(arguments)
    if not parameters:
        built = build(expression, count)
        if isinstance(built.numpy, np.ufunc):
            return built.numpy
        return lambda *arrays: evaluate(built, arrays)
    cache: dict[Any, Any] = {}

    def forward(*arrays: Any, **params: Any) -> Any:
        key = tuple(params.items())
        if key not in cache:
            cache[key] = build(lambda *scalars: expression(*scalars, **params), count)
        return evaluate(cache[key], arrays)

    return forward


def primitive(
    name: str,
    forward: Callable[..., Any],
    vjp: Any,
    jvp: Rule | None = None,
    expression: Callable[..., Any] | None = None,
    saves: Sequence[str] | None = None,
) -> Primitive:
    """Declare an op of one's own; the result is a function on tensors.

    Parameters
    ----------
    name : str
        Unique among all primitives.
    forward : callable
        Arrays (and Python numbers) in, an array or a tuple of arrays out.  Keyword-only arguments are
        parameters that are not differentiated.
    vjp : callable, or one callable (or None) per argument
        Each rule takes the cotangent ``g`` first and names what it needs: arguments of ``forward``, ``out``,
        parameters.  It is written in ops, so that it can be differentiated again.  One callable for
        several arguments returns a tuple, one cotangent per argument.
    jvp : callable, optional
        ``jvp(tangents, *inputs, out, **params)``; tangents may be None.  Without it the VJP is transposed.
    expression : callable, optional
        For an elementwise op: the same function on symbolic scalars, which lets it be fused.
    saves : names, optional
        What is kept for the backward pass; by default what the rules name.  Rules whose argument names are
        not recognised get the saved values in this order.

    Examples
    --------
    >>> import numpy as np, tinygrad_lstm as tg
    >>> cube = tg.primitive("doc_cube", forward=lambda x: x**3, vjp=lambda g, x: g * 3.0 * x * x)
    >>> x = tg.tensor([2.0], requires_grad=True)
    >>> cube(x).sum().backward()
    >>> x.grad.tolist()
    [12.0]
    """
    arguments, variadic, _ = signature_of(forward)
    joint = callable(vjp) and (len(arguments) > 1 or variadic)
    rule = vjp
    if callable(vjp) and not joint:
        rule = (_single(vjp),)
    prim = Primitive(
        name, forward, rule, jvp=jvp, joint=joint, expression=expression, saves=saves,
        is_elementwise=expression is not None, doc=getattr(forward, "__doc__", None),
    )  # fmt: skip
    prim.explains = False
    return prim


def _single(rule: Rule) -> Rule:
    """A rule for one argument that may return its cotangent in a tuple."""

    def unwrapped(*args: Any) -> Any:
        result = rule(*args)
        return result[0] if isinstance(result, (tuple, list)) else result

    unwrapped.__signature__ = inspect.signature(rule)  # type: ignore[attr-defined]
    return unwrapped
