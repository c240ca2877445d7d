"""Learning rates as pure functions of (step, total steps).

Such a schedule has no state: a resumed run computes the same rates because the checkpoint stores
the step and the total.  It gives a factor on the rate that the optimizer was made with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinygrad_lstm.checks import check_int, check_number
from tinygrad_lstm.errors import ArgumentError

__all__ = ["Constant", "WarmupCosine"]


@dataclass(frozen=True)
class Constant:
    """Always the optimizer's own rate.

    >>> Constant()(3, 10)
    1.0
    """

    def __call__(self, step: int, total: int) -> float:
        return 1.0


@dataclass(frozen=True)
class WarmupCosine:
    """A linear rise, then half a cosine down (Loshchilov & Hutter 2017, SGDR, without restarts).

    Step ``s`` of ``warmup`` first ones has the factor ``(s + 1) / warmup``; the rest falls from 1 to
    ``floor``, which the last step reaches.

    Parameters
    ----------
    warmup : int
        Steps of the rise; at most half of all steps are used for it.
    floor : float
        The factor at the end, in 0 .. 1.

    Examples
    --------
    >>> schedule = WarmupCosine(warmup=2, floor=0.1)
    >>> [round(schedule(step, 7), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1]
    """

    warmup: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_int("warmup", self.warmup, 0)
        check_number("floor", self.floor)
        if not 0 <= self.floor <= 1:
            raise ArgumentError(f"floor is a factor between 0 and 1, found {self.floor}")

    def __call__(self, step: int, total: int) -> float:
        warmup = min(self.warmup, total // 2)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup - 1))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2
