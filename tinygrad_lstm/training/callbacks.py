"""What can be hooked into a training run, and the progress bar."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tinygrad_lstm.training.trainer import Trainer

__all__ = ["Callback", "ProgressBar"]


class Callback:
    """Base class: each method is called at its moment; the defaults do nothing.

    ``trainer.stop("reason")`` in any of them ends the run after the current step.

    Examples
    --------
    >>> class Print(Callback):
    ...     def on_step(self, trainer, row):
    ...         print(row["step"], row["loss"])
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this call of ``fit``; ``trainer.step`` is above 0 when it resumes."""

    def on_step(self, trainer: Trainer, row: dict[str, float]) -> None:
        """After a step; ``row`` has step, epoch, loss, lr, grad_norm, seconds."""

    def on_validation(self, trainer: Trainer, value: float, is_best: bool) -> None:
        """After the validation data were evaluated."""

    def on_end(self, trainer: Trainer) -> None:
        """When ``fit`` ends, also when it ends by an error."""


class ProgressBar(Callback):
    """A tqdm bar: steps, time left, a smoothed loss and the rate of tokens or sequences.

    Parameters
    ----------
    unit : str
        What is counted for the rate, ``"tok"`` for example.
    per_step : int
        How many of them a step has; 0 shows none.
    extra : function, optional
        From the smoothed loss (and ``trainer``) to further things to show, a dict of strings.
    file : text stream, optional
        Standard error without it.
    """

    def __init__(
        self,
        unit: str = "it",
        per_step: int = 0,
        extra: Callable[[float, Trainer], dict[str, str]] | None = None,
        file: TextIO | None = None,
    ) -> None:
        self.unit, self.per_step, self.extra, self.file = unit, per_step, extra, file
        self._bar: Any = None
        self._loss = math.nan

    def on_start(self, trainer: Trainer) -> None:
        from tqdm import tqdm

        file = self.file or sys.stderr
        # Into a log file a line now and then is enough.
        interval = 0.2 if file.isatty() else 10.0
        self._loss = math.nan
        self._bar = tqdm(
            total=trainer.total,
            initial=trainer.step,
            file=file,
            unit="step",
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def on_step(self, trainer: Trainer, row: dict[str, float]) -> None:
        loss = row["loss"]
        self._loss = loss if math.isnan(self._loss) else 0.98 * self._loss + 0.02 * loss
        bar = self._bar
        shown = {"loss": f"{self._loss:.3f}"}
        if self.extra is not None:
            shown |= self.extra(self._loss, trainer)
        if self.per_step:
            facts = bar.format_dict
            # tqdm's smoothed rate; the mean one until there is a smoothed one.
            rate = facts["rate"] or (bar.n + 1 - bar.initial) / max(facts["elapsed"], 1e-9)
            shown[f"{self.unit}/s"] = f"{rate * self.per_step:,.0f}"
        bar.set_postfix(shown, refresh=False)
        bar.update()

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
