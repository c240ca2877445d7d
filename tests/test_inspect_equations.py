"""Printed equations: read back and evaluated with NumPy they give what the cell gives; and how they are written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from equation_reader import evaluate

import tinygrad_lstm as tg
from tinygrad_lstm import inspect, nn, ops
from tinygrad_lstm.tree import flatten, unflatten

# ---------------------------------------------------------------------------- the cells


class MinimalGated(nn.Module):
    """A user's cell: one product split, a stack of matrices, the state without a name."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.init.xavier_uniform((6, 2))
        self.U = nn.init.orthogonal((2, 3, 3))

    def initial_state(self, batch: int) -> tg.Tensor:
        return tg.tensor(np.zeros((batch, 3), self.U.dtype))

    def forward(self, x: Any, h: Any) -> Any:
        xf, xn = ops.chunk(x @ self.W.T, 2)
        f = tg.name(ops.sigmoid(xf + h @ self.U[0] + 1.0), "f")
        h = h + f * (ops.tanh(xn + (f * h) @ self.U[1]) - h)
        return h, h


class Odd(nn.Module):
    """Signs, powers, quotients in both places, joined rows, sums in products, a product of products."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.b = nn.Parameter(np.linspace(-1, 1, 15).reshape(5, 3)), nn.Parameter([0.3, -0.2, 0.9])
        self.B = nn.Parameter(np.linspace(0.2, 1, 9).reshape(3, 3))

    def initial_state(self, batch: int) -> tg.Tensor:
        return tg.tensor(np.zeros((batch, 3), self.A.dtype))

    def forward(self, x: Any, h: Any) -> Any:
        joined = ops.concatenate([x, h], axis=-1)
        p = tg.name(joined @ (self.A @ self.B) - (h - self.b) - -h, "p")
        q = tg.name(-(p + h) * (h / (1.5 + p**2)) / (2.0 / ops.exp(p)) - (-(h**3.0)), "q")
        h = ops.tanh(q - (p - (q - h)) * (q * 0.5)) + ops.square(-h) + (h @ self.B.T) * q
        return {"out": ops.relu(h), "same": p}, h


class WeightNormed(nn.Module):
    """Weight normalisation (Salimans & Kingma 2016): the matrix that is split is made of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.init.xavier_uniform((6, 2)), nn.Parameter(np.ones((6, 1)))
        self.bias = nn.Parameter(np.ones(6))

    def initial_state(self, batch: int) -> tg.Tensor:
        return tg.tensor(np.zeros((batch, 3), self.v.dtype))

    def forward(self, x: Any, h: Any) -> Any:
        weight = self.g * self.v / ops.norm(self.v, axis=1, keepdims=True)
        z, n = ops.chunk(x @ weight.T + self.bias, 2)
        z = tg.name(ops.sigmoid(z), "z")
        h = tg.name(z * h + ops.tanh(n), "h")
        return h, h


CELLS: dict[str, Callable[[], Any]] = {
    "lstm": lambda: nn.LSTMCell(2, 3),
    "lstm without bias": lambda: nn.LSTMCell(2, 3, bias=False),
    "lstm with a projection": lambda: nn.LSTMCell(4, 3, proj_size=2),
    "gru": lambda: nn.GRUCell(2, 3),
    "gru without bias": lambda: nn.GRUCell(3, 3, bias=False),
    "rnn": lambda: nn.RNNCell(2, 3),
    "rnn relu": lambda: nn.RNNCell(2, 3, nonlinearity="relu"),
    "peephole": lambda: nn.PeepholeLSTMCell(2, 3),
    "layer norm": lambda: nn.LayerNormLSTMCell(2, 3),
    "layer norm without shifts": lambda: nn.LayerNormLSTMCell(2, 3, bias=False, proj_size=2),
    "zoneout, evaluation": lambda: nn.Zoneout(nn.LSTMCell(2, 3), (0.1, 0.3)).eval(),
    "zoneout of layer norm": lambda: nn.Zoneout(nn.LayerNormLSTMCell(2, 3)).eval(),
    "user's": MinimalGated,
    "odd": Odd,
    "weight norm": WeightNormed,
}


