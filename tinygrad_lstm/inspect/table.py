"""The records of a tape as a table: one row for each value, chosen by time step, module path and name."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError
from tinygrad_lstm.record import Aval

if TYPE_CHECKING:
    from tinygrad_lstm.tape import Tape

__all__ = ["Table", "table_of"]

COLUMNS = ("serial", "op", "output", "name", "module", "t", "shape", "dtype", "norm", "source", "value")
SHOWN = ("serial", "op", "name", "module", "t", "value", "norm", "source")
_ONE_RECORD = "; a compiled loop is one record, run the model inside of tg.eager()"
MOST_SHOWN = 60  # rows of a printed table; more are left out in the middle


class Table:
    """Values of a tape, one row each, as :meth:`~tinygrad_lstm.Tape.to_table` returns them.

    Attributes
    ----------
    rows : list of dict
        In the order in which the values were made, each with

        ``serial``, ``op``, ``output``
            number of the record, name of its primitive, and which of its outputs this is;
        ``name``
            given with ``tg.name``, or None;
        ``module``, ``t``
            path of modules and scopes ("" outside of all), and time step (None outside of a loop);
        ``shape``, ``dtype``, ``norm``, ``value``
            of the value; the norm is the Euclidean one of all elements, the value a read-only ndarray;
        ``source``
            ``file:line`` of the code that ran the operation.

    ``str(table)`` is plain text, in a notebook it shows as an HTML table.  ``table["norm"]`` is one column as a list,
    ``table.columns()`` a dict of all, which for instance ``pandas.DataFrame`` takes.

    Examples
    --------
    >>> import numpy as np
    >>> import tinygrad_lstm as tg
    >>> from tinygrad_lstm import nn
    >>> with tg.Tape() as tape, tg.eager():
    ...     outputs, state = nn.LSTM(2, 3)(np.ones((4, 1, 2), np.float32))
    >>> table = tape.to_table(gate=["i", "f"], t=range(2, 4))
    >>> [(row["name"], row["t"], row["module"], row["shape"]) for row in table]
    [('i', 2, 'l0', (1, 3)), ('f', 2, 'l0', (1, 3)), ('i', 3, 'l0', (1, 3)), ('f', 3, 'l0', (1, 3))]
    >>> len(table["norm"])
    4
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        if column not in COLUMNS:
            raise ArgumentError(f"a table has no column {column!r}; it has {', '.join(COLUMNS)}")
        return [row[column] for row in self.rows]

    def columns(self) -> dict[str, list[Any]]:
        """Every column as a list, by its name."""
        return {column: self[column] for column in COLUMNS}

    def _shown(self) -> tuple[list[tuple[str, ...]], str]:
        """The cells of the rows that are printed, and what to say in the middle of them."""
        if len(self.rows) <= MOST_SHOWN:
            return [_texts(row) for row in self.rows], ""
        half = MOST_SHOWN // 2
        rows = [*self.rows[:half], *self.rows[-half:]]
        note = f"... {len(self.rows) - len(rows)} rows left out; table.rows has them all ..."
        return [_texts(row) for row in rows], note

    def __str__(self) -> str:
        rows, note = self._shown()
        lines = [SHOWN, *rows]
        widths = [max(len(line[k]) for line in lines) for k in range(len(SHOWN))]
        texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        texts = [text.rstrip() for text in texts]
        if note:
            texts.insert(1 + MOST_SHOWN // 2, note)
        return "\n".join(texts)

    def __repr__(self) -> str:
        return f"<Table of {len(self.rows)} rows>"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in SHOWN)
        cells, note = self._shown()
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in cells]
        if note:
            rows.insert(MOST_SHOWN // 2, f'<td colspan="{len(SHOWN)}">{note}</td>')
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as it is printed: shape and dtype together, the file's name without its folder."""
    shown = {**row, "value": str(Aval(row["shape"], row["dtype"])), "norm": f"{row['norm']:.4g}"}
    shown["source"] = row["source"].replace("\\", "/").rpartition("/")[2]
    return tuple("" if shown[column] is None else str(shown[column]) for column in SHOWN)


def table_of(tape: Tape, t: Any = None, module: str | None = None, gate: Any = None) -> Table:
    """The rows of a tape; see :meth:`~tinygrad_lstm.Tape.to_table` for the selections."""
    rows = [(record, index, value) for record, _, outputs in tape.entries for index, value in enumerate(outputs)]
    steps = [record.place.step for record, _, _ in rows]
    chosen = _chosen_steps(t, steps)
    unrolled = any(step is not None for step in steps)
    names = _chosen_names(gate, [_label(record, index) for record, index, _ in rows], unrolled)
    if module is not None:
        _check_module(module, {record.place.where for record, _, _ in rows}, unrolled)
    return Table(
        _row(record, index, value)
        for record, index, value in rows
        if (chosen is None or record.place.step in chosen)
        and (names is None or _label(record, index) in names)
        and (module is None or _is_within(record.place.where, module))
    )


def _row(record: Any, index: int, value: Any) -> dict[str, Any]:
    array = value._data.view()
    array.flags.writeable = False  # the tape's own value, not a copy
    return {
        "serial": record.serial, "op": record.primitive.name, "output": index, "name": _label(record, index),
        "module": record.place.where, "t": record.place.step, "shape": tuple(value.shape), "dtype": value.dtype,
        "norm": norm(array), "source": record.source_line(), "value": array,
    }  # fmt: skip


def norm(array: np.ndarray) -> float:
    """The Euclidean norm of all elements, summed in float64."""
    wide = np.asarray(array, np.float64).ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(np.dot(wide, wide)))


