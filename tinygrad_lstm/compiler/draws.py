"""Random numbers that are drawn while something is recorded: whatever runs the recording sees the same ones again."""

from __future__ import annotations

import functools
import inspect
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.blame import user_line, users_level
from tinygrad_lstm.compiler.reads import functions_of, global_names, global_paths, is_foreign, is_plain_object
from tinygrad_lstm.errors import TraceError
from tinygrad_lstm.random import _WITNESS

__all__ = ["CompileWarning", "drawn_once", "recorded_again"]

_FOREIGN_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)
_MOST = 500  # objects looked at


class CompileWarning(UserWarning):
    """A function was compiled, or the body of a loop recorded, that is better written another way."""


class _NoDraws(dict):
    """Stands where draws from generators are witnessed: the first one is an error, before it happens."""

    def __init__(self, name: str, later: str) -> None:
        super().__init__()
        self.name, self.later = name, later

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TraceError(
            f"random numbers were drawn, or a generator was seeded, while {self.name} was recorded ({user_line()}); "
            f"{self.later} would see the same ones: draw them before it and pass them in, or use ops.dropout; seed "
            "outside of it"
        )


@contextmanager
def drawn_once(f: Any, name: str, later: str, instead: str) -> Iterator[None]:
    """A block that records ``f`` (functions, modules, lists of them).

    A draw from a ``tg.Generator`` raises TraceError, one from another generator warns.  ``later`` says what would see
    the same numbers again, ``instead`` what to do.
    """
    generators = _generators_of(f)
    before = _states(generators)
    token = _WITNESS.set(_NoDraws(name, later))
    try:
        yield
    finally:
        _WITNESS.reset(token)
    if _states(generators) != before:
        warnings.warn(  # no error: another thread may have drawn
            f"{name}: numbers were drawn with numpy.random or random while it was recorded; if it draws them itself, "
            f"{later} sees the same ones: {instead}",
            CompileWarning,
            stacklevel=users_level(),
        )


def _states(generators: list[Any]) -> list[Any]:
    """The states of these generators, and of those that the functions of NumPy and Python draw from."""
    shared: Any = np.random.get_state()  # noqa: NPY002 - what others draw from
    found: list[Any] = [shared[1].tobytes(), shared[2:], random.getstate()]
    for generator in generators:
        if isinstance(generator, random.Random):
            found.append(generator.getstate())
        elif isinstance(generator, np.random.RandomState):
            own: Any = generator.get_state()
            found.append((own[1].tobytes(), own[2:]))
        else:
            found.append(repr(generator.bit_generator.state))
    return found


def _generators_of(f: Any) -> list[Any]:
    """Generators of NumPy and Python in what a function closes over, its defaults and globals, and the modules and
    objects of the user's among these, with all methods of their classes: a body may draw in any of them."""
    found: list[Any] = []
    seen: set[int] = set()
    pending = [f]
    while pending and len(seen) < _MOST:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _FOREIGN_GENERATORS):
            found.append(value)
        elif isinstance(value, MethodType):
            pending += (value.__func__, value.__self__)
        elif isinstance(value, FunctionType):
            for cell in value.__closure__ or ():
                try:
                    pending.append(cell.cell_contents)
                except ValueError:  # not filled yet
                    continue
            pending += (value.__defaults__, value.__kwdefaults__)
            if not is_foreign(value):
                names = value.__globals__
                pending += [names[name] for name in global_names(value.__code__) if name in names]
                for first, *rest in global_paths(value.__code__):
                    pending += _behind(names.get(first), rest)
        elif hasattr(type(value), "__tree_swap__"):
            pending += (*_of_class(type(value)), *vars(value).values())
        elif isinstance(value, functools.partial):
            pending += (value.func, value.args, value.keywords)
        elif is_plain_object(value):
            pending += (*_of_class(type(value)), *vars(value).values())
        elif isinstance(value, (list, tuple)) and len(value) < _MOST:
            pending += value
        elif isinstance(value, dict) and len(value) < _MOST:
            pending += value.values()
    return found


def _of_class(cls: type) -> list[Any]:
    """The methods of a user's class and of its bases, and its other attributes."""
    found: list[Any] = []
    for base in cls.__mro__:
        if not is_foreign(base):
            for name, value in list(vars(base).items()):
                found += functions_of(value) or ([] if name.startswith("__") else [value])
    return found


def _behind(value: Any, names: Sequence[str]) -> list[Any]:
    """What stands behind names in a module of the user's, or in a class."""
    for name in names:
        if not isinstance(value, (ModuleType, type)) or is_foreign(value):
            return []
        value = inspect.getattr_static(value, name, None)
    return [*functions_of(value)] or [value]


AGAIN = 3


def recorded_again(name: str, times: int) -> None:
    """Warn when the same program was made so often because values that Python code took had changed."""
    if times == AGAIN:
        warnings.warn(
            f"{name} was recorded {AGAIN} times more, to the same program, since it takes values of a tensor in Python "
            "(.data, .numpy(), item(), a comparison) and they keep changing: compute with ops on the tensor itself, "
            "and take shape and dtype from it, not from its .data",
            CompileWarning,
            stacklevel=users_level(),
        )