def symbol_of(name: str, symbols: set[str]) -> str:
    """The printed name of a parameter: W and b for weight and bias; w for a vector; the path where it is needed."""
    path, _, last = name.rpartition(".")
    for word, letters in (("weight", "Ww"), ("bias", "b")):
        if last.startswith(word):
            rest = last[len(word) :]
            for letter in letters:
                for symbol in (letter + rest, f"{letter}_{path.replace('.', '_')}{rest}"):
                    if symbol in symbols:
                        return symbol
    return last


@pytest.mark.parametrize("which", CELLS)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_printed_is_what_the_cell_computes(which: str, seed: int) -> None:
    cell = CELLS[which]().astype(np.float64)
    rng = np.random.default_rng(seed)
    for parameter in cell.parameters():
        parameter.data = rng.standard_normal(parameter.shape)
    width = 4 if "projection" in which else 3 if "gru without" in which else 2
    x = rng.standard_normal((5, width))
    leaves, treedef = flatten(cell.initial_state(5))
    state = [rng.standard_normal(leaf.shape) for leaf in leaves]
    with tg.no_grad():
        output, new = cell(tg.asarray(x), unflatten(treedef, [tg.asarray(leaf) for leaf in state]))

    text = inspect.equations(cell)
    old_names = list(dict.fromkeys(re.findall(r"\b([\w.]+)_\{t-1\}", text)))
    names = {"lstm": ["h", "c"], "zoneout": ["state0", "state1"], "peephole": ["h", "c"], "layer": ["h", "c"]}
    states = names.get(re.split(r"\W", which)[0], ["h"])
    assert set(old_names) <= set(states)
    symbols = set(re.findall(r"[A-Za-z]\w*", text))
    values = {symbol_of(name, symbols): array for name, array in cell.state_dict().items()}
    values |= {"x_t": x, **{f"{name}_{{t-1}}": leaf for name, leaf in zip(states, state, strict=True)}}
    found = evaluate(text, values)
    for name, leaf in zip(states, flatten(new)[0], strict=True):
        np.testing.assert_allclose(found[f"{name}_t"], leaf.numpy(), rtol=1e-9, atol=1e-11, err_msg=text)
    if which == "odd":
        np.testing.assert_allclose(found["out_t"], output["out"].numpy(), rtol=1e-9)
        np.testing.assert_allclose(found["p_t"], output["same"].numpy(), rtol=1e-9)


def test_the_reader_notices_wrong_equations() -> None:
    values = {"x_t": np.ones((2, 3)), "W": np.arange(6.0).reshape(2, 3), "h_{t-1}": np.full((2, 2), 2.0)}
    assert evaluate("h_t = x_t W^T * h_{t-1}", values)["h_t"].tolist() == [[6, 24], [6, 24]]
    with pytest.raises(KeyError):
        evaluate("h_t = x_t V^T", values)
    with pytest.raises(ValueError, match="mismatch"):
        evaluate("h_t = x_t W", values)


# ---------------------------------------------------------------------------- how it is written


def test_a_lstm_reads_as_in_a_textbook() -> None:
    lines = inspect.equations(nn.LSTMCell(2, 3)).splitlines()
    assert lines[0] == "i_t = sigmoid(x_t W_ih[i]^T + b_ih[i] + h_{t-1} W_hh[i]^T + b_hh[i])"
    assert lines[3] == "g_t = tanh(x_t W_ih[g]^T + b_ih[g] + h_{t-1} W_hh[g]^T + b_hh[g])"
    assert lines[4:6] == ["c_t = f_t * c_{t-1} + i_t * g_t", "h_t = o_t * tanh(c_t)"]


