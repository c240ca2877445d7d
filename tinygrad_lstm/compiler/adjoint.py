"""The adjoint of a loop body: its tape replayed in reverse while recording, split into two programs.

The *forward* program computes what the body computes and also the residuals; the *backward* program takes
residuals and cotangents.  Both come from one recording of ``body + replay``; no rule is written twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.compiler.constants import fill
from tinygrad_lstm.compiler.simplify import dead_code, unguarded
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Equation, Program, lower
from tinygrad_lstm.tape import paths, recording, replay
from tinygrad_lstm.tensor import Tensor
from tinygrad_lstm.trace import Trace

__all__ = ["Adjoint", "adjoint", "is_float"]


def is_float(aval: Any) -> bool:
    """Whether a value has a cotangent."""
    return np.dtype(aval.dtype).kind == "f"


class Adjoint(NamedTuple):
    """A loop body taken apart for reverse mode, both parts again loop bodies.

    ``forward``: inputs and captures as the body's; outputs (carry..., y..., residual..., s...).
    ``backward``: inputs (carry cotangents..., residuals..., the x in ``reads``..., present y cotangents...),
    captures (the body's..., present s cotangents...), outputs (carry cotangents..., wanted x cotangents...,
    wanted capture cotangents...), the last of which are to be summed over the steps.
    """

    forward: Program
    backward: Program
    residuals: tuple[int, ...]  # slots of the body
    reads: tuple[int, ...]  # which of the body's xs (counted behind the carry) the backward program reads


def adjoint(body: Program, n_carry: int, n_ys: int, present: Sequence[bool], wanted: Sequence[bool]) -> Adjoint:
    """Differentiate a loop body (carry..., x...; captures...) -> (carry..., y..., s...).

    Parameters
    ----------
    body : Program
    n_carry, n_ys : int
    present : one flag per y and s
        Whether its cotangent is given; the carry's always is.
    wanted : one flag per x and capture
        Whether its cotangent is asked for; the carry's always is.  Zeros where there is no path.
    """
    carried = [is_float(body.avals[slot]) for slot in body.inputs[:n_carry]]
    present = (*carried, *present)
    wanted = (*carried, *wanted)
    recorder = Trace()
    with recording(enabled=True, tapes=(), names=None, trace=recorder):
        sources = [recorder.new(body.avals[slot]) for slot in (*body.inputs, *body.captures)]
        outs = body.apply(sources[: len(body.inputs)], sources[len(body.inputs) :])
        n_forward = len(recorder.entries)
        cotangents: list[Tensor] = []
        targets = []
        for out, given in zip(outs, present, strict=True):
            if not given:
                continue
            seed = recorder.new(
                Aval(tuple(np.shape(out)) if not isinstance(out, Tensor) else out.shape, np.dtype(out.dtype))
            )
            cotangents.append(seed)
            if isinstance(out, Tensor):
                targets.append((out._node or out, seed))
        asked = [t for t, w in zip(sources, wanted, strict=True) if w]
        through, _ = paths([node for node, _ in targets], set(asked))
        found: Any = replay(targets, free=False, sources=set(asked), through=through)
        results: list[Tensor] = []
        for t in asked:
            results.append(found[t] if t in found else _zeros(t))
    made = [out if isinstance(out, Tensor) else Tensor(np.asarray(out)) for out in outs]
    # The body's values get their slots first, so that they have the same numbers whatever the cotangents.
    joint, captured = lower(recorder.entries, sources, [*made, *results])
    recorder.close()
    return _split(body, unguarded(joint), captured, cotangents, n_forward, n_carry, n_ys, present)


def _zeros(t: Tensor) -> Tensor:
    from tinygrad_lstm.primitive import zeros

    return zeros(t)


def _split(
    body: Program, joint: Program, captured: Sequence[Tensor], cotangents: Sequence[Tensor],
    n_forward: int, n_carry: int, n_ys: int, present: Sequence[bool],
) -> Adjoint:  # fmt: skip
    n_outputs = len(body.outputs)
    forward_equations = joint.equations[:n_forward]
    definitions = {slot: equation for equation in forward_equations for slot in equation.outputs}
    n_inputs = len(body.inputs)
    input_slots, capture_slots = joint.inputs[:n_inputs], joint.inputs[n_inputs:]
    by_identity = {id(t): slot for t, slot in zip(captured, joint.captures, strict=True)}
    cotangent_slots = []
    avals = list(joint.avals)
    for seed in cotangents:
        slot = by_identity.get(id(seed))
        if slot is None:  # no rule read it
            slot = len(avals)
            avals.append(Aval(seed.shape, seed.dtype))
        cotangent_slots.append(slot)
    constant_pairs = [
        (t, slot) for t, slot in zip(captured, joint.captures, strict=True) if slot not in set(cotangent_slots)
    ]
    backward = joint.replaced(avals=avals, equations=joint.equations[n_forward:], outputs=joint.outputs[n_outputs:])
    backward = dead_code(backward)
    invariant = set(capture_slots)
    for equation in forward_equations:
        if all(slot in invariant for slot in equation.reads()):
            invariant.update(equation.outputs)
    needed = {slot for equation in backward.equations for slot in equation.reads()}
    needed |= {output for output in backward.outputs if output.__class__ is int}
    # Values that are cheap to have again: pure functions of the captures (they do not change from step to
    # step), and views.
    again: list[Equation] = []
    residuals: list[int] = []
    pending = sorted((slot for slot in needed if slot in definitions), reverse=True)
    seen: set[int] = set()
    while pending:
        slot = pending.pop(0)
        if slot in seen:
            continue
        seen.add(slot)
        equation = definitions[slot]
        if slot in invariant or equation.primitive.name in _VIEWS:
            again.append(equation)
            seen.update(equation.outputs)
            pending = sorted({*pending, *(s for s in equation.reads() if s in definitions)}, reverse=True)
            needed.update(equation.reads())
        else:
            residuals.append(slot)
    carry_slots = input_slots[:n_carry]
    residuals += [slot for slot in carry_slots if slot in needed]
    order = {id(equation): k for k, equation in enumerate(forward_equations)}
    again.sort(key=lambda equation: order[id(equation)])
    residuals = sorted(set(residuals))
    xs = input_slots[n_carry:]
    reads = tuple(k for k, slot in enumerate(xs) if slot in needed)
    outputs = joint.outputs[:n_outputs]
    head, tail = outputs[: n_carry + n_ys], outputs[n_carry + n_ys :]
    forward = dead_code(
        Program(avals, input_slots, capture_slots, forward_equations, (*head, *residuals, *tail), joint.labels)
    )
    n_float = sum(present[:n_carry])
    n_present_ys = sum(present[n_carry : n_carry + n_ys])
    carry_seeds = cotangent_slots[:n_float]
    y_seeds = cotangent_slots[n_float : n_float + n_present_ys]
    s_seeds = cotangent_slots[n_float + n_present_ys :]
    backward = Program(
        avals,
        (*carry_seeds, *residuals, *(xs[k] for k in reads), *y_seeds),
        (*capture_slots, *s_seeds, *(slot for _, slot in constant_pairs)),
        (*again, *backward.equations),
        backward.outputs,
        joint.labels,
    )
    backward = dead_code(fill(backward, [t for t, _ in constant_pairs]))
    return Adjoint(forward, backward, tuple(residuals), reads)


_VIEWS = frozenset({"reshape", "transpose", "broadcast_to", "alias"})
