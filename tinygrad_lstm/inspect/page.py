"""The time player: one HTML file that steps forward through a sequence and back through its gradients."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError
from tinygrad_lstm.inspect.table import norm
from tinygrad_lstm.inspect.watch import Series, Watched, watch
from tinygrad_lstm.serialization import replacing

__all__ = ["player"]

MOST_NUMBERS = 500_000  # in the file: some 4 MB
ENDINGS = (".html", ".htm")
PLACE = '<script type="application/json" id="data">{}</script>'


def player(
    model: Any, x: Any, loss: Callable[..., Any], path: str | os.PathLike[str], target: Any = None, *,
    lengths: Any = None, row: int = 0, units: int = 32, title: str | None = None,
) -> None:  # fmt: skip
    """Write a page that plays backpropagation through time: open it in any browser, no network is needed.

    It steps forward through the sequence, to the loss, and back, with every state and gate and their gradients as
    strips of colour and as numbers, and the gradients of the parameters as they add up.  Arrow keys, Home, End and
    space, a slider and buttons move it; ``page.html#7`` opens at position 7.

    Parameters
    ----------
    model, x, loss, target, lengths
        As for :func:`~tinygrad_lstm.inspect.gradient_flow`.
    path : path
        A ``.html`` file.
    row : int
        The row of the batch whose values are shown (norms and parameters' gradients are those of the whole batch).
    units : int
        The most elements of each value that are shown; of more, as many evenly spaced ones, which the page says.
    title : str, optional

    Raises
    ------
    DTypeError, ShapeError, ArgumentError
        As :func:`~tinygrad_lstm.inspect.gradient_flow`; a file of another ending; a row that there is not; more than
        500,000 numbers (steps times units times values, and as many gradients): nothing is written then.
    FileError
        The file could not be written.  An old one is then still there.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from tinygrad_lstm import inspect, nn
    >>> page = pathlib.Path(tempfile.mkdtemp(), "lstm.html")
    >>> inspect.player(nn.LSTM(2, 4), np.ones((6, 1, 2), np.float32), lambda out: out[0][-1].sum(), page)
    >>> page.read_text(encoding="utf-8").startswith("<!doctype html>")
    True
    """
    if not isinstance(path, (str, os.PathLike)):
        raise DTypeError(f"player: a path is a str or path-like, found {type(path).__name__}")
    if Path(os.fspath(path)).suffix.lower() not in ENDINGS:
        raise ArgumentError(f"player: the page is a .html file, found {os.fspath(path)!r}")
    for name, value, least in (("row", row, 0), ("units", units, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise DTypeError(f"player: {name} is an int, found {value!r}")
        if value < least:
            raise ArgumentError(f"player: {name} is at least {least}, found {value}")
    seen = watch("player", model, x, loss, target, lengths)
    if not seen.series:
        raise ArgumentError(
            "player: no value has the same shape at all steps and a name; give the cell's values names with tg.name"
        )
    shown = [_series(one, int(row), int(units)) for one in seen.series]
    count = sum(2 * seen.steps * len(one["units"]) for one in shown)
    if count > MOST_NUMBERS:
        raise ArgumentError(
            f"player: {count:,} numbers ({seen.steps} steps, {len(shown)} values of up to {units} units), at most "
            f"{MOST_NUMBERS:,}; use fewer units=, or a shorter sequence"
        )
    about = title if title is not None else f"{type(model).__name__}: backpropagation through {seen.steps} steps"
    page = files("tinygrad_lstm.inspect").joinpath("player.html").read_text(encoding="utf-8")
    # "</script>" in a title would end the script.
    text = json.dumps(_data(seen, shown, about, int(row)), separators=(",", ":"), allow_nan=False).replace(
        "<", "\\u003c"
    )
    with replacing(path) as file:
        file.write(page.replace(PLACE, PLACE.replace("{}", text)).encode())


def _data(seen: Watched, shown: list[dict[str, Any]], title: str, row: int) -> dict[str, Any]:
    parameters = []
    for name, total in seen.totals.items():
        steps = {}
        if name in seen.parameters:
            steps = {"added": _numbers(seen.parameters[name]), "accumulated": _numbers(seen.accumulated[name])}
        parameters.append({"name": name, "total": _number(total), **steps})
    note = f"Values are those of row {row} of the batch; norms and parameters are of the whole batch."
    return {
        "title": title, "note": note, "loss": _number(seen.loss), "steps": seen.steps, "series": shown,
        "parameters": parameters,
    }  # fmt: skip


def _series(one: Series, row: int, units: int) -> dict[str, Any]:
    values, gradients = (_of_row(array, row, one.name) for array in (one.values, one.gradients))
    size = values.shape[1]
    chosen = np.unique(np.linspace(0, size - 1, min(units, size)).round().astype(int)) if size else np.zeros(0, int)
    return {
        "name": one.name, "kind": one.kind, "size": size, "units": chosen.tolist(),
        "values": [_numbers(step) for step in values[:, chosen]],
        "gradients": [_numbers(step) for step in gradients[:, chosen]],
        "value_norms": _numbers([norm(step) for step in one.values]),
        "gradient_norms": _numbers([norm(step) for step in one.gradients]),
    }  # fmt: skip


def _of_row(array: np.ndarray, row: int, name: str) -> np.ndarray:
    """``(T, units)`` of one row of the batch; a value with one axis is one number a row."""
    if array.ndim == 1:
        return array[:, None]
    if not row < array.shape[1]:
        raise ArgumentError(
            f"player: row {row} of {name!r}, which has {array.shape[1]} rows (0 to {array.shape[1] - 1})"
        )
    return array[:, row].reshape(len(array), -1)


def _numbers(values: Any) -> list[Any]:
    return [_number(value) for value in values]


def _number(value: Any) -> Any:
    """Four digits; what JSON has no number for as a string."""
    value = float(value)
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)