def test_parentheses_only_where_needed() -> None:
    gru = inspect.equations(nn.GRUCell(2, 3)).splitlines()
    assert gru[2] == "n_t = tanh(x_t W_ih[n]^T + b_ih[n] + r_t * (h_{t-1} W_hh[n]^T + b_hh[n]))"
    assert gru[3] == "h_t = (1 - z_t) * n_t + z_t * h_{t-1}"
    own = inspect.equations(MinimalGated()).splitlines()
    assert own[0] == "f_t = sigmoid(x_t W[f]^T + h_{t-1} U[0] + 1)"
    assert own[1] == "h_t = h_{t-1} + f_t * (tanh(x_t W[h]^T + (f_t * h_{t-1}) U[1]) - h_{t-1})"


def test_a_layer_norm_is_a_function() -> None:
    text = inspect.equations(nn.LayerNormLSTMCell(2, 3))
    assert "i_t = sigmoid(norm_x(x_t W_ih^T)[i] + norm_h(h_{t-1} W_hh^T)[i])" in text
    assert "norm_c(u) = (u - mean(u)) / sqrt(var(u) + 1e-05) * w_norm_c + b_norm_c" in text


def test_a_long_scope_is_a_function_and_a_short_one_is_not() -> None:
    class Scoped(MinimalGated):
        def forward(self, x: Any, h: Any) -> Any:
            with tg.scope("short"):
                u = x @ self.W[:3].T
            with tg.scope("gate"):
                g = ops.sigmoid(u * h + ops.exp(u) / (1.0 + ops.square(h) - ops.tanh(u * u)))
            h = g * h
            return h, h

    lines = inspect.equations(Scoped()).splitlines()
    assert lines[0] == "h_t = gate(x_t W[h]^T, h_{t-1}) * h_{t-1}"
    assert lines[1] == "gate(u, v) = sigmoid(u * v + exp(u) / (1 + v^2 - tanh(u * u)))"


def test_rows_of_what_is_made_of_parameters() -> None:
    where = inspect.equations(WeightNormed()).partition("where\n")[2].splitlines()
    assert where == ["  [z], [h] are rows 0:3, 3:6 of g * v / norm(v)", "  [z], [h] are elements 0:3, 3:6 of b"]


def test_a_reshape_says_nothing_of_the_batch() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(np.ones(6))

        def initial_state(self, batch: int) -> tg.Tensor:
            return tg.tensor(np.zeros((batch, 6)))

        def forward(self, x: Any, h: Any) -> Any:
            a = tg.name(ops.expand_dims(x + h * self.w, 1), "a")
            b = tg.name(ops.squeeze(a, 1), "b")
            h = tg.name(ops.reshape(b, (len(x), 2, 3)).sum(axis=1, keepdims=True).reshape(len(x), 3), "c")
            return h, b

    assert inspect.equations(Shaped()).splitlines() == [
        "a_t = (x_t + b_{t-1} * w)[:, None, :]",
        "b_t = a_t[:, 0, :]",
        "c_t = sum(reshape(b_t, shape=(-1, 2, 3)), axis=(-2,), keepdims=True)[:, 0, :]",
    ]


def test_rename_and_its_errors() -> None:
    text = inspect.equations(nn.LSTMCell(2, 3), rename={"g": "c~"})
    assert "c~_t = tanh(x_t W_ih[c~]^T" in text and "c_t = f_t * c_{t-1} + i_t * c~_t" in text
    assert r"\tilde{c}_{t}" in inspect.equations(nn.LSTMCell(2, 3), latex=True, rename={"g": "c~"})
    with pytest.raises(tg.ArgumentError, match=r"'q'; the names are \['c', 'f', 'g', 'h', 'i', 'o', 'x'\]"):
        inspect.equations(nn.LSTMCell(2, 3), rename={"q": "a"})
    for wrong in ("ga", {"g": 3}, ["g"]):
        with pytest.raises(tg.DTypeError, match="rename is a dict of names"):
            inspect.equations(nn.LSTMCell(2, 3), rename=wrong)  # type: ignore[arg-type]
    with pytest.raises(tg.ArgumentError, match="two values would be called 'i'"):
        inspect.equations(nn.LSTMCell(2, 3), rename={"g": "i"})


