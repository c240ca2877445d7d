"""Zoneout, variational dropout and dropped weights: the masks, step by step and recorded; the extremes."""

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn
from tinygrad_lstm.tree import flatten

F, H, T, B = 3, 4, 6, 3


def sequence(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def randomised(module, seed=1):
    rng = np.random.default_rng(seed)
    for p in module.parameters():
        p.data = rng.normal(size=p.shape) * 0.5
    return module


def make(kind, **options):
    return randomised(kind(F, H, dtype=np.float64, **options))


def leaves(tree):
    return [np.asarray(leaf) for leaf in flatten(tree)[0]]


def assert_trees(a, b, tolerance=1e-12):
    for left, right in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance)


def test_zoneout():
    cell, x = make(nn.LSTMCell), sequence(T, B, F)
    wrapped = nn.Zoneout(cell, p=(0.3, 0.6))
    layer = nn.Recurrent(wrapped)
    drawn = []
    for mode in (tg.eager, None):
        tg.seed(5)
        if mode is None:
            drawn.append(layer(x))
        else:
            with mode():
                drawn.append(layer(x))
    assert_trees(drawn[0], drawn[1])  # the masks are the same, step by step and recorded
    tg.seed(5)
    stays = [mask.numpy() for mask in wrapped.noise(T, B)]
    h, c = np.zeros((B, H)), np.zeros((B, H))
    for t in range(T):
        _, (h_new, c_new) = cell(x[t], (tg.tensor(h), tg.tensor(c)))
        h, c = np.where(stays[0][t], h, h_new.numpy()), np.where(stays[1][t], c, c_new.numpy())
        np.testing.assert_allclose(drawn[0][0].numpy()[t], h, atol=1e-12)
    assert_trees(drawn[0][1], (h, c))
    layer.eval()
    y, _ = cell(x[0], (tg.tensor(h), tg.tensor(c)))
    expected = 0.3 * h + 0.7 * y.numpy()
    np.testing.assert_allclose(wrapped(tg.tensor(x[0]), (tg.tensor(h), tg.tensor(c)))[0].numpy(), expected, atol=1e-12)


def test_zoneout_extremes():
    x = sequence(T, B, F)
    cell = make(nn.GRUCell)
    start = sequence(B, H, seed=3)
    _, state = nn.Recurrent(nn.Zoneout(cell, 1.0))(x, start)
    np.testing.assert_array_equal(state.numpy(), start)
    assert_trees(nn.Recurrent(nn.Zoneout(cell, 0.0))(x, start), nn.Recurrent(cell)(x, start))


def test_variational_dropout():
    tg.seed(0)
    y = nn.VariationalDropout(0.5)(np.ones((T, B, 50))).numpy()
    assert (y == y[0]).all() and set(np.unique(y)) == {0.0, 2.0} and (y[0, 0] != y[0, 1]).any()
    y = nn.VariationalDropout(0.5, batch_first=True)(np.ones((B, T, 50))).numpy()
    assert (y == y[:, :1]).all()


def test_weight_drop():
    layer = randomised(nn.LSTM(F, H, dtype=np.float64))
    weight = layer.weight_hh_l0.numpy().copy()
    dropped, x = nn.WeightDrop(layer, p=1.0), sequence(T, B, F)
    y, _ = dropped(x)
    layer.weight_hh_l0.data = np.zeros_like(weight)
    expected, _ = layer(x)
    np.testing.assert_array_equal(y.numpy(), expected.numpy())
    layer.weight_hh_l0.data = weight
    np.testing.assert_array_equal(dropped.eval()(x)[0].numpy(), layer(x)[0].numpy())
    half = nn.WeightDrop(layer, p=0.5)
    assert half.names == ["weight_hh_l0"]
    for _ in range(2):  # recorded anew, or from the cache: the mask is that of the call
        layer.zero_grad()
        half(x)[0].sum().backward()
        zeros = np.mean(layer.weight_hh_l0.grad == 0)
        assert 0.2 < zeros < 0.8
    assert isinstance(layer.weight_hh_l0, nn.Parameter)
    gradient = tg.grad(lambda m: m(x)[0].sum())(half)
    assert "layer.weight_hh_l0" in gradient
    with pytest.raises(tg.ArgumentError, match="nothing"):
        nn.WeightDrop(layer, ["nothing"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Zoneout(nn.LSTMCell(2, 3), 0.1, 0.2),
        lambda: nn.VariationalDropout(0.5, generator=np.random.default_rng(0)),
        lambda: nn.Dropout(0.5, 7),
        lambda: nn.WeightDrop(nn.LSTM(2, 3), generator=7),
    ],
)
def test_what_is_no_generator(make):
    with pytest.raises(tg.DTypeError, match=r"generator is a tg\.Generator, found"):
        make()


def test_a_probability_in_place_of_names() -> None:
    with pytest.raises(tg.DTypeError, match=r"names are a list of str, found 0.5; the probability is p=0.5"):
        nn.WeightDrop(nn.LSTM(3, 5), 0.5)
