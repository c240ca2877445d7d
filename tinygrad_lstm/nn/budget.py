"""Memory budgets of recurrent layers: how a layer shares its own out, and what it would keep."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm.compiler.schedule import Budget, Memory, check_memory, share_memory
from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.nn.cells import describe
from tinygrad_lstm.nn.module import Module
from tinygrad_lstm.ops.segments import MemoryPlan, memory_plan

__all__ = ["Budgeted", "first_cell"]


class Budgeted(Module):
    """A recurrent layer with a memory budget.

    Attributes
    ----------
    memory : int, float or None
        The most that is kept for the backward pass of one call, see :func:`~tinygrad_lstm.ops.scan`.  May be changed
        between calls.  Bytes are shared out evenly among the parts of a layer, a fraction holds for each.
    """

    memory: int | float | None = None

    def budget(self, given: Memory = None, parts: int = 1) -> Memory:
        """The budget of each of so many parts, from the one given in a call or else the layer's own.

        Errors name the layer that it was given to, also where a layer inside hands it on.
        """
        memory = self.memory if given is None else given
        if memory is None:
            return None
        who = describe(self)
        memory = check_memory(memory, who)
        return share_memory(memory if isinstance(memory, Budget) else Budget(memory, who), parts)

    def sharing(self, wanted: dict[str, Any], parts: int) -> dict[str, Any]:
        """The keyword arguments of a call as each of so many parts gets them: its share, where there is a budget."""
        share = self.budget(wanted.get("memory"), parts)
        rest = {key: value for key, value in wanted.items() if key != "memory"}
        return rest if share is None else {**rest, "memory": share}

    def memory_plan(self, steps: int, batch: int, features: Any = None) -> MemoryPlan:
        """What a call on ``(steps, batch, features)`` keeps for its backward pass, without running it.

        Parameters
        ----------
        steps, batch : int
        features : int or shape, optional
            Of x, behind time and batch; a cell with an ``input_size`` knows it.

        Returns
        -------
        MemoryPlan
            One schedule per layer and direction; ``peak`` and ``whole`` in bytes, ``recomputed`` in steps.

        Raises
        ------
        ArgumentError
            The budget cannot be met (the message says what the least is), nobody knows the features, or a cell needs
            values.

        Examples
        --------
        >>> from tinygrad_lstm import nn
        >>> plan = nn.LSTM(32, 64, memory=0.05).memory_plan(1000, 8)
        >>> plan.peak <= 0.05 * plan.whole
        True
        """
        cell = first_cell(self)
        features = getattr(cell, "input_size", None) if features is None else features
        if features is None:
            raise ArgumentError(f"memory_plan: {type(cell).__name__} has no input_size; give features=, the shape of x")
        rest = tuple(features) if isinstance(features, (tuple, list)) else (features,)
        dtype = next((p.dtype for p in self.parameters()), np.dtype(np.float32))
        lead = (batch, steps) if getattr(self, "batch_first", False) else (steps, batch)
        return memory_plan(self, np.broadcast_to(np.zeros((), dtype), (*lead, *rest)))


def first_cell(layer: Any) -> Any:
    """The cell that x goes to, of a layer of any kind."""
    for holder in ("layers", "_cells"):
        if holder in layer.__dict__:
            return first_cell(layer.__dict__[holder][0])
    for part in ("cell", "fwd"):
        if part in layer.__dict__ and getattr(layer, "returns_state", False):
            return first_cell(layer.__dict__[part])
    return layer
