"""Gradients over time: against gradients of loops written by hand, in which every step has its own parameters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import inspect, nn, ops
from tinygrad_lstm.inspect.watch import watch

T, B, I, H = 6, 2, 3, 4  # noqa: E741


class Model(nn.Module):
    def __init__(self, make: Any = nn.LSTMCell) -> None:
        super().__init__()
        self.layer = nn.Recurrent(make(I, H, dtype=np.float64))
        self.out = nn.Linear(H, 1, dtype=np.float64)

    def forward(self, x: Any, lengths: Any = None) -> Any:
        return self.out(self.layer(x, lengths=lengths)[0][-1])


def loss_of(output: Any) -> Any:
    return (ops.sin(output) * 2.0).sum()


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((T, B, I))


def norm(array: Any) -> float:
    return float(np.sqrt((np.asarray(array) ** 2).sum()))


def unrolled(model: Model, x: np.ndarray, state: Any, start: int, swaps: dict[int, Any] | None = None) -> Any:
    """The loss from a state before step ``start`` on; ``swaps`` gives steps parameters of their own."""
    cell = model.layer.cell
    own = cell.__tree_leaves__()
    output = None
    for t in range(start, T):
        if swaps:
            cell.__tree_swap__(swaps[t])
        try:
            output, state = cell(tg.asarray(x[t]), state)
        finally:
            if swaps:
                cell.__tree_swap__(own)
    return loss_of(model.out(output))


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.PeepholeLSTMCell, nn.GRUCell])
def test_states(make: Any, x: np.ndarray) -> None:
    model = Model(make)
    flow = inspect.gradient_flow(model, x, loss_of)
    state = model.layer.cell.initial_state(B)
    assert flow.steps == T and flow.loss == pytest.approx(unrolled(model, x, state, 0).item(), rel=1e-12)
    names = ["h"] if make is nn.GRUCell else ["h", "c"]
    assert sorted(flow.states) == sorted(names)
    for t in range(T - 1):
        with tg.no_grad():
            _, state = model.layer.cell(tg.asarray(x[t]), state)
        behind = list(state) if isinstance(state, tuple) else [state]

        def rest(*parts: Any, t: int = t) -> Any:
            return unrolled(model, x, parts if len(parts) > 1 else parts[0], t + 1)

        slopes = tg.grad(rest, tuple(range(len(behind))))(*behind)
        # (c of a step reaches the loss through h of the same step as well: see the next test.)
        assert flow.states["h"][t] == pytest.approx(norm(slopes[0].numpy()), rel=1e-9)


def test_gates_and_the_cell_state_against_a_shift(x: np.ndarray) -> None:
    """d loss / d gate by central differences, on the equations in NumPy: one element of one step is shifted."""
    model = Model()
    flow = inspect.gradient_flow(model, x, loss_of)
    seen = watch("test", model, x, loss_of)
    series = {one.name: one for one in seen.series}
    assert sorted(flow.gates) == ["f", "g", "i", "o"] and series["c"].kind == "state"

    def shifted(name: str, step: int, unit: int, by: float) -> float:
        cell, h, c = model.layer.cell, np.zeros((B, H)), np.zeros((B, H))
        p = {key: value.numpy() for key, value in cell.named_parameters()}
        for t in range(T):
            z = x[t] @ p["weight_ih"].T + p["bias_ih"] + h @ p["weight_hh"].T + p["bias_hh"]
            i, f, g, o = np.split(z, 4, axis=1)
            v = {"i": 1 / (1 + np.exp(-i)), "f": 1 / (1 + np.exp(-f)), "g": np.tanh(g), "o": 1 / (1 + np.exp(-o))}
            if t == step and name in v:
                v[name][1, unit] += by
            c = v["f"] * c + v["i"] * v["g"]
            if t == step and name == "c":
                c[1, unit] += by
            h = v["o"] * np.tanh(c)
            if t == step and name == "h":
                h[1, unit] += by
        weight, bias = model.out.weight.numpy(), model.out.bias.numpy()
        return float((np.sin(h @ weight.T + bias) * 2).sum())

    for name in "ifgoch":
        for step in (0, 3, T - 1):
            numeric = (shifted(name, step, 2, 1e-5) - shifted(name, step, 2, -1e-5)) / 2e-5
            assert series[name].gradients[step, 1, 2] == pytest.approx(numeric, rel=1e-6, abs=1e-10), (name, step)


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.LayerNormLSTMCell])
def test_what_each_step_adds_to_the_parameters(make: Any, x: np.ndarray) -> None:
    model = Model(make)
    flow = inspect.gradient_flow(model, x, loss_of)
    seen = watch("test", model, x, loss_of)
    assert all(parameter.grad is None for parameter in model.parameters())
    cell = model.layer.cell
    parameters = cell.__tree_leaves__()
    copies = [{name: tg.tensor(p.numpy(), requires_grad=True) for name, p in parameters.items()} for _ in range(T)]
    unrolled(model, x, cell.initial_state(B), 0, dict(enumerate(copies))).backward()
    assert set(flow.parameters) == {f"layer.cell.{name}" for name in parameters}
    for name in parameters:
        full = f"layer.cell.{name}"
        shares = [copy[name].grad for copy in copies]
        np.testing.assert_allclose(flow.parameters[full], [norm(share) for share in shares], rtol=1e-9, atol=1e-14)
        sums = [norm(sum(shares[t:])) for t in range(T)]
        np.testing.assert_allclose(seen.accumulated[full], sums, rtol=1e-9, atol=1e-14)
        assert flow.totals[full] == pytest.approx(sums[0], rel=1e-9)
    model.zero_grad()
    loss_of(model(x)).backward()
    for name, parameter in model.named_parameters():
        assert flow.totals[name] == pytest.approx(norm(parameter.grad), rel=1e-9)


def test_factor_of_a_linear_recurrence() -> None:
    """h' = a h + x: the gradient of the last h with respect to that k steps before is a^k."""

    class Leaky(nn.Module):
        def __init__(self, a: float) -> None:
            super().__init__()
            self.a = nn.Parameter(np.array([a]))

        def initial_state(self, batch: int) -> Any:
            return np.zeros((batch, 2))

        def forward(self, x: Any, h: Any) -> Any:
            h = tg.name(self.a * h + x, "h")
            return h, h

    x = np.ones((5, 1, 2))
    for a in (0.5, 1.0, 1.7):
        flow = inspect.gradient_flow(nn.Recurrent(Leaky(a)), x, lambda out: out[1].sum())
        np.testing.assert_allclose(flow.states["h"], [np.sqrt(2) * a**k for k in (4, 3, 2, 1, 0)])
        assert flow.factors["h"] == pytest.approx(a) and f"x {a:.3g} a step back" in str(flow)
        # The step from t = 2 to 3 adds h_2 = 1 + a + a^2 per unit, times a^(4 - 3).
        assert flow.parameters["cell.a"][3] == pytest.approx(2 * (1 + a + a**2) * a)
    back = inspect.gradient_flow(nn.Recurrent(Leaky(0.5), reverse=True), x, lambda out: out[1].sum())
    np.testing.assert_allclose(back.states["h"], [np.sqrt(2) * 0.5**k for k in range(5)])
    assert back.factors["h"] == pytest.approx(0.5)
    nothing = inspect.gradient_flow(nn.Recurrent(Leaky(0.0)), x, lambda out: out[1].sum())
    assert np.isnan(nothing.factors["h"]) and nothing.states["h"].tolist() == [0, 0, 0, 0, np.sqrt(2)]


