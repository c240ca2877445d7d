"""An LSTM of one unit and two steps, every number of it: forward, backward, and one step of SGD.

    python examples/numerical_example.py

This is the worked example that many who study backpropagation through time have done by hand (A. Gomez,
"Backpropogating an LSTM: A Numerical Example", 2016).  With one unit, every gate is one number, so the whole
computation fits on a screen.  The cell, in the letters of that account:

    a = tanh(W_a x + U_a out' + b_a)           what could be written         (out', state': of the step before)
    i = sigmoid(W_i x + U_i out' + b_i)        how much of it is written
    f = sigmoid(W_f x + U_f out' + b_f)        how much of the old state stays
    o = sigmoid(W_o x + U_o out' + b_o)        how much of the state is shown
    state = a i + f state'
    out   = tanh(state) o

The loss is the sum over both steps of (out - label)^2 / 2.  Nothing below differentiates anything by hand: the
forward pass runs on a tape, the tape is replayed in reverse, and all that is left to do is to ask it.

The exit status is 0 if the outputs and the new weights are the published ones.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

import tinygrad_lstm as tg
from tinygrad_lstm import ops

GATES = {"a": ops.tanh, "i": ops.sigmoid, "f": ops.sigmoid, "o": ops.sigmoid}

WEIGHTS: dict[str, list[float] | float] = {
    "W_a": [0.45, 0.25], "U_a": 0.15, "b_a": 0.2,
    "W_i": [0.95, 0.80], "U_i": 0.80, "b_i": 0.65,
    "W_f": [0.70, 0.45], "U_f": 0.10, "b_f": 0.15,
    "W_o": [0.60, 0.40], "U_o": 0.25, "b_o": 0.1,
}  # fmt: skip
INPUTS = [[1.0, 2.0], [0.5, 3.0]]
LABELS = [0.5, 1.25]
LEARNING_RATE = 0.1

PUBLISHED_OUT = [0.53631, 0.77198]
PUBLISHED_WEIGHTS = {
    "W_a": [0.45267, 0.25922], "U_a": 0.15104, "b_a": 0.20364, "W_o": [0.60259, 0.41626],
}  # fmt: skip

Numbers = dict[str, np.ndarray]


def step(weights: dict[str, tg.Tensor], x: tg.Tensor, out: tg.Tensor, state: tg.Tensor) -> tuple[tg.Tensor, tg.Tensor]:
    """One step of the LSTM.  ``tg.name`` labels a value: under that name the tape finds it again."""
    gate: dict[str, tg.Tensor] = {}
    for letter, squash in GATES.items():
        net = ops.dot(weights[f"W_{letter}"], x) + weights[f"U_{letter}"] * out + weights[f"b_{letter}"]
        tg.name(net, f"net_{letter}")  # the gate before its nonlinearity
        gate[letter] = tg.name(squash(net), letter)
    state = tg.name(gate["a"] * gate["i"] + gate["f"] * state, "state")
    return tg.name(ops.tanh(state) * gate["o"], "out"), state


def run() -> tuple[list[Numbers], list[Numbers], Numbers, Numbers]:
    """Forward and backward over both steps, and one step of SGD.

    Returns the named values of every step, the derivatives of the loss with respect to each of them, the
    derivatives with respect to the weights, and the new weights.
    """
    weights = {name: tg.tensor(value, dtype=np.float64, requires_grad=True) for name, value in WEIGHTS.items()}
    out = state = tg.tensor(0.0, dtype=np.float64)

    # Forward.  Everything that happens inside is written down, one record an operation.
    loss: tg.Tensor | float = 0.0
    with tg.Tape() as tape:
        for t, (x, label) in enumerate(zip(INPUTS, LABELS, strict=True)):
            with tg.scope(f"step {t}"):
                out, state = step(weights, tg.tensor(x, dtype=np.float64), out, state)
                loss = loss + 0.5 * ops.square(out - label)
    assert isinstance(loss, tg.Tensor)
    print(f"The forward pass left {len(tape)} records on the tape; the loss is {loss.item():.5f}.")

    # The named values, straight from the tape: which step (the scope), which name, which tensor.
    tensors: list[dict[str, tg.Tensor]] = [{}, {}]
    for record in tape.records:
        if record.label is not None:
            t = int(record.place.where.removeprefix("step "))
            (tensors[t][record.label],) = tape.outputs(record)

    # Backward: the tape in reverse, once for everything that we want to know.
    slopes, weight_slopes = tape.gradient(loss, (tensors, weights))

    values = [{name: t.numpy() for name, t in one.items()} for one in tensors]
    derivatives = [{name: g.numpy() + 0.0 for name, g in one.items()} for one in slopes]  # + 0.0: -0 prints as 0
    gradients = {name: g.numpy() for name, g in weight_slopes.items()}
    updated = {name: w.numpy() - LEARNING_RATE * gradients[name] for name, w in weights.items()}
    return values, derivatives, gradients, updated


def show_steps(values: list[Numbers], derivatives: list[Numbers]) -> None:
    """A table per step: each value, its derivative, and for gates the one before the nonlinearity."""
    for t, (value, slope) in enumerate(zip(values, derivatives, strict=True)):
        print(f"\nstep {t}: x = {INPUTS[t]}, label {LABELS[t]}")
        print("           value    dLoss/dvalue    delta = dLoss/dnet, before the nonlinearity")
        for name in ("a", "i", "f", "o", "state", "out"):
            delta = f"{slope[f'net_{name}']:15.5f}" if name in GATES else ""
            print(f"  {name:5s} {value[name]:10.5f} {slope[name]:15.5f}{delta}")


def show_update(gradients: Numbers, updated: Numbers) -> None:
    """Old weight, gradient, new weight."""
    print(f"\nSGD with learning rate {LEARNING_RATE}:")
    print("         old                  gradient             new")
    for name, old in WEIGHTS.items():
        columns = [" ".join(f"{v:9.5f}" for v in np.atleast_1d(a)) for a in (old, gradients[name], updated[name])]
        print(f"  {name}  " + "  ".join(f"{column:19s}" for column in columns).rstrip())


def agrees(values: list[Numbers], updated: Numbers) -> bool:
    """Whether the outputs and the new weights are the published ones, to all five decimals."""
    pairs = [(value["out"], published) for value, published in zip(values, PUBLISHED_OUT, strict=True)]
    pairs += [(updated[name], published) for name, published in PUBLISHED_WEIGHTS.items()]
    return all(np.all(np.round(found, 5) == published) for found, published in pairs)


def main() -> int:
    """Run, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="accepted for uniformity; it takes no time anyway")
    parser.parse_args()
    values, derivatives, gradients, updated = run()
    show_steps(values, derivatives)
    show_update(gradients, updated)
    right = agrees(values, updated)
    print("\nThe outputs and the new weights are " + ("" if right else "NOT ") + "the published ones.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
