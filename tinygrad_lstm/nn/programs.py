"""Recorded programs of a cell, kept between calls.

Recording a body costs more than running a tiny one.  A program is valid for one structure of the cell (its
version), one set of shapes and dtypes, and one mode (train or eval).  What it captures is read again at
every call, by its place in the module: a Parameter whose ``data`` was set, or that was replaced, counts.  A
cell that captures anything else (a tensor that it closes over) is recorded at every call; one that asks for values of
its parameters (``self.scale.item()``), when those have changed.

What a user's cell reads outside of itself (globals, attributes of its class), and what is in its lists, dicts, small
arrays, objects with their classes, and functions, is looked at before a program is used again.  A cell that keeps what
cannot be looked into (a deque), or not quickly (a large array), is recorded at every call.  What recording cannot see
is a value that a function returns anew (a clock, ``numpy.random``): it is what it was when the cell was recorded, at
every step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import PurePath
from types import BuiltinFunctionType, ModuleType
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.draws import recorded_again
from tinygrad_lstm.compiler.reach import LARGEST, Reach
from tinygrad_lstm.compiler.reads import is_foreign, is_installed
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
_lock = Lock()

# Objects of these types do not change without the module's version changing, or not in what their use records.
_SEEN = (
    Module, Tensor, Primitive, Generator, np.generic, np.dtype, np.ufunc, type,
    BuiltinFunctionType, PurePath, ModuleType, range, re.Pattern,
)  # fmt: skip
_FIXED = (Module, Tensor, Primitive, Generator, np.generic, np.dtype, np.ufunc, range)  # nothing to look into
_KNOWN = frozenset({type(None), bool, int, float, str, Tensor, Parameter})  # the same, at one look


def known_of(module: Module, make: bool = False) -> Any:
    """What is kept for a module between calls; None where there is nothing yet (and none is to be made).

    It is the module's own, in no global place: what refers back to the module is a cycle like any other.
    """
    try:
        known: Any = _held(module)
    except AttributeError:
        known = None
    if not make:
        return known
    with _lock:
        try:
            known = _held(module)
        except AttributeError:
            known = {}
            _hold(module, known)
        while len(known) >= _MOST:
            known.pop(next(iter(known)), None)
    return known


_slot = vars(Module)["_known"]  # past Module.__setattr__, which makes attributes
_held, _hold = _slot.__get__, _slot.__set__


def _structure(cell: Module) -> tuple[Any, ...]:
    """Versions and modes of the cell's modules, those in lists and dicts included.

    A cell is recorded anew when this changes.  What else is in lists, dicts and objects is for :func:`_surroundings`.
    """
    found: list[Any] = []
    seen: set[int] = set()
    pending: list[Any] = [cell]
    while pending:
        value = pending.pop()
        if isinstance(value, Module):
            found += (value._version, value.training)
            value = value.__dict__
        items = value.values() if isinstance(value, dict) else value
        for item in items:
            if item.__class__ not in _KNOWN and isinstance(item, (Module, list, tuple, dict)) and id(item) not in seen:
                seen.add(id(item))
                pending.append(item)
    return tuple(found)


def _surroundings(cell: Module) -> Reach | None:
    """What a cell reads that no version tells of: globals, attributes of a user's class, what is in its lists and
    dicts, in objects of the user's, and in what functions close over.  None where there is nothing of that kind."""
    classes = {base for module in cell.modules() for base in type(module).__mro__ if not is_foreign(base)}
    values = _unversioned(cell)
    if not classes and not values:
        return None
    return Reach(values, sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__)), places=True)


def _unversioned(cell: Module) -> tuple[Any, ...]:
    """Attributes whose content can change without a version that changes."""
    values = (value for module in cell.modules() for value in module.__dict__.values())
    return tuple([v for v in values if v.__class__ not in _KNOWN and not isinstance(v, _FIXED)])


def _is_opaque(cell: Module) -> bool:
    """Whether the cell keeps objects whose content can change unseen: then its body is recorded at every call."""
    return not all(_is_seen(value) for value in Reach(_unversioned(cell)).opaque)


def _is_seen(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.nbytes <= LARGEST and not value.dtype.hasobject  # compared by what it holds
    return isinstance(value, _SEEN) and (not isinstance(value, ModuleType) or is_foreign(value) or is_installed(value))


class _Entry:
    """A recorded body, and where what it captures stands in the module."""

    __slots__ = ("again", "captures", "outside", "read", "recorded", "settled")

    def __init__(
        self, recorded: Recorded, places: list[list[tuple[Any, Any]]], outside: Reach | None,
        read: list[tuple[Any, Any, np.ndarray]],
    ) -> None:  # fmt: skip
        self.recorded = recorded
        self.outside = outside
        self.read = read  # (holder, key, values) of tensors whose values the equations were made with
        self.again = 0  # how often the same equations were made since these had changed
        program = recorded.program
        self.captures = _captures(places, [program.avals[slot] for slot in program.captures])
        # Whether only a change that counts (see module.changes), or one outside, can make another program of it.
        self.settled = not read

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


_STRUCTURE = 3  # where it stands in a key


def _give_up(known: dict[Any, Any], structure: tuple[Any, ...]) -> None:
    """Drop programs of earlier versions, which do not come back: they hold on to what was an attribute then."""
    for key in list(known):
        if len(key) > _STRUCTURE and key[_STRUCTURE][::2] != structure[::2]:
            known.pop(key, None)


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

        known = known_of(cell) or {}
        key: tuple[Any, ...] = (
            variant,
            type(cell).forward,
            type(cell).__call__,
            _structure(cell),
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
        if _is_opaque(cell):
            return record()
        known = known_of(cell, make=True)
        _give_up(known, key[_STRUCTURE])
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
            made = known[key] = _Entry(bare, captured, _surroundings(cell), read)
            if entry is not None and not entry.holds():
                made.again = entry.again + (entry.recorded.program.key == bare.program.key)
                recorded_again(f"the body of {type(cell).__name__}", made.again)
            recorded.entry = known[key] if known[key].settled else None
        return recorded

    return found_or_recorded
