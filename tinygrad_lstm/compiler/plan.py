"""A loop that is planned: three programs, their wiring, and what is known of its results."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from tinygrad_lstm.compiler.native import NativeLoop
from tinygrad_lstm.compiler.report import Report, loop_report
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Program

__all__ = ["LoopPlan"]


@dataclass
class LoopPlan:
    """Three programs and their wiring.

    ``before``: (xs..., captures...) -> (sequence values..., invariant values...) that the others read.
    ``body``: (carry..., some sequence values...; some invariant values...) -> (carry..., stacked..., summed...).
    ``behind``: (stacked..., summed..., sequence values..., invariant values...) -> (ys..., sums...).
    """

    before: Program
    body: Program
    behind: Program
    n_carry: int
    n_sequence: int  # how many of before's outputs have the time axis
    loop_sequence: list[int]  # which of them the loop reads
    loop_invariant: list[int]
    stacked: list[Aval]  # per step
    sums: list[Aval]
    carry: list[Aval]
    inner: Program  # the body before it was fused: what native code is made from
    steps: int
    runner: Any = None  # the loop as a Python function, generated on first use
    calls: dict[bool, Any] = field(default_factory=dict)  # all of it as a function, by direction (runner.py)
    native: Any = None  # a NativeLoop, or what speaks against one (Unsupported), or None: not worth it

    @functools.cached_property
    def borrowed(self) -> list[int]:
        """Which of the results may be views of what the loop was given (or of a constant)."""
        behind = self.behind
        made = behind.definitions()
        fresh = set(behind.inputs[: len(self.stacked) + len(self.sums)])
        found = []
        for k, output in enumerate(behind.outputs):
            while output.__class__ is int and output in made and made[output].primitive.view:
                if made[output].primitive.name == "broadcast_to":
                    break
                output = made[output].operands[0]
            if output.__class__ is not int or not (
                output in fresh or (output in made and not made[output].primitive.view)
            ):
                found.append(k)
        return found

    @functools.cached_property
    def roots(self) -> list[Any]:
        """For every result, what its memory belongs to, as far as programs tell: with equal ones, two results may have
        the same."""
        stacks: list[Any] = [("stack", k) for k in range(len(self.stacked))]
        if self.compiled:  # a carry before every step, and behind it, are rows of one buffer
            stacks = [("carry", k) if kind != "y" else ("stack", n)
                      for n, (kind, k) in enumerate(self.native.lowered.stacked)]  # fmt: skip
        stacks += [("sum", k) for k in range(len(self.sums))]
        stacks += [_viewed(self.before, output) for output in self.before.outputs]
        place = dict(zip(self.behind.inputs, stacks, strict=True))
        found = [_viewed(self.behind, output) for output in self.behind.outputs]
        return [place.get(root, ("behind", root)) if root.__class__ is int else root for root in found]

    @functools.cached_property
    def compiled(self) -> bool:
        """Whether the loop runs as native code."""
        return isinstance(self.native, NativeLoop)

    def report(self) -> Report:
        """What was moved, fused and lowered, and what was not."""
        return loop_report(self)

    def __str__(self) -> str:
        parts = (("before the loop", self.before), ("in the loop", self.body), ("behind the loop", self.behind))
        return "\n".join(f"-- {title}\n{program}" for title, program in parts)


def _viewed(program: Program, operand: Any) -> Any:
    """The slot that an operand is a view of, or may be; a constant as itself."""
    made = program.definitions()
    while operand.__class__ is int and operand in made and made[operand].primitive.view:
        operand = made[operand].operands[0]
    return operand if operand.__class__ is int else ("constant", id(operand.value))
