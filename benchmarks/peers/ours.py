"""This library, with default settings, through its public names: the whole call that a user makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tinygrad_lstm as tg
from tinygrad_lstm import nn, optim
from tinygrad_lstm.random import Generator

from .ours_cells import CELLS
from .work import ZONEOUT, Case, Work, inputs, model_weights, shape_of, tokens, weights, zoneout_masks

LIBRARIES = ("tinygrad_lstm", "tinygrad_lstm.nn")


class Masks(Generator):
    """Draws as the library's own, but for the masks of the work in ``fixed`` while a result is compared."""

    fixed: dict[float, np.ndarray] | None = None

    def keep_mask(self, p: float, size: Any) -> np.ndarray:
        """True where nothing is dropped, here: where the state moves on."""
        return super().keep_mask(p, size) if self.fixed is None else ~self.fixed[p]


def layer_of(work: Work, memory: float | None, masks: Masks) -> tuple[Any, str]:
    """The layer that a user would take, and the prefix of its parameters' names."""
    _, _, width, hidden, layers = shape_of(work)
    if work.cell in ("lstm", "projection"):
        return nn.LSTM(width, hidden, layers, proj_size=hidden // 2 * (work.cell != "lstm"), memory=memory), ""
    if work.cell in ("gru", "rnn"):
        return (nn.GRU if work.cell == "gru" else nn.RNN)(width, hidden, layers), ""
    if work.cell == "peephole":
        return nn.Recurrent(nn.PeepholeLSTMCell(width, hidden)), "cell."
    if work.cell == "layer-norm":
        return nn.Recurrent(nn.LayerNormLSTMCell(width, hidden)), "cell."
    if work.cell == "zoneout":
        return nn.Recurrent(nn.Zoneout(nn.LSTMCell(width, hidden), p=ZONEOUT, generator=masks)), "cell.cell."
    return nn.Recurrent(CELLS[work.cell](weights(work))), "cell."


def build(work: Work, options: dict[str, Any]) -> Case:
    """A layer, or ``nn.Recurrent`` over a cell; ``options['memory']``: a budget for the backward pass."""
    if work.kind == "training":
        return training(work)
    masks = Masks(0)
    layer, prefix = layer_of(work, options.get("memory"), masks)
    layer.load_state_dict({prefix + name: value for name, value in weights(work).items()})
    x = tg.tensor(inputs(work), requires_grad=work.kind == "step")
    parameters = dict(layer.named_parameters())
    leaves = [x, *parameters.values()]

    def forward() -> Any:
        with tg.no_grad():
            return layer(x)[0]

    def step() -> Any:
        for leaf in leaves:
            leaf.grad = None
        y, _ = layer(x)
        loss = (y * y).sum()
        loss.backward()
        return loss

    def result() -> dict[str, np.ndarray]:
        masks.fixed = dict(zip(ZONEOUT, zoneout_masks(work), strict=True))
        try:
            if work.kind == "forward":
                return {"y": forward().numpy()}
            loss = step()
        finally:
            masks.fixed = None
        found = {name.removeprefix(prefix): value.grad for name, value in parameters.items()}
        return found | {"x": x.grad, "loss": loss.numpy()}

    def facts() -> dict[str, Any]:
        plan = layer.memory_plan(*shape_of(work)[:2])
        return {"peak": plan.peak, "whole": plan.whole, "recomputed": plan.recomputed, "steps": shape_of(work)[0]}

    case = Case(forward if work.kind == "forward" else step, result)
    return case._replace(facts=facts) if "memory" in options else case


class Model(nn.Module):
    """The character model."""

    def __init__(self, vocabulary: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.recurrent = nn.LSTM(width, hidden, layers)
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Any, state: Any) -> Any:
        """Logits and the state."""
        y, state = self.recurrent(self.embedding(ids), state)
        return self.output(y), state


def training(work: Work) -> Case:
    """Truncated BPTT with carried state, cross-entropy, clipping by norm, Adam."""
    data = tokens(work)
    _, _, width, hidden, layers = shape_of(work)

    def start() -> Callable[[], float]:
        model = Model(data.vocabulary, width, hidden, layers)
        model.load_state_dict(model_weights(work))
        optimizer = optim.Adam(model.parameters(), lr=2e-3)
        state, k = None, 0

        def step() -> float:
            nonlocal state, k
            optimizer.zero_grad()
            logits, new = model(data.x[k], state)
            state = tuple(part.detach() for part in new)
            loss = nn.cross_entropy(logits, data.y[k])
            loss.backward()
            optim.clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
            k = (k + 1) % len(data.x)
            return loss.item()

        return step

    def result() -> dict[str, np.ndarray]:
        step = start()
        return {"losses": np.array([step() for _ in range(5)])}

    return Case(start(), result)
