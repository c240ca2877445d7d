"""Checkpointing schedules: backpropagation through time within a number of bytes.

A loop of T steps needs the residuals of a step when that step is reversed, ``residual`` bytes each.  Instead of
keeping all of them, one keeps the carry (``carry`` bytes) at some borders and runs forward again from there.  What
is kept where is a :class:`Schedule`: a list of two kinds of actions on a stack of carries.

* :class:`Advance` ``(start, stop)``: run from the carry on top of the stack and push the one at ``stop``.
* :class:`Reverse` ``(start, stop)``: pop the carry at ``start``, run with residuals, then reverse these steps.

Nothing here touches an array.  The first carry (at step 0) is an operand of the loop, so it costs nothing.

Two kinds of schedules are made.  *Equal segments* run every step at most twice (Chen et al. 2016, "Training deep
nets with sublinear memory cost"); their least peak is about ``2 sqrt(T * carry * residual)``, at segments of
``sqrt(T * carry / residual)`` steps.  No schedule runs fewer steps again than ``T - budget / residual``; equal
segments run as many of them as the kept carries displace more: at most
``(segments - 1) * carry / residual + 1``.  Below that peak, the *optimal multi-level* schedule, by dynamic
programming as in Gruslys et al. (2016), "Memory-efficient backpropagation through time", runs some steps several
times; with one step per reversal it is the binomial schedule of Griewank & Walther (2000).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError

__all__ = [
    "Advance", "Budget", "Memory", "Reverse", "Schedule", "budget_bytes", "check_memory", "make_schedule",
    "share_memory", "who_asks",
]  # fmt: skip

EXACT = 1024  # steps up to which the dynamic programme may place a border anywhere; beyond, cells of a grid
_LENGTHS = 12  # besides powers of two
_NEVER = np.int64(1) << 60


class Advance(NamedTuple):
    """Run steps ``start..stop`` from the carry on top of the stack, without residuals; push the carry at ``stop``."""

    start: int
    stop: int


class Reverse(NamedTuple):
    """Run steps ``start..stop`` with residuals from the carry on top of the stack, which is popped; reverse them."""

    start: int
    stop: int


class Schedule:
    """What a loop keeps, and what it runs again.

    Attributes
    ----------
    actions : tuple of Advance and Reverse
        In the order in which they run.  The forward pass runs up to, and including, the first run with residuals.
    steps, residual, carry : int
        Steps of the loop; bytes of the residuals of a step, and of a carry.
    segments : int
        How many runs are reversed.
    kept : int
        The most carries that are held at any moment.
    recomputed : int
        Steps that run again; T is one more forward pass.
    peak : int
        The most bytes of residuals and carries that are held at any moment.
    whole : int
        Bytes that are kept without a budget.

    Examples
    --------
    >>> print(make_schedule(1000, residual=14336, carry=4096, budget=716800))
    1000 steps in 24 segments of at most 43: keeps 23 carries, runs 957 steps again (0.96 of a forward pass), \
