"""Checks of plain arguments, for messages that say which one is wrong and what was expected."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError

__all__ = ["check_dtype", "check_int", "check_number", "check_probability", "is_number"]


def is_number(value: Any) -> bool:
    """A number, or something like a 0-d array that can be one."""
    return not isinstance(value, (bool, str, bytes)) and (
        isinstance(value, (int, float, np.number)) or (hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0)
    )


def check_number(what: str, value: Any) -> None:
    """Raise DTypeError unless the value is a number."""
    if not is_number(value):
        raise DTypeError(f"{what} is a number, found {value!r:.60}")


def check_int(what: str, value: Any, least: int | None = 1) -> None:
    """Raise unless the value is an int (DTypeError) and, if that is given, at least ``least`` (ArgumentError)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise DTypeError(f"{what} is an int, found {value!r:.60}")
    if least is not None and value < least:
        raise ArgumentError(f"{what} is at least {least}, found {value}")


def check_dtype(who: str, dtype: Any) -> np.dtype:
    """The floating dtype that a module's parameters are to have; DTypeError where it is none."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.kind != "f":
        raise DTypeError(f"{who}: {dtype!r} is no dtype of parameters; expected np.float32, np.float64 or np.float16")
    return found


def check_probability(who: str, p: Any, name: str = "p") -> float:
    """The number as a float; raises unless it is one (DTypeError) in [0, 1] (ArgumentError)."""
    check_number(f"{who}: {name}", p)
    if not 0.0 <= p <= 1.0:
        raise ArgumentError(f"{who}: a probability lies in [0, 1], found {name}={p}")
    return float(p)
