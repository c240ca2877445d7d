"""Lengths as an argument of a compiled function: recorded without values, checked when it is called."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops

T, B = 7, 3


def layers() -> dict[str, Any]:
    tg.seed(2)
    f8 = {"dtype": np.float64}
    return {
        "LSTM": nn.LSTM(2, 3, num_layers=2, bidirectional=True, **f8),
        "GRU": nn.GRU(2, 3, batch_first=True, **f8),
        "RNN with a budget": nn.RNN(2, 3, memory=0.6, **f8),
        "Recurrent": nn.Recurrent(nn.PeepholeLSTMCell(2, 3, **f8), reverse=True),
        "Bidirectional": nn.Bidirectional(nn.GRUCell(2, 3, **f8), nn.GRUCell(2, 3, **f8)),
        "Stack": nn.Stack([nn.LSTMCell(2, 3, **f8), nn.GRUCell(3, 3, **f8)]),
    }


def run(layer: Any, x: Any, lengths: Any) -> Any:
    outputs, state = layer(x, lengths=lengths)
    total = ops.square(outputs).sum()
    for leaf in state if isinstance(state, tuple) and isinstance(state[0], tg.Tensor) else ():
        total = total + leaf.sum()
    return total


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_layers(name, dtype, rng):
    layer = layers()[name]
    x = rng.standard_normal((B, T, 2) if name == "GRU" else (T, B, 2))
    f = tg.compile(tg.value_and_grad(run, argnums=(0, 1)))
    for lengths in ([7, 0, 4], [1, 7, 7]):
        given = np.array(lengths, dtype)
        value, (of_layer, of_x) = f(layer, x, given)
        expected, (layer_expected, x_expected) = tg.value_and_grad(run, argnums=(0, 1))(layer, x, given)
        np.testing.assert_allclose(value.numpy(), expected.numpy(), rtol=1e-12)
        np.testing.assert_allclose(of_x.numpy(), x_expected.numpy(), rtol=1e-11, atol=1e-13)
        for key, gradient in of_layer.items():
            np.testing.assert_allclose(gradient.numpy(), layer_expected[key].numpy(), rtol=1e-11, atol=1e-13)
    assert len(f._entries) == 1  # other values are no other signature
    run_it = tg.compile(run)
    run_it(layer, x, tg.tensor(given))
    for bad in ([7, 8, 1], [-1, 2, 3]):
        if min(bad) < 0 and dtype is np.uint8:
            continue
        with pytest.raises(tg.OutOfRangeError, match=rf"length {'8' if 8 in bad else '-1'} is outside of 0..7"):
            run_it(layer, x, np.array(bad, dtype))
        with pytest.raises(tg.OutOfRangeError, match=r"^(LSTM|GRU|RNN|Recurrent).*: length"):
            f(layer, x, np.array(bad, dtype))
    np.testing.assert_allclose(run_it(layer, x, given).numpy(), expected.numpy(), rtol=1e-12)  # usable afterwards


@pytest.mark.parametrize("mode", ["never", "always"])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan(mode, reverse, rng, monkeypatch):
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", mode)
    x = rng.standard_normal((T, B, 2))
    x[5:, 0] = np.nan  # padding

    def f(x: Any, lengths: Any) -> Any:
        body = lambda c, v: (ops.tanh(c + v), c * v)
        return ops.scan(body, np.zeros((B, 2)), x, lengths=lengths, reverse=reverse)

    compiled = tg.compile(f)
    for lengths in (np.array([5, 7, 0]), np.array([2, 3, 7])):
        for found, expected in zip(compiled(x, lengths), f(x, lengths), strict=True):
            np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-12)
    gradient = tg.compile(tg.grad(lambda x, n: ops.square(f(x, n)[1]).sum()))(x, np.array([5, 7, 0])).numpy()
    assert np.isfinite(gradient).all() and not gradient[5:, 0].any() and not gradient[:, 2].any()
    with pytest.raises(tg.OutOfRangeError, match=r"scan: length 8 is outside of 0\.\.7"):
        compiled(x, np.array([5, 8, 0]))


def test_what_can_be_seen_at_recording_is_refused_there(rng):
    layer = nn.GRU(2, 3)
    f = tg.compile(lambda x, lengths: layer(x, lengths=lengths)[0])
    x = rng.standard_normal((T, B, 2)).astype(np.float32)
    with pytest.raises(tg.DTypeError, match="GRU: lengths are integers, found float64"):
        f(x, np.array([1.0, 2.0, 3.0]))
    with pytest.raises(tg.ShapeError, match=r"GRU: lengths of shape \(2,\), expected \(3,\)"):
        f(x, np.array([1, 2]))
    assert f(x[:, 0], np.array([4]))[4:].numpy().any() == 0  # unbatched
    assert f(x[:, 0], np.array(4))[:4].numpy().all()


def test_a_batch_of_none_and_ctc():
    layer = nn.GRU(2, 3)
    f = tg.compile(lambda x, lengths: layer(x, lengths=lengths)[0])
    assert f(np.zeros((T, 0, 2), np.float32), np.zeros(0, np.int64)).shape == (T, 0, 3)
    scores = np.log(np.full((5, 2, 3), 1 / 3))
    loss = lambda p, n: nn.losses.ctc_loss(p, np.array([[1, 2], [2, 1]]), n, [2, 2])
    n = np.array([5, 4])
    np.testing.assert_allclose(tg.compile(loss)(scores, n).numpy(), loss(scores, n).numpy(), rtol=1e-12)
    with pytest.raises(tg.OutOfRangeError, match="input_lengths"):
        tg.compile(loss)(scores, np.array([5, 9]))
