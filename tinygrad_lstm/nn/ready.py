"""Calls of recurrent layers that are known already.

A call on the same shapes as an earlier one asks the same questions and gets the same answers, as long as no module
was changed: the arguments fit, the cells are recorded, the loops planned.  What is left is to run them.  For a layer
of one row and few steps the questions take ten times as long as the loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.binding import MARK
from tinygrad_lstm.compiler.runner import loop_call_in
from tinygrad_lstm.compiler.straight import Form
from tinygrad_lstm.errors import TraceError
from tinygrad_lstm.nn.cells import GatedCell
from tinygrad_lstm.nn.module import Module, changes
from tinygrad_lstm.nn.programs import known_of, recorder_for
from tinygrad_lstm.ops.control import leaves_of, rebuilt
from tinygrad_lstm.ops.loop import bind_site, linked_loop
from tinygrad_lstm.ops.prepared import Site, apart, compile_mode, plan_of, site_of
from tinygrad_lstm.primitive import REGISTRY, Primitive
from tinygrad_lstm.record import State
from tinygrad_lstm.storage import share
from tinygrad_lstm.tensor import Tensor
from tinygrad_lstm.tree import LEAF, TreeDef

__all__ = ["ReadyLayers", "ReadyRecurrent", "find", "keep", "keep_recurrent"]

_PLAIN = (False, False, False)  # the variant of a cell's program without lengths, states and gates


class _Run:
    """One cell over a sequence of one shape, by default from its zero state."""

    def __init__(
        self, cell: Any, recorded: Any, carry: list[Tensor] | None, steps: int, reverse: bool
    ) -> None:  # fmt: skip
        self.cell = cell
        self.outside = recorded.entry.outside
        # Parameters are looked up anew at each call: those of now may be stand-ins, which must not live on here.
        self.program, self.captures, self.carry = recorded.program, recorded.entry.captures, carry
        self.n_carry, self.steps, self.reverse = recorded.n_carry, steps, reverse
        self.n_ys = len(recorded.program.outputs) - self.n_carry
        self.sites: dict[tuple[bool, ...], Site] = {}
        self.silent: dict[bool, Any] = {}  # calls that nobody differentiates, by ``lead``

    def stands(self, k: int) -> tuple[list[str], dict[str, Any]]:
        """Lines of a function that returns None unless ``cell{k}`` is this cell, with the equations that were recorded,
        and what they refer to."""
        kind = type(self.cell)
        names: dict[str, Any] = {f"own{k}": self.cell, f"kind{k}": kind}
        unlike = [f"cell{k} is not own{k}"]
        for name in _METHODS:
            found = getattr(kind, name, self)
            if found is self:
                unlike.append(f"hasattr(kind{k}, {name!r})")
            else:
                names[f"{name}{k}"] = found
                unlike.append(f"kind{k}.{name} != {name}{k}")
        if self.outside is not None:
            names[f"unchanged{k}"] = self.outside.unchanged
            unlike.append(f"not unchanged{k}()")
        return [f"if {' or '.join(unlike)}: return None"], names

    def __call__(
        self, x: Tensor, captures: list[Tensor], current: State, lead: bool = False, carry: list[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """(parts of the final state..., outputs); with ``lead`` the state has another axis in front."""
        if carry is None:
            carry = self.carry or []
        operands = (*carry, x, *captures)
        linked = tuple([t._rg for t in operands[self.n_carry :]])
        if current.enabled and (True in linked or (carry is not self.carry and any(t._rg for t in carry))):
            return bind_site(self.site(linked), operands, True, current, lead=lead)
        call = self.silent.get(lead)
        if call is None:
            call = self.silent[lead] = self.silently(lead)
        outs: tuple[Tensor, ...] = call(*operands)
        return outs

    def known(self, linked: tuple[bool, ...]) -> Any:
        """The loop as a function of tensors, led, for a start that nobody differentiates."""
        if True in linked:
            return linked_loop(self.site(linked), lead=True)
        return self.silent.get(True) or self.silent.setdefault(True, self.silently(True))

    def site(self, linked: tuple[bool, ...]) -> Site:
        """The scan where these of x and the captures require a gradient."""
        site = self.sites.get(linked)
        if site is None:
            site = site_of(self.program, self.n_carry, self.n_ys, self.steps, self.reverse, linked)
            self.sites[linked] = site
        return site

    def silently(self, lead: bool) -> Any:
        """The loop on tensors, none of which is differentiated."""
        plan = plan_of(self.program, self.n_carry, self.n_ys, self.steps)

        def tensors(taken: Sequence[str], final: Sequence[str], ys: Sequence[str]) -> list[str]:
            made = [f"Tensor({part}{'[None]' if lead else ''})" for part in final]
            made += [f"*map(Tensor, apart([{', '.join(ys)}]))"] if len(ys) > 1 else [f"Tensor({y})" for y in ys]
            return [f"return {', '.join(made)},"]

        form = Form("{}._data", tensors, {"Tensor": Tensor, "apart": apart}, bare=True)
        return loop_call_in(form, plan, self.reverse)


class _Ready:
    """Cells over a time-major sequence of one shape, without lengths, trajectories, dropout or a budget."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        self.runs = runs
        self.changes = changes()
        # Settled now, also for what is written later: what is patched by then is not what was recorded.
        self._asked = lines, names = self._looking()
        found = ", ".join(f"found{k}" for k in range(len(runs)))
        self._captures = _written([*lines, f"return [{found}]"], {**names})

    def captures(self, cells: Sequence[Any], current: State) -> list[list[Tensor]] | None:
        """What the runs capture; None where something was changed since, or somebody looks at single operations."""
        found: list[list[Tensor]] | None = self._captures(cells, current)
        return found

    def _looking(self) -> tuple[list[str], dict[str, Any]]:
        """What is asked at every call, written down once: lines of a function of ``cells`` and ``current`` that returns
        None where :meth:`captures` does, else finds ``found0``, ...; and what they refer to."""
        names: dict[str, Any] = {
            "now": changes, "changes": self.changes, "Primitive": Primitive, "generation": Primitive.generation,
            "mode_now": compile_mode, "mode": compile_mode(),
        }  # fmt: skip
        same = "now() != changes or Primitive.generation != generation or mode_now() != mode"
        count = len(self.runs)
        lines = [f"if not current.plain or {same} or len(cells) != {count}: return None"]
        lines.append(f"{', '.join(f'cell{k}' for k in range(count))}, = cells")
        for k, run in enumerate(self.runs):
            more, found = run.stands(k)
            lines += [*more, f"found{k} = captures{k}()", f"if found{k} is None: return None"]
            names.update(found)
            names[f"captures{k}"] = run.captures
        return lines, names


