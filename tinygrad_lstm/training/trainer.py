"""The training loop: steps, validation, truncated BPTT, checkpoints, and resuming bit for bit."""

from __future__ import annotations

import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm import serialization
from tinygrad_lstm.calls import SaysWhatItTakes, says_what_it_takes
from tinygrad_lstm.errors import ArgumentError, CheckpointError, Error
from tinygrad_lstm.nn import Module
from tinygrad_lstm.optim import ReduceLROnPlateau, clip_grad_norm
from tinygrad_lstm.tape import no_grad
from tinygrad_lstm.tensor import Tensor
from tinygrad_lstm.training.arguments import (
    check_fit,
    check_iterable,
    check_parts,
    loss_of,
    model_output,
    rate_factor,
)
from tinygrad_lstm.training.batches import Batches, Unpacked, has_padding, real_steps, unpack
from tinygrad_lstm.training.callbacks import Callback, ProgressBar
from tinygrad_lstm.training.state import detached, restore, snapshot
from tinygrad_lstm.tree import tree_map

__all__ = ["DivergedError", "Trainer"]

COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "seconds")


class DivergedError(Error, ArithmeticError):
    """The loss or its gradient is no longer finite.  The parameters are those before that step."""


class Trainer(SaysWhatItTakes):
    """Trains a model on batches.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(inputs)``; as ``model(inputs, lengths=lengths)`` where the sequences of a
        batch differ in length; with ``carry_state`` as ``model(inputs, state)``, returning
        ``(output, state)``.
    optimizer : optimizer of ``tg.optim`` over the model's parameters, but for LBFGS
    loss : function
        ``loss(output, targets)`` gives a scalar Tensor, the mean over the targets.  It never sees padding: where
        sequences of a batch differ in length and targets are per step, both are ``(N, ...)``, the N real steps in
        the order of ``output[batch.mask]`` (see :class:`Batch <tinygrad_lstm.data.Batch>`); else both are whole.
    schedule : optional
        Either a function ``(step, total) -> factor`` on the optimizer's own rates (see
        ``training.schedules``), or a scheduler of ``tg.optim``, whose ``step()`` is called after
        each step (of a ReduceLROnPlateau: with the loss, after each validation).
    clip_norm : float, optional
        Gradients are scaled down to this global norm (Pascanu et al. 2013).
    carry_state : bool
        Truncated backpropagation through time (Williams & Peng 1990): the state after a batch,
        detached, starts the next one; an epoch starts without.
    callbacks : list of Callback

    Attributes
    ----------
    step, total, epoch : int
        Steps done, steps of the whole run, epochs completed.
    history : dict of lists
        ``step epoch loss lr grad_norm seconds``, one entry per step.
    validations : dict of lists
        ``step loss``, one entry per validation.
    best : dict or None
        ``step``, ``loss`` and ``model`` (a state dict) of the best validation.
    stop_reason : str or None
        Why the last ``fit`` ended: "complete", "time limit", "early stopping", or what ``stop`` was
        given.

    Examples
    --------
    A run that was stopped goes on, bit for bit, where it was::

        trainer = Trainer(model, optim.Adam(model, lr=1e-3), nn.mse_loss)
        trainer.fit(loader, epochs=10, validation=held_out, checkpoint="last.safetensors", time_limit=60)
        ...
        trainer.load("last.safetensors")      # in a new process, with model and loader made alike
        trainer.fit(loader, validation=held_out, checkpoint="last.safetensors")
    """

    def __init__(
        self,
        model: Module,
        optimizer: Any,
        loss: Callable[[Any, Any], Tensor],
        *,
        schedule: Any = None,
        clip_norm: float | None = None,
        carry_state: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_parts(model, optimizer, loss, schedule, clip_norm, callbacks)
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.schedule, self.clip_norm, self.carry_state = schedule, clip_norm, carry_state
        self.callbacks = list(callbacks)
        self._by_validation = isinstance(schedule, ReduceLROnPlateau)
        self.base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.new_run(0)

    def new_run(self, total: int) -> None:
        """Forget the last run; the model, the optimizer and the generators stay as they are."""
        self.step, self.total, self.epoch = 0, total, 0
        self.history: dict[str, list[float]] = {name: [] for name in COLUMNS}
        self.validations: dict[str, list[float]] = {"step": [], "loss": []}
        self.best: dict[str, Any] | None = None
        self.stop_reason: str | None = None
        self.seconds = 0.0
        self.position = 0  # batches of this epoch that are done
        self.since_best = 0  # validations since the best one
        self.carried: Any = None  # the state that the next batch starts with
        self.finished = True  # no run is under way
        self.batches: Batches | None = None
        self.loaded_data_state: Any = None

    # -- the run -----------------------------------------------------------------------------------

    @says_what_it_takes
    def fit(
        self,
        batches: Batches,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        validation: Iterable[Any] | None = None,
        validate_every: int | None = None,
        patience: int | None = None,
        time_limit: float | None = None,
        checkpoint: str | os.PathLike[str] | Callable[[Trainer], None] | None = None,
        checkpoint_every: int | None = None,
        progress: bool = False,
    ) -> Trainer:
        """Train until the run is complete, or stopped.

        A run's total number of steps is fixed when it starts, and stored: schedules depend on
        nothing else.  If the last run was stopped (or :meth:`load` brought back one that was), this
        goes on with it, else it starts a new run.  An exception, Ctrl-C too, may hit in the middle of a
        step; only what was saved before it is whole.

        Parameters
        ----------
        batches : sized iterable of ``(inputs, targets[, lengths])``
        steps, epochs : int
            The total; one of the two for a new run, optional for one that goes on.
        validation : iterable of batches, optional
            Evaluated every ``validate_every`` steps (an epoch without it) and after the last step.
        patience : int, optional
            Early stopping: end after so many validations without a better one.
        time_limit : float, optional
            Seconds after which this call stops the run; it changes nothing else.
        checkpoint : path or function, optional
            Where to save the run, or what is called with the trainer to do so: every
            ``checkpoint_every`` steps (an epoch without it), and when this call ends in good order.
        progress : bool
            Show a progress bar.

        Returns
        -------
        Trainer
            Itself.

        Raises
        ------
        ArgumentError, DTypeError
            What cannot be trained with; no total, or one that differs from the run's that goes on; no batches.
        DivergedError
            The loss or the gradient's norm is not finite.  No checkpoint is written then.
        """
        counts = {
            "steps": steps,
            "epochs": epochs,
            "validate_every": validate_every,
            "checkpoint_every": checkpoint_every,
        }
        check_fit(batches, validation, self.schedule, patience, time_limit, counts)
        length = len(batches)
        if length == 0:
            raise ArgumentError("there are no batches to train on")
        if not self._begin(batches, steps, epochs, length):
            return self
        callbacks = [*self.callbacks, ProgressBar()] if progress else self.callbacks
        started = time.monotonic()
        before = self.seconds
        self.stop_reason = None
        self.model.train()
        entered: list[Callback] = []
        try:
            for callback in callbacks:
                entered.append(callback)
                callback.on_start(self)
            for batch in self._remaining(batches, length):
                row = self._train_step(batch)
                self.position += 1
                if self.position == length:
                    self._end_epoch()
                self.seconds = before + time.monotonic() - started
                self._record(row)
                last = self.step == self.total
                if validation is not None and (last or self.step % (validate_every or length) == 0):
                    self._validate(validation, patience, callbacks)
                for callback in callbacks:
                    callback.on_step(self, row)
                if last:
                    self.stop_reason = "complete"
                elif time_limit is not None and time.monotonic() - started >= time_limit:
                    self.stop("time limit")
                self.finished = self.stop_reason in ("complete", "early stopping")
                if self.stop_reason is not None:
                    break
                if self.step % (checkpoint_every or length) == 0:
                    self._write(checkpoint)
            self._write(checkpoint)
        finally:
            for callback in entered:
                callback.on_end(self)
        return self

    def stop(self, reason: str = "stopped") -> None:
        """End the run after the step that is under way; may be called from a signal handler."""
        if self.stop_reason is None:
            self.stop_reason = reason

    def _begin(self, batches: Batches, steps: int | None, epochs: int | None, length: int) -> bool:
        """Start a run or go on with one; False when there is nothing left to do."""
        if steps is not None and epochs is not None:
            raise ArgumentError("give steps or epochs, not both")
        total = epochs * length if epochs is not None else steps
        if self.finished and total is None:
            if self.step == 0:
                raise ArgumentError("a new run needs steps=... or epochs=...")
            self.stop_reason = "complete" if self.step == self.total else "early stopping"
            return False
        if self.finished or (not self.step and total not in (None, self.total)):  # nothing depends on it yet
            self.new_run(total or 0)
        elif total is not None and total != self.total:
            raise ArgumentError(
                f"the run that goes on has {self.total} steps in all ({self.step} are done), found {total}; "
                "the total is fixed when a run starts because the schedule depends on it"
            )
        elif (data_state := self.data_state()) is not None:
            batches.load_state_dict(data_state)  # type: ignore[attr-defined]
        self.batches, self.finished = batches, False
        return True

    def _remaining(self, batches: Batches, length: int) -> Iterator[Any]:
        """Batches until the total is reached, epoch after epoch, from the current position on."""
        while self.step < self.total:
            before = self.step
            skipped = 0 if hasattr(batches, "state_dict") else self.position
            yield from itertools.islice(iter(batches), skipped, length)
            if self.step == before:
                raise ArgumentError(f"batches says that it has {length} batches, but an epoch came out empty")
            if self.position != 0:  # an epoch that was shorter than announced
                self._end_epoch()

    def _end_epoch(self) -> None:
        self.epoch, self.position, self.carried = self.epoch + 1, 0, None

    def _train_step(self, batch: Any) -> dict[str, float]:
        parts = unpack(batch, self.model)
        self.optimizer.zero_grad()
        with _quiet():
            output, state = self.forward(parts.inputs, self.carried, parts.lengths)
            loss = self._loss(output, parts)
            value = loss.item()
            if not math.isfinite(value):
                raise DivergedError(
                    f"the loss is {value} at step {self.step}; a lower learning rate or clip_norm may help"
                )
            loss.backward()
        norm = math.nan
        if self.clip_norm is not None:
            norm = float(clip_grad_norm(self.model.parameters(), self.clip_norm))
            if not math.isfinite(norm):
                raise DivergedError(
                    f"the gradient's norm is {norm} at step {self.step}; a lower learning rate may help"
                )
        if callable(self.schedule):
            factor = rate_factor(self.schedule(self.step, self.total), self.step)
            for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = base * factor
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.schedule is not None and not callable(self.schedule) and not self._by_validation:
            self.schedule.step()
        # Detached: the next batch's gradient ends at its own first step.
        self.carried = detached(state)
        self.step += 1
        return {"step": self.step, "epoch": self.epoch, "loss": value, "lr": rate, "grad_norm": norm}

    def forward(self, inputs: Any, state: Any = None, lengths: Any = None) -> tuple[Any, Any]:
        """``(output, state)`` of the model; override it for models that are called in another way."""
        ragged = lengths is not None and has_padding(inputs, lengths)
        return model_output(self.model, self.carry_state, inputs, state, lengths if ragged else None)

    def _loss(self, output: Any, batch: Unpacked) -> Tensor:
        return loss_of(self.loss, *real_steps(output, batch), self.carry_state)

    def _record(self, row: dict[str, float]) -> None:
        row["seconds"] = self.seconds
        for name in COLUMNS:
            self.history[name].append(row[name])

    def _validate(self, validation: Iterable[Any], patience: int | None, callbacks: Sequence[Callback]) -> None:
        value = self.evaluate(validation)
        self.validations["step"].append(self.step)
        self.validations["loss"].append(value)
        best = math.nan if self.best is None else self.best["loss"]
        is_best = self.best is None or value < best or (math.isnan(best) and not math.isnan(value))
        self.since_best = 0 if is_best else self.since_best + 1
        if is_best:
            model = {name: np.array(array) for name, array in self.model.state_dict().items()}
            self.best = {"step": self.step, "loss": value, "model": model}
        if self._by_validation:
            self.schedule.step(value)
        for callback in callbacks:
            callback.on_validation(self, value, is_best)
        if patience is not None and self.since_best >= patience:
            self.stop("early stopping")

    # -- without training ----------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[Any]) -> float:
        """The mean loss over all batches, weighted by their number of targets, in evaluation mode.

        The model's mode and the state of a run under way are left as they were.  With targets per
        step, padding is neither in the loss nor counted.
        """
        total, weight = 0.0, 0
        for output, batch in self._outputs(batches):
            with no_grad(), _quiet():
                value = self._loss(output, batch).item()
            total, weight = total + value * batch.weight, weight + batch.weight
        if weight == 0:
            raise ArgumentError("there are no batches to evaluate")
        return total / weight

    def predict(self, batches: Any) -> Any:
        """The model's outputs in evaluation mode.

        ``batches`` is an array or Tensor of inputs (the result is one ndarray), or an iterable of
        batches (the result is a list with one ndarray each; targets are not looked at).
        """
        if isinstance(batches, (np.ndarray, Tensor)):
            return self.predict([(batches, None)])[0]
        return [tree_map(_array, output) for output, _ in self._outputs(batches)]

    def _outputs(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Unpacked]]:
        check_iterable(batches)
        if batches is self.batches and hasattr(batches, "state_dict"):
            batches = copy.copy(batches)  # so that the place where the run stands in them is not lost
        training = self.model.training
        self.model.eval()
        state = None
        try:
            for batch in batches:
                parts = unpack(batch, self.model)
                with no_grad(), _quiet():
                    output, state = self.forward(parts.inputs, state, parts.lengths)
                yield output, parts
        finally:
            self.model.train(training)

    # -- checkpoints -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, and its history; a tree for ``tg.save``."""
        return snapshot(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; model, optimizer and schedule have to be made as they were.

        Raises
        ------
        CheckpointError
            The state is that of something else.
        """
        restore(self, state)

    def data_state(self) -> Any:
        """Where the data stand, None for data that cannot tell."""
        if self.batches is None:
            return self.loaded_data_state
        return self.batches.state_dict() if hasattr(self.batches, "state_dict") else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the run to a file (see :func:`tg.save <tinygrad_lstm.serialization.save>`)."""
        serialization.save(path, {"trainer": self.state_dict()}, metadata={"kind": "trainer", "step": self.step})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Bring back a run that :meth:`save`, or ``fit(checkpoint=...)``, wrote; ``fit`` then goes on with it."""
        tree = serialization.load(path)
        if not isinstance(tree, dict) or not isinstance(tree.get("trainer"), dict):
            raise CheckpointError(f"{os.fspath(path)} holds no run of a Trainer")
        self.load_state_dict(tree["trainer"])

    def load_best(self) -> None:
        """Give the model the parameters of the best validation."""
        if self.best is None:
            raise ArgumentError("there was no validation in this run, so no parameters are the best")
        self.model.load_state_dict(self.best["model"])

    def _write(self, checkpoint: str | os.PathLike[str] | Callable[[Trainer], None] | None) -> None:
        if callable(checkpoint):
            checkpoint(self)
        elif checkpoint is not None:
            self.save(checkpoint)


def _quiet() -> np.errstate:
    """Without NumPy's warnings of what is no longer finite: a Trainer says it of the loss, once."""
    return np.errstate(over="ignore", invalid="ignore")


def _array(leaf: Any) -> np.ndarray:
    return leaf.numpy() if isinstance(leaf, Tensor) else np.asarray(leaf)
