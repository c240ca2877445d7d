"""The LSTM's published equations differentiated by hand in NumPy, against the tape: every gate at every step.

The backward below is written out from the equations (Greff et al. 2017, appendix A, without peepholes).  It
exists in this test only.
"""

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn

T, B, F, H = 5, 3, 4, 6


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def forward(x, h, c, w, u, b):
    """Values of all gates and states, lists over time."""
    steps = []
    for x_t in x:
        z = x_t @ w.T + h @ u.T + b
        i, f, g, o = sigmoid(z[:, :H]), sigmoid(z[:, H : 2 * H]), np.tanh(z[:, 2 * H : 3 * H]), sigmoid(z[:, 3 * H :])
        c_new = f * c + i * g
        h_new = o * np.tanh(c_new)
        steps.append({"x": x_t, "h_old": h, "c_old": c, "i": i, "f": f, "g": g, "o": o, "c": c_new, "h": h_new})
        h, c = h_new, c_new
    return steps


def backward(steps, dy, w, u):
    """Gradients of sum(h * dy) with respect to every gate, state, weight and input."""
    dw, du, db = np.zeros_like(w), np.zeros_like(u), np.zeros(4 * H)
    dh_next, dc_next = np.zeros((B, H)), np.zeros((B, H))
    found = []
    for s, dy_t in zip(reversed(steps), dy[::-1], strict=True):
        dh = dy_t + dh_next
        tanh_c = np.tanh(s["c"])
        dc = dh * s["o"] * (1 - tanh_c**2) + dc_next
        do, di, dg, df = dh * tanh_c, dc * s["g"], dc * s["i"], dc * s["c_old"]
        dz = np.concatenate(
            [
                di * s["i"] * (1 - s["i"]),
                df * s["f"] * (1 - s["f"]),
                dg * (1 - s["g"] ** 2),
                do * s["o"] * (1 - s["o"]),
            ],
            axis=1,
        )
        dw += dz.T @ s["x"]
        du += dz.T @ s["h_old"]
        db += dz.sum(axis=0)
        found.append({"i": di, "f": df, "g": dg, "o": do, "c": dc, "h": dh, "x": dz @ w})
        dh_next, dc_next = dz @ u, dc * s["f"]
    return found[::-1], {"weight_ih": dw, "weight_hh": du, "bias_ih": db, "bias_hh": db}, dh_next, dc_next


@pytest.fixture
def case(rng):
    cell = nn.LSTMCell(F, H, dtype=np.float64)
    for p in cell.parameters():
        p.data = rng.normal(size=p.shape) * 0.5
    x, dy = rng.normal(size=(T, B, F)), rng.normal(size=(T, B, H))
    h, c = rng.normal(size=(B, H)), rng.normal(size=(B, H))
    w, u = cell.weight_ih.numpy(), cell.weight_hh.numpy()
    steps = forward(x, h, c, w, u, cell.bias_ih.numpy() + cell.bias_hh.numpy())
    return cell, x, dy, h, c, steps, backward(steps, dy, w, u)


def test_every_gate_at_every_step(case):
    cell, x, dy, h, c, steps, (by_step, by_parameter, dh, dc) = case
    xs, h0, c0 = tg.tensor(x), tg.tensor(h), tg.tensor(c)
    with tg.Tape() as tape, tg.eager():
        y, _ = nn.Recurrent(cell)(xs, (h0, c0))
        loss = (y * dy).sum()
    named = {}
    for record in tape.records:
        if record.label is not None:
            named[record.label, record.place.step] = tape.outputs(record)[0]
    assert len(named) == 6 * T
    gradients = tape.gradient(loss, named)
    for (gate, t), value in named.items():
        np.testing.assert_allclose(value.numpy(), steps[t][gate], rtol=0, atol=1e-12, err_msg=f"{gate} at {t}")
        np.testing.assert_allclose(
            gradients[gate, t].numpy(), by_step[t][gate], rtol=0, atol=1e-12, err_msg=f"d{gate} at {t}"
        )
    parameters = dict(cell.named_parameters())
    for name, g in tape.gradient(loss, parameters).items():
        np.testing.assert_allclose(g.numpy(), by_parameter[name], rtol=0, atol=1e-11, err_msg=name)
    g_x, g_h, g_c = tape.gradient(loss, [xs, h0, c0])
    np.testing.assert_allclose(g_x.numpy(), [s["x"] for s in by_step], rtol=0, atol=1e-12)
    np.testing.assert_allclose(g_h.numpy(), dh, rtol=0, atol=1e-12)
    np.testing.assert_allclose(g_c.numpy(), dc, rtol=0, atol=1e-12)


def test_recorded_scan_and_trajectories(case):
    """The same numbers without eager(): gates as trajectories, gradients through scan's adjoint."""
    cell, x, dy, h, c, steps, (by_step, by_parameter, dh, dc) = case
    xs, h0, c0 = (tg.tensor(a, requires_grad=True) for a in (x, h, c))
    y, _, traj = nn.Recurrent(cell, return_gates=True)(xs, (h0, c0))
    (y * dy).sum().backward()
    for gate in "ifgoch":
        np.testing.assert_allclose(traj[gate].numpy()[0], [s[gate] for s in steps], rtol=0, atol=1e-12, err_msg=gate)
    for name, p in cell.named_parameters():
        np.testing.assert_allclose(p.grad, by_parameter[name], rtol=0, atol=1e-11, err_msg=name)
    np.testing.assert_allclose(xs.grad, [s["x"] for s in by_step], rtol=0, atol=1e-12)
    np.testing.assert_allclose(h0.grad, dh, rtol=0, atol=1e-12)
    np.testing.assert_allclose(c0.grad, dc, rtol=0, atol=1e-12)


def test_gradient_into_a_gate_trajectory(case):
    """A loss on a gate's trajectory reaches the weights, as it does in a Python loop."""
    cell, x, _, h, c, _, _ = case
    weights = np.random.default_rng(0).normal(size=(T, B, H))
    layer = nn.Recurrent(cell, return_gates=True)

    def loss(cell):
        _, _, traj = layer(x, (h, c))
        return (traj["f"][0] * weights).sum()

    scanned = tg.grad(loss)(cell)
    with tg.eager():
        stepped = tg.grad(loss)(cell)
    for name, g in scanned.items():
        np.testing.assert_allclose(g.numpy(), stepped[name].numpy(), rtol=0, atol=1e-12, err_msg=name)
        assert np.abs(g.numpy()).max() > 1e-3


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("mode", ["always", "never"])
def test_gradients_share_no_memory(mode: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both biases of a gate have the same gradient, but not the same array: a hook may write to it."""
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", mode)
    layer, x = nn.LSTM(3, 4), np.ones((steps, 5, 3), np.float32)
    layer.bias_ih_l0.register_hook(lambda g: g.data.fill(7.0))
    layer(x)[0].sum().backward()
    assert (layer.bias_ih_l0.grad == 7.0).all() and not (layer.bias_hh_l0.grad == 7.0).any()