def _written(lines: list[str], names: dict[str, Any]) -> Any:
    text = ["def call(cells, current, x=None, starts=None, owner=None):", "    try:"]
    text += [*("        " + line for line in lines), "    except AttributeError: return None"]
    names[MARK] = True
    exec(compile("\n".join(text), "<known call>", "exec"), names)
    return names.pop("call")


class ReadyLayers(_Ready):
    """Stacked layers."""

    def __init__(self, runs: Sequence[_Run], directions: int, parts: int) -> None:
        super().__init__(runs)
        self.directions, self.parts = directions, parts
        self.avals = [((len(runs), *t.shape), t.dtype) for t in runs[0].carry or []]
        self._whole: dict[bool, Any] = {}  # the call as one function, by whether anything is recorded
        # Of every run, the function of its loop by what requires gradients: x and the captures.
        self._loops: list[dict[tuple[bool, ...], Any]] = [{} for _ in runs]

    def whole(self, x: Tensor, cells: Sequence[Any], current: State, state: Any = None) -> tuple[Tensor, Any] | None:
        """The call from zeros or a state in PyTorch's form; None where :meth:`captures` is None, or the state is not as
        it should be."""
        starts = None
        if state is not None:
            starts = self.starts(state, current)
            if starts is None:
                return None
        call = self._whole.get(current.enabled)
        if call is None:
            call = self._whole[current.enabled] = self._written_out(current.enabled)
        result: tuple[Tensor, Any] | None = call(cells, current, x, starts, self)
        return result

    def _written_out(self, recorded: bool) -> Any:
        """The call as one function: the questions, then loop after loop, each with its record where there is one.

        It is given this object and does not refer to it: a cycle would keep parameters alive.
        """
        count = len(self.runs)
        lines, names = [*self._asked[0]], {**self._asked[1]}
        names.update(join=REGISTRY["concatenate"].bind, zeros=tuple(tuple(run.carry or ()) for run in self.runs))
        given = f"x, [{', '.join(f'found{k}' for k in range(count))}], current"
        if recorded:
            names.update(differentiated=_differentiated)
            lines.append(f"if starts is not None and differentiated(starts): return owner({given}, starts)")
        starts = "".join(f"({''.join(f's{k}_{p}, ' for p in range(run.n_carry))}), " for k, run in enumerate(self.runs))
        lines += ["if starts is None: starts = zeros", f"{starts}= starts"]
        below = "x"
        for first in range(0, count, self.directions):
            here = range(first, first + self.directions)
            for k in here:
                run = self.runs[k]
                captures = [f"w{k}_{j}" for j in range(len(run.program.captures))]
                operands = ", ".join([*(f"s{k}_{p}" for p in range(run.n_carry)), below, *captures])
                loop = f"loop{k}"
                lines.append(f"{''.join(f'{name}, ' for name in captures) or '()'} = found{k}")
                if recorded:
                    names[f"loops{k}"] = self._loops[k]
                    linked = "".join(f"{name}._rg, " for name in (below, *captures))
                    lines.append(f"{loop} = loops{k}.get(({linked}))")
                    lines.append(f"if {loop} is None: return owner._met({given}, starts)")
                else:
                    names[loop] = run.known((False,))
                lines.append(f"{''.join(f'final{k}_{p}, ' for p in range(run.n_carry))}y{k}, = {loop}({operands})")
            below = f"y{first}"
            if self.directions > 1:
                names["last"] = {"axis": -1}
                below = f"both{first}"
                lines.append(f"{below} = join(({''.join(f'y{k}, ' for k in here)}), last)")
        state = []
        for p in range(self.parts):
            parts = [f"final{k}_{p}" for k in range(count)]
            if count > 1:
                names[f"first{p}"] = {"axis": -len(self.avals[p][0])}
            state.append(parts[0] if count == 1 else f"join(({', '.join(parts)}), first{p})")
        lines.append(f"return {below}, {', '.join(state).join('()' if self.parts > 1 else ('', ''))}")
        return _written(lines, names)

    def _met(self, x: Tensor, captures: list[list[Tensor]], current: State, starts: Any) -> tuple[Tensor, Any]:
        """A call for which the loops of some run are not known yet: made in the ordinary way, after which they are."""
        result = self(x, captures, current, starts)
        below = x._rg
        for k, run in enumerate(self.runs):
            if k % self.directions == 0:
                into, below = below, False
            linked = (into, *[t._rg for t in captures[k]])
            below = below or True in linked
            self._loops[k][linked] = run.known(linked)
        return result

    def starts(self, state: Any, current: State) -> list[list[Tensor]] | None:
        """The state of every cell from one in PyTorch's form; None where it is not as it should be."""
        parts = (state,) if self.parts == 1 else state
        if parts.__class__ not in (tuple, list) or len(parts) != self.parts:
            return None
        for part, (shape, dtype) in zip(parts, self.avals, strict=True):
            if not isinstance(part, Tensor) or part._data.shape != shape or part._data.dtype != dtype:
                return None
        return [[_row(part, k, current) for part in parts] for k in range(len(self.runs))]

    def __call__(
        self, x: Tensor, captures: list[list[Tensor]], current: State, starts: list[list[Tensor]] | None = None
    ) -> tuple[Tensor, Any]:
        """Outputs of the last layer, and the state in PyTorch's form."""
        carries: list[Any] = starts or [None] * len(self.runs)
        if len(self.runs) == 1:
            outs = self.runs[0](x, captures[0], current, lead=True, carry=carries[0])
            return outs[-1], outs[0] if self.parts == 1 else outs[:-1]
        finals = []
        for first in range(0, len(self.runs), self.directions):
            outputs = []
            for k in range(first, first + self.directions):
                *final, y = self.runs[k](x, captures[k], current, carry=carries[k])
                finals.append(final)
                outputs.append(y)
            x = outputs[0] if len(outputs) == 1 else ops.concatenate(outputs, axis=-1)
        state = [ops.stack(list(column)) for column in zip(*finals, strict=True)]
        return x, state[0] if self.parts == 1 else tuple(state)


