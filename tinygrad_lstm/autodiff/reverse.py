"""grad, value_and_grad and vjp: record a function, replay the tape in reverse.

Every call differentiates with respect to fresh *variables*: new nodes that alias the arguments.  Nested
calls therefore never confuse each other's variables (no perturbation confusion), and closed-over tensors
of an outer call stay connected through the arguments' own history.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from tinygrad_lstm.autodiff.standins import opened
from tinygrad_lstm.dtypes import check_differentiable
from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.ops.shape import alias
from tinygrad_lstm.primitive import Aval, zeros
from tinygrad_lstm.record import now
from tinygrad_lstm.tape import differentiate, observed, paths, recording, state
from tinygrad_lstm.tensor import Tensor, asarray, seed_cotangent
from tinygrad_lstm.tree import TreeDef, flatten, leaf_paths, unflatten

__all__ = ["grad", "value_and_grad", "vjp"]


def variable(value: Any, requires_grad: bool = True) -> Tensor:
    """A new node with the same values, linked to the past of ``value`` if it has one."""
    source = asarray(value)
    check_differentiable(source.dtype)
    out = alias(source)
    out._rg = out._rg or requires_grad
    return out


def variables(tree: Any, who: str, requires_grad: bool = True) -> tuple[list[Tensor], TreeDef, Any]:
    """Fresh variables for all leaves of an argument: (variables, structure, the argument rebuilt)."""
    leaves, treedef = flatten(tree)
    for path, leaf in zip(leaf_paths(tree), leaves, strict=True):
        try:
            check_differentiable(asarray(leaf).dtype)
        except DTypeError as error:
            raise DTypeError(f"{who}{path}: {error}") from None
    fresh = [variable(leaf, requires_grad) for leaf in leaves]
    return fresh, treedef, unflatten(treedef, fresh)


def _check_scalar(out: Any, who: str) -> Tensor:
    if not isinstance(out, Tensor):
        pair = (
            "; has_aux=True for a pair (loss, what else is wanted)" if isinstance(out, tuple) and len(out) == 2 else ""
        )
        raise DTypeError(f"{who}: the function returned {type(out).__name__}, expected a scalar Tensor{pair}")
    if out.size != 1:
        raise ShapeError(f"{who}: the function returned shape {out.shape}, expected a scalar; reduce it (sum, mean)")
    if out.dtype.kind != "f":
        raise DTypeError(f"{who}: the function returned {out.dtype}, which has no derivative; expected a float")
    return out


def value_and_grad(
    f: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """A function that returns ``(f(...), gradient)``.

    Parameters
    ----------
    f : callable
        Returns a scalar Tensor; with ``has_aux`` a pair (scalar, anything).
    argnums : int or sequence of ints
        Which positional arguments to differentiate: arrays, Tensors, trees of them, or Modules.
    has_aux : bool
        The value is then the pair that ``f`` returned.

    Returns
    -------
    callable
        Gradients are Tensors in the structure of the argument (a tuple of them for several ``argnums``);
        in the place of a Module, at any depth, a dict by parameter name; zeros where there is no path.  Nestable.

    Examples
    --------
    >>> import tinygrad_lstm as tg
    >>> value, slope = tg.value_and_grad(lambda x: x * x * x)(2.0)
    >>> value.item(), slope.item()
    (8.0, 12.0)
    """
    check_callable(f, "grad")
    numbers = _positions(argnums)

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        args = tuple(args)
        chosen: list[int] = []
        for number in numbers:
            if not -len(args) <= number < len(args):
                raise ArgumentError(f"argnums={argnums} for a call with {len(args)} positional arguments")
            if args[number] is None:
                raise DTypeError(f"grad: argument {number} is None, expected an array, a tree of arrays or a Module")
            chosen.append(number % len(args))
        if len(set(chosen)) != len(chosen):
            raise ArgumentError(f"argnums={argnums} names an argument twice")
        enabled = state().enabled
        since = now()
        of_trees, trees = opened(f, args, chosen)
        replaced = list(trees)
        sources: list[Tensor] = []
        spans: list[tuple[TreeDef, int]] = []
        with recording(enabled=True):
            for number in chosen:
                fresh, treedef, replaced[number] = variables(trees[number], f"grad: argument {number}")
                spans.append((treedef, len(fresh)))
                sources.extend(fresh)
            result = of_trees(*replaced, **kwargs)
            if has_aux and not (isinstance(result, (tuple, list)) and len(result) == 2):
                found_kind = f"{len(result)} values" if isinstance(result, (tuple, list)) else type(result).__name__
                raise DTypeError(
                    f"grad: with has_aux the function returns a pair (scalar, anything), found {found_kind}"
                )
            out = _check_scalar(result[0] if has_aux else result, "grad")
            found = pullback_to(out, seed_cotangent(out, None, "grad"), sources, since)
            kept = enabled and (observed(sources) or foreign([out], sources, since))
        if not kept:  # nobody can differentiate the results: let the graph go
            found = unlinked(found)
            result = unlinked(result)
        grads: list[Any] = []
        start = 0
        for treedef, count in spans:
            grads.append(unflatten(treedef, found[start : start + count]))
            start += count
        return result, (tuple(grads) if isinstance(argnums, (tuple, list)) else grads[0])

    return wrapped


def check_callable(f: Any, who: str) -> None:
    """Raise unless there is a function to differentiate."""
    if not callable(f):
        raise DTypeError(f"{who}: expected a function, found {type(f).__name__}; call it as {who}(f)(x)")


def _positions(argnums: Any) -> tuple[int, ...]:
    """``argnums`` as a tuple of positions."""
    try:
        return tuple(map(operator.index, argnums if isinstance(argnums, (tuple, list)) else (argnums,)))
    except TypeError:
        raise DTypeError(f"grad: argnums is an int or a tuple of ints, found {argnums!r}") from None


def unlinked(tree: Any) -> Any:
    """The tree with every tensor outside of any graph."""
    leaves, treedef = flatten(tree)
    return unflatten(treedef, [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def foreign(targets: Sequence[Tensor], sources: Sequence[Tensor], since: int) -> bool:
    """Whether the targets also depend on differentiable values that are no sources."""
    return paths([t._node or t for t in targets], {s._node or s for s in sources}, since)[1]


def pullback_to(out: Tensor, cotangent: Tensor, sources: Sequence[Tensor], since: int) -> list[Tensor]:
    """Cotangents of the sources, zeros where there is no path."""
    found = differentiate([out], [cotangent], sources, since=since)
    return [zeros(Aval(s.shape, s.dtype)) if g is None else g for g, s in zip(found, sources, strict=True)]


def grad(f: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable[..., Any]:
    """A function that returns the gradient of the scalar function ``f``; see :func:`value_and_grad`.

    >>> import tinygrad_lstm as tg
    >>> third = tg.grad(tg.grad(tg.grad(lambda x: x**4)))
    >>> third(2.0).item()
    48.0
    """
    both = value_and_grad(f, argnums, has_aux)

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return wrapped


def vjp(f: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """Run ``f`` and return ``(out, pullback)``.

    ``pullback(cotangent)`` gives a tuple, one tree per primal (a dict by parameter name in place of a Module); it may
    be called as often as wanted.  The cotangent has the structure of ``out``.

    >>> import tinygrad_lstm as tg
    >>> out, pullback = tg.vjp(lambda x, y: x * y, 3.0, 4.0)
    >>> [g.item() for g in pullback(1.0)]
    [4.0, 3.0]
    """
    check_callable(f, "vjp")
    f, primals = opened(f, primals)
    since = now()
    enabled = state().enabled
    with recording(enabled=True):
        packs = [variables(p, f"vjp: argument {k}") for k, p in enumerate(primals)]
        result = f(*[rebuilt for _, _, rebuilt in packs])
    outs, out_tree = flatten(result)
    for out in outs:
        if not isinstance(out, Tensor):
            raise DTypeError(f"vjp: the function returned a {type(out).__name__}, expected Tensors")
    sources = [v for fresh, _, _ in packs for v in fresh]

    def pullback(cotangent: Any) -> tuple[Any, ...]:
        given, given_tree = flatten(cotangent) if out_tree.kind != "leaf" else ([cotangent], out_tree)
        if given_tree != out_tree:
            raise ShapeError(f"pullback: the cotangent has {len(given)} leaves in another structure than the output")
        with recording(enabled=True):
            seeds = [seed_cotangent(o, c, "pullback") for o, c in zip(outs, given, strict=True)]
            found = differentiate(outs, seeds, sources, since=since)
            filled = [zeros(Aval(s.shape, s.dtype)) if g is None else g for g, s in zip(found, sources, strict=True)]
        if not (enabled and state().enabled):
            filled = unlinked(filled)
        trees, start = [], 0
        for fresh, treedef, _ in packs:
            trees.append(unflatten(treedef, filled[start : start + len(fresh)]))
            start += len(fresh)
        return tuple(trees)

    if not (enabled and (observed(sources) or foreign(outs, sources, since))):
        result = unlinked(result)
    return result, pullback
