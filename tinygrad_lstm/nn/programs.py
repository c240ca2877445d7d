"""Recorded programs of a cell, kept between calls.

Recording a body costs more than running a tiny one.  A program is valid for one structure of the cell (its
version), one set of shapes and dtypes, and one mode (train or eval).  What it captures is read again at
every call, by its place in the module: a Parameter whose ``data`` was set, or that was replaced, counts.  A
cell that captures anything else (a tensor that it closes over) is recorded at every call; one that asks for values of
its parameters (``self.scale.item()``), when those have changed.

What a user's cell reads outside of itself (globals, attributes of its class) is looked at before a program is used
again.  What recording cannot see is a value that a function returns anew (a clock, ``numpy.random``): it is
what it was when the cell was recorded, at every step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.draws import recorded_again
from tinygrad_lstm.compiler.reach import Reach, is_foreign
from tinygrad_lstm.errors import TraceError
from tinygrad_lstm.kernels.locks import Lock
from tinygrad_lstm.nn.module import Module, Parameter
from tinygrad_lstm.ops.control import Recorded, record_body
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.random import Generator
from tinygrad_lstm.tensor import Tensor
from tinygrad_lstm.trace import depends_on, same_values

__all__ = ["known_of", "recorder_for"]

_MOST = 32  # programs per cell
_programs: dict[int, dict[Any, Any]] = {}  # by the cell's id: a dataclass cannot be a key
_lock = Lock()

# Attributes of these types do not change without the module's version changing (lists and dicts are looked into).
_SEEN = (
    Module,
    Tensor,
    np.ndarray,
    np.generic,
    np.dtype,
    bool,
    int,
    float,
    str,
    type,
    Generator,
    FunctionType,
    BuiltinFunctionType,
)
_KNOWN = frozenset({type(None), bool, int, float, str, type, Tensor, Parameter, np.ndarray})  # the same, at one look


def known_of(module: Module, make: bool = False) -> Any:
    """What is kept for a module between calls; None where there is nothing yet (and none is to be made)."""
    known: Any = _programs.get(id(module))
    if not make:
        return known
    with _lock:
        known = _programs.get(id(module))
        if known is None:
            known = _programs[id(module)] = {}
            weakref.finalize(module, _programs.pop, id(module), None)
        while len(known) >= _MOST:
            del known[next(iter(known))]
    return known


def _has_opaque_state(cell: Module) -> bool:
    """Whether the cell keeps objects whose content can change unseen: then its body is recorded at every call."""
    return any(_is_opaque(value) for module in cell.modules() for value in module.__dict__.values())


def _quick_state(cell: Module) -> tuple[Any, ...] | None:
    """Versions and modes of the cell's modules in one pass; None where only a closer look tells.

    A cell is recorded anew when this changes.  Lists, dicts and unknown objects can change without it.
    """
    found: list[Any] = []
    seen = {id(cell)}
    pending = [cell]
    while pending:
        module = pending.pop()
        found += (module._version, module.training)
        for value in module.__dict__.values():
            kind = value.__class__
            if kind in _KNOWN:
                continue
            if isinstance(value, Module):
                if id(value) not in seen:
                    seen.add(id(value))
                    pending.append(value)
            elif kind is tuple:
                if not all(item.__class__ in _KNOWN for item in value):
                    return None
            elif not isinstance(value, _SEEN):
                return None
    return tuple(found)


def _is_opaque(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_is_opaque(item) for item in value)
    if isinstance(value, dict):
        return any(_is_opaque(item) for item in value.values())
    return value is not None and not isinstance(value, _SEEN)


def _outside(cell: Module) -> Reach | None:
    """What the methods of a user's cell read outside of the cell: globals, and attributes of its class."""
    classes = {base for module in cell.modules() for base in type(module).__mro__ if not is_foreign(base)}
    return Reach(None, sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__))) if classes else None


class _Entry:
    """A recorded body, and where what it captures stands in the module."""

    __slots__ = ("again", "captures", "outside", "read", "recorded", "settled")

    def __init__(
        self, recorded: Recorded, places: list[list[tuple[Any, Any]]], outside: Reach | None, settled: bool,
        read: list[tuple[Any, Any, np.ndarray]],
    ) -> None:  # fmt: skip
        self.recorded = recorded
        self.outside = outside
        self.read = read  # (holder, key, values) of tensors whose values the equations were made with
        self.again = 0  # how often the same equations were made since these had changed
        program = recorded.program
        self.captures = _captures(places, [program.avals[slot] for slot in program.captures])
        # Whether only a change that counts (see module.changes), or one outside, can make another program, or other
        # captures, of it.
        self.settled = settled and not read and all(_is_attribute(holder) for found in places for holder, _ in found)

    def holds(self) -> bool:
        """Whether the tensors that were read have the same values."""
        try:
            return all(same_values(holder[key]._data, values) for holder, key, values in self.read)
        except (LookupError, AttributeError):
            return False