def test_unnamed_states_masked_states_and_layers(x: np.ndarray) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(np.eye(I))

        def initial_state(self, batch: int) -> Any:
            return np.zeros((batch, I)), np.zeros((batch, I))

        def forward(self, x: Any, state: Any) -> Any:
            h, m = state
            m = 0.5 * m + x
            h = ops.tanh(h @ self.W + m)
            return h, (h, m)

    flow = inspect.gradient_flow(nn.Recurrent(Plain()), x, lambda out: out[0].sum())
    assert set(flow.states) == {"state0", "state1"} and not flow.gates
    parts = {name: values.tolist() for name, values in flow.states.items()}

    class Half(Plain):
        def forward(self, x: Any, state: Any) -> Any:
            out, (h, m) = super().forward(x, state)
            return out, (tg.name(h, "hidden"), m)

    half = nn.Recurrent(Half())
    named = inspect.gradient_flow(half, x, lambda out: out[0].sum()).states
    assert set(named) == set(half(x, return_states=True)[2]) == {"hidden", "state1"}
    assert {"hidden": parts["state0"], "state1": parts["state1"]} == {k: v.tolist() for k, v in named.items()}
    kept = watch("a test", nn.Recurrent(Plain()), x, lambda out: out[0].sum()).series
    trajectories = nn.Recurrent(Plain())(x, return_states=True)[2]
    for one in kept:
        np.testing.assert_allclose(one.values, trajectories[one.name].numpy()[0], rtol=1e-12)
    masked = inspect.gradient_flow(Model(), x, loss_of, lengths=[T, 2])
    assert set(masked.states) == {"h", "c"}
    two = inspect.gradient_flow(nn.LSTM(I, H, num_layers=2, dtype=np.float64), x, lambda out: out[0].sum())
    assert set(two.states) == {"l0.h", "l0.c", "l1.h", "l1.c"} and "l1.i" in two.gates
    mixed = inspect.gradient_flow(
        nn.Recurrent(nn.Zoneout(nn.GRUCell(I, H, dtype=np.float64))), x, lambda out: out[0].sum()
    )
    assert list(mixed.states) == ["cell.h"] and "cell.cell.h" in mixed.gates


