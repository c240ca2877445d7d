"""What is drawn: boxes for values and operations, arrows for what goes where, from a Program or a tensor's past."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tinygrad_lstm.compiler.report import place_of
from tinygrad_lstm.errors import ArgumentError, DTypeError, GraphError
from tinygrad_lstm.inspect.recorded import Recorded, is_cell, record_cell, record_module
from tinygrad_lstm.nn.module import Module, Parameter
from tinygrad_lstm.program import Equation, Literal, Program, lower
from tinygrad_lstm.record import Aval, Output, Record
from tinygrad_lstm.tape import Tape
from tinygrad_lstm.tensor import Tensor

__all__ = ["Arrow", "Box", "Graph", "graph_of"]

QUIET = frozenset({"shape", "sizes", "axes", "template", "dtype"})  # parameters that the shapes tell already


class Box(NamedTuple):
    """``kind`` is "input", "parameter", "constant", "op", "named" (an op whose value has a name) or "output"."""

    kind: str
    title: str
    lines: tuple[str, ...]
    note: str = ""  # where it comes from


class Arrow(NamedTuple):
    """From one box to a later one; ``label`` says which of several outputs."""

    start: int
    end: int
    label: str = ""


class Graph(NamedTuple):
    """Boxes in an order in which arrows point forwards."""

    boxes: list[Box]
    arrows: list[Arrow]


def graph_of(obj: Any, x: Any = None, module: Any = None) -> Graph:
    """The graph of a Tape, a Program, a cell, a Module or a Tensor; see :func:`~tinygrad_lstm.inspect.draw`."""
    names = {id(p): name for name, p in module.named_parameters()} if module is not None else {}
    if isinstance(obj, Tape):
        if not obj.entries:
            raise ArgumentError("draw: nothing is on this tape")
        program, captures = lower(obj.entries, None, None)
        return _of_program(program, {}, dict(zip(program.captures, _captured(captures, names), strict=True)))
    if isinstance(obj, Program):
        return _of_program(obj, {}, {})
    if isinstance(obj, Tensor):
        return _of_tensor(obj, names)
    if is_cell(obj):
        return _of_recorded(record_cell(obj, x))
    if isinstance(obj, Module):
        if x is None:
            raise ArgumentError(f"draw: {type(obj).__name__} needs an example of its input, x=...")
        return _of_recorded(record_module(obj, x))
    raise DTypeError(f"draw: found {type(obj).__name__}, expected a Tape, a Program, a cell, a Module or a Tensor")


def _captured(tensors: Iterable[Tensor], names: Mapping[int, str]) -> list[tuple[str, str]]:
    """(kind, title) for tensors that were used but not made."""
    found = []
    for tensor in tensors:
        label = names.get(id(tensor)) or (tensor._meta.label if tensor._meta is not None else None)
        if isinstance(tensor, Parameter):
            found.append(("parameter", label or "parameter"))
        else:
            found.append(("input" if tensor.requires_grad or label else "constant", label or "tensor"))
    return found


def _of_recorded(recorded: Recorded) -> Graph:
    titles = {slot: f"{name}_t" for slot, name in recorded.inputs.items()} if recorded.states else dict(recorded.inputs)
    titles |= {slot: f"{name}_{{t-1}}" for slot, _, name in recorded.states}
    captures = {
        slot: ("parameter" if is_parameter else "constant", name)
        for slot, (name, is_parameter, _) in recorded.captures.items()
    }
    results = {} if recorded.states else dict(recorded.outputs)
    results |= {operand: f"{name}_t" for operand, name in recorded.outputs if recorded.states}
    results |= {new: f"{name}_t" for _, new, name in recorded.states}
    return _of_program(recorded.program, titles, captures, results)


def _of_program(
    program: Program, inputs: Mapping[int, str], captures: Mapping[int, tuple[str, str]],
    results: Mapping[Any, str] | None = None,
) -> Graph:  # fmt: skip
    graph = Graph([], [])
    origin: dict[int, tuple[int, str]] = {}  # slot -> (box, which output)

    def box(kind: str, title: str, lines: Iterable[str], note: str = "") -> int:
        graph.boxes.append(Box(kind, title, tuple(lines), note))
        return len(graph.boxes) - 1

    for k, slot in enumerate(program.inputs):
        title = inputs.get(slot) or program.labels.get(slot) or f"input {k}"
        origin[slot] = (box("input", title, [str(program.avals[slot])]), "")
    for slot in program.captures:
        kind, title = captures.get(slot, ("constant", program.labels.get(slot, "capture")))
        origin[slot] = (box(kind, title, [str(program.avals[slot])]), "")
    for equation in program.equations:
        labels = [program.labels[slot] for slot in equation.outputs if slot in program.labels]
        where = (equation.source.where, equation.source.step) if equation.source else ("", None)
        avals = [program.avals[slot] for slot in equation.outputs]
        number = len(graph.boxes)
        graph.boxes.append(_op_box(_application(equation), labels, avals, *where, place_of(equation)))
        for slot in dict.fromkeys(equation.reads()):
            start, which = origin[slot]
            graph.arrows.append(Arrow(start, number, which))
        for k, slot in enumerate(equation.outputs):
            origin[slot] = (number, str(k) if len(equation.outputs) > 1 else "")
    for k, operand in enumerate(dict.fromkeys(program.outputs)):
        title = (results or {}).get(operand) or ("output" if len(set(program.outputs)) == 1 else f"output {k}")
        number = box("output", title, [])
        if operand.__class__ is int:
            graph.arrows.append(Arrow(origin[operand][0], number, origin[operand][1]))
    return graph


def _application(equation: Equation) -> str:
    """The primitive with the numbers among its operands, and what its parameters say beyond the shapes."""
    name = equation.primitive.name
    if any(isinstance(operand, Literal) for operand in equation.operands):
        shown = [_short(o.value) if isinstance(o, Literal) else "·" for o in equation.operands]
        name += f"({', '.join(shown)})"
    extra = [
        f"{key}={f'<{len(value)} equations>' if isinstance(value, Program) else _short(value)}"
        for key, value in equation.params.items()
        if key not in QUIET
    ]
    text = ", ".join(extra)
    return f"{name} {text}" if 0 < len(text) <= 40 else name


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _op_box(name: str, labels: list[str], avals: Sequence[Aval], where: str, step: int | None, note: str) -> Box:
    shapes = str(avals[0]) if len(avals) == 1 else f"{len(avals)} outputs, {avals[0]} ..."
    place = ", ".join([*([where] if where else []), *([] if step is None else [f"t={step}"])])
    lines = [*([name] if labels else []), shapes, *([place] if place else [])]
    file = note.replace("\\", "/").rpartition("/")[2]  # equal drawings wherever the package is installed
    return Box("named" if labels else "op", ", ".join(labels) or name, tuple(lines), file)


# ---------------------------------------------------------------------------- from a tensor


def _record_of(node: Any) -> Record | None:
    """The record that made a node; None for a leaf."""
    return node.record if isinstance(node, Output) else node if isinstance(node, Record) else None


def _of_tensor(tensor: Tensor, names: Mapping[int, str]) -> Graph:
    """What a tensor was made of, as far as gradients would flow: constants are not kept, so they are not shown."""
    node = tensor._node
    if node is None:
        raise GraphError("draw: this tensor was not made by recorded operations; there is no graph behind it")
    end = _record_of(node)
    assert end is not None
    records: dict[int, Record] = {}
    leaves: dict[int, Tensor] = {}
    stack = [end]
    while stack:
        record = stack.pop()
        if record.serial in records:
            continue
        records[record.serial] = record
        if record.parents is None:
            raise GraphError(
                f"draw: the graph behind {record.describe()} was freed by a backward; "
                "draw before it, or pass retain_graph=True to it"
            )
        for parent in record.parents:
            before = _record_of(parent)
            if before is not None:
                stack.append(before)
            elif parent is not None:
                leaves[id(parent)] = parent
    graph = Graph([], [])
    place: dict[int, int] = {}
    for key, (kind, title) in zip(leaves, _captured(leaves.values(), names), strict=True):
        place[key] = len(graph.boxes)
        leaf = leaves[key]
        graph.boxes.append(Box(kind, title, (str(Aval(leaf.shape, leaf.dtype)),)))
    for serial in sorted(records):
        record = records[serial]
        labels = record.extra.label if record.extra is not None and record.extra.label else {}
        avals = record.output_avals or [Aval(record.shape, record.dtype)]
        name = _application(Equation(record.primitive, (), record.params, ()))
        number = len(graph.boxes)
        box = _op_box(name, list(labels.values()), avals, *record.place, record.source_line())
        graph.boxes.append(box)
        for parent in dict.fromkeys(record.parents or ()):
            if parent is None:
                continue
            before = _record_of(parent)
            start = place[id(parent) if before is None else before.serial]
            graph.arrows.append(Arrow(start, number, str(parent.index) if parent.__class__ is Output else ""))
        place[serial] = number
    graph.boxes.append(Box("output", "tensor", ()))
    graph.arrows.append(Arrow(place[end.serial], len(graph.boxes) - 1))
    return graph
