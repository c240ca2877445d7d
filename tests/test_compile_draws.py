"""Random masks in compiled functions: drawn anew at every call, the same as eager for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops

LAYERS = {
    "dropout between layers": lambda: nn.LSTM(3, 4, num_layers=2, dropout=0.5),
    "zoneout": lambda: nn.Recurrent(nn.Zoneout(nn.LSTMCell(3, 4), p=(0.3, 0.4))),
    "weight drop": lambda: nn.WeightDrop(nn.LSTM(3, 4), p=0.5),
    "variational": lambda: nn.GRU(3, 4),
}


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.before = nn.VariationalDropout(0.5) if kind == "variational" else nn.Dropout(0.0)
        self.layer = LAYERS[kind]()
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(4, 2)
        self.astype(np.float64)

    def forward(self, x):
        return self.out(self.drop(self.layer(self.before(x))[0][-1]))


def loss(model, x):
    return ops.sum(ops.square(model(x)))


def steps(function, model, x, inside):
    """Losses and gradients of four calls."""
    tg.seed(5)
    found = []
    for _ in range(4):
        if inside:
            value, grads = function(model, x)
            found.append((value.item(), [g.numpy() for g in grads.values()]))
        else:
            model.zero_grad()
            value = function(model, x)
            value.backward()
            found.append((value.item(), [p.grad for p in model.parameters()]))
    return found


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "gradient compiled"])
def test_a_compiled_function_draws_what_the_eager_one_draws(kind, inside):
    x = np.random.default_rng(0).normal(size=(5, 3, 3))
    model = Net(kind)
    compiled = tg.compile(tg.value_and_grad(loss)) if inside else tg.compile(loss)
    ours = steps(compiled, model, x, inside)
    eager = steps(compiled.__wrapped__, model, x, inside)
    for (value, grads), (expected, wanted) in zip(ours, eager, strict=True):
        assert value == pytest.approx(expected, abs=1e-12)
        for g, w in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-12)
    assert len({value for value, _ in ours}) == 4  # masks differ from call to call
    model.eval()
    assert compiled(model, x) is not None


def test_a_body_that_draws_is_refused():
    def total(x):
        return ops.scan(lambda h, row: (ops.dropout(h + row, 0.5), None), x[0], x)[0]

    with pytest.raises(tg.TraceError, match="before the loop"):
        tg.compile(total)(np.ones((3, 2)))
