"""Argument types and what several commands share."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinygrad_lstm.errors import Error

__all__ = ["UsageError", "duration", "fraction", "integer", "model_file", "number", "program"]

NAME = "tinygrad-lstm"
BEST, LAST = "best.safetensors", "last.safetensors"


class UsageError(Error, ValueError):
    """Arguments that are wrong, alone or together; exit status 2."""


def integer(low: int) -> Callable[[str], int]:
    """An argument type: an int that is at least ``low``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is less than {low}")
        return value

    return parse


def number(low: float, low_included: bool = True) -> Callable[[str], float]:
    """An argument type: a finite float above ``low``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value) or value < low or (value == low and not low_included):
            raise argparse.ArgumentTypeError(f"{text} is not {'at least' if low_included else 'above'} {low:g}")
        return value

    return parse


def fraction(text: str) -> float:
    """An argument type: a probability in ``[0, 1)``."""
    value = number(0)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def duration(text: str) -> float:
    """An argument type: seconds, or a number with s, m or h.

    >>> duration("90"), duration("1.5m"), duration("2h")
    (90.0, 90.0, 7200.0)
    """
    factor = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    figures = text[:-1] if factor else text
    try:
        float(figures)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time; write seconds, or a number with s, m or h: 90, 1.5m, 2h"
        ) from None
    return number(0, low_included=False)(figures) * (factor or 1)


def model_file(path: str) -> Path:
    """A checkpoint given as a file, or as a run's folder (its best model, else its last)."""
    given = Path(path)
    if not given.is_dir():
        return given
    for name in (BEST, LAST):
        if (given / name).exists():
            return given / name
    raise FileNotFoundError(2, f"a folder without {BEST} or {LAST}", path)


def program() -> str:
    """How the user called this command line, for hints: what is not on the PATH by its path."""
    words = sys.orig_argv
    for k, word in enumerate(words[1:-1], 1):
        if word == "-m" and words[k + 1] == "tinygrad_lstm":
            return shlex.join(words[: k + 2])
    called = sys.argv[0]
    if Path(called).stem == NAME:
        found = shutil.which(NAME)
        if found is None or not os.path.exists(called) or not os.path.samefile(found, called):
            return shlex.quote(called)
    return NAME


def explicit(args: argparse.Namespace, names: Any) -> dict[str, Any]:
    """The options that were given on the command line (the others are None)."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
