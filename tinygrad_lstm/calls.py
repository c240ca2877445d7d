"""What a primitive, or a module, may be called with.

A primitive: its operands by position (or by name), its parameters by keyword.

A forward function may be one of NumPy's own, which takes more than a primitive does: a third operand of a binary ufunc
is the array that it writes into.  So a call is checked before the forward sees it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError
from tinygrad_lstm.hints import did_you_mean

__all__ = ["SaysWhatItTakes", "Takes", "misfit", "says_what_it_takes"]

_Kind = inspect.Parameter
F = TypeVar("F", bound=Callable[..., Any])


class Takes:
    """The operands and parameters of a primitive.

    Attributes
    ----------
    count : int
        How many operands there are.
    variadic : bool
        Any number of them may follow in place of the last one.
    parameters : frozenset
        Names of the keyword-only parameters.
    """

    def __init__(
        self, name: str, arguments: list[str], variadic: bool, parameters: list[str], function: Callable[..., Any]
    ) -> None:
        self.name, self.arguments, self.variadic = name, arguments, variadic
        self.count = len(arguments)
        self.parameters = frozenset(parameters)
        known: Any = () if isinstance(function, np.ufunc) else inspect.signature(function).parameters.values()
        self.defaults = {p.name: p.default for p in known if p.default is not _Kind.empty}
        self.any_keyword = any(p.kind is _Kind.VAR_KEYWORD for p in known)

    def __str__(self) -> str:
        operands = [f"*{a}" if self.variadic and a == self.arguments[-1] else a for a in self.arguments]
        return ", ".join([*operands, *(f"{p}=" for p in sorted(self.parameters))])

    def matched(self, args: tuple[Any, ...], params: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with operands in their places and defaults filled in.

        Raises ArgumentError for what the primitive does not take, and for what is missing.
        """
        operands, given = list(args), dict(params)
        if not self.variadic:
            if len(operands) > len(self.arguments):
                raise ArgumentError(f"{self.name} takes ({self}), found {len(operands)} operands")
            for name in self.arguments[len(operands) :]:
                if name in given:
                    operands.append(given.pop(name))
                elif name in self.defaults:
                    operands.append(self.defaults[name])
                elif operands or given:
                    raise ArgumentError(f"{self.name} takes ({self}): the operand {name} is missing")
                else:
                    raise ArgumentError(f"{self.name}() needs at least one operand: it takes ({self})")
        unknown = [] if self.any_keyword else sorted(given.keys() - self.parameters)
        if unknown:
            raise ArgumentError(f"{self.name} takes ({self}), found the keyword {', '.join(unknown)}")
        for name in sorted(self.parameters - given.keys()):
            if name not in self.defaults:
                raise ArgumentError(f"{self.name} takes ({self}): the parameter {name} is missing")
            given[name] = self.defaults[name]
        return tuple(operands), given


def misfit(error: TypeError, who: str, function: Callable[..., Any], args: tuple[Any, ...], given: Any) -> TypeError:
    """The error of a call whose arguments do not fit the function, with those that it takes."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return error
    try:
        signature.bind(*args, **given)
    except TypeError as reason:
        known = signature.parameters
        shown = ", ".join(name if p.default is _Kind.empty else f"{name}=" for name, p in known.items())
        unknown = [name for name in given if name not in known]
        if any(_AXES.get(name) in known for name in unknown):
            called = ", ".join(f"{name}=" for name in unknown)
            return DTypeError(f"{who} takes ({shown}), got {called}; here it is axis= (keepdim= is keepdims=)")
        hints = (did_you_mean(name, known) for name in unknown)
        return DTypeError(f"{who} takes ({shown}): {reason}{next(hints, '')}")
    return error


_AXES = {"dim": "axis", "keepdim": "keepdims"}  # as PyTorch calls them


def says_what_it_takes(function: F, who: str = "", of_object: bool = True) -> F:
    """The function, whose calls with arguments that do not fit raise :func:`misfit`'s error.

    ``of_object``: a method, whose first argument nobody writes.
    """
    who = who or function.__qualname__.rpartition("<locals>.")[2].removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        try:
            return function(*args, **given)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise  # of what the function does
            written, arguments = (MethodType(function, args[0]), args[1:]) if of_object else (function, args)
            raise misfit(error, who, written, arguments, given) from None

    return call  # type: ignore[return-value]


class SaysWhatItTakes:
    """Base class: wrong arguments of a subclass's ``__init__`` are told as by :func:`says_what_it_takes`."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "__init__" in cls.__dict__:
            cls.__init__ = says_what_it_takes(cls.__init__)  # type: ignore[method-assign]
