"""Push splits through elementwise equations: the parts of a sum are the sums of the parts.

What is computed on the whole of a value that is only used in parts (the gates of a cell) is then computed part
by part, in the loop that uses the parts, and never written to memory as a whole.
"""

from __future__ import annotations

from typing import Any

from tinygrad_lstm.compiler.simplify import simplify
from tinygrad_lstm.primitive import REGISTRY, Aval
from tinygrad_lstm.program import Equation, Literal, Program

__all__ = ["narrow"]


def narrow(program: Program) -> Program:
    """Move every split of the last axis in front of the elementwise equation that it cuts.  Exact."""
    changed = True
    while changed:
        program, changed = _once(program)
    return simplify(program)


def _once(program: Program) -> tuple[Program, bool]:
    made = program.definitions()
    users: dict[int, int] = {}
    for equation in program.equations:
        for slot in equation.reads():
            users[slot] = users.get(slot, 0) + 1
    for output in program.outputs:
        if output.__class__ is int:
            users[output] = users.get(output, 0) + 1
    for place, equation in enumerate(program.equations):
        if equation.primitive.name != "split" or equation.params["axis"] != -1:
            continue
        source = made.get(equation.operands[0])
        if source is None or not source.primitive.is_elementwise or users[source.outputs[0]] > 1:
            continue
        return _through(program, place, source), True
    return program, False


def _through(program: Program, place: int, source: Equation) -> Program:
    split = program.equations[place]
    sizes = split.params["sizes"]
    avals = list(program.avals)
    width = avals[source.outputs[0]].shape[-1]
    pieces: list[list[Any]] = []  # per operand, one per part
    before: list[Equation] = []
    for operand in source.operands:
        aval = program.aval(operand)
        if isinstance(operand, Literal) or not aval.shape or aval.shape[-1] != width:
            pieces.append([operand] * len(sizes))
            continue
        slots = tuple(range(len(avals), len(avals) + len(sizes)))
        avals += [Aval((*aval.shape[:-1], n), aval.dtype) for n in sizes]
        before.append(Equation(REGISTRY["split"], (operand,), dict(split.params), slots, split.source))
        pieces.append(list(slots))
    parts = [
        Equation(source.primitive, tuple(p[k] for p in pieces), source.params, (slot,), source.source)
        for k, slot in enumerate(split.outputs)
    ]
    equations = [e for e in program.equations[:place] if e is not source]
    return program.replaced(avals=avals, equations=(*equations, *before, *parts, *program.equations[place + 1 :]))
