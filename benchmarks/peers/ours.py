"""This library, with default settings, through its public names: the whole call that a user makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tinygrad_lstm as tg
from tinygrad_lstm import nn, optim

from .ours_cells import CELLS
from .work import Case, Work, inputs, model_weights, shape_of, tokens, weights

LIBRARIES = ("tinygrad_lstm", "tinygrad_lstm.nn")


def build(work: Work, options: dict[str, Any]) -> Case:
    """``nn.LSTM``, or ``nn.Recurrent`` over a cell typed by a user."""
    if work.kind == "training":
        return training(work)
    _, _, width, hidden, layers = shape_of(work)
    layer: Any
    if work.cell == "lstm":
        layer, prefix = nn.LSTM(width, hidden, layers), ""
        layer.load_state_dict(weights(work))
    else:
        layer, prefix = nn.Recurrent(CELLS[work.cell](weights(work))), "cell."
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
        if work.kind == "forward":
            return {"y": forward().numpy()}
        loss = step()
        found = {name.removeprefix(prefix): value.grad for name, value in parameters.items()}
        return found | {"x": x.grad, "loss": loss.numpy()}

    return Case(forward if work.kind == "forward" else step, result)


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
