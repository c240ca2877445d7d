"""Declaring primitives: elementwise ones from a scalar expression, users' own from outside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError, GraphError
from tinygrad_lstm.kernels import build, evaluate
from tinygrad_lstm.primitive import Primitive, Rule, signature_of
from tinygrad_lstm.pullback import described

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
        For an elementwise op: the same function on symbolic scalars, which lets it be fused.  It may use
        arithmetic, comparisons, and the elementwise functions of ``ops`` or NumPy (``np.where`` instead of ``if``);
        what it gives for a few numbers is compared with ``forward`` here.
    saves : names, optional
        What is kept for the backward pass; by default what the rules name.  Rules whose argument names are
        not recognised get the saved values in this order.

    Raises
    ------
    GraphError, ShapeError
        When it is differentiated: a rule that returns another number of results than there are arguments (of ``jvp``:
        outputs), or one of another shape.  Dtypes are converted.
    ArgumentError
        A name that is taken, rules that do not fit the arguments, an expression that differs from ``forward``.
    DTypeError
        A name that is no string, an expression of something that native code does not have; when it is called: a
        forward that returns no array.

    Examples
    --------
    >>> import numpy as np, tinygrad_lstm as tg
    >>> cube = tg.primitive("doc_cube", forward=lambda x: x**3, vjp=lambda g, x: g * 3.0 * x * x)
    >>> x = tg.tensor([2.0], requires_grad=True)
    >>> cube(x).sum().backward()
    >>> x.grad.tolist()
    [12.0]
    """
    if not isinstance(name, str):
        raise DTypeError(f"primitive: a name is a string, found {name!r}")
    if not callable(forward):
        raise DTypeError(f"primitive {name!r}: forward is a function of arrays, found {type(forward).__name__}")
    for what, given in (("vjp", vjp if isinstance(vjp, (list, tuple)) else [vjp]), ("jvp", [jvp])):
        for wrong in (f for f in given if f is not None and not callable(f)):
            raise DTypeError(f"primitive {name!r}: {what} is made of functions, found {wrong!r}")
    arguments, variadic, _ = signature_of(forward)
    if expression is not None:
        _check_expression(name, expression, forward, len(arguments))
    joint = callable(vjp) and (len(arguments) > 1 or variadic)
    rule = vjp
    if callable(vjp) and not joint:
        rule = (_single(name, vjp),)
    prim = Primitive(
        name, forward if isinstance(forward, np.ufunc) else _checked(name, forward), rule, jvp=jvp, joint=joint,
        expression=expression, saves=saves, is_elementwise=expression is not None,
        doc=getattr(forward, "__doc__", None),
    )  # fmt: skip
    prim.explains = False
    return prim


_TRIED = np.array([-1.6, -0.8, 0.35, 0.7, 1.2, 2.3])  # on both sides of 0 and of 1


def _check_expression(name: str, expression: Callable[..., Any], forward: Callable[..., Any], count: int) -> None:
    """Raise where an expression cannot be built, or says something else than the forward on a few numbers.

    One with a parameter that has no default is seen when it is called.
    """
    if not callable(expression):
        raise DTypeError(f"primitive {name!r}: expression is a function of scalars, found {type(expression).__name__}")
    _, _, parameters = signature_of(expression)
    defaults = {key: p.default for key, p in inspect.signature(expression).parameters.items() if key in parameters}
    if inspect.Parameter.empty in defaults.values():
        return
    try:
        built = build(lambda *scalars: expression(*scalars, **defaults), count)
    except (TypeError, AttributeError, ValueError) as error:
        raise DTypeError(f"primitive {name!r}: the expression cannot be built: {error}") from None
    values = [np.roll(_TRIED, k) for k in range(count)]
    with np.errstate(all="ignore"):
        try:
            expected = np.asarray(forward(*values, **defaults))
        except Exception:  # it may be for other shapes, or check what it is given
            return
        found = np.asarray(built.numpy(*values))
    if expected.shape != found.shape or not np.allclose(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True):
        raise ArgumentError(
            f"primitive {name!r}: for {', '.join(map(str, values))} the expression gives {found}, forward {expected}; "
            "compiled code would compute something else"
        )


def _checked(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a user; raises where it returns something else than an array, a number or a tuple of these."""

    @functools.wraps(forward)
    def checked(*args: Any, **params: Any) -> Any:
        out = forward(*args, **params)
        for k, part in enumerate(out if isinstance(out, tuple) else (out,)):
            several = isinstance(part, (list, tuple)) and any(isinstance(item, np.ndarray) for item in part)
            dtype = part.dtype if hasattr(part, "dtype") else None if several else np.asarray(part).dtype
            if dtype is None or dtype.kind not in "fiub":
                which = f" as output {k}" if isinstance(out, tuple) else ""
                found = f"an array of {part.dtype}" if isinstance(part, np.ndarray) else described(part)
                raise DTypeError(
                    f"the forward of {name} returned {found}{which}, expected an array of real numbers, or a tuple of "
                    "arrays for several outputs"
                )
        return out

    checked.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return checked


def _single(name: str, rule: Rule) -> Rule:
    """A rule for one argument that may return its cotangent in a tuple."""

    def unwrapped(*args: Any) -> Any:
        result = rule(*args)
        if not isinstance(result, (tuple, list)):
            return result
        if len(result) != 1:
            raise GraphError(
                f"the VJP of {name} returned {described(result)}, expected one cotangent, for one argument"
            )
        return result[0]

    unwrapped.__signature__ = inspect.signature(rule)  # type: ignore[attr-defined]
    return unwrapped