peak 710656 bytes, 5.0 % of the 14336000 for everything
    """

    def __init__(
        self, steps: int, residual: int, carry: int, actions: tuple[Advance | Reverse, ...],
        whole: int | None = None,
    ) -> None:  # fmt: skip
        self.steps, self.residual, self.carry, self.actions = steps, residual, carry, actions
        self.segments = self.kept = self.recomputed = self.peak = self.longest = 0
        held = 0
        for action in actions:
            length = action.stop - action.start
            if isinstance(action, Advance):
                held += 1
                self.recomputed += length
            else:
                self.peak = max(self.peak, held * carry + length * residual)
                held -= 1
                self.segments += 1
                self.longest = max(self.longest, length)
            self.kept = max(self.kept, held)
        self.whole = steps * residual if whole is None else whole
        # Few lengths: those of most actions, and powers of two for the rest.
        often = Counter(min(action.stop - action.start, self.longest) for action in actions).most_common(_LENGTHS)
        powers = [1 << k for k in range(self.longest.bit_length())]
        self._lengths = sorted({*powers, *(length for length, _ in often)}, reverse=True)

    def pieces(self, action: Advance | Reverse) -> list[tuple[int, int]]:
        """The runs that an action is made of.

        No run is longer than the longest one that is reversed, so its working memory is bounded too; and there are
        few lengths, because everything that is derived from a length is derived once.
        """
        start, stop = action
        found: list[tuple[int, int]] = []
        for length in self._lengths:
            while stop - start >= length:
                found.append((start, start + length))
                start += length
        return found

    def __str__(self) -> str:
        if self.peak >= self.whole:
            return f"{self.steps} steps in one: keeps everything, {self.peak} bytes"
        return (
            f"{self.steps} steps in {self.segments} segments of at most {self.longest}: keeps {self.kept} carries, "
            f"runs {self.recomputed} steps again ({self.recomputed / self.steps:.2f} of a forward pass), "
            f"peak {self.peak} bytes, {100 * self.peak / self.whole:.1f} % of the {self.whole} for everything"
        )

    def __repr__(self) -> str:
        return f"<Schedule {self}>"


# ---------------------------------------------------------------------------- what the user gives


class Budget(NamedTuple):
    """The budget that a layer hands on to its loops: an amount, and whom errors name."""

    amount: int | float
    who: str

    def __repr__(self) -> str:
        return repr(self.amount)


Memory = int | float | Budget | None  # after check_memory


def check_memory(memory: Any, who: str) -> Any:
    """``memory=`` as an int (bytes), a float (fraction), or None; a layer's Budget as it is.

    Raises
    ------
    DTypeError
        No number.
    ArgumentError
        Bytes below 1, or a fraction outside of (0, 1].
    """
    if memory is None or memory.__class__ is Budget:
        return memory
    if isinstance(memory, (bool, np.bool_)) or not isinstance(memory, (int, float, np.integer, np.floating)):
        raise DTypeError(
            f"{who}: memory is a number of bytes (int) or a fraction of what keeping everything takes (float), "
            f"found {memory!r}"
        )
    if isinstance(memory, (int, np.integer)):
        if memory < 1:
            raise ArgumentError(f"{who}: memory is at least one byte, found {memory}; None keeps everything")
        return int(memory)
    if not 0.0 < memory <= 1.0:
        raise ArgumentError(
            f"{who}: as a float, memory is a fraction in (0, 1], found {memory}; bytes are given as an int"
        )
    return float(memory)


def who_asks(memory: Memory, otherwise: str) -> str:
    """Whom an error about a budget names."""
    return memory.who if isinstance(memory, Budget) else otherwise


def share_memory(memory: Memory, loops: int) -> Memory:
    """The part of each of several loops: bytes are shared out evenly, a fraction holds for each."""
    if isinstance(memory, Budget):
        return Budget(share_memory(memory.amount, loops), memory.who)  # type: ignore[arg-type]
    return max(1, memory // loops) if isinstance(memory, int) else memory


def budget_bytes(memory: int | float | Budget, whole: int) -> int:
    """A budget in bytes."""
    amount = memory.amount if isinstance(memory, Budget) else memory
    return amount if isinstance(amount, int) else int(amount * whole)


# ---------------------------------------------------------------------------- making schedules


def make_schedule(
    steps: int, residual: int, carry: int, budget: int, who: str = "scan", whole: int | None = None
) -> Schedule:
    """The schedule of a loop within a budget.

    Parameters
    ----------
    steps : int
    residual, carry : int
        Bytes of the residuals of one step, and of one carry.
    budget : int
        The most bytes of residuals and carries at any moment.
    who : str
        Who asks, for the message.
    whole : int, optional
        Bytes that are kept without a budget, where those are not ``steps * residual``.

    Raises
    ------
    ArgumentError
        No schedule fits; says what the least budget is.

    Examples
    --------
    >>> make_schedule(10, residual=7, carry=2, budget=30).recomputed
    7
    >>> make_schedule(10, residual=7, carry=2, budget=8)
    Traceback (most recent call last):
    ...
    tinygrad_lstm.errors.ArgumentError: scan: memory=8 bytes do not suffice for 10 steps with 7 bytes of residuals \
