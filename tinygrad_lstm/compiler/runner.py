"""Run a loop plan: the program before, the time loop in native code or as a generated function, the program behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.fuse import FUSED, worth_compiling
from tinygrad_lstm.compiler.plan import LoopPlan
from tinygrad_lstm.compiler.report import publish
from tinygrad_lstm.compiler.straight import ARRAYS, Form, Results, Straight, owned, straight
from tinygrad_lstm.kernels.pool import empty
from tinygrad_lstm.ops.prepared import apart

__all__ = ["loop_call", "loop_call_in", "loop_in_one", "run_loop"]


def run_loop(plan: LoopPlan, operands: Sequence[np.ndarray], reverse: bool) -> Results:
    """Run a loop on (carry..., xs..., captures...): (final carry, [ys..., sums...]).

    Nothing that is returned shares memory with the operands.
    """
    return (plan.calls.get(reverse) or loop_call(plan, reverse))(*operands)


def loop_call(plan: LoopPlan, reverse: bool) -> Straight:
    """The loop with what runs before and behind it, as a function of all arrays; compiles it."""
    call: Straight | None = plan.calls.get(reverse)
    if call is None:
        call = plan.calls[reverse] = _call_of(plan, reverse, ARRAYS)
    return call


def loop_call_in(form: Form, plan: LoopPlan, reverse: bool) -> Callable[..., Any]:
    """As :func:`loop_call` in another form; made anew at every call."""
    return _call_of(plan, reverse, form)


def loop_in_one(plan: LoopPlan, reverse: bool) -> Callable[..., list[np.ndarray]]:
    """As :func:`loop_call`, with all results in one list; ys and sums share no memory.  Made anew at every call."""
    roots = plan.roots
    # One array in several places is copied straight away; whether others share memory depends on the operands.

    def lines(taken: Sequence[str], final: Sequence[str], outs: Sequence[str]) -> list[str]:
        met: set[str] = set()
        ys = []
        for out in outs:
            ys.append(f"{out}.copy()" if out in met else out)
            met.add(out)
        among = [k for k, y in enumerate(ys) if y in met and roots.count(roots[k]) > outs.count(y)]
        text = f"*apart([{', '.join(ys)}], {among})" if among else ", ".join(ys)
        return [f"return [{''.join(f'{part}, ' for part in final)}{text}]"]

    return _call_of(plan, reverse, Form("{}", lines, {"apart": apart}))


def _call_of(plan: LoopPlan, reverse: bool, form: Form) -> Callable[..., Any]:
    if plan.steps and plan.compiled and plan.native.rows:
        return straight(plan, plan.native, reverse, lambda *operands: _over_numpy(plan, reverse)(*operands), form)
    call = _over_numpy(plan, reverse) if plan.steps else _nothing(plan)
    if form is ARRAYS:
        return call
    taken = [f"t{k}" for k in range(plan.n_carry + len(plan.before.inputs) + len(plan.before.captures))]
    return form.around(call, taken, plan.n_carry, len(plan.behind.outputs))


def _nothing(plan: LoopPlan) -> Straight:
    """A loop of no steps."""
    return lambda *operands: ([np.array(c) for c in operands[: plan.n_carry]], _empty(plan))


def _over_numpy(plan: LoopPlan, reverse: bool) -> Callable[..., Results]:
    """The time loop in Python."""
    before, behind, n = plan.before.function(), plan.behind.function(), plan.n_carry
    loop = _runner(plan, worth_compiling(plan.body, plan.body.equations, plan.steps))
    steps, borrowed = plan.steps, plan.borrowed

    def call(*arguments: np.ndarray) -> Results:
        publish(plan.report)
        values = before(*arguments[n:])
        sequence = [values[k] for k in plan.loop_sequence]
        invariant = [values[plan.n_sequence + k] for k in plan.loop_invariant]
        stacks = [empty((steps, *aval.shape), aval.dtype) for aval in plan.stacked]
        sums = [np.zeros(aval.shape, aval.dtype) for aval in plan.sums]
        times = range(steps - 1, -1, -1) if reverse else range(steps)
        # A carry value may live in a row of a stack, or be the caller's own array where no step changed it.
        final = [np.array(c) for c in loop(times, *arguments[:n], *sequence, *invariant, *stacks, *sums)]
        outs = list(behind(*stacks, *sums, *values))
        for k in borrowed:
            outs[k] = owned(outs[k], arguments)
        return final, outs

    return call


def _empty(plan: LoopPlan) -> list[np.ndarray]:
    """Outputs of a loop of no steps."""
    return [np.zeros(aval.shape, aval.dtype) for aval in plan.behind.output_avals()]


def _runner(plan: LoopPlan, native: bool) -> Callable[..., Any]:
    if plan.runner is None:
        plan.runner = {}
    if native not in plan.runner:
        source, names = _generate(plan, native)
        exec(compile(source, "<loop>", "exec"), names)
        plan.runner[native] = names["loop"]
    return plan.runner[native]


def _generate(plan: LoopPlan, native: bool) -> tuple[str, dict[str, Any]]:
    """The time loop as straight-line Python over the primitives' forwards and the fused kernels.

    Kernels write what is stacked straight into its row.
    """
    body = plan.body
    names: dict[str, Any] = {"asarray": np.asarray, "empty": np.empty, "copyto": np.copyto}
    n_carry, n_stacked = plan.n_carry, len(plan.stacked)
    carry_in, sequence = body.inputs[:n_carry], body.inputs[n_carry:]
    carry_out = body.outputs[:n_carry]
    stacked = body.outputs[n_carry : n_carry + n_stacked]
    sums = body.outputs[n_carry + n_stacked :]
    row_of: dict[int, int] = {}
    for k, slot in enumerate(stacked):
        row_of.setdefault(slot, k)
    arguments = (
        [f"v{s}" for s in carry_in] + [f"X{s}" for s in sequence] + [f"v{s}" for s in body.captures]
        + [f"Y{k}" for k in range(n_stacked)] + [f"S{k}" for k in range(len(sums))]
    )  # fmt: skip
    lines = [f"def loop(times, {', '.join(arguments)}):", "    for t in times:"]
    # X[t, ...] stays an array also where a step's value is 0-d.
    lines += [f"        v{s} = X{s}[t, ...]" for s in sequence]

    def text(operand: Any, tag: str) -> str:
        if operand.__class__ is int:
            return f"v{operand}"
        names[tag] = operand.value
        return tag

    written: set[int] = set()
    for k, equation in enumerate(body.equations):
        operands = [text(o, f"c{k}_{i}") for i, o in enumerate(equation.operands)]
        if equation.primitive is FUSED and native:
            kernel = equation.params["kernel"]
            names[f"f{k}"] = kernel.compile()
            for slot, aval in zip(equation.outputs, kernel.avals, strict=True):
                if slot in row_of:
                    lines.append(f"        v{slot} = Y{row_of[slot]}[t, ...]")
                    written.add(slot)
                else:
                    names[f"s{slot}"], names[f"d{slot}"] = aval.shape, np.dtype(aval.dtype)
                    lines.append(f"        v{slot} = empty(s{slot}, d{slot})")
            outputs = "".join(f"v{s}, " for s in equation.outputs)
            lines.append(f"        f{k}(({''.join(o + ', ' for o in operands)}), ({outputs}))")
            continue
        names[f"f{k}"] = equation.primitive.forward
        for key, value in equation.params.items():
            names[f"p{k}_{key}"] = value
            operands.append(f"{key}=p{k}_{key}")
        targets = ", ".join(f"v{slot}" for slot in equation.outputs)
        several = "," if len(equation.outputs) == 1 and equation.primitive.several(1) else ""
        lines.append(f"        {targets}{several} = f{k}({', '.join(operands)})")
    for k, slot in enumerate(stacked):
        if not (slot in written and row_of[slot] == k):
            lines.append(f"        Y{k}[t] = v{slot}")
    lines += [f"        S{k} += v{slot}" for k, slot in enumerate(sums)]
    if n_carry:
        targets = ", ".join(f"v{s}" for s in carry_in)
        lines.append(f"        {targets} = {', '.join(text(o, f'o{k}') for k, o in enumerate(carry_out))}")
    if lines[-1].endswith(":"):
        lines.append("        pass")
    lines.append(f"    return ({''.join(f'v{s}, ' for s in carry_in)})")
    return "\n".join(lines), names
