"""A native loop, and what runs before and behind it, as one straight function of Python.

All that a call of a plan has to find out is the same at every call: which arrays go where, which are made anew, what
is called on what.  It is written down once.  For a layer of one row, and for any layer whose caller has just used the
caches for something else, the questions would take longer than the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinygrad_lstm.compiler.native import SLICE, Frame, NativeLoop, shares
from tinygrad_lstm.compiler.report import publish

if TYPE_CHECKING:
    from tinygrad_lstm.compiler.plan import LoopPlan

__all__ = ["ARRAYS", "Form", "Results", "Straight", "owned", "straight"]

Results = tuple[list[np.ndarray], list[np.ndarray]]  # final carry; ys and sums
Straight = Callable[..., Results]


class Form(NamedTuple):
    """What a function around a loop takes and returns, as text."""

    array: str  # of an argument
    # Lines that return the result: of variables with the arguments, with the final carry, and with ys and sums.
    lines: Callable[[Sequence[str], Sequence[str], Sequence[str]], list[str]]
    names: Mapping[str, Any]  # what the text refers to
    bare: bool = False  # whether one launch is written out where that is all, without NativeLoop.run

    def around(self, call: Straight, taken: Sequence[str], n_carry: int, n_outs: int) -> Callable[..., Any]:
        """A function in this form that has its results from a function of arrays."""
        lines = [
            f"def around({', '.join(taken)}):",
            f"    final, outs = call({', '.join(self.array.format(name) for name in taken)})",
            *("    " + line for line in self.lines(taken, _items("final", n_carry), _items("outs", n_outs))),
        ]
        names = {**self.names, "call": call}
        exec(compile("\n".join(lines), "<loop>", "exec"), names)
        function: Callable[..., Any] = names.pop("around")
        return function


ARRAYS = Form("{}", lambda taken, final, outs: [f"return [{', '.join(final)}], [{', '.join(outs)}]"], {})


def straight(
    plan: LoopPlan, native: NativeLoop, reverse: bool, otherwise: Straight, form: Form = ARRAYS
) -> Callable[..., Any]:
    """``call(*carry, *xs, *captures)``, in the form ``ARRAYS`` a :data:`Straight`.  Compiles the loop.

    ``otherwise`` is called (on arrays) where native code met an index out of range: it says which one.
    """
    private = [k for k in range(len(plan.stacked)) if ("stack", k) not in plan.roots]
    frame = Frame(native, plan.steps, reverse, private)
    names: dict[str, Any] = {
        **form.names, "frame": frame, "native": native, "plain": native.entry().plain, "spaces": native.spaces,
        "ndarray": id(np.ndarray), "shares": shares, "owned": owned, "publish": publish, "report": plan.report,
        "otherwise": otherwise,
    }  # fmt: skip
    carry = [f"c{k}" for k in range(plan.n_carry)]
    given = [f"x{k}" for k in range(len(plan.before.inputs))] + [f"w{k}" for k in range(len(plan.before.captures))]
    lines, values, constants = plan.before.text(given, "_", given)
    arrays = [*carry, *given]
    taken, looked = arrays, []
    if form.array != ARRAYS.array:
        taken = [f"{name}_" for name in arrays]
        looked = [f"{name} = {form.array.format(item)}" for name, item in zip(arrays, taken, strict=True)]
    lines[:0] = ["publish(report)", *looked]
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
    names.update(stamp=(plan.steps, reverse, 1, 1), parts=1)
    if native.rows >= 2:  # else there is nothing to share out
        lines += [
            f"parts, chunk = shares({native.rows}, {frame.least})",
            f"stamp = ({plan.steps}, {reverse}, chunk, parts)",
        ]
    lines.append("if space.stamp is not stamp and space.stamp != stamp: space.prepare_for(frame, stamp)")
    parts_of = ", ".join(_tuple(names) for names in (carry, sequence, invariant, buffers))
    pool = [*carry, *sequence, *invariant, *buffers, *(f"space.turns[{k}]" for k in range(len(frame.turns)))]
    lines += [
        f"operands = {_tuple([pool[place] for place in frame.order])}",
        f"if not plain(id(operands), 0, {frame.checked}, ndarray):",
        f"    operands = frame.tidied({parts_of}, space)",
    ]
    failed = "native.run(frame, space, operands, parts)"
    if form.bare and native.rows < 2 and frame.work <= SLICE:  # nothing to share out, nor to be called in pieces
        names["advance"], pack, loop = frame.find_launch()
        failed = f"advance(0, {pack}, {loop}, space.address, id(operands), 0, {plan.steps}, 1)"
    if form is not ARRAYS:
        names["otherwise"] = form.around(otherwise, taken, plan.n_carry, len(plan.behind.outputs))
    lines += [f"if {failed}: return otherwise({', '.join(taken)})", "spaces.append(space)", "del operands"]

    stacks = []
    for k, (buffer, rows) in enumerate(frame.stacks):
        stacks.append(f"y{k}" if rows is not None else buffers[buffer])
        if rows is not None:
            names[f"rows{k}"] = rows
            lines.append(f"y{k} = {buffers[buffer]}[rows{k}]")
    final = buffers[frame.n_buffers : frame.n_buffers + plan.n_carry]
    sums = buffers[frame.n_buffers + plan.n_carry :]
    arguments = [*stacks, *sums, *values]
    # What is given more than once, or looked at once more, is not dropped on the way.
    stay = {name for name in arguments if arguments.count(name) > 1} | set(given)
    more, outs, constants = plan.behind.text(arguments, "__", stay)
    lines += more
    names.update(constants)
    everything = _tuple(arrays)
    outs = [f"owned({out}, {everything})" if k in plan.borrowed else out for k, out in enumerate(outs)]
    lines += form.lines(taken, final, outs)
    text = "\n    ".join([f"def call({', '.join(taken)}):", *lines])
    exec(compile(text, "<native loop>", "exec"), names)
    function: Callable[..., Any] = names.pop("call")
    return function


def _items(name: str, count: int) -> list[str]:
    return [f"{name}[{k}]" for k in range(count)]


def _tuple(items: Sequence[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items)})"


def owned(out: Any, arguments: Sequence[np.ndarray]) -> np.ndarray:
    """An output that the caller may write to: a copy where it is a view of an argument, or broadcast."""
    out = np.asarray(out)
    if not out.flags.writeable or any(np.may_share_memory(out, a) for a in arguments):
        return np.array(out)
    return out
