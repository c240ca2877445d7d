"""A cell or a module recorded once on data-free tensors: its Program, and what its inputs and captures are called."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError, Error, TraceError
from tinygrad_lstm.nn.module import Module
from tinygrad_lstm.nn.recurrent import draw_noise
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Program
from tinygrad_lstm.random import witnessed
from tinygrad_lstm.tape import no_grad
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.trace import Traced, trace
from tinygrad_lstm.tree import flatten, unflatten

__all__ = ["Recorded", "cells_of", "is_cell", "record_cell", "record_module"]

ROWS = 2  # of the batch that a cell is recorded for


class Recorded(NamedTuple):
    """A program with names for its slots.

    Attributes
    ----------
    program : Program
    root : str
        The path at which the module itself ran; what ran in a part of it has a longer one.
    inputs : names of the inputs, the state excepted
    states : (old slot, new operand, name) for each part of the state
    outputs : (operand, name) of the outputs, the state excepted
    captures : slot -> (name, whether it is a parameter, the tensor)
    """

    program: Program
    root: str
    inputs: dict[int, str]
    states: list[tuple[int, Any, str]]
    outputs: list[tuple[Any, str]]
    captures: dict[int, tuple[str, bool, Tensor]]


def is_cell(module: Any) -> bool:
    """Whether an object has a cell's two methods."""
    return callable(module) and not isinstance(module, type) and hasattr(module, "initial_state")


def cells_of(module: Any) -> list[tuple[str, Any]]:
    """The cells in a module with their paths; a cell that another one wraps belongs to that one."""
    if is_cell(module):
        return [("", module)]
    if not isinstance(module, Module):
        raise DTypeError(f"found {type(module).__name__}, expected a cell, or a module that has cells")
    found: list[tuple[str, Any]] = []
    _collect(module, "", found, set())
    return found


