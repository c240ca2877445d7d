"""Learning-rate schedules: ``step()`` after every optimizer step (or epoch, as the numbers are meant).

As in PyTorch, most of them change the rate that is in force: several of them on one optimizer go together, and a rate
that was set by hand between steps is gone on from.  (:class:`OneCycleLR`, and a schedule that has only :meth:`rate
<Schedule.rate>`, set it.)  The rates in force are part of a schedule's state, so that a resumed run repeats an
uninterrupted one bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tinygrad_lstm.calls import SaysWhatItTakes
from tinygrad_lstm.checks import check_int, check_number
from tinygrad_lstm.errors import ArgumentError, DTypeError
from tinygrad_lstm.optim.base import Optimizer, as_float

__all__ = [
    "CosineAnnealingLR", "ExponentialLR", "LinearWarmup", "OneCycleLR", "ReduceLROnPlateau", "Schedule", "StepLR",
]  # fmt: skip


def _one_per_group(what: str, rates: float | Sequence[float], groups: list[dict[str, Any]]) -> list[float]:
    """A rate for each group, from one for all or a list."""
    each: list[Any] = list(rates) if isinstance(rates, (list, tuple)) else [rates] * len(groups)
    if len(each) != len(groups):
        raise ArgumentError(f"{what} has {len(each)} values for {len(groups)} groups")
    for rate in each:
        check_number(what, rate)
    return [float(rate) for rate in each]


class Schedule(SaysWhatItTakes):
    """Base class: what becomes of the rate of every group at each step.

    A subclass writes :meth:`rate`, of the number of steps alone, or :meth:`next_rate`, of the rate in force too.

    Attributes
    ----------
    last_epoch : int
        How often ``step()`` was called.
    base_lrs : list of floats
        The rates of the groups when the first schedule was made.
    """

    _stored: tuple[str, ...] = ("last_epoch", "base_lrs")

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ArgumentError(
                f"{type(self).__name__}: the first argument is an optimizer, found {type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        self.base_lrs = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
        self.last_epoch = 0
        self._apply()

    def rate(self, base: float, step: int) -> float:
        """The rate of a group with the base rate ``base`` after ``step`` steps."""
        raise ArgumentError(f"{type(self).__name__} has neither rate() nor next_rate(); define one in the subclass")

    def next_rate(self, current: float, base: float, step: int) -> float:
        """The rate after ``step`` steps, where ``current`` was in force before (step 0: when it was made)."""
        return self.rate(base, step)

    def _apply(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = self.next_rate(group["lr"], base, self.last_epoch)

    def step(self) -> None:
        """Go on by one step and set the rates."""
        self.last_epoch += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """The rates in force, one per group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The state as a tree of numbers and lists; ``last_lrs`` are the rates in force."""
        own = {key: list(value) if isinstance(value := getattr(self, key), list) else value for key in self._stored}
        return {**own, "last_lrs": self.get_last_lr()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; the optimizer's rates are set to those in force then."""
        if not isinstance(state, Mapping):
            raise DTypeError(f"{type(self).__name__}.load_state_dict takes a dict, found a {type(state).__name__}")
        missing = [key for key in self._stored if key not in state]
        # (Without rates it is a state of an earlier version: the optimizer's own state has them.)
        rates = state.get("last_lrs", self.get_last_lr())
        lists = [] if missing else [state["base_lrs"], rates]
        if missing or not all(isinstance(x, (list, tuple)) and len(x) == len(self.base_lrs) for x in lists):
            raise ArgumentError(
                f"{type(self).__name__}.load_state_dict: this is no state of this schedule (missing {missing})"
            )
        for key in self._stored:
            value = state[key]
            setattr(self, key, list(value) if isinstance(value, (list, tuple)) else value)
        self._restored()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _restored(self) -> None:
        """What else follows from a state that was loaded."""


class StepLR(Schedule):
    """The rate times ``gamma`` every ``step_size`` steps.

    >>> from tinygrad_lstm import nn, optim
    >>> optimizer = optim.SGD([nn.Parameter([1.0])], lr=1.0)
    >>> schedule = optim.StepLR(optimizer, step_size=2, gamma=0.5)
    >>> schedule.step(), schedule.step(), optimizer.param_groups[0]["lr"]
    (None, None, 0.5)
    """

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        check_int("StepLR: step_size", step_size)
        check_number("StepLR: gamma", gamma)
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer)

    def next_rate(self, current: float, base: float, step: int) -> float:
        """Times ``gamma`` at multiples of ``step_size``."""
        return current * self.gamma if step and step % self.step_size == 0 else current


class ExponentialLR(Schedule):
    """The rate times ``gamma`` every step."""

    def __init__(self, optimizer: Optimizer, gamma: float) -> None:
        check_number("ExponentialLR: gamma", gamma)
        self.gamma = gamma
        super().__init__(optimizer)

    def next_rate(self, current: float, base: float, step: int) -> float:
        """Times ``gamma``."""
        return current * self.gamma if step else current


