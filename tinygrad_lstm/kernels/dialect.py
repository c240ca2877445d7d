"""What texts of native code import beside numbers: decorators of functions, and calls with a meaning of their own.

:mod:`.translate` says what the rest of a text may be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir

from .instructions import I64, declared

__all__ = ["Intrinsic", "entry", "exported", "external", "private"]

_F = TypeVar("_F", bound=Callable[..., Any])


class Intrinsic:
    """What a call becomes that is written in instructions: ``emit(builder, *arguments)`` returns the value, or None."""

    def __init__(self, emit: Callable[..., Any]) -> None:
        self.emit = emit
        self.__doc__ = emit.__doc__

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError("this is an instruction of native code")


def external(name: str, count: int) -> Intrinsic:
    """A function of ``count`` int64 that returns one, in a program that is loaded already (:meth:`Program.symbol`)."""

    def emit(builder: Any, *arguments: Any) -> Any:
        type_ = ir.FunctionType(I64, [I64] * count)
        return builder.call(declared(builder.module, type_, name), arguments)

    return Intrinsic(emit)


def private(function: _F) -> _F:
    """Only the module's other functions call it."""
    return function


def exported(function: _F) -> _F:
    """A C function, called by its address."""
    return function


def entry(function: _F) -> _F:
    """A C function, and a function of Python, which releases the GIL."""
    return function
