"""A whole program as one primitive: run natively where that pays, differentiated by its own replay.

The VJP replays the program's tape in reverse while recording, and cuts what was recorded in two: what does not
depend on a cotangent runs forward, and the rest backward.  Both halves are programs again, bound to the same
primitive, so derivatives of any order are compiled too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.compiler.constants import fill
from tinygrad_lstm.compiler.fuse import FUSED, fuse
from tinygrad_lstm.compiler.simplify import dead_code, simplify
from tinygrad_lstm.kernels.elementwise import THRESHOLD
from tinygrad_lstm.kernels.pool import empty
from tinygrad_lstm.ops.loop import _derived as derived
from tinygrad_lstm.ops.loop import _tangent_body, scan_primitive
from tinygrad_lstm.primitive import Aval, Primitive, zeros
from tinygrad_lstm.program import Equation, Program, lower
from tinygrad_lstm.storage import watch_output
from tinygrad_lstm.tape import paths, recording, replay, state
from tinygrad_lstm.tensor import Tensor
from tinygrad_lstm.trace import Trace

__all__ = ["NATIVE", "Executable", "bind_program", "executable", "optimised", "whole_primitive"]


def _native(*arrays: Any, kernel: Any) -> tuple[np.ndarray, ...]:
    outputs = tuple([empty(aval.shape, aval.dtype) for aval in kernel.avals])
    kernel.compile()([a if a.__class__ is np.ndarray else np.asarray(a) for a in arrays], outputs)
    return outputs


def _no_rule(g: Any, position: int) -> Any:
    raise AssertionError("native equations are made after differentiation")


NATIVE: Primitive = Primitive(
    "native", _native, (_no_rule,), shape=lambda *operands, kernel: tuple(kernel.avals), always_tuple=True,
    register=False, doc="A fused chain as one native loop.",
)  # fmt: skip


def optimised(program: Program) -> Program:
    """The passes that keep a program one of primitives: it can still be differentiated."""
    return simplify(merge_scans(simplify(program)))


def merge_scans(program: Program) -> Program:
    """A scan, and the same scan that also returns residuals, become the latter: the forward loop runs once.

    The gradient of a scan that was recorded (rather than run) asks for residuals by a scan of its own.
    """
    scans = [(k, e) for k, e in enumerate(program.equations) if e.primitive is scan_primitive]
    replaced: dict[int, Equation] = {}
    dropped: set[int] = set()
    place: dict[int, int] = {}  # where a scan stands that has taken the place of an earlier one
    same: dict[int, int] = {}
    for k, plain in scans:
        forwards = {
            id(d.forward) for key, d in plain.params["body"].derived.items() if key[0] == "adjoint"
        }  # programs that compute what the body computes, and residuals
        for j, full in scans:
            alike = all(full.params[p] == plain.params[p] for p in ("length", "reverse", "n_carry"))
            if j == k or j in dropped or full.operands != plain.operands or not alike:
                continue
            if id(full.params["body"]) not in forwards:
                continue
            head = plain.params["n_carry"] + plain.params["n_ys"]
            tail = len(plain.outputs) - head
            same.update(zip(plain.outputs[:head], full.outputs[:head], strict=True))
            same.update(zip(plain.outputs[head:], full.outputs[len(full.outputs) - tail :], strict=True))
            place[j] = place.get(k, k)
            replaced[place[j]] = full
            dropped.add(j)
            break
    if not replaced:
        return program

    def now(operand: Any) -> Any:
        while operand.__class__ is int and operand in same:
            operand = same[operand]
        return operand

    equations = []
    for k, equation in enumerate(program.equations):
        if k not in dropped or k in replaced:
            equation = replaced.get(k, equation)
            equations.append(equation._replace(operands=tuple(now(o) for o in equation.operands)))
    return program.replaced(equations=tuple(equations), outputs=tuple(now(o) for o in program.outputs))


# ---------------------------------------------------------------------------- running


class Executable:
    """A program after all passes, as a function on arrays."""

    def __init__(self, program: Program) -> None:
        self.source = program
        fused = fuse(program)
        self.program = fused.replaced(equations=tuple(map(self._lowered, fused.equations)))
        self.function = self.program.function()

    def _lowered(self, equation: Equation) -> Equation:
        """Natively from the size on at which single operations are native too: the same call, the same path."""
        if equation.primitive is FUSED:
            aval = equation.params["kernel"].avals[0]
            if int(np.prod(aval.shape)) >= THRESHOLD:
                return equation._replace(primitive=NATIVE)
        return equation

    def __call__(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs that share memory neither with the arguments nor with each other."""
        outs: list[np.ndarray] = []
        known = {id(a) for a in arrays}
        for out in self.function(*arrays):
            if out.__class__ is not np.ndarray:
                out = np.asarray(out)
            if id(out) in known or (
                out.base is not None
                and (not out.flags.writeable or any(np.may_share_memory(out, a) for a in (*arrays, *outs)))
            ):
                out = np.array(out)
            known.add(id(out))
            outs.append(out)
        return outs