class CosineAnnealingLR(Schedule):
    """Half a cosine from the base rate to ``eta_min`` over ``T_max`` steps, and back (Loshchilov & Hutter 2017).

    Alone, ``eta_min + (base - eta_min) (1 + cos(pi step / T_max)) / 2``.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0) -> None:
        check_number("CosineAnnealingLR: T_max", T_max)
        check_number("CosineAnnealingLR: eta_min", eta_min)
        if T_max < 1:
            raise ArgumentError(f"CosineAnnealingLR: T_max is at least 1, found {T_max}")
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer)

    def next_rate(self, current: float, base: float, step: int) -> float:
        """What is above ``eta_min`` times the quotient of two heights of the cosine; from its bottom, a first rise."""
        if not step:
            return current
        if (step - 1) % (2 * self.T_max) == self.T_max:
            return current + (base - self.eta_min) * (1 - math.cos(math.pi / self.T_max)) / 2
        now, before = (1 + math.cos(math.pi * k / self.T_max) for k in (step, step - 1))
        return self.eta_min + (current - self.eta_min) * (now / before)


class LinearWarmup(Schedule):
    """From ``base / warmup_steps`` up to the base rate in equal steps, then constant (Goyal et al. 2017)."""

    def __init__(self, optimizer: Optimizer, warmup_steps: int) -> None:
        check_int("LinearWarmup: warmup_steps", warmup_steps)
        self.warmup_steps = warmup_steps
        super().__init__(optimizer)

    def next_rate(self, current: float, base: float, step: int) -> float:
        """Divided by ``warmup_steps`` at first, then times ``(step + 1) / step``: alone, in equal steps."""
        if not step:
            return current / self.warmup_steps
        return current * (step + 1) / step if step < self.warmup_steps else current


class OneCycleLR(Schedule):
    """Up to ``max_lr`` and down again, with the momentum the other way round (Smith & Topin 2019).

    Parameters
    ----------
    optimizer : Optimizer
    max_lr : float or list of floats, one per group
    total_steps : int
        Or ``epochs`` and ``steps_per_epoch``.
    pct_start : float
        The fraction of the steps that go up.
    anneal_strategy : "cos" or "linear"
    cycle_momentum : bool
        For optimizers with ``momentum`` or ``betas``: between ``max_momentum`` and ``base_momentum``.
    div_factor, final_div_factor : float
        The first rate is ``max_lr / div_factor``, the last that one divided by ``final_div_factor``.
    three_phase : bool
        Come down as long as it went up, then fall to the last rate.
    """

    def __init__(
        self, optimizer: Optimizer, max_lr: float | list[float], total_steps: int | None = None,
        epochs: int | None = None, steps_per_epoch: int | None = None, pct_start: float = 0.3,
        anneal_strategy: str = "cos", cycle_momentum: bool = True, base_momentum: float = 0.85,
        max_momentum: float = 0.95, div_factor: float = 25.0, final_div_factor: float = 1e4, three_phase: bool = False,
    ) -> None:  # fmt: skip
        if total_steps is None and (epochs is None or steps_per_epoch is None):
            raise ArgumentError("OneCycleLR: total_steps, or epochs and steps_per_epoch, are needed")
        counts = {"total_steps": total_steps, "epochs": epochs, "steps_per_epoch": steps_per_epoch}
        for name, count in counts.items():
            if count is not None:
                check_int(f"OneCycleLR: {name}", count)
        self.total_steps = int(total_steps if total_steps is not None else epochs * steps_per_epoch)  # type: ignore[operator]
        for name, number in (("div_factor", div_factor), ("final_div_factor", final_div_factor)):
            check_number(f"OneCycleLR: {name}", number)
            if not number > 0:
                raise ArgumentError(f"OneCycleLR: {name} is positive, found {number}")
        if self.total_steps < 1 or not 0.0 <= pct_start <= 1.0:
            raise ArgumentError(
                f"OneCycleLR: total_steps={self.total_steps} is at least 1, pct_start={pct_start} lies in [0, 1]"
            )
        if anneal_strategy not in ("cos", "linear"):
            raise ArgumentError(f"OneCycleLR: anneal_strategy is 'cos' or 'linear', found {anneal_strategy!r}")
        groups = optimizer.param_groups
        self.max_lrs = _one_per_group("OneCycleLR: max_lr", max_lr, groups)
        self.linear = anneal_strategy == "linear"
        self.div_factor, self.final_div_factor = div_factor, final_div_factor
        self.low, self.high = base_momentum, max_momentum
        self.cycle_momentum = cycle_momentum
        if cycle_momentum and not all("momentum" in group or "betas" in group for group in groups):
            raise ArgumentError(
                f"OneCycleLR: {type(optimizer).__name__} has no momentum to cycle; pass cycle_momentum=False"
            )
        up = float(pct_start * self.total_steps) - 1
        # (last step of the phase, rate and momentum at its start and end: 0 first, 1 top, 2 last)
        self.phases = [(up, 0, 1), (float(self.total_steps - 1), 1, 2)]
        if three_phase:
            self.phases = [(up, 0, 1), (2 * up, 1, 0), (float(self.total_steps - 1), 0, 2)]
        for group, top in zip(groups, self.max_lrs, strict=True):
            group["initial_lr"] = top / div_factor
        super().__init__(optimizer)

    def _between(self, start: float, end: float, part: float) -> float:
        if self.linear:
            return (end - start) * part + start
        return end + (start - end) / 2.0 * (math.cos(math.pi * part) + 1)

    def _at(self, step: int, levels: tuple[float, float, float]) -> float:
        before = 0.0
        for k, (last, first, second) in enumerate(self.phases):
            if step <= last or k == len(self.phases) - 1:
                part = (step - before) / (last - before) if last != before else 1.0
                return self._between(levels[first], levels[second], part)
            before = last
        raise AssertionError  # the last phase always returns

    def _apply(self) -> None:
        if self.last_epoch > self.total_steps:
            raise ArgumentError(f"OneCycleLR: step {self.last_epoch} of a cycle of {self.total_steps} steps")
        for group, top in zip(self.optimizer.param_groups, self.max_lrs, strict=True):
            first = top / self.div_factor
            group["lr"] = self._at(self.last_epoch, (first, top, first / self.final_div_factor))
            if self.cycle_momentum:
                momentum = self._at(self.last_epoch, (self.high, self.low, self.high))
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                else:
                    group["momentum"] = momentum

    def _restored(self) -> None:
        self._apply()  # the momentum


class ReduceLROnPlateau(Schedule):
    """The rate times ``factor`` when a metric has not improved for more than ``patience`` steps.

    Parameters
    ----------
    optimizer : Optimizer
    mode : "min" or "max"
        Whether lower or higher is better.
    factor : float below 1
    patience, cooldown : int
    threshold : float
    threshold_mode : "rel" or "abs"
        What counts as an improvement: by this fraction of the best, or by this amount.
    min_lr : float or list of floats, one per group
    eps : float
        A change of the rate of at most eps is not made.

    Examples
    --------
    >>> from tinygrad_lstm import nn, optim
    >>> optimizer = optim.SGD([nn.Parameter([1.0])], lr=1.0)
    >>> schedule = optim.ReduceLROnPlateau(optimizer, patience=1)
    >>> for loss in [3.0, 3.0, 3.0, 3.0]:
    ...     schedule.step(loss)
    >>> optimizer.param_groups[0]["lr"]
    0.1
    """

    _stored = ("last_epoch", "base_lrs", "best", "bad_steps", "cooling")

    def __init__(
        self, optimizer: Optimizer, mode: str = "min", factor: float = 0.1, patience: int = 10, threshold: float = 1e-4,
        threshold_mode: str = "rel", cooldown: int = 0, min_lr: float | list[float] = 0.0,
        eps: float = 1e-8,
    ) -> None:  # fmt: skip
        if mode not in ("min", "max") or threshold_mode not in ("rel", "abs"):
            raise ArgumentError(
                "ReduceLROnPlateau: mode is 'min' or 'max', threshold_mode 'rel' or 'abs', "
                f"found {mode!r} and {threshold_mode!r}"
            )
        for name, count in (("patience", patience), ("cooldown", cooldown)):
            check_int(f"ReduceLROnPlateau: {name}", count, 0)
        for name, number in (("factor", factor), ("threshold", threshold), ("eps", eps)):
            check_number(f"ReduceLROnPlateau: {name}", number)
        if not 0.0 <= factor < 1.0:
            raise ArgumentError(f"ReduceLROnPlateau: factor lies in [0, 1), found {factor}")
        self.mode, self.factor, self.patience, self.cooldown = mode, factor, patience, cooldown
        self.threshold, self.threshold_mode, self.eps = threshold, threshold_mode, eps
        self.best: float | None = None
        self.bad_steps = self.cooling = 0
        super().__init__(optimizer)
        self.min_lrs = _one_per_group("ReduceLROnPlateau: min_lr", min_lr, optimizer.param_groups)

    def next_rate(self, current: float, base: float, step: int) -> float:
        """The rate in force: what changes it is the metric."""
        return current

    def _better(self, value: float) -> bool:
        if self.best is None:
            return not math.isnan(value)
        sign = 1.0 if self.mode == "min" else -1.0
        if self.threshold_mode == "rel":
            return sign * value < sign * self.best * (1.0 - sign * self.threshold)
        return sign * value < sign * self.best - self.threshold

    def step(self, metric: Any = None) -> None:
        """Take the metric of a step (a number or a Tensor with one element)."""
        if metric is None:
            raise ArgumentError("ReduceLROnPlateau.step needs the metric: step(loss)")
        value = as_float("ReduceLROnPlateau.step: the metric", metric)
        self.last_epoch += 1
        if self._better(value):
            self.best, self.bad_steps = value, 0
        else:
            self.bad_steps += 1
        if self.cooling > 0:
            self.cooling, self.bad_steps = self.cooling - 1, 0
        if self.bad_steps > self.patience:
            for group, least in zip(self.optimizer.param_groups, self.min_lrs, strict=True):
                lower = max(group["lr"] * self.factor, least)
                if group["lr"] - lower > self.eps:
                    group["lr"] = lower
            self.cooling, self.bad_steps = self.cooldown, 0
