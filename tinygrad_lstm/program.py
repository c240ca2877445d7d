"""Program: the immutable, value-free, single-assignment form of a tape; its executor and its printer.

:func:`lower` is the only way from recorded entries to a Program.  Scan, the passes of the compiler, the
printer and the exporters read Programs alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinygrad_lstm.errors import ArgumentError, GraphError
from tinygrad_lstm.kernels.matmul import dot
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.record import Place
from tinygrad_lstm.shortforms import is_small_product, is_turn, is_turnable, short_form
from tinygrad_lstm.tape import Output, Record

if TYPE_CHECKING:
    from tinygrad_lstm.tensor import Tensor

__all__ = ["Equation", "Literal", "Program", "content", "lower", "sourced"]


class Literal(NamedTuple):
    """A Python number among the operands (weak: it takes the dtype of its neighbours)."""

    value: Any


Operand = Any  # int (a slot) or Literal


class Source(NamedTuple):
    """Where an equation came from."""

    where: str
    step: int | None
    code: CodeType | None
    lasti: int


class Equation(NamedTuple):
    """``outputs = primitive(operands, **params)``, on slots."""

    primitive: Primitive
    operands: tuple[Operand, ...]
    params: Mapping[str, Any]
    outputs: tuple[int, ...]
    source: Source | None = None

    def reads(self) -> list[int]:
        """The slots among the operands."""
        return [operand for operand in self.operands if operand.__class__ is int]


def sourced(value: Any, source: Source | None) -> None:
    """Give the record that made a value the source of the equation that it repeats."""
    node = getattr(value, "_node", None)
    if source is None or node is None:
        return
    record = node.record if node.__class__ is Output else node
    if isinstance(record, Record):
        record.code, record.lasti = source.code, source.lasti
        record.place = Place(source.where, source.step)


def content(value: Any) -> str:
    """A parameter as text: equal texts, equal values (the repr of an array leaves digits and elements out)."""
    if isinstance(value, Program):
        return value.key
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(content, value))})"
    if value is None or isinstance(value, (bool, int, float, str, slice, type, np.generic, np.dtype, type(Ellipsis))):
        return repr(value)
    return f"{value!r} at {id(value)}"  # the program keeps it alive, so nothing else gets this number


class Program:
    """Inputs, captures, equations and outputs over integer slots with known shapes and dtypes.

    A Program is never changed; passes return new ones.  Every slot is assigned exactly once.
    """

    def __init__(
        self,
        avals: Sequence[Aval],
        inputs: Sequence[int],
        captures: Sequence[int],
        equations: Sequence[Equation],
        outputs: Sequence[Operand],
        labels: Mapping[int, str] | None = None,
    ) -> None:
        self.avals = tuple(avals)
        self.inputs = tuple(inputs)
        self.captures = tuple(captures)
        self.equations = tuple(equations)
        self.outputs = tuple(outputs)
        self.labels = dict(labels or {})
        self._function: Callable[..., tuple[Any, ...]] | None = None
        self._key: str | None = None
        # Programs derived from this one (its adjoint, its loop plan), by what was asked for.
        self.derived: dict[Any, Any] = {}

    def replaced(self, **changes: Any) -> Program:
        """A Program with some fields changed."""
        fields = ("avals", "inputs", "captures", "equations", "outputs", "labels")
        return Program(**{**{field: getattr(self, field) for field in fields}, **changes})

    def __len__(self) -> int:
        return len(self.equations)

    def definitions(self) -> dict[int, Equation]:
        """The equation that assigns each computed slot."""
        return {slot: equation for equation in self.equations for slot in equation.outputs}

    def users(self) -> dict[int, list[Equation | None]]:
        """The equations that read each slot, once for every reading; None where it is an output of the program."""
        found: dict[int, list[Equation | None]] = {}
        for equation in self.equations:
            for slot in equation.reads():
                found.setdefault(slot, []).append(equation)
        for output in self.outputs:
            if output.__class__ is int:
                found.setdefault(output, []).append(None)
        return found

    def output_avals(self) -> list[Aval]:
        """Shapes and dtypes of the outputs."""
        return [self.aval(output) for output in self.outputs]

    def aval(self, operand: Operand) -> Aval:
        """Shape and dtype of an operand (a Literal counts as 0-d)."""
        if operand.__class__ is int:
            return self.avals[operand]
        return Aval((), np.asarray(operand.value).dtype)

    def labelled(self, label: str) -> int:
        """The last slot with this name (``tg.name``)."""
        slots = [slot for slot, given in self.labels.items() if given == label]
        if not slots:
            raise ArgumentError(f"no value named {label!r}; named are {sorted(set(self.labels.values()))}")
        return max(slots)

    # ------------------------------------------------------------------ running

    def run(self, inputs: Sequence[Any], captures: Sequence[Any] = ()) -> tuple[Any, ...]:
        """Run on NumPy arrays, equation by equation: the reference for every pass.

        >>> import numpy as np, tinygrad_lstm as tg
        >>> x = tg.tensor([1.0, 2.0])
        >>> with tg.Tape() as tape:
        ...     y = x * 3.0
        >>> tape.to_program([x], [y]).run([np.array([2.0, 4.0])])[0].tolist()
        [6.0, 12.0]
        """
        if len(inputs) != len(self.inputs) or len(captures) != len(self.captures):
            raise ArgumentError(
                f"program with {len(self.inputs)} inputs and {len(self.captures)} captures, "
                f"given {len(inputs)} and {len(captures)}"
            )
        return self.function()(*inputs, *captures)

    def function(self) -> Callable[..., tuple[Any, ...]]:
        """The program as one Python function of (inputs, captures), generated once.

        Straight-line code over the primitives' NumPy forwards; a value is dropped after its last use.
        """
        if self._function is None:
            arguments = [f"v{slot}" for slot in (*self.inputs, *self.captures)]
            lines, results, names = self.text(arguments)
            lines = [f"def program({', '.join(arguments)}):", *lines, f"return ({''.join(f'{r}, ' for r in results)})"]
            exec(compile("\n    ".join(lines), "<program>", "exec"), names)
            self._function = names["program"]
        return self._function

    def text(
        self, arguments: Sequence[str], tag: str = "", stay: Collection[str] = ()
    ) -> tuple[list[str], list[str], dict[str, Any]]:
        """The lines of :meth:`function` on variables of these names, the variables of the results, and the constants.

        All other names that are bound begin with a letter and ``tag``.  Variables in ``stay`` are not deleted.
        """
        names: dict[str, Any] = {}
        variable = dict(zip((*self.inputs, *self.captures), arguments, strict=True))
        last: dict[int, int] = {}
        for k, equation in enumerate(self.equations):
            variable.update({slot: f"v{tag}{slot}" for slot in equation.outputs})
            for slot in equation.reads():
                last[slot] = k
        keep = {output for output in self.outputs if output.__class__ is int}

        def text(operand: Operand, constant: str) -> str:
            if operand.__class__ is int:
                return variable[operand]
            names[constant] = operand.value
            return constant

        turned = self._turned()
        lines = []
        for k, equation in enumerate(self.equations):
            operands = [text(operand, f"c{tag}{k}_{i}") for i, operand in enumerate(equation.operands)]
            direct = short_form(equation, self.avals, f"p{tag}{k}")
            target = variable[equation.outputs[0]]
            if k in turned:
                small = is_small_product(equation, self.avals)
                names["dot"] = dot
                text_of = "{1}.T.dot({0}.T)" if small else "dot({1}.T, {0}.T)"
                lines.append(f"{target} = {text_of.format(*operands)}")
            elif equation.outputs[0] in turned.values():
                lines.append(f"{target} = {operands[0]}")
            elif direct is not None:
                names.update(direct.constants)
                lines.append(f"{target} = {direct.text.format(*operands)}")
            else:
                names[f"f{tag}{k}"] = equation.primitive.forward
                for key, value in equation.params.items():
                    names[f"p{tag}{k}_{key}"] = value
                    operands.append(f"{key}=p{tag}{k}_{key}")
                targets = ", ".join(variable[slot] for slot in equation.outputs)
                several = "" if len(equation.outputs) == 1 and not _returns_tuple(equation) else ","
                lines.append(f"{targets}{several} = f{tag}{k}({', '.join(operands)})")
            dead = [slot for slot in {*equation.reads()} if last[slot] == k and slot not in keep]
            dead += [slot for slot in equation.outputs if slot not in last and slot not in keep]
            gone = [variable[slot] for slot in dead if variable[slot] not in stay]
            if gone:
                lines.append("del " + ", ".join(gone))
        return lines, [text(output, f"o{tag}{i}") for i, output in enumerate(self.outputs)], names

    def _turned(self) -> dict[int, int]:
        """Products whose only reader transposes them, by number, and what that assigns: computed transposed.

        A contiguous result need not be copied to become a gradient.
        """
        readers: dict[int, list[Equation]] = {}
        for equation in self.equations:
            for slot in equation.reads():
                readers.setdefault(slot, []).append(equation)
        found = {}
        for k, equation in enumerate(self.equations):
            slot = equation.outputs[0]
            if equation.primitive.name != "matmul" or not is_turnable(equation, self.avals):
                continue
            users = readers.get(slot, [])
            if len(users) == 1 and slot not in self.outputs and is_turn(users[0], self.avals):
                found[k] = users[0].outputs[0]
        return found

    def apply(self, inputs: Sequence[Any], captures: Sequence[Any] = ()) -> list[Any]:
        """Run on tensors through the ops, so that the run is itself recorded where recording is on."""
        environment: dict[int, Any] = dict(zip(self.inputs, inputs, strict=True))
        environment.update(zip(self.captures, captures, strict=True))

        def read(operand: Operand) -> Any:
            return environment[operand] if operand.__class__ is int else operand.value

        for equation in self.equations:
            out = equation.primitive.bind(tuple(read(o) for o in equation.operands), dict(equation.params))
            values = out if isinstance(out, tuple) else (out,)
            sourced(values[0], equation.source)
            for slot, value in zip(equation.outputs, values, strict=True):
                environment[slot] = value
                if slot in self.labels and value._node is not None:
                    from tinygrad_lstm.tape import name

                    name(value, self.labels[slot])
        return [read(output) for output in self.outputs]

    # ------------------------------------------------------------------ identity and text

    @property
    def key(self) -> str:
        """A hash of the content: primitives and their rules' versions, parameters, shapes, dtypes, wiring."""
        if self._key is None:
            parts = [repr((self.inputs, self.captures, [(a.shape, np.dtype(a.dtype).str) for a in self.avals]))]
            for equation in self.equations:
                prim = equation.primitive
                params = sorted((k, content(v)) for k, v in equation.params.items())
                parts.append(repr((prim.name, prim.version, equation.operands, params, equation.outputs)))
            parts.append(repr((self.outputs, sorted(self.labels.items()))))
            self._key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
        return self._key

    def _show(self, operand: Operand) -> str:
        if operand.__class__ is not int:
            return repr(operand.value)
        label = self.labels.get(operand)
        return f"%{operand}:{label}" if label else f"%{operand}"

    def __str__(self) -> str:
        def declared(slots: Iterable[int]) -> str:
            return ", ".join(f"{self._show(slot)} {self.avals[slot]}" for slot in slots)

        lines = [
            f"program({declared(self.inputs)})" + (f" captures({declared(self.captures)})" if self.captures else "")
        ]
        for equation in self.equations:
            params = "".join(f", {key}={_brief(value)}" for key, value in equation.params.items())
            operands = ", ".join(self._show(operand) for operand in equation.operands)
            targets = ", ".join(f"{self._show(slot)} {self.avals[slot]}" for slot in equation.outputs)
            where = f"  # {equation.source.where}" if equation.source and equation.source.where else ""
            lines.append(f"  {targets} = {equation.primitive.name}({operands}{params}){where}")
        lines.append(f"  return {', '.join(self._show(output) for output in self.outputs)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Program {len(self.inputs)} inputs, {len(self.captures)} captures, {len(self.equations)} equations>"


def _returns_tuple(equation: Equation) -> bool:
    return equation.primitive.several(len(equation.outputs))


def _brief(value: Any) -> str:
    return f"<{len(value)} equations>" if isinstance(value, Program) else repr(value)


# ---------------------------------------------------------------------------- from a tape


def _identity(t: Tensor) -> Any:
    """What makes two tensors the same value: the record and output that made them, else the object."""
    node = t._node
    if node.__class__ is Output:
        return (node.record.serial, node.index)
    if node.__class__ is Record:
        return (node.serial, 0)
    return id(t)


def lower(
    entries: Sequence[tuple[Record, tuple[Any, ...], tuple[Tensor, ...]]],
    inputs: Sequence[Tensor] | None,
    outputs: Sequence[Tensor] | None,
) -> tuple[Program, list[Tensor]]:
    """Turn recorded entries into a Program; returns it with the captured tensors, in the order of its captures.

    Raises GraphError when an output was neither made by the entries nor is an input or a tensor at all.
    """
    from tinygrad_lstm.tensor import Tensor

    slots: dict[Any, int] = {}
    avals: list[Aval] = []
    labels: dict[int, str] = {}
    captures: list[Tensor] = []
    capture_slots: list[int] = []

    def new(t: Tensor, label: str | None = None) -> int:
        slot = len(avals)
        slots[_identity(t)] = slot
        avals.append(Aval(tuple(t.shape), t.dtype))
        if label is None and t._meta is not None:
            label = t._meta.label
        if label:
            labels[slot] = label
        return slot

    def operand(value: Any) -> Operand:
        if not isinstance(value, Tensor):
            return Literal(value)
        identity = _identity(value)
        if identity not in slots:
            capture_slots.append(new(value))
            captures.append(value)
        return slots[identity]

    input_slots = [new(t) for t in inputs or ()]
    equations: list[Equation] = []
    for record, args, outs in entries:
        operands = tuple(operand(arg) for arg in args)
        given = record.extra.label if record.extra is not None and record.extra.label else {}
        targets = tuple(new(out, given.get(k)) for k, out in enumerate(outs))
        source = Source(record.place.where, record.place.step, record.code, record.lasti)
        equations.append(Equation(record.primitive, operands, record.params, targets, source))
    if outputs is None:
        used = {slot for equation in equations for slot in equation.reads()}
        results: list[Operand] = [s for equation in equations for s in equation.outputs if s not in used]
    else:
        for t in outputs:
            if not isinstance(t, Tensor):
                raise GraphError(f"an output of a program is a Tensor, found {type(t).__name__}")
        results = [operand(t) for t in outputs]
    return Program(avals, input_slots, capture_slots, equations, results, labels), captures