def test_a_loop_in_the_body_counts_as_a_part_of_its_step(x: np.ndarray) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(0.3 * np.eye(I))

        def initial_state(self, batch: int) -> Any:
            return np.zeros((batch, I))

        def forward(self, x: Any, h: Any) -> Any:
            h, _ = ops.scan(lambda c, u: (ops.tanh(c @ self.W + u), c), h, ops.stack([x, x, x]))
            return h, tg.name(h * 1.0, "h")

    layer = nn.Recurrent(Inner())
    flow = inspect.gradient_flow(layer, x, lambda out: out[0].sum())
    assert flow.steps == T and (flow.parameters["cell.W"] > 0).all() and set(flow.states) == {"h"}
    copies = [{"W": tg.tensor(layer.cell.W.numpy(), requires_grad=True)} for _ in range(T)]
    state, total, own = layer.cell.initial_state(B), 0.0, layer.cell.__tree_leaves__()
    for t in range(T):
        layer.cell.__tree_swap__(copies[t])
        y, state = layer.cell(tg.asarray(x[t]), tg.asarray(state))
        total = total + y.sum()
        layer.cell.__tree_swap__(own)
    total.backward()
    np.testing.assert_allclose(flow.parameters["cell.W"], [norm(copy["W"].grad) for copy in copies], rtol=1e-9)


def test_target_and_text(x: np.ndarray) -> None:
    model = Model()
    flow = inspect.gradient_flow(model, x, nn.mse_loss, np.ones((B, 1)))
    assert flow.loss == pytest.approx(nn.mse_loss(model(x), np.ones((B, 1))).item())
    text = str(flow)
    assert text.startswith(f"loss {flow.loss:.6g}, 6 steps") and f"{flow.states['h'][0]:.2e}" in text
    assert "out.weight" in text and f"total {flow.totals['layer.cell.weight_hh']:.3g}" in text
    assert repr(flow) == "<GradientFlow over 6 steps: c, h>"
    one = inspect.gradient_flow(model, x[:1], loss_of)
    assert one.steps == 1 and "layer.cell.weight_ih" in str(one)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_plot(tmp_path: Path, x: np.ndarray, ending: str) -> None:
    pytest.importorskip("matplotlib")
    flow = inspect.gradient_flow(Model(), x, loss_of)
    flow.plot(tmp_path / f"a.{ending}")
    flow.plot(tmp_path / f"b.{ending}")
    first = (tmp_path / f"a.{ending}").read_bytes()
    assert first == (tmp_path / f"b.{ending}").read_bytes() and len(first) > 5000


