"""How gradients flow back through time: their norms at every step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.inspect.figures import blank_figure, picture
from tinygrad_lstm.inspect.table import norm
from tinygrad_lstm.inspect.watch import Series, watch
from tinygrad_lstm.serialization import replacing

__all__ = ["GradientFlow", "gradient_flow"]

SHOWN_STEPS = 6  # columns of the printed table
ENDINGS = (".png", ".pdf", ".svg")


class GradientFlow:
    """Norms of gradients over time, as :func:`gradient_flow` returns them.

    Norms are Euclidean, over batch and units together.

    Attributes
    ----------
    loss : float
    steps : int
    states, gates : dict of ndarray (T,)
        name -> norm of d loss / d value at every step.  States are what one step hands to the next.
    parameters : dict of ndarray (T,)
        name -> norm of what each step adds to the parameter's gradient (the gradient is the sum of what they add).
    totals : dict of float
        name -> norm of the gradient, of every parameter, those outside of the loops included.
    factors : dict of float
        state -> mean factor (geometric) by which the norm changes from one step to the one before it: below 1 it
        vanishes, above 1 it explodes (Bengio, Simard & Frasconi 1994).  NaN where fewer than two steps have one.
    """

    def __init__(
        self, loss: float, steps: int, series: list[Series], parameters: dict[str, np.ndarray], totals: dict[str, float]
    ) -> None:
        self.loss, self.steps, self.parameters, self.totals = loss, steps, parameters, totals
        norms = {one.name: np.array([norm(gradient) for gradient in one.gradients]) for one in series}
        self.states = {one.name: norms[one.name] for one in series if one.kind == "state"}
        self.gates = {one.name: norms[one.name] for one in series if one.kind != "state"}
        self.factors = {one.name: _factor(norms[one.name], one.reverse) for one in series if one.kind == "state"}

    def __str__(self) -> str:
        columns = np.unique(np.linspace(0, self.steps - 1, min(SHOWN_STEPS, self.steps)).round().astype(int))
        outside = {name: total for name, total in self.totals.items() if name not in self.parameters}
        width = max(12, *(len(name) + 2 for name in (*self.states, *self.gates, *self.parameters)))

        def row(name: str, cells: list[str], last: str = "") -> str:
            return f"  {name:<{width}}{''.join(f'{cell:>10}' for cell in cells)}  {last}".rstrip()

        lines = [
            f"loss {self.loss:.6g}, {self.steps} steps; norms of its gradient",
            row("", [f"t = {columns[0]}", *map(str, columns[1:])]),
        ]
        sections = (("states", self.states), ("gates", self.gates), ("parameters, step by step", self.parameters))
        for heading, norms in sections:
            if not norms:
                continue
            lines.append(heading)
            for name, values in norms.items():
                last = ""
                if heading == "states":
                    last = f"x {self.factors[name]:.3g} a step back"
                elif norms is self.parameters:
                    last = f"total {self.totals[name]:.3g}"
                lines.append(row(name, [f"{values[t]:.2e}" for t in columns], last))
        if outside:
            lines.append("parameters outside of the loop")
            lines += [row(name, [f"{total:.2e}"]) for name, total in outside.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<GradientFlow over {self.steps} steps: {', '.join(self.states)}>"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the norms over time, on a logarithmic scale, to a ``.png``, ``.pdf`` or ``.svg`` (needs matplotlib)."""
        ending = Path(os.fspath(path)).suffix.lower()
        if ending not in ENDINGS:
            raise ArgumentError(f"plot: {os.fspath(path)!r} ends in {ending!r}; figures end in {', '.join(ENDINGS)}")
        panels = {"states": self.states, "gates": self.gates, "parameters, step by step": self.parameters}
        panels = {title: norms for title, norms in panels.items() if norms}
        rows = max(-(-len(norms) // 2) for norms in panels.values())
        figure = blank_figure("GradientFlow.plot", 4.6 * len(panels), 3.6 + 0.19 * rows)
        for k, (title, norms) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), k + 1, xlabel="t", title=title)
            for number, (name, values) in enumerate(norms.items()):
                style = ("-", "--", ":")[number // 10 % 3]  # there are ten colours
                seen = np.where(values > 0, values, np.nan)
                axes.plot(np.arange(self.steps), seen, linestyle=style, marker=".", label=name)
            if any((values > 0).any() for values in norms.values()):
                axes.set_yscale("log")
            axes.set_ylabel("norm of the gradient" if k == 0 else "")
            axes.grid(alpha=0.3)
            axes.locator_params(axis="x", integer=True)
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
        figure.tight_layout()
        data = picture(figure, ending[1:])
        with replacing(path) as file:
            file.write(data)


def _factor(norms: np.ndarray, reverse: bool) -> float:
    """The mean factor of one step back, from the first to the last step with a gradient that can be told from 0."""
    values = norms[::-1] if reverse else norms
    there = np.flatnonzero(np.isfinite(values) & (values > 0))
    if len(there) < 2:
        return float("nan")
    first, last = int(there[0]), int(there[-1])
    return float(np.exp((np.log(values[first]) - np.log(values[last])) / (last - first)))


def gradient_flow(
    model: Any, x: Any, loss: Callable[..., Any], target: Any = None, *, lengths: Any = None
) -> GradientFlow:
    """Norms of the loss's gradient with respect to states, gates and parameters, step by step.

    The model runs op by op (``tg.eager()``), so sequences of some hundred steps are as much as one wants to wait for.
    ``.grad`` of its parameters stays as it is.

    Parameters
    ----------
    model : Module
        Called as ``model(x)``, in the mode (train or eval) that it is in.
    x : the model's input
    loss : function
        ``loss(output)`` gives a scalar Tensor, output being what the model returns (of ``nn.LSTM`` a pair).
    target : optional
        If given, the loss is called as :class:`~tinygrad_lstm.training.Trainer` does: ``loss(output, target)``.
    lengths : B ints, optional
        Handed to the model.

    Returns
    -------
    GradientFlow

    Raises
    ------
    DTypeError, ShapeError
        No Module, or a loss that is no scalar Tensor.
    ArgumentError
        No loop over time ran, or the gradients would need more than 1 GB.

    Examples
    --------
    >>> import numpy as np
    >>> import tinygrad_lstm as tg
    >>> from tinygrad_lstm import inspect, nn
    >>> tg.seed(0)
    >>> x = np.random.default_rng(0).standard_normal((40, 1, 2)).astype(np.float32)
    >>> flow = inspect.gradient_flow(nn.RNN(2, 8), x, lambda out: (out[0][-1] ** 2).sum())
    >>> flow.states["h"].shape, flow.factors["h"] < 1
    ((40,), True)
    """
    seen = watch("gradient_flow", model, x, loss, target, lengths)
    return GradientFlow(seen.loss, seen.steps, seen.series, seen.parameters, seen.totals)