def _captures(places: list[list[tuple[Any, Any]]], avals: Sequence[Aval]) -> Callable[[], list[Any] | None]:
    """A function that says what stands in the places now; None where that is not what was recorded.

    ``places`` are all (holder, key) of every capture: a shared parameter has several.  A list or dict of Parameters may
    be changed without the module knowing, also to other shapes.
    """
    names: dict[str, Any] = {"Tensor": Tensor, "Parameter": Parameter}
    lines = []
    for k, ((first, *others), aval) in enumerate(zip(places, avals, strict=True)):
        for j, (holder, key) in enumerate((first, *others)):
            names.update({f"h{k}_{j}": holder, f"k{k}_{j}": key})
        names.update({f"s{k}": aval.shape, f"d{k}": np.dtype(aval.dtype)})
        # Its array answers sooner; what stands in for a parameter while something is recorded has none.
        lines.append(f"t{k} = h{k}_0[k{k}_0]")
        lines.append(f"if t{k}.__class__ is Parameter: a = t{k}._data")
        lines.append(f"elif isinstance(t{k}, Tensor): a = t{k}")
        lines.append("else: return None")
        unlike = [f"a.shape != s{k} or (a.dtype is not d{k} and a.dtype != d{k})"]
        unlike += [f"h{k}_{j + 1}[k{k}_{j + 1}] is not t{k}" for j in range(len(others))]
        lines.append(f"if {' or '.join(unlike)}: return None")
    body = "\n        ".join([*lines, f"return [{', '.join(f't{k}' for k in range(len(places)))}]"])
    text = f"def captures():\n    try:\n        {body}\n    except (LookupError, AttributeError):\n        return None"
    exec(compile(text, "<captures>", "exec"), names)
    function: Callable[[], list[Any] | None] = names.pop("captures")
    return function


def _is_attribute(holder: Any) -> bool:
    """Whether it is the __dict__ of a module."""
    return isinstance(holder, dict) and "_version" in holder


def _recorded_still(cell: Module, record: Callable[[], Recorded]) -> Recorded:
    """What is recorded of a body; TraceError where the body changes something at every step (a counter, a flag that its
    first step clears): what is recorded would have the first values for ever."""
    reach = Reach(cell)
    before, put_back = reach.by_content(), reach.kept()
    first = record()
    once = Reach(cell).by_content()
    if once == before:
        return first
    # What is only set, to the same at every step, is now as it stays.
    second = record()
    if Reach(cell).by_content() == once and second.program.key == first.program.key:
        return second
    put_back()
    raise TraceError(
        f"{type(cell).__name__} changes something at every step (an attribute, say), so it runs step by step; to be "
        "compiled, what changes from step to step must be a part of the state or of the input"
    )


def recorder_for(cell: Any, variant: Any) -> Callable[..., Any]:
    """A function like :func:`~tinygrad_lstm.ops.control.record_body` that looks into the cell's cache first.

    ``variant`` says how the body differs from a plain call of the cell (lengths, trajectories, ...).  Given None for a
    body it only looks, and returns None where nothing is found.
    """
    if not isinstance(cell, Module):
        return record_body

    def found_or_recorded(body: Any, carry: Any, carry_tree: Any, xs: Any, x_tree: Any) -> Recorded | None:
        def record() -> Recorded:
            return _recorded_still(cell, lambda: record_body(body, carry, carry_tree, xs, x_tree))

        structure: Any = _quick_state(cell)
        settled = structure is not None
        if structure is None:
            if _has_opaque_state(cell):
                return None if body is None else record()
            structure = (cell.version, tuple(module.training for module in cell.modules()))
        known = known_of(cell) or {}
        key = (
            variant,
            type(cell).forward,
            type(cell).__call__,
            structure,
            Primitive.generation,
            carry_tree,
            x_tree,
            tuple([(t.shape, t.dtype) for t in carry]),
            tuple([(t.shape[1:], t.dtype) for t in xs]),
        )
        entry = known.get(key)
        if entry is not None:
            if isinstance(entry, str):
                raise TraceError(entry)
            same = (entry.outside is None or entry.outside.unchanged()) and (not entry.read or entry.holds())
            captures = entry.captures() if same else None
            if captures is not None:
                recorded = Recorded(entry.recorded.program, captures, entry.recorded.n_carry, entry.recorded.y_tree)
                recorded.entry = entry if entry.settled else None
                depends_on([holder[key] for holder, key, _ in entry.read])
                return recorded
        if body is None:
            return None
        known = known_of(cell, make=True)
        try:
            recorded = record()
        except TraceError as error:
            known[key] = str(error)  # it needs values: do not try again at every call
            raise
        places: dict[int, list[tuple[Any, Any]]] = {}
        for place in cell._all_places():
            places.setdefault(id(place.value), []).append((place.holder, place.key))
        found = [places.get(id(t)) for t in (*recorded.captures, *recorded.read)]
        if all(place is not None for place in found):
            # The captured tensors themselves are not kept: swapped-in variables of grad must not live on here.
            bare = Recorded(recorded.program, [], recorded.n_carry, recorded.y_tree)
            captured = [place for place in found[: len(recorded.captures)] if place is not None]
            read = [
                (*place[0], t._data.copy())
                for place, t in zip(found[len(captured) :], recorded.read, strict=True)
                if place is not None
            ]
            made = known[key] = _Entry(bare, captured, _outside(cell), settled, read)
            if entry is not None and not entry.holds():
                made.again = entry.again + (entry.recorded.program.key == bare.program.key)
                recorded_again(f"the body of {type(cell).__name__}", made.again)
            recorded.entry = known[key] if known[key].settled else None
        return recorded

    return found_or_recorded