each and a carry of 2; at least 9 are needed (70 keep everything)
    """
    whole = steps * residual if whole is None else whole
    found = _schedule(steps, residual, carry, budget, whole)
    if found is None:
        budgets = (residual + k * carry for k in range(5))
        least = next(b for b in budgets if _schedule(steps, residual, carry, b, whole) is not None)
        raise ArgumentError(
            f"{who}: memory={budget} bytes do not suffice for {steps} steps with {residual} bytes of residuals each "
            f"and a carry of {carry}; at least {min(least, steps * residual)} are needed ({whole} keep everything)"
        )
    return found


@functools.lru_cache(maxsize=32)
def _schedule(steps: int, residual: int, carry: int, budget: int, whole: int) -> Schedule | None:
    actions = _actions(steps, residual, carry, budget)
    return None if actions is None else Schedule(steps, residual, carry, actions, whole)


def _actions(steps: int, residual: int, carry: int, budget: int) -> tuple[Advance | Reverse, ...] | None:
    if steps * residual <= budget:
        return (Reverse(0, steps),)
    if residual > budget:
        return None
    length = _equal_segments(steps, residual, carry, budget)
    if length:
        # The odd segment comes first, so that the last one, kept from the forward pass, is a full one.
        return _walk(steps, lambda n, held: n if n <= length else n % length or length)
    if not carry or residual + carry > budget:
        return None
    cell = -(-steps // EXACT)
    cells = -(-steps // cell)
    choose = _optimal(cells, cell, residual, carry, budget)
    return None if choose is None else _shifted(_walk(cells * cell, choose), cells * cell - steps)


def _shifted(actions: tuple[Advance | Reverse, ...], pad: int) -> tuple[Advance | Reverse, ...]:
    """Without the first ``pad`` steps: what ran only in them is dropped, and so is the carry that it made."""
    moved = (type(a)(max(a.start - pad, 0), max(a.stop - pad, 0)) for a in actions)
    return tuple(a for a in moved if a.start < a.stop)


def _walk(steps: int, choose: Callable[[int, int], int]) -> tuple[Advance | Reverse, ...]:
    """The actions of a schedule given as a choice.

    ``choose(n, held)``: of n steps in front of what is reversed already, with so many carries held, how many are
    advanced before a carry is kept; n to run all of them with residuals.
    """
    actions: list[Advance | Reverse] = []
    pending = [(0, steps)]
    while pending:
        start, stop = pending.pop()
        advance = choose(stop - start, len(pending))
        while advance < stop - start:
            actions.append(Advance(start, start + advance))
            pending.append((start, start + advance))
            start += advance
            advance = choose(stop - start, len(pending))
        actions.append(Reverse(start, stop))
    return tuple(actions)


def _equal_segments(steps: int, residual: int, carry: int, budget: int) -> int:
    """The longest segments with which every step runs at most twice; 0 where none fit.

    The fewer segments, the fewer steps run again, and the less is done between them.
    """
    lengths = np.arange(1, min(steps, budget // residual) + 1, dtype=np.int64)
    borders = -(-steps // lengths) - 1
    fits = np.flatnonzero(lengths * residual + borders * carry <= budget)
    return int(lengths[fits[-1]]) if fits.size else 0


def _optimal(cells: int, cell: int, residual: int, carry: int, budget: int) -> Callable[[int, int], int] | None:
    """The choice of the schedule that runs the fewest of ``cells * cell`` steps, see :func:`_walk`; None if none fits.

    With ``cost(n, held)`` the steps that run forward until n of them are reversed::

        cost(n, held) = n                                                            if n * residual fits beside held
                      = min over k of k + cost(n - k, held + 1) + cost(k, held)      otherwise

    Within a cell k is any step, beyond it a multiple of the cell; that costs less than 5 % more steps where the
    budget holds the residuals of six steps, some 20 % at the least budget (measured, up to 2700 steps).
    """
    most = min((budget - residual) // carry, cells * cell)  # carries beside which one step can still be reversed
    fits = [(budget - held * carry) // residual for held in range(most + 1)]
    cost, choice = _table(cells if cell == 1 else cell, 1, fits)
    if cell == 1:
        return None if cost[cells, 0] >= _NEVER else lambda n, held: int(choice[n, held])
    coarse, beyond = _table(cells, cell, fits, cost[cell])
    if coarse[cells, 0] >= _NEVER:
        return None
    return lambda n, held: int(choice[n, held] if n <= cell else beyond[n // cell, held] * cell)


def _table(count: int, cell: int, fits: list[int], single: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Cost and choice by (cells, carries held).  ``single``: the cost of one cell, where it is no single step."""
    width = len(fits)
    room = np.asarray(fits)
    # One column more, of what can never be done: one carry too many.
    cost = np.full((count + 1, width + 1), _NEVER)
    choice = np.zeros((count + 1, width), np.int64)
    cost[0] = 0
    advanced = np.arange(count + 1, dtype=np.int64)[:, None] * cell
    for n in range(1, count + 1):
        if n > 1:
            total = advanced[1:n] + cost[n - 1 : 0 : -1, 1:] + cost[1:n, :-1]
            best = total.argmin(axis=0)
            cost[n, :-1] = np.minimum(total[best, np.arange(width)], _NEVER)
            choice[n] = best + 1
        elif single is not None:
            cost[n, :-1] = single[:width]
            choice[n] = 1
        whole = room >= n * cell
        cost[n, :-1][whole] = n * cell
        choice[n][whole] = n
    return cost, choice
