"""Watch a gradient go back through time: a cell's equations, the norms of its gradients, and a page that plays them.

    python examples/watch_bptt.py            # also writes a page and a drawing into the folder watch-bptt
    python examples/watch_bptt.py --quick    # a shorter sequence, no files

Two networks read the same random sequence, and the loss looks at the last output alone: so whatever the first steps
are to learn has to come back through all the others.  In the simple recurrent network each step back multiplies by
W_hh^T and by the slope of tanh, and the gradient vanishes (Hochreiter 1991; Bengio, Simard & Frasconi 1994).  In the
LSTM the cell state goes back through the forget gate alone (Hochreiter & Schmidhuber 1997; Gers et al. 2000).  With
that gate open (its bias at 4) the gradient of the cell state does not vanish.

What can be judged: the gradient of the LSTM's cell state at the first step is over a thousand times that of the
simple network's state, each taken relative to the last step.  The exit status is 0 if it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import tinygrad_lstm as tg
from tinygrad_lstm import inspect, nn, ops

UNITS, INPUTS = 12, 4
TARGET = 1000.0


class Reader(nn.Module):
    """A recurrent layer over the sequence, and a number from its last output."""

    def __init__(self, layer: nn.Module, generator: tg.Generator) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(UNITS, 1, generator=generator)

    def forward(self, x: np.ndarray) -> tg.Tensor:
        """``(T, B, I)`` to ``(B, 1)``."""
        return self.out(self.layer(x)[0][-1])


def make(kind: str, seed: int) -> Reader:
    """The simple network or the LSTM, the forget gates of the latter open."""
    generator = tg.Generator(seed)
    if kind == "rnn":
        return Reader(nn.RNN(INPUTS, UNITS, generator=generator), generator)
    layer = nn.LSTM(INPUTS, UNITS, generator=generator)
    bias = layer.bias_ih_l0.numpy().copy()
    bias[UNITS : 2 * UNITS] = 4.0  # the rows are in the order i, f, g, o
    layer.bias_ih_l0.data = bias
    return Reader(layer, generator)


def loss_of(output: tg.Tensor) -> tg.Tensor:
    """Something that depends on the last output."""
    return ops.square(output - 1.0).mean()


def kept(norms: np.ndarray) -> float:
    """How much of the gradient at the last step is left at the first."""
    return float(norms[0] / norms[-1])


def main() -> int:
    """Print equations and norms, write the page, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 steps instead of 80, and no files")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default 0)")
    parser.add_argument("--out", default="watch-bptt", metavar="FOLDER", help="where the files go (default watch-bptt)")
    options = parser.parse_args()
    steps = 40 if options.quick else 80
    x = tg.Generator(options.seed + 1).normal(size=(steps, 1, INPUTS), dtype=np.float32)
    left = {}
    for kind, state, cell in (("rnn", "h", nn.RNNCell(INPUTS, UNITS)), ("lstm", "c", nn.LSTMCell(INPUTS, UNITS))):
        model = make(kind, options.seed)
        print(f"{kind}\n\n{inspect.equations(model)}\n")
        flow = inspect.gradient_flow(model, x, loss_of)
        print(f"{flow}\n")
        left[kind] = kept(flow.states[state])
        if not options.quick:
            folder = Path(options.out)
            folder.mkdir(parents=True, exist_ok=True)
            inspect.player(model, x, loss_of, folder / f"{kind}.html")
            inspect.draw(cell, folder / f"{kind}.svg")
            print(f"wrote {folder / kind}.html (open it in a browser) and {folder / kind}.svg\n")
    print(f"left of the gradient after {steps - 1} steps back: rnn {left['rnn']:.2g}, lstm {left['lstm']:.2g}")
    return 0 if left["lstm"] > TARGET * left["rnn"] else 1


if __name__ == "__main__":
    sys.exit(main())
