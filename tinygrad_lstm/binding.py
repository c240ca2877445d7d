"""Making the record of an application."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tinygrad_lstm.record import Aval, Output, Record, State
from tinygrad_lstm.storage import guards_of
from tinygrad_lstm.tensor import Tensor

if TYPE_CHECKING:
    from tinygrad_lstm.primitive import Primitive

__all__ = ["mark_internal", "record_application", "record_plain"]

# Modules whose frames are not the user's carry this name: provenance looks past them.
MARK = "_provenance_looks_past"
_NOTHING = (None,)


_ENGINE = (
    "autodiff", "binding", "calls", "compiler", "operands", "ops", "primitive", "pullback", "pushforward", "record",
    "tape", "tensor", "trace", "tree",
)  # fmt: skip


def mark_internal(*parts: str) -> None:
    """Mark modules of this package (by default the engine's); called when all of them are imported."""
    prefixes = tuple(f"tinygrad_lstm.{part}" for part in parts or _ENGINE)
    for name, module in list(sys.modules.items()):
        if name.startswith(prefixes) and module is not None:
            module.__dict__[MARK] = True


def _node_of(arg: Any, every: bool = False) -> Any:
    """The node of an input that gradients flow to; under a Tape or trace (``every``), of all floating ones."""
    if isinstance(arg, Tensor) and (arg._rg or (every and arg.dtype.kind == "f")):
        return arg._node or arg
    return None


def _kept(prim: Primitive, parents: Sequence[Any]) -> tuple[set[int], bool]:
    """Which inputs, and whether the output, the rules of the linked inputs need."""
    keep: set[int] = set()
    saves_out = False
    for (inputs, out), parent in zip(prim.kept_for, parents, strict=False):
        if parent is not None:
            keep = keep | inputs
            saves_out = saves_out or out
    return keep, saves_out


def record_plain(
    prim: Primitive, args: tuple[Any, ...], params: dict[str, Any], result: Tensor, out: Any, current: State
) -> None:
    """:func:`record_application` for the common case: one output, no Tape, no trace, something requires a gradient."""
    stored = False  # whether anything that is saved may be written to behind the tape's back
    if prim.saves_nothing:
        saved: tuple[Any, ...] = _NOTHING
        if prim.quick and len(args) == 2:
            x, y = args
            parents: tuple[Any, ...] = (
                (x._node or x) if x.__class__ is Tensor and x._rg else _node_of(x),
                (y._node or y) if y.__class__ is Tensor and y._rg else _node_of(y),
            )
        else:
            parents = tuple([(arg._node or arg) if isinstance(arg, Tensor) and arg._rg else None for arg in args])
    else:
        parents = tuple([(arg._node or arg) if isinstance(arg, Tensor) and arg._rg else None for arg in args])
        keep, saves_out = prim._saved_inputs, prim.saves_out
        if prim.simple and None in parents:
            keep, saves_out = _kept(prim, parents)
        kept: list[Any] = []
        for index, arg in enumerate(args):
            if index not in keep:
                kept.append(None)
                continue
            kept.append(arg)
            if isinstance(arg, Tensor):
                arg._used = True
                stored = stored or arg._storage is not None
        if saves_out:
            kept.append(out)
            result._used = True
        else:
            kept.append(None)
        saved = tuple(kept)
    frame: Any = sys._getframe(2)
    while frame is not None and MARK in frame.f_globals:
        frame = frame.f_back
    code, lasti = (None, -1) if frame is None else (frame.f_code, frame.f_lasti)
    dtype = out.dtype
    shapes = None
    if prim._needs_shapes:
        shapes = tuple([(a._data.shape, a._data.dtype) if isinstance(a, Tensor) else ((), None) for a in args])
    record = Record(prim, params, parents, saved, out.shape, dtype, shapes, None, current.place, code, lasti)
    if stored:
        record.guards, record.marked = guards_of(saved)
    result._node = record
    result._rg = dtype.kind == "f"


def record_application(
    prim: Primitive, args: tuple[Any, ...], params: dict[str, Any], outputs: tuple[Tensor, ...],
    needs: bool, current: State, several: bool, avals: tuple[Aval, ...] | None = None, last: Any = None,
) -> Record:  # fmt: skip
    """Make the Record of an application and link its outputs to it.

    ``avals``: of the outputs, where they are known.  ``last``: what is saved in place of the outputs.
    """
    keep, keep_from = prim._saved_inputs, prim._saved_from
    saves_out = prim.saves_out
    stored = False  # whether anything that is saved may be written to behind the tape's back
    if not prim.differentiable:
        parents: list[Any] = [None] * len(args)
    elif current.tapes or current.trace is not None:
        parents = [_node_of(arg, True) for arg in args]
    else:
        parents = [(arg._node or arg) if isinstance(arg, Tensor) and arg._rg else None for arg in args]
    if prim.simple and None in parents:
        keep, saves_out = _kept(prim, parents)
    saved: list[Any]
    if keep_from:
        saved = [arg if index in keep or index >= keep_from else None for index, arg in enumerate(args)]
    else:
        saved = [*args]
    for arg in saved:
        if isinstance(arg, Tensor):
            arg._used = True
            stored = stored or arg._storage is not None
    if last is None and saves_out:
        kept_outputs = tuple([o if current.trace is not None else o._data for o in outputs])
        saved.append(kept_outputs if several else kept_outputs[0])
        for output in outputs:
            output._used = True
    else:
        saved.append(last)
    shapes = None
    if prim._needs_shapes:
        shapes = tuple([(a.shape, a.dtype) if isinstance(a, Tensor) else ((), None) for a in args])
    if avals is None:
        avals = tuple([Aval(output.shape, output.dtype) for output in outputs])
    frame: Any = sys._getframe(2)
    while frame is not None and MARK in frame.f_globals:
        frame = frame.f_back
    record = Record(
        prim, params, tuple(parents), tuple(saved), *avals[0], shapes, avals if several else None, current.place,
        None if frame is None else frame.f_code, -1 if frame is None else frame.f_lasti,
    )  # fmt: skip
    if stored:
        record.guards, record.marked = guards_of(saved)
    needs_too = needs and prim.differentiable
    for index, output in enumerate(outputs):
        output._node = Output(record, index) if several else record
        output._rg = needs_too and avals[index].dtype.kind == "f"
    if current.tapes:
        if not needs:
            record.more().tape_only = True
        for tape in current.tapes:
            tape.add(record, args, outputs)
    return record
