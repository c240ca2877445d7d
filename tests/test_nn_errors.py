"""What the recurrent layers refuse, and what they say."""

from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn

F, H = 3, 4


def test_messages():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.LSTM(16, 4)

        def forward(self, x, *rest):
            return self.encoder(x, *rest)

    model = Model()
    with pytest.raises(tg.ShapeError) as info:
        model(np.zeros((50, 32, 12), np.float32))
    assert str(info.value) == (
        "LSTM 'encoder': x has 12 features in its last axis, the layer was built for input_size=16 "
        "(x.shape = (50, 32, 12), expected (T, B, 16))"
    )
    with pytest.raises(tg.DTypeError, match=r"LSTM 'encoder': x is float64, the parameters are float32"):
        model(np.zeros((5, 2, 16)))
    with pytest.raises(tg.DTypeError, match="int64"):
        model(np.zeros((5, 2, 16), int))
    with pytest.raises(tg.ShapeError, match="4 axes"):
        model(np.zeros((5, 2, 2, 16), np.float32))
    x = np.zeros((5, 2, 16), np.float32)
    with pytest.raises(tg.ShapeError, match=r"initial c has shape \(1, 3, 4\), expected \(1, 2, 4\)"):
        model(x, (np.zeros((1, 2, 4), np.float32), np.zeros((1, 3, 4), np.float32)))
    with pytest.raises(tg.DTypeError, match="initial h is float64"):
        model(x, (np.zeros((1, 2, 4)), np.zeros((1, 2, 4))))
    with pytest.raises(tg.ShapeError, match=r"pair \(h, c\)"):
        model(x, np.zeros((1, 2, 4), np.float32))
    with pytest.raises(tg.ShapeError, match=r"expected \(B, T, 16\)"):
        nn.GRU(16, 4, batch_first=True)(np.zeros((2, 5, 3), np.float32))
    with pytest.raises(tg.ShapeError, match=r"RNNCell: x has 3 axes"):
        nn.RNNCell(16, 4)(x)
    with pytest.raises(tg.ShapeError, match="1 parts, that of LSTMCell has 2"):
        nn.Recurrent(nn.LSTMCell(16, 4))(x, np.zeros((2, 4), np.float32))
    with pytest.raises(tg.DTypeError, match="Linear is no cell"):
        nn.Recurrent(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(0, 4),
        lambda: nn.LSTM(4, 4, proj_size=4),
        lambda: nn.LSTM(4, 4, dropout=1.5),
        lambda: nn.RNN(4, 4, nonlinearity="selu"),
        lambda: nn.GRUCell(4, 4, proj_size=2),
        lambda: nn.Stack([]),
        lambda: nn.Zoneout(nn.LSTMCell(2, 2), (0.1, 0.1, 0.1)),
        lambda: nn.VariationalDropout(-1.0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(tg.ArgumentError):
        make()


def test_sizes_are_ints():
    with pytest.raises(tg.DTypeError, match=r"LSTM: hidden_size is an int, found 4\.0"):
        nn.LSTM(4, 4.0)


def test_replacing_a_parameter_by_its_flat_name():
    layer = nn.LSTM(F, H)
    layer.weight_hh_l0 = nn.Parameter(np.ones((4 * H, H), np.float32))
    assert layer._cells[0].weight_hh is layer.weight_hh_l0
    with pytest.raises(tg.ShapeError, match=r"LSTM.weight_hh_l0 .* \(16, 4\)"):
        layer.weight_hh_l0 = nn.Parameter(np.ones((2, 2), np.float32))
    with pytest.raises(AttributeError, match="weight_hh_l7"):
        _ = layer.weight_hh_l7


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (np.zeros((1, 8, 8), np.float32), tg.ShapeError, r"the state has shape \(1, 8, 8\), expected \(8, 8\)"),
        (np.zeros((7, 8), np.float32), tg.ShapeError, r"the state has shape \(7, 8\), expected \(8, 8\)"),
        ((np.zeros((8, 8), np.float32),), tg.ShapeError, "1 parts in a tuple, that of GRUCell is one array"),
    ],
)
def test_a_state_of_another_form(state: Any, error: type[Exception], message: str) -> None:
    layer, x = nn.Recurrent(nn.GRUCell(4, 8)), np.zeros((5, 8, 4), np.float32)
    assert layer(x, np.zeros((8, 8), np.float32))[0].shape == (5, 8, 8)
    with pytest.raises(error, match=message):
        layer(x, state)