def _label(record: Any, index: int) -> str | None:
    labels = None if record.extra is None else record.extra.label
    return None if labels is None else labels.get(index)


def _is_within(where: str, module: str) -> bool:
    return where == module or bool(module and where.startswith(f"{module}."))


def _chosen_steps(t: Any, steps: Iterable[int | None]) -> set[int] | None:
    if t is None:
        return None
    one = isinstance(t, (int, np.integer)) and not isinstance(t, bool)
    wanted = [t] if one else t
    if isinstance(wanted, (str, bytes, bool)) or not isinstance(wanted, Iterable):
        raise DTypeError(f"to_table: t is a time step or several of them (range(3, 6), [0, 9]), found {t!r}")
    chosen = list(wanted)
    if not all(isinstance(k, (int, np.integer)) and not isinstance(k, bool) for k in chosen):
        raise DTypeError(f"to_table: time steps are ints, found {t!r}")
    there = {step for step in steps if step is not None}
    if not there:
        raise ArgumentError(f"to_table: no record of this tape has a time step{_ONE_RECORD}")
    if missing := [int(k) for k in chosen if k not in there]:
        raise ArgumentError(f"to_table: no records of t = {missing}; the steps are {min(there)} to {max(there)}")
    return {int(k) for k in chosen}


def _chosen_names(gate: Any, labels: Iterable[str | None], unrolled: bool) -> set[str] | None:
    if gate is None:
        return None
    wanted = [gate] if isinstance(gate, str) else list(gate) if isinstance(gate, Iterable) else [gate]
    if not all(isinstance(name, str) for name in wanted):
        raise DTypeError(f"to_table: gate is a name given with tg.name, or several of them, found {gate!r}")
    there = {label for label in labels if label is not None}
    if missing := [name for name in wanted if name not in there]:
        raise ArgumentError(
            f"to_table: no value named {missing}; named are {sorted(there)}{'' if unrolled else _ONE_RECORD}"
        )
    return set(wanted)


def _check_module(module: Any, paths: set[str], unrolled: bool) -> None:
    if not isinstance(module, str):
        raise DTypeError(f"to_table: module is a path such as 'encoder.l0', found {module!r}")
    if not any(_is_within(path, module) for path in paths):
        hint = "" if unrolled else _ONE_RECORD
        raise ArgumentError(f"to_table: nothing ran in module {module!r}; the paths are {sorted(paths)}{hint}")
