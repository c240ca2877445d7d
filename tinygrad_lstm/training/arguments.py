"""What a Trainer is given: refused before the first step where it cannot work."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

from tinygrad_lstm.calls import misfit
from tinygrad_lstm.checks import check_int, check_number
from tinygrad_lstm.compiler.blame import users_level
from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.hints import did_you_mean
from tinygrad_lstm.nn import Module
from tinygrad_lstm.optim import LBFGS, ReduceLROnPlateau
from tinygrad_lstm.tensor import Tensor
from tinygrad_lstm.training.callbacks import Callback

__all__ = [
    "check_batches", "check_fit", "check_iterable", "check_parts", "loss_of", "model_output", "rate_factor",
    "scalar_loss",
]  # fmt: skip


def check_parts(model: Any, optimizer: Any, loss: Any, schedule: Any, clip_norm: Any, callbacks: Any) -> None:
    """Raise unless a Trainer can be made of these."""
    if not isinstance(model, Module):
        raise DTypeError(f"Trainer: the model is a Module, found a {type(model).__name__}")
    if not all(hasattr(optimizer, name) for name in ("step", "zero_grad", "param_groups")):
        raise DTypeError(f"Trainer: the optimizer is one of tg.optim, found a {type(optimizer).__name__}")
    if isinstance(optimizer, LBFGS):
        raise ArgumentError(
            "Trainer: LBFGS computes the loss of one batch several times per step, by a closure, which this loop does "
            "not do; call optimizer.step(closure) in a loop of your own, or take another optimizer"
        )
    if not callable(loss):
        raise DTypeError(f"Trainer: the loss is a function of (output, targets), found a {type(loss).__name__}")
    if schedule is not None and not callable(schedule) and not hasattr(schedule, "step"):
        raise DTypeError(
            "Trainer: the schedule is a function (step, total) -> factor or a schedule of tg.optim, found a "
            f"{type(schedule).__name__}"
        )
    if isinstance(schedule, type):
        raise DTypeError(
            f"Trainer: the schedule is the class {schedule.__name__}, expected one, {schedule.__name__}(...)"
        )
    if callable(schedule) and not hasattr(schedule, "step"):
        _check_call("Trainer calls schedule(step, total); this one", schedule, 2)
    _check_trained(model, optimizer, loss)
    if getattr(schedule, "optimizer", optimizer) is not optimizer:
        raise ArgumentError(
            f"Trainer: the {type(schedule).__name__} was made for another optimizer, so it would change nothing here; "
            "make it of the one that is given to the Trainer"
        )
    _check_callbacks(callbacks)
    if clip_norm is not None:
        check_number("Trainer: clip_norm", clip_norm)
        if not clip_norm > 0:
            raise ArgumentError(f"Trainer: clip_norm is positive or None, found {clip_norm}")


def _check_callbacks(callbacks: Any) -> None:
    if not isinstance(callbacks, (list, tuple)):
        raise DTypeError(f"Trainer: callbacks are a list, found a {type(callbacks).__name__}")
    for n, callback in enumerate(callbacks):
        if isinstance(callback, type) and issubclass(callback, Callback):
            name = callback.__name__
            raise DTypeError(f"Trainer: callbacks[{n}] is the class {name}, expected an instance: {name}(...)")
        if not isinstance(callback, Callback):
            raise DTypeError(
                f"Trainer: callbacks[{n}] is {callback!r:.60}, expected an instance of a subclass of "
                f"training.Callback, which overrides {_MOMENTS}"
            )
        who = type(callback).__name__
        for moment, arguments in _CALLED.items():
            calls = f"Trainer calls {moment}({', '.join(arguments)}); that of {who}"
            _check_call(calls, getattr(callback, moment), len(arguments))
        others = [name for name in dir(callback) if name.startswith("on_") and name not in _CALLED]
        if others:
            warnings.warn(
                f"Trainer: {who}.{others[0]} is never called; a Trainer calls {_MOMENTS}"
                f"{did_you_mean(others[0], _CALLED)}",
                UserWarning,
                stacklevel=users_level(),
            )


_CALLED = {
    name: list(inspect.signature(method).parameters)[1:]
    for name, method in vars(Callback).items()
    if name.startswith("on_")
}
_MOMENTS = "on_start, on_step, on_validation or on_end"


def _check_call(who: str, function: Any, count: int) -> None:
    """Raise unless a function takes so many arguments."""
    error = misfit(TypeError(), who, function, (None,) * count, {})
    if isinstance(error, DTypeError):
        raise error


def _check_trained(model: Module, optimizer: Any, loss: Any) -> None:
    """Raise where a step of the optimizer changes no parameter of the model (nor of a loss that has some)."""
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    own = {
        id(p): name for module in (model, loss) if isinstance(module, Module) for name, p in module.named_parameters()
    }
    if not own.keys() & set(found):
        raise ArgumentError(
            f"Trainer: none of the {len(found)} parameters of the {type(optimizer).__name__} belongs to the model "
            f"({type(model).__name__}: {', '.join(list(own.values())[:3]) or 'no parameters'}"
            f"{', ...' if len(own) > 3 else ''}), so nothing would train; make the optimizer of "
            "model.parameters(), after the last parameter of the model was replaced"
        )


def scalar_loss(value: Any) -> Tensor:
    """What a loss function returned; raises unless it is a Tensor of one element."""
    if not isinstance(value, Tensor):
        instead = "it returned nothing" if value is None else "compute it from the output with ops, without .numpy()"
        raise DTypeError(f"Trainer: the loss is a {type(value).__name__}, expected a scalar Tensor; {instead}")
    if value.size != 1:
        raise ShapeError(
            f"Trainer: the loss has shape {value.shape}, expected a scalar; reduce it to the mean over the targets"
        )
    return value


def rate_factor(factor: Any, step: int) -> float:
    """What a schedule gave; raises unless it is a finite number."""
    check_number(f"Trainer: the schedule's factor at step {step}", factor)
    if not math.isfinite(factor):
        raise ArgumentError(f"Trainer: the schedule's factor at step {step} is {factor}, expected a finite number")
    return float(factor)


def model_output(model: Module, carry_state: bool, inputs: Any, state: Any, lengths: Any) -> tuple[Any, Any]:
    """``(output, state)`` of a model: called without lengths where they are None, with a state where it is carried."""
    args, given = ((inputs, state) if carry_state else (inputs,)), ({} if lengths is None else {"lengths": lengths})
    who = type(model).__name__
    try:
        found = model(*args, **given)
    except TypeError as error:
        if carry_state and not _fits(model, *args):
            raise DTypeError(
                f"Trainer: carry_state=True calls {who}.forward(inputs, state), which does not take these: {error}; "
                "write a forward that takes a state and returns (output, state), or leave carry_state out"
            ) from None
        if given and _fits(model, *args) and not _fits(model, *args, **given):
            raise DTypeError(
                f"Trainer: the batches bring lengths, since their sequences differ in length, but {who}.forward takes "
                "none; write a Module whose forward(self, x, lengths=None) hands them to its recurrent layers, as "
                "layer(x, lengths=lengths), or put sequences of one length in each batch"
            ) from None
        raise
    if not carry_state:
        return found, None
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise DTypeError(
            f"Trainer: carry_state=True expects {who}.forward to return a pair (output, state), found a "
            f"{type(found).__name__}; return both, or leave carry_state out"
        )
    return found[0], found[1]


def _fits(model: Module, *args: Any, **given: Any) -> bool:
    try:
        inspect.signature(model.forward).bind(*args, **given)
    except TypeError:
        return False
    return True


def loss_of(loss: Any, output: Any, targets: Any, carry_state: bool) -> Tensor:
    """The loss of a batch; where it cannot take a tuple that the model returned, the error says where states go."""
    try:
        value = loss(output, targets)
    except (TypeError, AttributeError) as error:
        if carry_state or not isinstance(output, tuple):
            raise
        raise DTypeError(
            f"Trainer: the model returned a tuple of {len(output)}, which the loss does not take; of a model that "
            "returns (output, state), Trainer(..., carry_state=True) hands the output to the loss and the state to the "
            "next batch; else return the output alone"
        ) from error
    return scalar_loss(value)


def check_iterable(batches: Any, what: str = "Trainer: batches") -> None:
    """Raise unless the batches can be gone through."""
    if not hasattr(batches, "__iter__"):
        raise DTypeError(f"{what} are an iterable of batches, found a {type(batches).__name__}")


def check_batches(batches: Any, what: str) -> None:
    """Raise unless the batches can be gone through more than once."""
    check_iterable(batches, f"Trainer.fit: {what}")
    if hasattr(batches, "__next__"):
        raise DTypeError(
            f"Trainer.fit: {what} are a {type(batches).__name__}, which can be gone through only once; an epoch is one "
            "loop over all batches, so pass a list of them, or a DataLoader"
        )


def check_fit(
    batches: Any, validation: Any, schedule: Any, patience: Any, time_limit: Any, counts: dict[str, Any]
) -> None:
    """Raise unless ``fit`` can run with these; ``counts`` are numbers of steps, epochs or validations, or None."""
    check_batches(batches, "batches")
    if not hasattr(batches, "__len__"):
        raise DTypeError(
            f"Trainer.fit: batches are a {type(batches).__name__} without a length; give it __len__ (batches in an "
            "epoch), or pass a list"
        )
    if validation is not None:
        check_batches(validation, "validation batches")
    for name, count in {**counts, "patience": patience}.items():
        if count is not None:
            check_int(f"Trainer.fit: {name}", count)
    if time_limit is not None:
        check_number("Trainer.fit: time_limit", time_limit)
        if not time_limit >= 0 or math.isnan(time_limit):
            raise ArgumentError(f"Trainer.fit: time_limit is a number of seconds, at least 0, found {time_limit}")
    if validation is None and patience is not None:
        raise ArgumentError(f"Trainer.fit: patience={patience} counts validations, but there are no validation batches")
    if validation is None and isinstance(schedule, ReduceLROnPlateau):
        raise ArgumentError(
            "Trainer.fit: ReduceLROnPlateau is stepped with the loss of each validation, but there are no validation "
            "batches; pass validation=..."
        )