def test_latex_has_subscripts_and_balanced_braces() -> None:
    for make in CELLS.values():
        text = inspect.equations(make(), latex=True)
        assert text.startswith("\\begin{aligned}\n") and "\\end{aligned}" in text
        depth = 0
        for brace in re.findall(r"(?<!\\)[{}]", text):
            depth += 1 if brace == "{" else -1
            assert depth >= 0
        assert depth == 0 and text.count(r"\left(") == text.count(r"\right)")
        assert not re.search(r"\^\{[^{}]*\}\^", text), "a double superscript is an error in LaTeX"
    lstm = inspect.equations(nn.LSTMCell(2, 3), latex=True)
    assert r"i_{t} &= \sigma\left(x_{t} \, {W_{ih}^{(i)}}^{\top} + b_{ih}^{(i)}" in lstm
    assert r"c_{t} &= f_{t} \odot c_{t-1} + i_{t} \odot g_{t} \\" in lstm


@pytest.mark.parametrize("which", CELLS)
def test_latex_is_set_by_matplotlib(which: str) -> None:
    """Its mathtext knows no environments: each side of each line by itself."""
    pytest.importorskip("matplotlib")
    from matplotlib.mathtext import MathTextParser

    parser = MathTextParser("path")
    text = inspect.equations(CELLS[which](), latex=True).partition("\\end{aligned}")[0]
    for line in text.splitlines()[1:]:
        for side in line.removesuffix(r"\\").split(" &= "):
            parser.parse(
                f"${side.strip().replace(chr(92) + ';', ' ').replace(chr(92) + 'operatorname', chr(92) + 'mathrm')}$"
            )


def test_a_module_gives_each_of_its_cells_once() -> None:
    text = inspect.equations(nn.Stack([nn.GRUCell(2, 3), nn.GRUCell(3, 3), nn.RNNCell(3, 4)]))
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == ["# layers.0.cell: GRUCell, layers.1.cell: GRUCell", "# layers.2.cell: RNNCell"]
    assert inspect.equations(nn.Recurrent(nn.GRUCell(2, 3))) == inspect.equations(nn.GRUCell(2, 3))
    assert inspect.equations(nn.LSTM(2, 3, bidirectional=True)).startswith("# l0: LSTMCell, l0_reverse: LSTMCell\n")


def test_the_width_of_x() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(np.ones(1, np.float32))

        def initial_state(self, batch: int) -> Any:
            return {"m": np.zeros((batch, 4), np.float32), "n": np.zeros((batch, 4), np.float32)}

        def forward(self, x: Any, state: Any) -> Any:
            m = state["m"] * 0.5 + self.a * x.sum(axis=-1, keepdims=True)
            return m, {"m": m, "n": state["m"]}

    class Any2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W, self.V = nn.Parameter(np.ones((3, 4))), nn.Parameter(np.ones((2, 2)))

        def initial_state(self, batch: int) -> Any:
            return np.zeros((batch, 4))

        def forward(self, x: Any, s: Any) -> Any:
            s = s + x.sum() + self.W.sum() + self.V.sum()
            return s, s

    of_one = inspect.equations(GatedOfOne())  # a parameter has an axis of length 1, and others
    assert of_one == "h_t = tanh(x_t W^T + h_{t-1} U)"
    assert inspect.equations(Scaled()) == "m_t = m_{t-1} * 0.5 + a * sum(x_t)\nn_t = m_{t-1}"
    with pytest.raises(tg.ArgumentError, match=r"the widths \[2, 3, 4\] all work.*x=\.\.\."):
        inspect.equations(Any2())
    assert "s_t = s_{t-1} + sum(x_t, axis=(-2, -1), keepdims=False)" in inspect.equations(Any2(), x=np.ones((1, 7)))
    with pytest.raises(tg.ArgumentError, match="no x of shape"):
        inspect.equations(nn.Recurrent(Broken()).cell)


