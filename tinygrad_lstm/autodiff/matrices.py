"""Hessian-vector products, Jacobians and Hessians."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.autodiff.forward import jvp
from tinygrad_lstm.autodiff.reverse import check_callable, grad, opened, value_and_grad, vjp
from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.ops.shape import reshape, stack
from tinygrad_lstm.primitive import Aval, zeros
from tinygrad_lstm.tensor import Tensor, asarray

__all__ = ["hessian", "hvp", "jacobian"]


def hvp(f: Callable[..., Any], primals: Sequence[Any], vectors: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """``(f(*primals), H v)`` by forward over reverse (Pearlmutter 1994), without building the Hessian.

    ``primals`` and ``vectors`` are tuples of one structure; ``H v`` is a tuple like ``primals``.  In place of a Module
    the vector and its product are dicts by parameter name.

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

    (value, _), (_, product) = jvp(gradient, arguments, directions)
    return value, product


def _is_numbers(value: Any) -> bool:
    return all(isinstance(v, (int, float)) for v in value)


def jacobian(f: Callable[..., Any], argnums: int = 0) -> Callable[..., Any]:
    """A function that returns the Jacobian of ``f``: a Tensor of shape ``out.shape + in.shape``.

    Keyword arguments of the call are handed to ``f``.

    One reverse replay per output element, or one forward replay per input element where there are fewer.

    >>> import tinygrad_lstm as tg
    >>> tg.jacobian(lambda x: x * x)(tg.tensor([1.0, 2.0])).tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """

    check_callable(f, "jacobian")
    if not isinstance(argnums, int):
        raise ArgumentError(f"jacobian: argnums is one int, found {argnums!r}; call it once per argument")

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not -len(args) <= argnums < len(args):
            raise ArgumentError(f"jacobian: argnums={argnums} for a call with {len(args)} arguments")
        number = argnums % len(args)
        if hasattr(args[number], "__tree_swap__"):
            raise DTypeError(
                "jacobian and hessian are of one array, found a Module; take jvp, vjp or hvp with respect to its "
                "parameters, or differentiate a function of one of them"
            )
        x = asarray(args[number])

        def of_one(value: Any) -> Any:
            return f(*args[:number], value, *args[number + 1 :], **kwargs)

        out, pullback = vjp(of_one, x)
        if not isinstance(out, Tensor):
            raise DTypeError(f"jacobian: the function returned {type(out).__name__}, expected one Tensor")
        shape = out.shape + x.shape
        if not out.size or not x.size:
            return zeros(Aval(shape, x.dtype))
        if x.size < out.size:
            columns = [jvp(of_one, (x,), (_basis(x, k),))[1] for k in range(x.size)]
            return reshape(stack([reshape(c, (out.size,)) for c in columns], axis=1), shape)
        rows = [pullback(_basis(out, k))[0] for k in range(out.size)]
        return reshape(stack([reshape(r, (x.size,)) for r in rows], axis=0), shape)

    return wrapped


def _basis(like: Any, k: int) -> Tensor:
    unit = np.zeros(like.size, like.dtype)
    unit[k] = 1
    return Tensor(unit.reshape(like.shape))


def hessian(f: Callable[..., Any], argnums: int = 0) -> Callable[..., Any]:
    """A function that returns the Hessian of the scalar function ``f``: shape ``in.shape + in.shape``.

    >>> import tinygrad_lstm as tg
    >>> tg.hessian(lambda x: (x * x * x).sum())(tg.tensor([1.0, 2.0])).tolist()
    [[6.0, 0.0], [0.0, 12.0]]
    """
    check_callable(f, "hessian")
    return jacobian(grad(f, argnums), argnums)
