"""Tensors in place of a Module's parameters for a block: how a function of Modules becomes one of their parameters."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.tree import TreeDef, flatten, leaves_at, unflatten

__all__ = ["Filled", "filled_now", "lock_of", "opened", "standing"]


class Filled:
    """Put given tensors in place of a Module's parameters for a block; other threads wait for it."""

    def __init__(self, module: Any, values: Mapping[str, Tensor]) -> None:
        self.module, self.values, self.lock = module, values, lock_of(module)

    def __enter__(self) -> None:
        self.lock.acquire()
        self.saved = self.module.__tree_leaves__()
        self.before = _FILLED.get()
        self.module.__tree_swap__(self.values)
        _FILLED.set((*self.before, self))

    def __exit__(self, *exc: object) -> None:
        _FILLED.set(self.before)
        self.module.__tree_swap__(self.saved)
        self.lock.release()


_FILLED: ContextVar[tuple[Filled, ...]] = ContextVar("filled", default=())

# Stand-ins are put into the module itself, so two threads cannot differentiate one module at the same time.
_locks: dict[int, Any] = {}


def lock_of(module: Any) -> Any:
    """The lock that is held while something stands in for the module's parameters."""
    if id(module) not in _locks:
        weakref.finalize(module, _locks.pop, id(module), None)
    return _locks.setdefault(id(module), threading.RLock())


def filled_now() -> tuple[Filled, ...]:
    """What stands in for parameters just now, outermost first."""
    return _FILLED.get()


@contextlib.contextmanager
def standing(then: Sequence[Filled]) -> Iterator[None]:
    """What stood in for parameters at another moment, and nothing else, for a block: code that runs again finds it."""
    now = _FILLED.get()
    for one in reversed(now):
        one.module.__tree_swap__(one.saved)
    _FILLED.set(())
    try:
        with contextlib.ExitStack() as stack:
            for one in then:
                stack.enter_context(Filled(one.module, one.values))
            yield
    finally:
        for one in now:
            one.module.__tree_swap__(one.values)
        _FILLED.set(now)


def _is_module(leaf: Any) -> bool:
    return hasattr(type(leaf), "__tree_swap__")  # of the type: some objects have every attribute


def _parameters(module: Any) -> dict[str, Tensor]:
    """The floating parameters of a Module, not what another thread has put in their place."""
    with lock_of(module):
        return {name: p for name, p in module.__tree_leaves__().items() if p.dtype.kind == "f"}


def opened(
    f: Callable[..., Any], arguments: Sequence[Any], chosen: Iterable[int] | None = None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of Modules as one of dicts of their floating parameters, and the arguments as such.

    Modules are found at any depth of an argument.  ``chosen``: the positions of the arguments that are opened; all
    without it.
    """
    plain = list(arguments)
    plans: dict[int, tuple[TreeDef, list[Any]]] = {}
    for k in range(len(plain)) if chosen is None else chosen:
        leaves, treedef = flatten(arguments[k], open_modules=False)
        if any(map(_is_module, leaves)):
            plans[k] = treedef, [leaf if _is_module(leaf) else None for leaf in leaves]
            plain[k] = unflatten(treedef, [_parameters(leaf) if _is_module(leaf) else leaf for leaf in leaves])
    if not plans:
        return f, tuple(arguments)

    def of_parameters(*given: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            filled, entered = list(given), []
            for k, (treedef, modules) in plans.items():
                leaves = leaves_at(treedef, given[k])
                for n, module in enumerate(modules):
                    if module is not None:
                        entered.append(Filled(module, {name: asarray(value) for name, value in leaves[n].items()}))
                        stack.enter_context(entered[-1])
                        leaves[n] = module
                filled[k] = unflatten(treedef, leaves)
            if len(entered) > 1:
                _check_apart(entered)
            return f(*filled, **kwargs)

    return of_parameters, tuple(plain)


def _check_apart(entered: Sequence[Filled]) -> None:
    """Raise where one stand-in has taken the place of another: the first one's derivative would be zero."""
    for one in entered:
        found = one.module.__tree_leaves__()
        for name, value in one.values.items():
            if found.get(name) is not value:
                raise ArgumentError(
                    f"{name!r} of a {type(one.module).__name__} is in the arguments twice (a module was given twice, "
                    "or beside one that holds it); give it once"
                )