class GatedOfOne(nn.Module):
    """A cell with one input, as for a series of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Parameter(np.ones((4, 1))), nn.Parameter(np.ones((4, 4)))

    def initial_state(self, batch: int) -> Any:
        return np.zeros((batch, 4))

    def forward(self, x: Any, h: Any) -> Any:
        h = ops.tanh(x @ self.W.T + h @ self.U)
        return h, h


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(np.ones((3, 4)))

    def initial_state(self, batch: int) -> Any:
        return np.zeros((batch, 9))

    def forward(self, x: Any, s: Any) -> Any:
        s = s @ self.W
        return s, s


def test_what_is_no_cell() -> None:
    for wrong in (nn.Linear(2, 3), 5, nn.LSTMCell):
        with pytest.raises(tg.DTypeError, match="cell"):
            inspect.equations(wrong)


def test_nothing_is_drawn_and_nothing_changed() -> None:
    cell = nn.Zoneout(nn.LSTMCell(2, 3))
    before = {name: array.copy() for name, array in cell.state_dict().items()}
    state = tg.random.default_generator().get_state()
    assert "state0_t = where(stays0_t, state0_{t-1}, h_t)" in inspect.equations(cell)
    assert tg.random.default_generator().get_state() == state
    assert all(np.array_equal(before[name], array) for name, array in cell.state_dict().items())
    assert all(parameter.grad is None for parameter in cell.parameters())


class Tree(nn.Module):
    """Trees of inputs, states and outputs; a table; a loop in the body; several outputs of one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lin = nn.Embedding(7, 3), nn.Linear(5, 4)

    def initial_state(self, batch: int) -> Any:
        return {"h": np.zeros((batch, 4), np.float32), "n": np.zeros(batch, np.float32)}

    def forward(self, x: Any, state: Any) -> Any:
        h = ops.tanh(self.lin(ops.concatenate([self.table(x["token"]), x["feat"]], axis=-1)) + state["h"])
        last, _ = ops.scan(lambda c, u: (c + u, c), h, ops.stack([h, h]))
        return {"last": last, "most": ops.max(h, axis=-1, keepdims=True)}, {"h": h, "n": state["n"] + 1.0}


def test_trees_tables_and_loops() -> None:
    x = {"token": np.zeros(2, int), "feat": np.ones((2, 2), np.float32)}
    lines = inspect.equations(Tree(), x=x).splitlines()
    assert lines[0] == "h_t = tanh([W_table[token_t], feat_t] W_lin^T + b + h_{t-1})"
    assert lines[1].startswith("last_t = scan(h_t, ") and "body=<1 equations>, length=2" in lines[1]
    assert lines[2:] == ["most_t = max(h_t)", "n_t = n_{t-1} + 1"]
    assert r"W_{\mathrm{table}}[\mathrm{token}_{t}]" in inspect.equations(Tree(), x=x, latex=True)
    with pytest.raises(tg.ArgumentError, match=r"give the input of one step as x=\.\.\."):
        inspect.equations(Tree())


def test_constants_and_repeated_values() -> None:
    table = tg.tensor(np.ones((3, 3)))

    class Closed(MinimalGated):
        def forward(self, x: Any, h: Any) -> Any:
            z = ops.tanh((x @ self.W[:3].T)[:, :3] + h @ table + h @ self.U[0])
            h = z * tg.asarray(0.25) + z / (z + 2.0)
            return h, h

    text = inspect.equations(Closed().astype(np.float64))
    lines = text.splitlines()
    assert re.fullmatch(r"u1_t = tanh\(x_t W\[0:3\]\^T \+ h_\{t-1\} K\d+ \+ h_\{t-1\} U\[0\]\)", lines[0]), text
    assert lines[1] == "h_t = u1_t * 0.25 + u1_t / (u1_t + 2)"
    assert re.fullmatch(r"  K\d+ is a constant float64\[3,3\]", lines[-1])


def test_a_cell_that_branches_on_values_has_no_equations():
    class Branching(MinimalGated):
        def forward(self, x: Any, h: Any) -> Any:
            if x.sum() > 0:
                return super().forward(x, h)
            return h, h

    for show in (inspect.equations, lambda cell: inspect.equations(cell, x=np.zeros((1, 2), np.float32))):
        with pytest.raises(
            tg.TraceError, match=rf"^Branching cannot be recorded: .*needed.*\({re.escape(__file__)}:\d+\).*ops.where"
        ):
            show(Branching())
