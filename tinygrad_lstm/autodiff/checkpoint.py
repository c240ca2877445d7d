"""checkpoint: keep the inputs of a function instead of what it computes, and run it again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from tinygrad_lstm.autodiff.reverse import check_callable
from tinygrad_lstm.autodiff.standins import filled_now, standing
from tinygrad_lstm.errors import DTypeError
from tinygrad_lstm.ops.shape import alias
from tinygrad_lstm.primitive import Primitive
from tinygrad_lstm.random import witnessed
from tinygrad_lstm.tape import Tape, differentiate, recording, state
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.tree import flatten, unflatten

__all__ = ["checkpoint"]

ARRAY = object()


def _forward(*arrays: Any, run: Any) -> Any:
    return tuple(run.results)


def _vjp(cotangents: Any, inputs: Any, run: Any, wanted: Sequence[bool]) -> list[Any]:
    """Run the function again, recording this time, and pull back through it: the rule of any function."""
    from tinygrad_lstm.autodiff.reverse import variable

    count = run.n_arguments
    # What f closes over need not require a gradient where a Tape, or jvp, asks for its derivative.
    taped = any(w and not t.requires_grad for t, w in zip(inputs[count:], wanted[count:], strict=True))
    tape = Tape() if taped else nullcontext()
    with standing(run.filled), recording(enabled=True), _generators_at(run.drawn), tape:
        arguments = [variable(t) if w else t for t, w in zip(inputs[:count], wanted[:count], strict=True)]
        outs = run.call(arguments)
    pairs = [(o, c) for o, c in zip(outs, cotangents, strict=True) if c is not None and (taped or o.requires_grad)]
    sources = [a for a, w in zip([*arguments, *inputs[count:]], wanted, strict=True) if w]
    # Only through what ran here: the past of arguments and closed-over values is the outer replay's.
    found = iter(differentiate([o for o, _ in pairs], [c for _, c in pairs], sources, frontier=True))
    return [next(found) if w else None for w in wanted]


_checkpoint: Primitive = Primitive("checkpoint", _forward, (_vjp,), joint=True, always_tuple=True)


class _generators_at:
    """Generators put back to an earlier state for a block, so that dropout draws the same masks."""

    def __init__(self, drawn: dict[int, Any]) -> None:
        self.drawn = drawn

    def __enter__(self) -> None:
        self.now = [(generator, generator.get_state()) for generator, _ in self.drawn.values()]
        for generator, at in self.drawn.values():
            generator.set_state(at)

    def __exit__(self, *exc: object) -> None:
        for generator, at in self.now:
            generator.set_state(at)


class _Run:
    """A call that can be repeated.  ``leaves`` are those of its arguments, ARRAY in place of each array."""

    def __init__(self, f: Callable[..., Any], treedef: Any, leaves: list[Any]) -> None:
        self.f = f
        self.treedef = treedef
        self.leaves = leaves
        self.n_arguments = sum(leaf is ARRAY for leaf in leaves)
        self.filled = filled_now()  # the parameters that f finds in its modules now, whenever it runs again
        self.drawn: dict[int, Any] = {}  # the generators that the first run drew from, and where they were
        self.results: list[Any] = []
        self.out_tree: Any = None

    def call(self, tensors: Sequence[Any]) -> list[Any]:
        rest = iter(tensors)
        args, kwargs = unflatten(self.treedef, [next(rest) if leaf is ARRAY else leaf for leaf in self.leaves])
        outs, self.out_tree = flatten(self.f(*args, **kwargs))
        for out in outs:
            if not isinstance(out, Tensor):
                raise DTypeError(f"checkpoint: the function returned a {type(out).__name__}, expected Tensors")
        return outs

    def __repr__(self) -> str:
        return getattr(self.f, "__name__", "function")


def _floats(t: Tensor) -> bool:
    return t.dtype.kind == "f"


def checkpoint(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the values and gradients of ``f`` that stores only its inputs (Griewank 1992; Chen et al. 2016).

    Tensors that ``f`` closes over get their gradients too; random masks from a Generator are drawn
    again identically.  Arguments and results are trees of tensors.

    >>> import tinygrad_lstm as tg
    >>> from tinygrad_lstm import ops
    >>> x = tg.tensor([0.5], requires_grad=True)
    >>> tg.checkpoint(lambda t: ops.tanh(ops.exp(t)))(x).sum().backward()
    >>> round(x.grad.item(), 4)
    0.2268
    """
    check_callable(f, "checkpoint")

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = flatten((args, kwargs), open_modules=False)
        is_array = [isinstance(leaf, Tensor) or hasattr(leaf, "__array__") for leaf in leaves]
        tensors = [asarray(leaf) for leaf, yes in zip(leaves, is_array, strict=True) if yes]
        run = _Run(f, treedef, [ARRAY if yes else leaf for leaf, yes in zip(leaves, is_array, strict=True)])
        current = state()
        if not current.enabled or current.trace is not None:
            outs = run.call(tensors)
            return unflatten(run.out_tree, outs)
        every = bool(current.tapes)  # a Tape may be asked for the derivative of anything
        # A tape of its own finds what f closes over; it dies here, and the values with it.
        with recording(enabled=True, tapes=()), witnessed() as run.drawn, Tape() as finder:
            arguments = [alias(t) for t in tensors]  # apart from the same tensor where f closes over it
            outs = run.call(arguments)
            made = {id(t) for _, _, made_here in finder.entries for t in made_here}
            known = made | {id(t) for t in arguments}
            closed: dict[int, Tensor] = {}
            for _, inputs, _ in finder.entries[len(arguments) :]:
                for t in inputs:
                    if isinstance(t, Tensor) and id(t) not in known and (t.requires_grad or (every and _floats(t))):
                        closed[id(t)] = t
        run.results = [o._data for o in outs]
        results = _checkpoint.bind((*tensors, *closed.values()), {"run": run})
        run.results = []
        return unflatten(run.out_tree, results)

    return wrapped
