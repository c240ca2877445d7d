"""Hessian-vector products, Jacobians and Hessians."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.autodiff.forward import along, jvp
from tinygrad_lstm.autodiff.reverse import check_callable, grad, opened, value_and_grad, vjp
from tinygrad_lstm.dtypes import check_differentiable
from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.ops.shape import reshape, stack
from tinygrad_lstm.primitive import Aval, zeros
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.tree import flatten

__all__ = ["hessian", "hvp", "jacobian"]


def hvp(f: Callable[..., Any], primals: Sequence[Any], vectors: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """``(f(*primals), H v)`` by forward over reverse (Pearlmutter 1994), without building the Hessian.

    ``primals`` and ``vectors`` are tuples of one structure; ``H v`` is a tuple like ``primals``.  An entry is an array,
    a tree of them, or a list of numbers, which is one array.  In place of a Module the vector and its product are dicts
    by parameter name.

    >>> import tinygrad_lstm as tg
    >>> value, (product,) = tg.hvp(lambda x: (x * x * x).sum(), ([1.0, 2.0],), ([1.0, 1.0],))
    >>> product.tolist()
    [6.0, 12.0]
    """
    check_callable(f, "hvp")
    if not isinstance(primals, (tuple, list)) or not isinstance(vectors, (tuple, list)) or len(primals) != len(vectors):
        raise ShapeError("hvp: primals and vectors are tuples of one length, an entry per argument; write (x,) for one")
    of_plain, opened_primals = opened(f, primals)
    arguments = tuple(asarray(p) if isinstance(p, list) and _is_numbers(p) else p for p in opened_primals)
    directions = tuple(np.asarray(v, np.float64) if isinstance(v, list) and _is_numbers(v) else v for v in vectors)

    def gradient(*xs: Any) -> Any:
        value, grads = value_and_grad(of_plain, tuple(range(len(xs))))(*xs)
        return value, grads

    (value, _), (_, product) = along(gradient, arguments, directions, "hvp", "vector")
    return value, product


def _is_numbers(value: Any) -> bool:
    return all(isinstance(v, (int, float)) for v in value)


def jacobian(f: Callable[..., Any], argnums: int = 0) -> Callable[..., Any]:
    """A function that returns the Jacobian of ``f``: a Tensor of shape ``out.shape + in.shape``.

    The argument is one array (or a number, or nested lists of numbers), which ``f`` gets as a Tensor; trees of arrays
    and Modules are refused.  Keyword arguments of the call are handed to ``f``.

    One reverse replay per output element, or one forward replay per input element where there are fewer.

    >>> import tinygrad_lstm as tg
    >>> tg.jacobian(lambda x: x * x)(tg.tensor([1.0, 2.0])).tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    check_callable(f, "jacobian")
    return _jacobian(f, argnums, "jacobian")


def _jacobian(f: Callable[..., Any], argnums: Any, who: str) -> Callable[..., Any]:
    position = _position(argnums, who)

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not -len(args) <= position < len(args):
            raise ArgumentError(f"{who}: argnums={argnums} for a call with {len(args)} positional arguments")
        number = position % len(args)
        x = _one_array(args[number], f"{who}: argument {number}")

        def of_one(value: Any) -> Any:
            return f(*args[:number], value, *args[number + 1 :], **kwargs)

        out, pullback = vjp(of_one, x)
        if not isinstance(out, Tensor):
            raise DTypeError(
                f"{who}: the function returned {type(out).__name__}, expected one Tensor; vjp and jvp take trees"
            )
        shape = out.shape + x.shape
        if not out.size or not x.size:
            return zeros(Aval(shape, x.dtype))
        if x.size < out.size:
            columns = [jvp(of_one, (x,), (_basis(x, k),))[1] for k in range(x.size)]
            return reshape(stack([reshape(c, (out.size,)) for c in columns], axis=1), shape)
        rows = [pullback(_basis(out, k))[0] for k in range(out.size)]
        return reshape(stack([reshape(r, (x.size,)) for r in rows], axis=0), shape)

    return wrapped


def _position(argnums: Any, who: str) -> int:
    try:
        return operator.index(argnums)
    except TypeError:
        raise ArgumentError(f"{who}: argnums is one int, found {argnums!r}; call it once per argument") from None


def _one_array(value: Any, who: str) -> Tensor:
    """The argument as a Tensor of a floating dtype; raises where it is several arrays, or none."""
    leaves, treedef = flatten(value, open_modules=False)
    inside = treedef.kind != "leaf" and not all(isinstance(leaf, (bool, int, float, np.generic)) for leaf in leaves)
    if inside or not leaves or isinstance(value, dict) or hasattr(type(value), "__tree_swap__"):
        found = type(value).__name__
        kind = "a Module" if hasattr(type(value), "__tree_swap__") else f"a {found}" if leaves else f"{value!r}"
        raise DTypeError(
            f"{who} is {kind}, expected one array, whose shape becomes a part of the result's; take grad, vjp, jvp or "
            "hvp for trees and Modules, or differentiate a function of one of the arrays"
        )
    try:
        x = asarray(value)
        check_differentiable(x.dtype)
    except DTypeError as error:
        raise DTypeError(f"{who}: {error}") from None
    return x


def _basis(like: Any, k: int) -> Tensor:
    unit = np.zeros(like.size, like.dtype)
    unit[k] = 1
    return Tensor(unit.reshape(like.shape))


def hessian(f: Callable[..., Any], argnums: int = 0) -> Callable[..., Any]:
    """A function that returns the Hessian of the scalar function ``f``: shape ``in.shape + in.shape``.

    The argument is as that of :func:`jacobian`.

    >>> import tinygrad_lstm as tg
    >>> tg.hessian(lambda x: (x * x * x).sum())(tg.tensor([1.0, 2.0])).tolist()
    [[6.0, 0.0], [0.0, 12.0]]
    """
    check_callable(f, "hessian")
    return _jacobian(grad(f, argnums), argnums, "hessian")
