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

    with pytest.raises(tg.DTypeError, match=r"LSTMCell: proj_size is an int, found 1\.5"):
        nn.LSTM(4, 4, proj_size=1.5)
    for cell in (nn.GRUCell(4, 4), nn.PeepholeLSTMCell(4, 4)):
        with pytest.raises(tg.DTypeError, match=r"initial_state: batch is an int, found 1\.5"):
            cell.initial_state(1.5)
        with pytest.raises(tg.ArgumentError, match="initial_state: batch is at least 0, found -1"):
            cell.initial_state(-1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNNCell, nn.Linear, nn.Embedding])
def test_a_generator_is_one_of_this_package(kind):
    with pytest.raises(tg.DTypeError, match=rf"{kind.__name__}: generator is a tg\.Generator, found int"):
        kind(4, 4, generator=3)


def test_lengths_of_one_sequence():
    layer, x = nn.LSTM(F, H), np.ones((5, F), np.float32)
    np.testing.assert_array_equal(layer(x, lengths=2)[0].numpy(), layer(x, lengths=[2])[0].numpy())
    with pytest.raises(tg.ShapeError, match=r"LSTM: lengths of shape \(2,\), expected \(1,\)"):
        layer(x, lengths=[1, 2])


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


class Plain(nn.Module):
    """A cell whose state has to be an array."""

    def initial_state(self, batch: int) -> Any:
        return None

    def forward(self, x: Any, h: Any) -> Any:
        return h + x, h + x


class Other(Plain):
    """A cell, some of whose methods are given."""

    def __init__(self, **methods: Any) -> None:
        super().__init__()
        self.__dict__.update(methods)

    def initial_state(self, batch: int) -> Any:
        return np.zeros((batch, 4), np.float32)


STEP, STATE = np.zeros((2, 4), np.float32), np.zeros((2, 5), np.float32)
LAYER_STATE = np.zeros((1, 2, 5), np.float32)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda x: nn.LSTM(4, 5)(x, (LAYER_STATE, None)), tg.DTypeError, "LSTM: initial c is None, expected an array"),
        (lambda x: nn.GRU(4, 5)(x, "abc"), tg.DTypeError, "GRU: initial h is 'abc'"),
        (lambda x: nn.LSTMCell(4, 5)(STEP, (STATE, None)), tg.DTypeError, "LSTMCell: the state c is None"),
        # Two rows are no pair (h, c), and a pair no state (2, B, H).
        (lambda x: nn.LSTMCell(4, 5)(STEP, STATE), tg.ShapeError, r"LSTMCell: the state is a pair \(h, c\), found a"),
        (lambda x: nn.GRUCell(4, 5)(STEP, (STATE, STATE)), tg.ShapeError, r"GRUCell: .*\(2, 2, 5\), expected \(2, "),
        (lambda x: nn.RNNCell(4, 5)(STEP, STATE[:1]), tg.ShapeError, r"RNNCell: .*\(1, 5\), expected \(2, 5\)"),
        (lambda x: nn.Recurrent(Plain())(x), tg.DTypeError, r"Plain\.initial_state returned None.*forward failed"),
        (lambda x: nn.Recurrent(Other(initial_state=lambda: 0))(x), tg.DTypeError, r"_state\(batch\) .* takes \(\)"),
        (lambda x: nn.Recurrent(Other(forward=lambda x, h: x + h))(x), tg.DTypeError, "returned Tensor, expected a"),
        (lambda x: nn.Recurrent(Other(forward=lambda x, h: (h, h, h)))(x), tg.DTypeError, "returned a tuple of 3"),
        (
            lambda x: nn.Recurrent(Other(noise=lambda steps, batch: np.zeros((batch, steps))))(x),
            tg.ShapeError, r"Other\.noise\(3, 2\) returned shape \(2, 3\), expected \(3, \.\.\.\)",
        ),
        (lambda x: nn.Recurrent(nn.GRUCell(4, 5))(x, "abc"), tg.DTypeError, "Recurrent: the state is 'abc'"),
        (lambda x: nn.Stack([nn.GRUCell(4, 5)])(x, 3), tg.ShapeError, "Stack: the state is a list of 1.*found a int"),
        (lambda x: nn.Stack(nn.GRUCell(4, 5)), tg.DTypeError, r"Stack: layers are a list, found a GRUCell.*Stack\(\["),
        (
            lambda x: nn.Bidirectional(nn.GRUCell(4, 5), nn.GRUCell(4, 5))(x, (1, 2, 3)),
            tg.ShapeError, "Bidirectional: the state is a pair",
        ),
    ],
)  # fmt: skip
def test_states_and_layers_of_another_kind(run: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(np.zeros((3, 2, 4), np.float32))


def test_a_cell_without_a_state_is_none_that_fails() -> None:
    class Stateless(Plain):
        def forward(self, x: Any, h: Any) -> Any:
            return x * 2.0, None

    x = np.ones((3, 2, 4), np.float32)
    outputs, state = nn.Recurrent(Stateless())(x)
    assert state is None
    np.testing.assert_array_equal(outputs.numpy(), 2.0 * x)


class Pair(nn.Module):
    def forward(self, x: Any, y: Any) -> Any:
        return x + y


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: nn.LSTM(4, 3)(x, length=[1, 2]), r"^LSTM.forward takes \(x, state=, lengths=, .* mean 'lengths'"),
        (lambda x: nn.Recurrent(nn.GRUCell(4, 3))(x, reutrn_states=True), "did you mean 'return_states'"),
        (lambda x: nn.Sequential(nn.Linear(4, 3))(x, foo=1), r"^Sequential.forward takes \(x\): .*'foo'$"),
        (lambda x: nn.Linear(4, 3)(), r"^Linear.forward takes \(x\): missing .*'x'$"),
        (lambda x: nn.Sequential(nn.Linear(4, 3), Pair())(x), r"^Pair.forward takes \(x, y\): missing .*'y'$"),
    ],
)  # fmt: skip
def test_calls_with_arguments_that_do_not_fit(call: Any, message: str) -> None:
    with pytest.raises(tg.DTypeError, match=message):
        call(np.ones((5, 2, 4), np.float32))


def test_errors_of_a_forward_stay_as_they_are() -> None:
    class Own(nn.Module):
        def forward(self, x: Any) -> Any:
            return (lambda: None)(x)  # type: ignore[call-arg]

    for module in (Own(), nn.Sequential(Own())):
        with pytest.raises(TypeError, match="takes 0 positional arguments but 1 was given") as caught:
            module(1.0)
        assert not isinstance(caught.value, tg.Error)


def test_dropout_without_a_layer_to_act_between() -> None:
    for make in (
        lambda: nn.LSTM(3, 4, dropout=0.5),
        lambda: nn.GRU(3, 4, 1, bidirectional=True, dropout=0.5),
        lambda: nn.RNN(3, 4, dropout=0.5),
        lambda: nn.Stack([nn.LSTMCell(3, 4)], dropout=0.5),
    ):
        with pytest.warns(UserWarning, match=r"dropout=0\.5 acts between layers, and there is one layer") as caught:
            make()
        assert caught[0].filename == __file__
    nn.LSTM(3, 4, 2, dropout=0.5), nn.LSTM(3, 4, dropout=0.0)