class ReadyRecurrent(_Ready):
    """One cell, also of a user's: its initial state is asked for at every call."""

    def __init__(self, run: _Run, carry: list[Tensor], carry_tree: TreeDef, y_tree: TreeDef) -> None:
        super().__init__([run])
        self.run, self.carry_tree, self.y_tree = run, carry_tree, y_tree
        self.ours = run.carry is not None
        self.avals = [(t.shape, t.dtype) for t in carry]

    def start(self, batch: int) -> Any:
        """What the cell says it starts from, if that has to be asked."""
        return None if self.ours else self.run.cell.initial_state(batch)

    def __call__(self, x: Tensor, start: Any, captures: list[list[Tensor]], current: State) -> tuple[Any, Any] | None:
        """Outputs and the final state; None where the loop starts from another kind of state than it did."""
        carry = None
        if start is not None:
            carry, tree = leaves_of(start, "init")
            if tree != self.carry_tree or [(t.shape, t.dtype) for t in carry] != self.avals:
                return None
        outs = list(self.run(x, captures[0], current, carry=carry))
        n_carry = self.run.n_carry
        return rebuilt(self.y_tree, outs[n_carry:]), rebuilt(self.carry_tree, outs[:n_carry])


def _differentiated(starts: Sequence[Sequence[Tensor]]) -> bool:
    return any(part._rg for start in starts for part in start)