def executable(program: Program) -> Executable:
    """The executable of a program, made once."""
    return derived(program, ("executable",), lambda: Executable(program))


# ---------------------------------------------------------------------------- differentiating


class Pair(NamedTuple):
    """A program taken apart for reverse mode.

    ``forward``: inputs -> (outputs..., residuals that are no outputs...).
    ``backward``: (present cotangents..., residuals..., the inputs in ``reads``...) -> wanted cotangents.
    """

    forward: Program
    backward: Program
    residuals: tuple[int, ...]  # which of forward's outputs
    reads: tuple[int, ...]


class Kept:
    """The residuals of one call: arrays that nobody else sees."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.arrays: dict[int, np.ndarray] = {}  # by position among the forward half's outputs


def _pair(program: Program, present: tuple[bool, ...], wanted: tuple[bool, ...]) -> Pair:
    return derived(program, ("pair", present, wanted), lambda: _taken_apart(program, present, wanted))


def _taken_apart(program: Program, present: tuple[bool, ...], wanted: tuple[bool, ...]) -> Pair:
    recorder = Trace()
    with recording(enabled=True, tapes=(), names=None, trace=recorder):
        sources: list[Tensor] = [recorder.new(program.avals[slot]) for slot in program.inputs]
        outs = program.apply(sources)
        made = [out if isinstance(out, Tensor) else Tensor(np.asarray(out)) for out in outs]
        seeds: list[Tensor] = []
        targets = []
        for out, given in zip(made, present, strict=True):
            if given:
                seeds.append(recorder.new(Aval(out.shape, out.dtype)))
                targets.append((out._node or out, seeds[-1]))
        asked = [t for t, w in zip(sources, wanted, strict=True) if w]
        through, _ = paths([node for node, _ in targets], set(asked))
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Any = replay(targets, free=False, sources=set(asked), through=through)
            results = [found[t] if t in found else zeros(t) for t in asked]
        joint, constants = lower(recorder.entries, [*sources, *seeds], [*made, *results])
    recorder.close()
    return _cut(optimised(fill(joint, constants)), len(sources), len(made))


# What is cheaper to have again than to keep: views, and constants.
_AGAIN = frozenset({"alias", "broadcast_to", "full", "reshape", "stop_gradient", "transpose"})


def _cut(joint: Program, n_inputs: int, n_outputs: int) -> Pair:
    """Split a program of (inputs, cotangents) where it begins to depend on a cotangent."""
    inputs, seeds = joint.inputs[:n_inputs], joint.inputs[n_inputs:]
    outputs, results = joint.outputs[:n_outputs], joint.outputs[n_outputs:]
    moving = set(seeds)
    for equation in joint.equations:
        if not moving.isdisjoint(equation.reads()):
            moving.update(equation.outputs)
    first = [e for e in joint.equations if e.outputs[0] not in moving]
    backward = dead_code(
        joint.replaced(equations=[e for e in joint.equations if e.outputs[0] in moving], outputs=results)
    )
    definitions = {slot: equation for equation in first for slot in equation.outputs}
    pending = [slot for equation in backward.equations for slot in equation.reads() if slot not in moving]
    pending += [o for o in results if o.__class__ is int and o not in moving]
    residuals: list[int] = []
    again: set[int] = set()
    read: set[int] = set()
    while pending:
        slot = pending.pop()
        made = definitions.get(slot)
        if made is None:
            read.add(slot)
        elif made.primitive.name in _AGAIN:
            again.update(made.outputs)
            pending.extend(made.reads())
        elif slot not in residuals:
            residuals.append(slot)
    residuals.sort()
    extra = [slot for slot in residuals if slot not in outputs]
    all_outputs = (*outputs, *extra)
    reads = tuple(k for k, slot in enumerate(inputs) if slot in read)
    repeated = [e for e in first if e.outputs[0] in again]
    return Pair(
        dead_code(Program(joint.avals, inputs, (), first, all_outputs, joint.labels)),
        Program(
            joint.avals,
            (*seeds, *residuals, *(inputs[k] for k in reads)),
            (),
            (*repeated, *backward.equations),
            results,
        ),
        tuple(all_outputs.index(slot) for slot in residuals),
        reads,
    )


# ---------------------------------------------------------------------------- the primitive


def _forward(*arrays: Any, program: Program, keep: Kept | None = None) -> tuple[np.ndarray, ...]:
    arrays = tuple([np.asarray(a) for a in arrays])
    if keep is None:
        return tuple(executable(program)(arrays))
    outs = executable(keep.pair.forward)(arrays)
    keep.arrays = {k: outs[k] for k in keep.pair.residuals}
    return tuple(outs[: len(program.outputs)])


def _usual(program: Program, wanted: tuple[bool, ...]) -> dict[str, Any]:
    """What was asked of this program before: which cotangents were present when it was differentiated, or None."""
    return derived(program, ("usual", wanted), lambda: {"present": None})


def _vjp(
    g: Sequence[Any], inputs: Sequence[Tensor], program: Program, record: Any, wanted: Sequence[bool]
) -> list[Any]:
    present, asked = tuple(c is not None for c in g), tuple(wanted)
    pair = _pair(program, present, asked)
    _usual(program, asked)["present"] = present
    kept = record.saved[-1]
    if isinstance(kept, Kept) and kept.pair is pair and not state().enabled:
        residuals = [Tensor(kept.arrays[k]) for k in pair.residuals]
    else:  # the first backward, or one that is itself recorded
        outs = bind_program(pair.forward, inputs, keep=False)
        residuals = [outs[k] for k in pair.residuals]
    operands = (*(c for c in g if c is not None), *residuals, *(inputs[k] for k in pair.reads))
    shares = iter(bind_program(pair.backward, operands))
    return [next(shares) if w else None for w in asked]


def _jvp(tangents: Sequence[Any], *values: Any, program: Program) -> list[Any]:
    inputs = values[:-1]
    moving = tuple(k for k, t in enumerate(tangents) if t is not None)
    pushed, _ = derived(
        program, ("tangent", moving), lambda: _tangent_body(program, 0, len(program.outputs), (), moving)
    )
    outs = bind_program(pushed, (*inputs, *(tangents[k] for k in moving)))
    rest = iter(outs[len(program.outputs) :])
    return [next(rest) if np.dtype(aval.dtype).kind == "f" else None for aval in program.output_avals()]


whole_primitive: Primitive = Primitive(
    "compiled", _forward, (_vjp,), joint=True, jvp=_jvp, always_tuple=True,
    shape=lambda *operands, program: tuple(program.output_avals()),
    doc="A recorded function: operands are its program's inputs.",
)  # fmt: skip
whole_primitive.may_skip = False


def bind_program(program: Program, operands: Sequence[Tensor], keep: bool = True) -> tuple[Tensor, ...]:
    """Run a program without captures on tensors, as one record where somebody may ask for gradients.

    Residuals are kept only once a program has been differentiated: gradients that nobody differentiates again
    cost nothing, and the first backward of any other runs the forward half a second time.
    """
    current = state()
    if current.trace is not None:
        return whole_primitive.bind(tuple(operands), {"program": program})
    linked = tuple([t.dtype.kind == "f" and (t._rg or bool(current.tapes)) for t in operands])
    if not current.enabled or True not in linked:
        return tuple([Tensor(out) for out in executable(program)([t._data for t in operands])])
    usual = _usual(program, linked)["present"] if keep else None
    if usual is None:
        return whole_primitive.bind(tuple(operands), {"program": program})
    kept = Kept(_pair(program, usual, linked))
    outs = whole_primitive.bind(tuple(operands), {"program": program, "keep": kept})
    node: Any = outs[0]._node
    record = node.record
    record.params = {"program": program}  # residuals are the record's own, released with it
    record.saved = (*record.saved[:-1], kept)
    for k in kept.pair.residuals:
        if k < len(outs):  # an output that is a residual too: a write to it must be noticed
            outs[k]._used = True
            watch_output(record, outs[k]._store(), always=True)
    return outs
