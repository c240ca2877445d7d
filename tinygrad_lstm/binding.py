"""Making the record of an application."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tinygrad_lstm.record import Aval, Output, Record, State
from tinygrad_lstm.storage import guard_of
from tinygrad_lstm.tensor import Tensor

if TYPE_CHECKING:
    from tinygrad_lstm.primitive import Primitive

__all__ = ["record_application"]

# The modules whose frames are not the user's: provenance looks past them.
_INTERNAL = tuple(
    f"tinygrad_lstm.{name}" for name in ("autodiff", "binding", "ops", "primitive", "record", "tape", "tensor", "trace")
)


def record_application(
    prim: Primitive, args: tuple[Any, ...], params: dict[str, Any], outputs: tuple[Tensor, ...],
    needs: bool, current: State, several: bool,
) -> Record:  # fmt: skip
    """Make the Record of an application and link its outputs to it."""
    keep, keep_from = prim._saved_inputs, prim._saved_from
    every = bool(current.tapes) or current.trace is not None
    guards = None
    parents: list[Any] = []
    saved: list[Any] = []
    for index, arg in enumerate(args):
        if isinstance(arg, Tensor):
            linked = arg._rg or (every and arg.dtype.kind == "f")
            parents.append((arg._node or arg) if linked and prim.differentiable else None)
            if index in keep or index >= keep_from:
                saved.append(arg)
                guard = guard_of(arg)
                if guard is not None:
                    guards = guards or {}
                    guards[index] = guard
            else:
                saved.append(None)
        else:
            parents.append(None)
            saved.append(arg if index in keep or index >= keep_from else None)
    if prim.saves_out:
        traced = current.trace is not None
        saved.append(outputs[0] if traced else outputs[0]._data)
        outputs[0]._used = True
    else:
        saved.append(None)
    shapes = None
    if prim._needs_shapes:
        shapes = tuple([(a.shape, a.dtype) if isinstance(a, Tensor) else ((), None) for a in args])
    first = outputs[0]
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_INTERNAL):
        frame = frame.f_back
    record = Record(
        prim, params, tuple(parents), tuple(saved), first.shape, first.dtype, shapes,
        tuple([Aval(o.shape, o.dtype) for o in outputs]) if several else None, current.place,
        None if frame is None else frame.f_code, -1 if frame is None else frame.f_lasti,
    )  # fmt: skip
    if guards is not None:
        record.more().guards = guards
    if several:
        for index, output in enumerate(outputs):
            output._node = Output(record, index, output.shape, output.dtype)
            output._rg = needs and prim.differentiable and output.dtype.kind == "f"
    else:
        first._node = record
        first._rg = needs and prim.differentiable and first.dtype.kind == "f"
    if current.tapes:
        if not needs:
            record.more().tape_only = True
        for tape in current.tapes:
            tape.add(record, args, outputs)
    return record