def test_plot_errors(tmp_path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = inspect.gradient_flow(Model(), x, loss_of)
    with pytest.raises(tg.ArgumentError, match=r"figures end in \.png"):
        flow.plot(tmp_path / "a.jpg")
    for name in [m for m in sys.modules if m == "matplotlib" or m.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(tg.Error, match=r"matplotlib; pip install .*\[plots\]"):
        flow.plot(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_what_is_refused(x: np.ndarray) -> None:
    model = Model()
    with pytest.raises(tg.DTypeError, match="the model is a Module, found function"):
        inspect.gradient_flow(lambda x: x, x, loss_of)
    with pytest.raises(tg.DTypeError, match="loss is a function"):
        inspect.gradient_flow(model, x, 3)  # type: ignore[arg-type]
    with pytest.raises(tg.ShapeError, match=r"loss returned shape \(2, 1\), expected a scalar"):
        inspect.gradient_flow(model, x, lambda out: out)
    with pytest.raises(tg.DTypeError, match="loss returned float"):
        inspect.gradient_flow(model, x, lambda out: out.sum().item())
    with pytest.raises(tg.ArgumentError, match="no step of a recurrent layer or scan ran in Linear"):
        inspect.gradient_flow(nn.Linear(I, 1, dtype=np.float64), x, lambda out: out.sum())
    with tg.no_grad(), pytest.raises(tg.GraphError, match=r"outside of no_grad\(\)"):
        inspect.gradient_flow(model, x, loss_of)


def test_too_much_memory_is_refused(x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinygrad_lstm.inspect.watch.MOST_BYTES", 1000)
    with pytest.raises(tg.ArgumentError, match=r"would take \d+ MB, at most .* shorter sequence"):
        inspect.gradient_flow(Model(), x, loss_of)


class Quiet(nn.Module):
    """A cell that names nothing, with an output beside its state."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(np.linspace(-0.5, 0.5, I * I).reshape(I, I))

    def initial_state(self, batch: int) -> Any:
        return np.zeros((batch, I)), np.zeros((batch, I))

    def forward(self, x: Any, state: Any) -> Any:
        h, m = state
        h = ops.tanh(h @ self.W + x)
        m = 0.9 * m + h
        return m * h, (h, m)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(I, H, dtype=np.float64),
        lambda: nn.GRU(I, H, dtype=np.float64),
        lambda: nn.Recurrent(nn.PeepholeLSTMCell(I, H, dtype=np.float64), reverse=True),
        lambda: nn.Recurrent(Quiet()),
    ],
    ids=["lstm", "gru", "reverse", "unnamed"],
)
def test_with_lengths_each_row_is_as_if_it_were_alone(make: Any, x: np.ndarray) -> None:
    layer, lengths = make(), [T, 2]
    of_outputs = lambda out: (out[0] ** 2).sum()
    whole = inspect.gradient_flow(layer, x, of_outputs, lengths=lengths)
    rows = [inspect.gradient_flow(layer, x[:n, [b]], of_outputs) for b, n in enumerate(lengths)]
    assert whole.states.keys() == rows[0].states.keys()
    for name, norms in whole.states.items():
        each = [np.pad(row.states[name], (0, T - row.steps)) for row in rows]
        # In reverse the padding comes first, and hands on the state that the row starts from.
        both = slice(0, 2 if getattr(layer, "reverse", False) else T)
        np.testing.assert_allclose(norms[both], np.hypot(*each)[both], rtol=1e-10)


def test_with_lengths_a_state_is_handed_through_the_padding(x: np.ndarray) -> None:
    layer = nn.GRU(I, H, dtype=np.float64)
    of_state = lambda out: (out[1][:, -1] ** 2).sum()
    norms = inspect.gradient_flow(layer, x, of_state, lengths=[T, 2]).states["h"]
    alone = inspect.gradient_flow(layer, x[:2, [1]], of_state).states["h"]
    np.testing.assert_allclose(norms, [*alone, *[alone[-1]] * (T - 2)], rtol=1e-10)


def test_names_do_not_depend_on_lengths(x: np.ndarray) -> None:
    layers = (nn.LSTM(I, 4, 2, bidirectional=True, dtype=np.float64), nn.GRU(I, 4, dtype=np.float64))
    for model in (Model(), *layers):
        loss = lambda out: ops.square(out[0] if isinstance(out, tuple) else out).sum()
        plain = inspect.gradient_flow(model, x, loss)
        padded = inspect.gradient_flow(model, x, loss, lengths=[T, 2])
        assert list(padded.states) == list(plain.states)
        assert list(padded.gates) == list(plain.gates)