def _row(part: Tensor, k: int, current: State) -> Tensor:
    """``part[k]``; without a record where there would be none."""
    if current.enabled and part._rg:
        return part[k]
    row = Tensor(part._data[k])
    if current.enabled:
        share(part, (row,))  # it may be saved: a write to the whole is a write to it
    return row


def find(layer: Any, x: Tensor) -> Any:
    """The known call of a layer on a tensor of this shape."""
    known = known_of(layer)
    return known.get((x._data.shape, x._data.dtype)) if known is not None else None


def keep(layer: Any, cells: Sequence[Any], directions: int, parts: int, x: Tensor, given: Tensor) -> None:
    """Keep a call that was just made in the ordinary way for :func:`find`, where all about it is settled.

    ``x`` is what was ``given``, time-major.
    """
    steps, batch, width = x.shape
    runs = []
    for k, cell in enumerate(cells):
        if k and k % directions == 0:
            width = directions * cells[k - 1].state_sizes()[0]
        if not _is_ours(cell):
            return
        like = Tensor(np.broadcast_to(np.zeros((), x.dtype), (steps, batch, width)))
        carry, tree = leaves_of(cell.initial_state(batch), "init")
        try:
            recorded = recorder_for(cell, _PLAIN)(None, carry, tree, [like], LEAF)
        except TraceError:
            return
        if recorded is None or recorded.entry is None or recorded.y_tree is not LEAF or not recorded.program.outputs:
            return
        runs.append(_Run(cell, recorded, carry, steps, k % directions == 1))
    _put(layer, given, ReadyLayers(runs, directions, parts))


def keep_recurrent(layer: Any, cell: Any, reverse: bool, x: Tensor, given: Tensor, start: Any) -> None:
    """Keep a call of ``nn.Recurrent`` that was just made from the state ``start``, as :func:`keep`."""
    drawn = getattr(cell, "noise", None) is not None
    if not isinstance(cell, Module) or drawn or not vars(cell).keys().isdisjoint(_OVERRIDES):
        return
    like = Tensor(np.broadcast_to(np.zeros((), x.dtype), x.shape))
    carry, tree = leaves_of(start, "init")
    try:
        recorded = recorder_for(cell, _PLAIN)(None, carry, tree, [like], LEAF)
    except TraceError:
        return
    if recorded is None or recorded.entry is None or not recorded.program.outputs or not carry:
        return
    # What a user's cell starts from, or a user gave, is the user's (and may have a past): it must not live on here.
    zeros = None
    if _is_ours(cell):
        made: Any = cell
        zeros, _ = leaves_of(made.initial_state(x.shape[1]), "init")
    run = _Run(cell, recorded, zeros, x.shape[0], reverse)
    _put(layer, given, ReadyRecurrent(run, carry, tree, recorded.y_tree))


def _put(layer: Any, x: Tensor, ready: _Ready) -> None:
    """Keep a call, and give up those before the last change: they are never right again, and hold on to cells."""
    known = known_of(layer, make=True)
    for key, other in list(known.items()):
        if isinstance(other, _Ready) and other.changes != ready.changes:
            known.pop(key, None)
    known[x.shape, x.dtype] = ready


def _is_ours(cell: Any) -> bool:
    """Whether equations and initial state are those of this package: that one is zeros, and stays so."""
    kind = type(cell)
    methods = [getattr(kind, name, None) for name in _METHODS]
    ours = all(m is None or (getattr(m, "__module__", None) or "").startswith("tinygrad_lstm.") for m in methods)
    return ours and isinstance(cell, GatedCell) and vars(cell).keys().isdisjoint(_OVERRIDES)


_OVERRIDES = ("forward", "initial_state", "state_sizes", "noise")


# What the equations and the initial state of a cell may come from.
_METHODS = ("forward", "initial_state", "state_sizes", "noise", "__call__")
