"""A native loop, and what runs before and behind it, as one straight function of Python.

All that a call of a plan has to find out is the same at every call: which arrays go where, which are made anew, what
is called on what.  It is written down once.  For a layer of one row, and for any layer whose caller has just used the
caches for something else, the questions would take longer than the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_lstm.compiler.native import Frame, NativeLoop, shares
from tinygrad_lstm.compiler.report import publish

if TYPE_CHECKING:
    from tinygrad_lstm.compiler.loop import LoopPlan

__all__ = ["Results", "Straight", "owned", "straight"]

Results = tuple[list[np.ndarray], list[np.ndarray]]  # final carry; ys and sums
Straight = Callable[..., Results]


def straight(plan: LoopPlan, native: NativeLoop, reverse: bool, otherwise: Straight) -> Straight:
    """``call(*carry, *xs, *captures)``: (final carry, [ys..., sums...]).  Compiles the loop.

    ``otherwise`` is called where native code met an index out of range: it says which one.
    """
    private = [k for k in range(len(plan.stacked)) if ("stack", k) not in plan.roots]
    frame = Frame(native, plan.steps, reverse, private)
    names: dict[str, Any] = {
        "frame": frame, "native": native, "plain": native.entry()[2], "spaces": native.spaces,
        "ndarray": id(np.ndarray), "shares": shares, "owned": owned, "publish": publish, "report": plan.report,
        "otherwise": otherwise,
    }  # fmt: skip
    carry = [f"c{k}" for k in range(plan.n_carry)]
    given = [f"x{k}" for k in range(len(plan.before.inputs))] + [f"w{k}" for k in range(len(plan.before.captures))]
    lines, values, constants = plan.before.text(given, "_", given)
    lines.insert(0, "publish(report)")
    names.update(constants)
    sequence = [values[k] for k in plan.loop_sequence]
    invariant = [values[plan.n_sequence + k] for k in plan.loop_invariant]

    buffers = [f"b{k}" for k in range(len(frame.makers))]
    for name, (make, shape, dtype) in zip(buffers, frame.makers, strict=True):
        names.update({f"{name}_make": make, f"{name}_shape": shape, f"{name}_dtype": dtype})
        lines.append(f"{name} = {name}_make({name}_shape, {name}_dtype)")
    lines += [
        "try: space = spaces.pop()",
        "except IndexError: space = native.workspace()",
    ]
    # With one row there is nothing to share out.
    parts, chunk = ("1", "1") if native.rows < 2 else ("parts", "chunk")
    if native.rows >= 2:
        lines.append(f"parts, chunk = shares({native.rows})")
    lines += [
        f"stamp = ({plan.steps}, {reverse}, {chunk}, {parts})",
        "if space.stamp != stamp: space.prepare_for(frame, stamp)",
    ]
    parts_of = ", ".join(_tuple(names) for names in (carry, sequence, invariant, buffers))
    pool = [*carry, *sequence, *invariant, *buffers, *(f"space.turns[{k}]" for k in range(len(frame.turns)))]
    lines += [
        f"operands = {_tuple([pool[place] for place in frame.order])}",
        f"if not plain(id(operands), 0, {frame.checked}, ndarray):",
        f"    operands = frame.tidied({parts_of}, space)",
    ]
    lines += [
        f"if native.run(frame, space, operands, {parts}): return otherwise({', '.join([*carry, *given])})",
        "spaces.append(space)",
        "del operands",
    ]  # fmt: skip

    stacks = []
    for k, (buffer, rows) in enumerate(frame.stacks):
        stacks.append(f"y{k}" if rows is not None else buffers[buffer])
        if rows is not None:
            lines.append(f"y{k} = {buffers[buffer]}[{rows.start}:{rows.stop}]")
    final = buffers[frame.n_buffers : frame.n_buffers + plan.n_carry]
    sums = buffers[frame.n_buffers + plan.n_carry :]
    arguments = [*stacks, *sums, *values]
    # What is given more than once, or looked at once more, is not dropped on the way.
    stay = {name for name in arguments if arguments.count(name) > 1} | set(given)
    more, outs, constants = plan.behind.text(arguments, "__", stay)
    lines += more
    names.update(constants)
    everything = _tuple([*carry, *given])
    outs = [f"owned({out}, {everything})" if k in plan.borrowed else out for k, out in enumerate(outs)]
    lines.append(f"return [{', '.join(final)}], [{', '.join(outs)}]")
    text = "\n    ".join([f"def call({', '.join([*carry, *given])}):", *lines])
    exec(compile(text, "<native loop>", "exec"), names)
    function: Straight = names.pop("call")
    return function


def _tuple(items: Sequence[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items)})"


def owned(out: Any, arguments: Sequence[np.ndarray]) -> np.ndarray:
    """An output that the caller may write to: a copy where it is a view of an argument, or broadcast."""
    out = np.asarray(out)
    if not out.flags.writeable or any(np.may_share_memory(out, a) for a in arguments):
        return np.array(out)
    return out
