"""The equations of a cell, read off the Program of one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinygrad_lstm.errors import ArgumentError, DTypeError
from tinygrad_lstm.inspect.expression import Cut, Node, walk
from tinygrad_lstm.inspect.fold import System, system_of
from tinygrad_lstm.inspect.notation import Latex, Text, Writer
from tinygrad_lstm.inspect.recorded import cells_of, record_cell

__all__ = ["equations"]


def equations(cell: Any, latex: bool = False, *, x: Any = None, rename: Mapping[str, str] | None = None) -> str:
    """The equations of a cell, one line for each named value.

    Values have the names that the cell gives them with ``tg.name``, parameters those of their attributes
    (``weight_ih`` is W_ih, ``bias_ih`` b_ih).  ``h_{t-1}`` is the state before the step, ``h_t`` the one behind it.
    x and h are rows, so a linear layer is ``x_t W^T``: side by side stand the factors of a matrix product, ``*`` is
    the elementwise one.  Where the cell computes one product and splits it, each gate shows its part: ``W_ih[i]`` are
    the rows of W_ih that belong to gate i, and the lines behind ``where`` say which those are.  A submodule of some
    size (a layer norm) is a function with a line of its own.  ``mean``, ``sum``, ``var`` and the like are over the
    elements of a row.  What no reader would find in a textbook in one piece gets a name (``u1``).

    Parameters
    ----------
    cell : a cell, or a module with cells
        A module gives the equations of each of its cells, under headings.
    latex : bool
        The environment ``aligned``, to be put between ``$$``.
    x : tree of ``(B, ...)``, optional
        Input of one step, for cells whose input has a width that their parameters do not tell.
    rename : dict, optional
        Other letters for names: ``{"g": "a"}``, ``{"g": "c~"}``.

    Raises
    ------
    DTypeError
        No cell; ``rename`` is no dict of strings.
    ArgumentError
        A name in ``rename`` that there is not, or one that would stand for two values; no or several widths of x.

    Examples
    --------
    >>> from tinygrad_lstm import inspect, nn
    >>> print(inspect.equations(nn.RNNCell(2, 3)))
    h_t = tanh(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)
    >>> print(inspect.equations(nn.LSTMCell(2, 3, bias=False), rename={"g": "a"}))
    i_t = sigmoid(x_t W_ih[i]^T + h_{t-1} W_hh[i]^T)
    f_t = sigmoid(x_t W_ih[f]^T + h_{t-1} W_hh[f]^T)
    o_t = sigmoid(x_t W_ih[o]^T + h_{t-1} W_hh[o]^T)
    a_t = tanh(x_t W_ih[a]^T + h_{t-1} W_hh[a]^T)
    c_t = f_t * c_{t-1} + i_t * a_t
    h_t = o_t * tanh(c_t)
    where
      [i], [f], [a], [o] are rows 0:3, 3:6, 6:9, 9:12 of W_ih, W_hh
    >>> print(inspect.equations(nn.RNNCell(2, 3, bias=False), latex=True))
    \\begin{aligned}
    h_{t} &= \\tanh\\left(x_{t} \\, {W_{ih}}^{\\top} + h_{t-1} \\, {W_{hh}}^{\\top}\\right)
    \\end{aligned}
    """
    if rename is not None and not (
        isinstance(rename, Mapping) and all(isinstance(name, str) for pair in rename.items() for name in pair)
    ):
        raise DTypeError(f"equations: rename is a dict of names such as {{'g': 'a'}}, found {rename!r}")
    cells = cells_of(cell)
    if not cells:
        raise DTypeError(f"equations: {type(cell).__name__} has no recurrent cell")
    texts: dict[str, list[str]] = {}
    for path, one in cells:
        title = f"{path}: {type(one).__name__}" if path else ""
        texts.setdefault(_written(system_of(record_cell(one, x)), latex, rename or {}), []).append(title)
    if len(cells) == 1:
        return next(iter(texts))
    comment = "%" if latex else "#"
    return "\n\n".join(f"{comment} {', '.join(titles)}\n{text}" for text, titles in texts.items())


def _written(system: System, latex: bool, rename: Mapping[str, str]) -> str:
    system = _renamed(system, rename)
    parts = _part_names(system)
    writer: Writer = (Latex if latex else Text)(system.symbols, parts)
    lines = [(writer(line.left), writer(line.right)) for line in (*system.lines, *system.functions)]
    notes = _notes(system, writer, parts)
    if latex:
        body = " \\\\\n".join(f"{left} &= {right}" for left, right in lines)
        text = f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
        return "\n".join([text, *(f"% {note}" for note in notes)])
    return "\n".join(
        [*(f"{left} = {right}" for left, right in lines), *(["where"] if notes else []), *(f"  {n}" for n in notes)]
    )


def _renamed(system: System, rename: Mapping[str, str]) -> System:
    names = {n.data[0] for line in system.lines for side in line[:2] for n in walk(side) if n.op == "value"}
    if unknown := [name for name in rename if name not in names]:
        raise ArgumentError(f"equations: rename has {', '.join(map(repr, unknown))}; the names are {sorted(names)}")
    new = [rename.get(name, name) for name in sorted(names)]
    if twice := sorted({name for name in new if new.count(name) > 1}):
        raise ArgumentError(f"equations: after rename two values would be called {', '.join(map(repr, twice))}")

    def changed(node: Node) -> Node:
        data = (rename.get(node.data[0], node.data[0]), node.data[1]) if node.op == "value" else node.data
        return node._replace(args=tuple(changed(arg) for arg in node.args), data=data)

    return system._replace(
        lines=[line._replace(left=changed(line.left), right=changed(line.right)) for line in system.lines]
    )


def _part_names(system: System) -> dict[Cut, str]:
    """Parts by the name of the one line that uses them; without a name are those that several lines use."""
    used: dict[Cut, list[str]] = {}
    for line in system.lines:
        for node in walk(line.right):
            if node.op == "part":
                used.setdefault(node.data, []).append("" if line.is_helper else line.left.data[0])
    names = {cut: lines[0] for cut, lines in used.items() if len(set(lines)) == 1 and lines[0]}
    bounds: dict[str, set[tuple[int, int]]] = {}
    for cut, name in names.items():
        bounds.setdefault(name, set()).add((cut.low, cut.high))
    return {cut: name for cut, name in names.items() if len(bounds[name]) == 1}


def _notes(system: System, writer: Writer, parts: dict[Cut, str]) -> list[str]:
    """What the named parts are, and the constants."""
    places: dict[tuple[str, str], set[Cut]] = {}  # (what, of what) -> its cuts
    for line in (*system.lines, *system.functions):
        for node in walk(line.right):
            if node.op == "part" and node.data in parts:
                base: Node = node.args[0]
                what = "rows" if node.data.axis == 0 else "columns" if len(base.shape) > 1 else "elements"
                whole = base.op == "parameter" or what == "rows"  # a matrix that is made of parameters
                key = (what, writer(base)) if whole else ("elements", "other values")
                places.setdefault(key, set()).add(node.data)
    grouped: dict[tuple[Any, ...], list[str]] = {}
    for (what, of), cuts in places.items():
        bounds = dict.fromkeys((f"[{parts[cut]}]", f"{cut.low}:{cut.high}") for cut in sorted(cuts))
        grouped.setdefault((what, tuple(bounds)), []).append(of)
    notes = []
    for (what, bounds), bases in grouped.items():
        names, ranges = (", ".join(column) for column in zip(*bounds, strict=True))
        notes.append(f"{names} are {what} {ranges} of {', '.join(bases)}")
    notes += [f"{name} is a constant {aval}" for name, aval in system.constants.items()]
    return notes
