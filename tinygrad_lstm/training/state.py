"""A training run as a tree: everything that its future depends on, and its history."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_lstm.errors import CheckpointError
from tinygrad_lstm.random import Generator, default_generator
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.tree import tree_map

if TYPE_CHECKING:
    from tinygrad_lstm.training.trainer import Trainer

__all__ = ["detached", "restore", "snapshot"]

_PROGRESS = {
    "step": int, "total": int, "epoch": int, "position": int, "since_best": int, "seconds": float, "finished": bool,
}  # fmt: skip


def snapshot(trainer: Trainer) -> dict[str, Any]:
    """The state of a trainer, for ``tg.save``."""
    schedule = trainer.schedule
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": schedule.state_dict() if hasattr(schedule, "state_dict") else None,
        "base_rates": trainer.base_rates,
        "generators": [g.get_state() for g in _generators(trainer)],
        "data": trainer.data_state(),
        "carried": trainer.carried,
        "progress": {name: getattr(trainer, name) for name in _PROGRESS},
        "best": trainer.best,
        "history": {name: np.array(column, np.float64) for name, column in trainer.history.items()},
        "validations": {name: np.array(column, np.float64) for name, column in trainer.validations.items()},
    }


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put a trainer into the state that :func:`snapshot` took of one that was made alike.

    Raises with everything as it was where it is the state of another one.
    """
    schedule = trainer.schedule if hasattr(trainer.schedule, "load_state_dict") else None
    holders = [holder for holder in (trainer.model, trainer.optimizer, schedule) if holder is not None]
    before = [(holder, holder.state_dict()) for holder in holders]
    generators = [(generator, generator.get_state()) for generator in _generators(trainer)]
    run = vars(trainer).copy()
    try:
        _restore(trainer, state)
    except BaseException:
        for holder, own in before:
            holder.load_state_dict(own)
        for generator, its_state in generators:
            generator.set_state(its_state)
        vars(trainer).update(run)
        raise


def _restore(trainer: Trainer, state: dict[str, Any]) -> None:
    try:
        progress = {name: kind(state["progress"][name]) for name, kind in _PROGRESS.items()}
        own, saved = _generators(trainer), state["generators"]
        if len(saved) != len(own):
            raise CheckpointError(f"the checkpoint has {len(saved)} random generators, the model uses {len(own)}")
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        if hasattr(trainer.schedule, "load_state_dict"):
            trainer.schedule.load_state_dict(state["schedule"])
        for generator, its_state in zip(own, saved, strict=True):
            generator.set_state(its_state)
        trainer.new_run(progress["total"])
        for name, value in progress.items():
            setattr(trainer, name, value)
        trainer.base_rates = [float(rate) for rate in state["base_rates"]]
        trainer.loaded_data_state, trainer.best = state["data"], state["best"]
        trainer.carried = tree_map(asarray, state["carried"])
        for columns, name in ((trainer.history, "history"), (trainer.validations, "validations")):
            columns.update({key: [float(value) for value in state[name][key]] for key in columns})
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"this is no state of a Trainer like this one: {error!r}") from None


def detached(tree: Any) -> Any:
    """The tree without its Tensors' history."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _generators(trainer: Trainer) -> list[Generator]:
    """The default generator and those that modules own, each once, in the order of the modules."""
    found = [default_generator()]
    for module in trainer.model.modules():
        for value in vars(module).values():
            if isinstance(value, Generator) and not any(value is g for g in found):
                found.append(value)
    return found