def _collect(module: Any, path: str, found: list[tuple[str, Any]], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    if is_cell(module):
        found.append((path, module))
        return
    # Layers with PyTorch's flat names hold their cells apart from the tree.
    hidden = [(cell._label, cell) for cell in getattr(module, "_cells", ())]
    for name, child in (*hidden, *module.named_children()):
        _collect(child, f"{path}.{name}" if path else str(name), found, seen)


@contextmanager
def _undrawn() -> Iterator[None]:
    """Whatever is drawn inside, the generators stand afterwards where they stood."""
    with witnessed() as drawn:
        try:
            yield
        finally:
            for generator, state in drawn.values():
                generator.set_state(state)


def _arguments(module: Any) -> list[str]:
    """The names of the positional arguments of ``forward``."""
    try:
        parameters = inspect.signature(module.forward if isinstance(module, Module) else module).parameters
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _avals(leaves: Sequence[Any]) -> list[Aval]:
    return [Aval(tuple(leaf.shape), leaf.dtype) for leaf in map(asarray, leaves)]


def _leaf_names(tree: Any, base: str) -> list[str]:
    """A name for every leaf: the base itself for a single one, keys of a dict or of a named tuple, else numbers."""
    leaves, treedef = flatten(tree)
    if treedef.kind == "leaf":
        return [base]
    if treedef.keys and all(child.kind == "leaf" for child in treedef.children):
        return [str(key) for key in treedef.keys]
    return [f"{base}{k}" for k in range(len(leaves))]


def _traced(module: Any, body: Any, avals: list[Aval]) -> Traced:
    """The body recorded; an error that says that it cannot be names the module."""
    try:
        with _undrawn():
            return trace(body, avals, flat=True)
    except TraceError as error:
        raise TraceError(f"{type(module).__name__} cannot be recorded: {error}") from None


def record_cell(cell: Any, x: Any = None) -> Recorded:
    """Record one step of a cell.

    ``x`` is one step's input (a tree of ``(B, ...)``).  Without it the width of x is the cell's ``input_size``, or
    what is found by trying the lengths that occur in the shapes of the parameters (and those less the state's).

    Raises ArgumentError where no width or several work.
    """
    if not is_cell(cell):
        raise DTypeError(
            f"found {type(cell).__name__}, expected a cell: a Module with forward(x, state) -> (output, state) and "
            "initial_state(batch)"
        )
    if x is not None:
        return _record(cell, x)
    with no_grad(), _undrawn():
        state = [leaf for leaf in map(asarray, flatten(cell.initial_state(ROWS))[0]) if leaf.dtype.kind == "f"]
    dtype = state[0].dtype if state else np.dtype(np.float32)
    who = type(cell).__name__
    width = getattr(cell, "input_size", None)
    if isinstance(width, (int, np.integer)):
        return _record(cell, np.zeros((ROWS, int(width)), dtype))
    known: list[Any] = list(cell.parameters()) if isinstance(cell, Module) else []
    lengths = {n for parameter in known for n in parameter.shape}
    joined = {n - leaf.shape[-1] for n in lengths for leaf in state if leaf.ndim}  # x and h side by side
    works: dict[int, Recorded] = {}
    last: Exception | None = None
    # What is 1 wide broadcasts, so other widths come first.
    for width in (*sorted(n for n in lengths | joined if n > 1), 1):
        if width == 1 and works:
            break
        try:
            works[width] = _record(cell, np.zeros((ROWS, width), dtype))
        except TraceError:  # it needs values: no width helps
            raise
        except (Error, ValueError, TypeError, IndexError) as error:
            last = error
    if len(works) != 1:
        found = f"x of the widths {sorted(works)} all work" if works else f"no x of shape (B, width) works: {last}"
        raise ArgumentError(f"{who}: the width of x is not known ({found}); give the input of one step as x=...")
    return next(iter(works.values()))


def _record(cell: Any, x: Any) -> Recorded:
    names = [*_arguments(cell), "x", "state"][:3] if len(_arguments(cell)) < 2 else _arguments(cell)
    x_leaves, x_tree = flatten(x)
    with no_grad(), _undrawn():
        rows = next((asarray(leaf).shape[0] for leaf in x_leaves if asarray(leaf).ndim), ROWS)
        state = cell.initial_state(rows)
        noise = draw_noise(cell, 1, rows)
    s_leaves, s_tree = flatten(state)
    n_leaves, n_tree = flatten(noise)
    avals = [*_avals(x_leaves), *_avals(s_leaves), *(Aval(a.shape[1:], a.dtype) for a in _avals(n_leaves))]
    output_names: list[str] = []

    def body(*tensors: Any) -> list[Any]:
        old = tensors[len(x_leaves) : len(x_leaves) + len(s_leaves)]
        extra = [unflatten(n_tree, tensors[len(x_leaves) + len(s_leaves) :])] if n_leaves else []
        result = cell(unflatten(x_tree, tensors[: len(x_leaves)]), unflatten(s_tree, old), *extra)
        if not isinstance(result, tuple) or len(result) != 2:
            raise DTypeError(f"{type(cell).__name__}.forward returned no pair (output, state)")
        outputs, new = (flatten(part)[0] for part in result)
        output_names[:] = _leaf_names(result[0], "y")
        return [*map(asarray, outputs), *map(asarray, new)]

    traced = _traced(cell, body, avals)
    program = traced.program
    inputs = dict(zip(program.inputs, _leaf_names(x, names[0]), strict=False))
    noise_slots = program.inputs[len(x_leaves) + len(s_leaves) :]
    inputs.update(zip(noise_slots, _leaf_names(noise, names[2] if len(names) > 2 else "noise"), strict=True))
    old_slots = program.inputs[len(x_leaves) : len(x_leaves) + len(s_leaves)]
    new = program.outputs[len(output_names) :]
    return Recorded(
        program, getattr(cell, "_label", None) or "", inputs,
        list(zip(old_slots, new, _state_names(program, new, state, names[1]), strict=True)),
        list(zip(program.outputs, output_names, strict=False)), _captures(traced, cell),
    )  # fmt: skip


def _state_names(program: Program, new: Sequence[Any], state: Any, argument: str) -> list[str]:
    """The names of the state's parts: those given to the new ones with ``tg.name``, else what the code calls them."""
    base = argument if argument not in ("carry", "hidden", "hx") else "state"
    names: list[str] = []
    for slot, default in zip(new, _leaf_names(state, base), strict=True):
        name = program.labels.get(slot, default) if slot.__class__ is int else default
        names.append(default if name in names else name)
    return names


def _captures(traced: Any, module: Any) -> dict[int, tuple[str, bool, Tensor]]:
    """What each capture is called: a parameter by its dotted name, another tensor by its own or a number."""
    named = {id(p): name for name, p in module.named_parameters()} if isinstance(module, Module) else {}
    found: dict[int, tuple[str, bool, Tensor]] = {}
    for slot, tensor in zip(traced.program.captures, traced.captures, strict=True):
        name = named.get(id(tensor))
        label = traced.program.labels.get(slot)
        found[slot] = (name or label or f"K{slot}", name is not None, tensor)
    return found


def record_module(module: Any, x: Any) -> Recorded:
    """Record a call ``module(x)``, ``x`` a tree of arrays."""
    leaves, treedef = flatten(x)

    output_names: list[str] = []

    def body(*tensors: Any) -> Any:
        result = module(unflatten(treedef, tensors))
        output_names[:] = _leaf_names(result, "output")
        return flatten(result)[0]

    traced = _traced(module, body, _avals(leaves))
    names = _leaf_names(x, (_arguments(module) or ["x"])[0])
    return Recorded(
        traced.program, getattr(module, "_label", None) or "", dict(zip(traced.program.inputs, names, strict=True)),
        [], list(zip(traced.program.outputs, output_names, strict=True)), _captures(traced, module),
    )  # fmt: skip
