"""What the last compiled call did: the text behind ``tg.explain()``.

Whoever runs compiled code publishes a *source*: a :class:`Report`, or anything that can make one later (a function
of no arguments).  Publishing stores one reference; text is made when somebody reads it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tinygrad_lstm.compiler.plan import LoopPlan
    from tinygrad_lstm.program import Equation, Program

_ENGINE = tuple(
    os.path.join(os.path.dirname(os.path.dirname(__file__)), part)
    for part in ("autodiff", "compiler", "ops", "primitive.py", "program.py", "pushforward.py", "tape.py")
)

__all__ = [
    "NotLowered",
    "Report",
    "collected",
    "explain",
    "last",
    "loop_report",
    "place_of",
    "program_report",
    "publish",
    "stepwise",
]


class NotLowered(NamedTuple):
    """An operation that did not become native code."""

    op: str
    where: str  # file:line of the code that asked for it
    why: str

    def __str__(self) -> str:
        return f"{self.op} ({self.where}): {self.why}"


@dataclass(frozen=True)
class Report:
    """What happened to a program, in sections of readable lines; ``str(report)`` is the whole text.

    Attributes
    ----------
    title : str
    fused : tuple of str
        Groups of operations that became one loop over the elements.
    moved : tuple of str
        What left a time loop: hoisted in front of it, or sunk behind it.
    lowered : tuple of str
        What runs as native code.
    not_lowered : tuple of NotLowered
        What does not, from which line it came, and why.
    notes : tuple of str
    parts : tuple of Report
        Reports of what ran inside (the scans of a compiled function).

    Examples
    --------
    >>> skipped = NotLowered("sort", "m.py:3", "no rule")
    >>> print(Report("scan of 3 steps", fused=["tanh, multiply"], not_lowered=[skipped]))
    scan of 3 steps
      fused
        tanh, multiply
      not lowered
        sort (m.py:3): no rule
    """

    title: str
    fused: Sequence[str] = ()
    moved: Sequence[str] = ()
    lowered: Sequence[str] = ()
    not_lowered: Sequence[NotLowered] = ()
    notes: Sequence[str] = ()
    parts: Sequence[Report] = ()

    def __post_init__(self) -> None:
        for section in (*_SECTIONS, "parts"):
            object.__setattr__(self, section, tuple(getattr(self, section)))

    def __str__(self) -> str:
        lines = [self.title]
        for section, heading in _SECTIONS.items():
            entries = getattr(self, section)
            if section == "lowered" and self.fused and set(self.fused) <= set(entries):  # said above
                entries = ["all that is fused", *(entry for entry in entries if entry not in self.fused)]
            if entries:
                lines.append(f"  {heading}")
                lines.extend(f"    {entry}" for entry in entries)
        for part in self.parts:
            lines.extend("  " + line for line in str(part).splitlines())
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


_SECTIONS = {
    "fused": "fused",
    "moved": "moved out of the loop",
    "lowered": "native",
    "not_lowered": "not lowered",
    "notes": "notes",
}

Source = Report | Callable[[], Report]


class _Last(threading.local):
    """One per thread, not a context variable: notebooks run every cell in a context of its own."""

    def __init__(self) -> None:
        self.source: Any = None
        self.collecting: list[Any] | None = None


_LAST = _Last()


def publish(source: Source) -> None:
    """Store what :func:`last` shows: a Report, or a function of no arguments that makes one.

    The source is kept until the next call, so it must not hold the arrays of the call.
    """
    if _LAST.collecting is not None:
        _LAST.collecting.append(source)
    else:
        _LAST.source = source


@contextmanager
def collected() -> Iterator[list[Any]]:
    """Gather in a list what is published in a block, instead of showing it: for a call that reports as a whole."""
    parts: list[Any] = []
    outer, _LAST.collecting = _LAST.collecting, parts
    try:
        yield parts
    finally:
        _LAST.collecting = outer


def resolved(source: Source) -> Report:
    """The Report that a source makes."""
    return source if isinstance(source, Report) else source()


def last() -> Report | None:
    """The report of the last compiled call in this thread; None before the first."""
    if _LAST.source is None:
        return None
    _LAST.source = report = resolved(_LAST.source)
    return report


def op_by_op() -> Report:
    """What is shown after a call inside of ``tg.eager()``."""
    return Report(
        "the last call ran op by op, inside of tg.eager()",
        notes=["call it outside of the block to see what is compiled"],
    )


def explain() -> Report:
    """What the last compiled call of this thread fused, moved and did not lower, and why.

    A compiled call is a scan, a recurrent layer (or the backward pass of one), or a function from ``tg.compile``.

    Returns
    -------
    Report
        Print it; or read its sections ``fused``, ``moved``, ``lowered``, ``not_lowered``, ``notes``, ``parts``.

    Examples
    --------
    >>> import tinygrad_lstm as tg
    >>> import numpy as np
    >>> f = tg.compile(lambda x: np.tanh(x) * 2.0 + 1.0)
    >>> y = f(np.float32([0.5, 1.0]))
    >>> tg.explain().fused
    ('tanh, multiply, add -> float32[2]',)
    """
    report = last()
    if report is not None:
        return report
    return Report(
        "nothing was compiled yet in this thread",
        notes=["call a scan, a recurrent layer or a function from tg.compile first, outside of tg.eager()"],
    )


# ---------------------------------------------------------------------------- reports of what there is


def place_of(equation: Equation) -> str:
    """``file:line`` of the code that an equation came from, with the module path where there is one."""
    source = equation.source
    if source is None or source.code is None:
        return "made by a pass"
    parts = [source.where] if source.where else []
    file = source.code.co_filename
    if not file.startswith("<") and not file.startswith(_ENGINE):
        line: int | None = source.code.co_firstlineno
        for start, end, at in source.code.co_lines():
            if start <= source.lasti < end and at is not None:
                line = at
                break
        parts.append(f"{file}:{line}")
    elif not parts:
        parts.append("derived")  # replayed by a gradient or a pass: the engine's own line says nothing
    return ", ".join(parts)


def names_of(equations: Sequence[Equation]) -> list[str]:
    """``matmul (model.py:31)``, with a count where several equations read alike."""
    counted: dict[str, int] = {}
    for equation in equations:
        line = f"{equation.primitive.name} ({place_of(equation)})"
        counted[line] = counted.get(line, 0) + 1
    return [line if count == 1 else f"{line} x {count}" for line, count in counted.items()]


def fused_groups(program: Program) -> list[str]:
    """The fused equations of a program, as lines."""
    groups = []
    for equation in program.equations:
        kernel = equation.params.get("kernel")
        if kernel is not None:
            members = [leaf.name for leaf in kernel.expression.leaves]
            shapes = ", ".join(str(program.avals[slot]) for slot in equation.outputs)
            groups.append(f"{', '.join(members)} -> {shapes}")
    return groups


def loop_report(plan: LoopPlan) -> Report:
    """The report of a loop plan: what left the loop, and how what stayed runs."""
    from tinygrad_lstm.compiler.native import NativeLoop, switched_off
    from tinygrad_lstm.compiler.stages import Product

    groups = fused_groups(plan.body)
    moved = [f"in front, for all steps at once: {line}" for line in names_of(_real(plan.before))]
    moved += [f"behind, for all steps at once: {line}" for line in names_of(_real(plan.behind))]
    title = (
        f"scan of {plan.steps} steps: {len(plan.before)} equations in front of the loop, {len(plan.body)} in it, "
        f"{len(plan.behind)} behind it"
    )
    native = plan.native
    if isinstance(native, NativeLoop):
        rest = [e for e in native.program.equations if "kernel" not in e.params]
        notes = ["the rows of the batch are shared out among threads"]
        if not native.split:
            why = (
                f"{native.mixing.equation.primitive.name} ({place_of(native.mixing.equation)}): {native.mixing.why}"
                if native.mixing
                else "the rows cannot be told apart"
            )
            notes = [f"one thread runs the whole batch: {why}"]
        if any(isinstance(op, Product) and op.early for op in native.lowered.operations):
            notes.append("products of inputs are made for several steps at once where these have few rows")
        fused = fused_groups(native.program)
        return Report(title, fused=fused, moved=moved, lowered=[*fused, *names_of(rest)], notes=notes)
    rest = [e for e in plan.body.equations if "kernel" not in e.params]
    not_lowered = [NotLowered(e.primitive.name, place_of(e), "runs on NumPy at every step") for e in rest]
    notes = []
    if native is not None and not isinstance(native, NativeLoop):
        where = place_of(native.equation) if native.equation is not None else "the loop"
        name = native.equation.primitive.name if native.equation is not None else "loop"
        not_lowered.insert(0, NotLowered(name, where, native.why))
        notes.append("the loop runs on NumPy, step by step, because of that operation")
    else:
        off = "native code is switched off (TINYGRAD_LSTM_COMPILE, TINYGRAD_LSTM_NATIVE)"
        why = off if switched_off() else "too little work for native code to pay"
        notes.append(f"the loop runs on NumPy, step by step: {why}")
    return Report(title, fused=groups, moved=moved, not_lowered=not_lowered, notes=notes)


def program_report(name: str, recorded: int, before: Program, after: Program, parts: Sequence[Any]) -> Report:
    """The report of a compiled function: ``before`` and ``after`` fusing, and what its scans published."""
    native = [e for e in after.equations if e.primitive.name == "native"]
    scans = [e for e in after.equations if e.primitive.name in ("scan", "scan_within", "scan_within_back")]
    rest = [e for e in _real(after) if "kernel" not in e.params and e not in scans]
    groups = fused_groups(after)
    inside = [resolved(part) for part in parts]
    for equation in scans if not inside else ():
        inside.append(Report(f"scan of {equation.params['length']} steps ({place_of(equation)})"))
    notes = []
    if len(groups) > len(native):
        notes.append(f"{len(groups) - len(native)} fused groups run on NumPy: too few elements for native code to pay")
    if rest:
        notes.append("on NumPy, one call each: " + "; ".join(names_of(rest)))
    return Report(
        f"compiled {name}: {recorded} equations recorded, {len(before)} after simplification, {len(after)} when run",
        fused=groups,
        lowered=fused_groups(after.replaced(equations=tuple(native))),
        notes=notes,
        parts=inside,
    )


_FREE = frozenset(
    {"alias", "broadcast_to", "expand_dims", "full", "getitem", "reshape", "stop_gradient", "stop_nan", "transpose"}
)


def _real(program: Program) -> list[Equation]:
    """The equations that compute something; views and constants only fill a page."""
    return [equation for equation in program.equations if equation.primitive.name not in _FREE]


def stepwise(error: Exception, steps: int) -> Report:
    """The report of a scan whose body needs values and was therefore called at every step."""
    return Report(
        f"scan of {steps} steps: not compiled",
        notes=[f"the body needs values, so it ran step by step: {error}"],
    )
