"""Modules as ONNX models: onnxruntime and from_onnx compute what the module computes, at any length."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import interop, nn, ops
from tinygrad_lstm.training.language_model import CharLM
from tinygrad_lstm.tree import flatten

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx_parts import Function, close, exported, session  # noqa: E402 - needs both
from random_cells import make  # noqa: E402

pytestmark = pytest.mark.conformance

T, B, F, H = 6, 3, 3, 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def normal(rng: np.random.Generator, dtype: Any, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


class OwnCell(nn.Module):
    """A user's: a dict as state with a counter, two outputs, a scalar parameter."""

    def __init__(self, dtype: Any) -> None:
        super().__init__()
        self.W = nn.Parameter(nn.init.xavier_uniform((2 * H, F)).data.astype(dtype))
        self.U = nn.Parameter(nn.init.orthogonal((2, H, H)).data.astype(dtype))
        self.gain = nn.Parameter(np.asarray(1.3, dtype))

    def initial_state(self, batch: int) -> Any:
        return {"h": tg.tensor(np.zeros((batch, H), self.W.dtype)), "n": tg.tensor(np.zeros(batch, np.int64))}

    def forward(self, x: Any, state: Any) -> Any:
        x_f, x_n = ops.chunk(x @ self.W.T, 2)
        f = tg.name(ops.sigmoid(x_f + state["h"] @ self.U[0] + 1.0), "f") * self.gain
        h = state["h"] + f * (ops.tanh(x_n + (f * state["h"]) @ self.U[1]) - state["h"])
        return (h, ops.softmax(h)), {"h": h, "n": state["n"] + 1}


LAYERS: dict[str, Any] = {
    "lstm": lambda d: nn.LSTM(F, H, dtype=d),
    "lstm_stack": lambda d: nn.LSTM(F, H, num_layers=2, bidirectional=True, proj_size=2, dropout=0.3, dtype=d),
    "lstm_gates": lambda d: nn.LSTM(F, H, return_gates=True, dtype=d),
    "gru": lambda d: nn.GRU(F, H, num_layers=2, dtype=d),
    "rnn": lambda d: nn.RNN(F, H, nonlinearity="relu", bidirectional=True, dtype=d),
    "peephole": lambda d: nn.Recurrent(nn.PeepholeLSTMCell(F, H, dtype=d)),
    "layer_norm": lambda d: nn.Recurrent(nn.LayerNormLSTMCell(F, H, dtype=d), reverse=True),
    "learned": lambda d: nn.Recurrent(nn.GRUCell(F, H, dtype=d), learn_state=True),
    "zoneout": lambda d: nn.Recurrent(nn.Zoneout(nn.LSTMCell(F, H, dtype=d), p=(0.1, 0.3))),
    "weight_drop": lambda d: nn.WeightDrop(nn.LSTM(F, H, dtype=d)),
    "own": lambda d: nn.Recurrent(OwnCell(d)),
    "stack": lambda d: nn.Stack([nn.LSTMCell(F, H, dtype=d), nn.GRUCell(H, 4, dtype=d)], dropout=0.5),
    "budget": lambda d: nn.LSTM(F, H, dtype=d, memory=0.5),
    "sequential": lambda d: nn.Sequential(
        nn.LayerNorm(F, dtype=d), nn.VariationalDropout(0.5),
        nn.Bidirectional(nn.GRUCell(F, H, dtype=d), nn.LSTMCell(F, H, dtype=d)),
        nn.Dropout(0.5), ops.relu, nn.Linear(2 * H, 2, dtype=d),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_at_any_time_and_batch(name: str, dtype: Any, path: Path, rng: np.random.Generator) -> None:
    layer = LAYERS[name](dtype)
    for parameter in layer.parameters():  # no zeros: an initial bias or peephole would hide a wrong place
        parameter.data = parameter.data + 0.1 * normal(rng, dtype, *parameter.shape)
    sizes = [(T, B), (9, 1), (1, 4)]
    running = exported(path, layer, *(normal(rng, dtype, t, b, F) for t, b in sizes))
    assert [str(n).partition("_axis")[2] for n in running.get_inputs()[0].shape] == ["0", "1", ""]
    assert running.get_outputs()[0].name == "output"


def test_the_state_is_an_input_where_it_is_given(path: Path, rng: np.random.Generator) -> None:
    def arguments(t: int, b: int) -> Any:
        return normal(rng, np.float32, t, b, F), tuple(normal(rng, np.float32, 2, b, H) for _ in "hc")

    # All of these lengths are 2: only which axes belong together tells them apart.
    running = exported(path, nn.LSTM(F, H, num_layers=2), arguments(2, 2), arguments(4, 1))
    shapes = {value.name: value.shape for value in running.get_inputs()}
    assert shapes == {
        "x": ["x_axis0", "x_axis1", F],
        "state_0": [2, "x_axis1", H],
        "state_1": [2, "x_axis1", H],
    }
    assert [value.name for value in running.get_outputs()] == ["output", "next_state_0", "next_state_1"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_lengths_are_an_input(kind: Any, path: Path, rng: np.random.Generator) -> None:
    def arguments(t: int, lengths: list[int]) -> Any:
        x = normal(rng, np.float32, t, len(lengths), F)
        for row, length in enumerate(lengths):
            x[length:, row] = np.nan  # padding that is looked at shows
        return x, None, np.array(lengths)

    exported(path, kind(F, H, bidirectional=True), arguments(6, [6, 2, 0]), arguments(4, [1, 4]))


def test_batch_first_and_unbatched(path: Path, rng: np.random.Generator) -> None:
    layer = nn.LSTM(F, H, batch_first=True)
    exported(path, layer, normal(rng, np.float32, B, T, F), normal(rng, np.float32, 1, 2, F))
    exported(path, nn.GRU(F, H), normal(rng, np.float32, T, F), normal(rng, np.float32, 3, F))


@pytest.mark.parametrize("embedding", [0, 4])
def test_a_language_model_takes_token_ids(embedding: int, path: Path, rng: np.random.Generator) -> None:
    model = CharLM(11, 8, embedding=embedding, dropout=0.2)
    tokens = [rng.integers(0, 11, shape) for shape in ((T, B), (2, 1))]
    running = exported(path, model, *tokens)
    assert (running.get_inputs()[0].name, running.get_inputs()[0].type) == ("tokens", "tensor(int64)")
    exported(path, nn.Embedding(11, 4, padding_idx=2), *[t.astype(np.int32) for t in tokens])


def test_one_cell_and_a_linear_layer(path: Path, rng: np.random.Generator) -> None:
    exported(path, nn.Linear(F, 2, bias=False), normal(rng, np.float64, 2, F).astype(np.float32))
    state = lambda b: tuple(normal(rng, np.float32, b, H) for _ in "hc")
    cell = nn.LSTMCell(F, H)
    exported(path, cell, (normal(rng, np.float32, 2, F), state(2)), (normal(rng, np.float32, 7, F), state(7)))


@pytest.mark.parametrize("seed", range(12))
def test_random_cells(seed: int, path: Path) -> None:
    cell = make(seed)

    def run(*xs: Any) -> Any:
        return ops.scan(cell.body, cell.init, dict(zip(cell.xs, xs, strict=True)))

    given = tuple(x.numpy() for x in cell.xs.values())
    if not {"gelu", "erf"} & {step.op for step in cell.recipe.body}:
        exported(path, Function(run), given)
        return
    # onnxruntime has no Erf in float64: only the way there and back again.
    interop.to_onnx(Function(run), path, given)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    with tg.no_grad():
        found, expected = (flatten(f(*given))[0] for f in (interop.from_onnx(path), run))
    for a, b in zip(found, expected, strict=True):
        close(a, b.numpy(), "from_onnx")


def test_lengths_by_which_the_forward_decides_are_fixed(path: Path, rng: np.random.Generator) -> None:
    def short_or_long(x: Any) -> Any:
        return ops.concatenate([x, x])[:4] if len(x) < 4 else x[:4] * 2

    running = exported(path, Function(short_or_long), normal(rng, np.float32, 3, F))
    assert running.get_inputs()[0].shape == [3, "input_0_axis1"]


def test_loops_in_loops_and_loops_that_only_count(path: Path, rng: np.random.Generator) -> None:
    def nested(x: Any) -> Any:
        def outer(c: Any, x_t: Any) -> Any:
            total, rows = ops.scan(lambda d, row: (d + row * 0.5, d * row), x_t[0], x_t)
            return c + total, rows

        return ops.scan(outer, x[0, 0], x, reverse=True)

    def counted(x: Any) -> Any:
        return ops.scan(lambda c, _: (c * 0.5 + 1.0, c), x[0], None, length=x.shape[0] + 2)

    def carry_only(x: Any) -> Any:
        return ops.scan(lambda c, x_t: (ops.tanh(c + x_t), ()), x[0], x)[0]

    for function in (nested, counted, carry_only):
        exported(path, Function(function), normal(rng, np.float32, 4, 3, F), normal(rng, np.float32, 2, 5, F))


def test_gradients_can_be_part_of_a_model(path: Path, rng: np.random.Generator) -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(normal(rng, np.float64, F, F))

        def forward(self, x: Any) -> Any:
            def loss(w: Any) -> Any:
                return ops.sum(ops.scan(lambda c, x_t: (ops.tanh(c @ w + x_t), c), x[0], x)[1] ** 2)

            return tg.grad(loss)(self.w)

    exported(path, Slope(), normal(rng, np.float64, T, B, F), normal(rng, np.float64, 2, 1, F))


def test_what_stands_in_front_of_a_loop_is_computed_once(path: Path, rng: np.random.Generator) -> None:
    interop.to_onnx(nn.LSTM(F, H), path, normal(rng, np.float32, T, B, F))
    main = onnx.load(path).graph
    (scan,) = [node for node in main.node if node.op_type == "Scan"]
    (body,) = [attribute.g for attribute in scan.attribute if attribute.name == "body"]
    assert "Transpose" in {node.op_type for node in main.node}
    assert "Transpose" not in {node.op_type for node in body.node}


# ---------------------------------------------------------------------------- names, modes, parameters


def test_parameters_keep_names_and_order_and_the_mode_is_put_back(path: Path, rng: np.random.Generator) -> None:
    model = nn.Sequential(nn.LSTM(F, H, num_layers=2, bidirectional=True), nn.Dropout(0.5), nn.Linear(2 * H, 1))
    model[1].eval()
    modes = [part.training for part in model.modules()]
    interop.to_onnx(model, path, normal(rng, np.float32, T, B, F))
    assert [part.training for part in model.modules()] == modes == [True, True, False, True]
    read = interop.from_onnx(path)
    assert list(read.state_dict()) == list(model.state_dict())
    other = nn.Sequential(nn.LSTM(F, H, num_layers=2, bidirectional=True), nn.Dropout(0.5), nn.Linear(2 * H, 1))
    other.load_state_dict(read.state_dict())
    assert all(
        np.array_equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_shared_parameters_and_names_that_inputs_have_too(path: Path, rng: np.random.Generator) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.output = nn.Linear(F, F), nn.Parameter(normal(rng, np.float32, F))
            self.again = nn.Linear(F, F)
            self.again.weight = self.x.weight
            self.scale = nn.Parameter(np.float32(1.5))

        def forward(self, x: Any) -> Any:
            return self.again(self.x(x)) * self.output * self.scale

    model = Twice()
    exported(path, model, normal(rng, np.float32, 2, F))
    read = interop.from_onnx(path)
    assert len(list(read.parameters())) == len(list(model.parameters())) == 5
    assert read.state_dict().keys() == model.state_dict().keys()
    Twice().load_state_dict(read.state_dict())


def test_names_and_notes(path: Path, rng: np.random.Generator) -> None:
    interop.to_onnx(
        nn.GRU(F, H), path, normal(rng, np.float32, T, B, F), input_names=["series"], output_names=["y", "h"],
        metadata={"unit": "mV"},
    )  # fmt: skip
    running = session(path)
    assert [v.name for v in running.get_inputs()] == ["series"]
    assert [v.name for v in running.get_outputs()] == ["y", "h"]
    assert running.get_modelmeta().custom_metadata_map["unit"] == "mV"
    read = interop.from_onnx(path)
    assert read.metadata == {"unit": "mV"} and read.outputs == ["y", "h"]
    with pytest.raises(tg.ArgumentError, match="input_names are 1 different names"):
        interop.to_onnx(nn.GRU(F, H), path, normal(rng, np.float32, T, B, F), input_names=["a", "b"])


@pytest.mark.parametrize("free", [True, False])
def test_a_python_loop_fixes_its_axis(free: bool, path: Path, rng: np.random.Generator) -> None:
    def unrolled(x: Any) -> Any:
        return sum((x[t] for t in range(len(x))), start=0.0)

    function = (lambda x: ops.sum(x, 0)) if free else unrolled
    running = exported(path, Function(function), normal(rng, np.float32, T, B), normal(rng, np.float32, T, 7))
    assert running.get_inputs()[0].shape == (["input_0_axis0"] if free else [T]) + ["input_0_axis1"]


# ---------------------------------------------------------------------------- what cannot be exported


def test_a_primitive_without_a_form_is_named_with_its_line(path: Path, rng: np.random.Generator) -> None:
    cube = tg.primitive("test_onnx_cube", forward=lambda x: x**3, vjp=lambda g, x: g * 3.0 * x * x)
    try:
        inside = Function(lambda x: ops.scan(lambda c, x_t: (cube(c + x_t), c), x[0], x))
        with pytest.raises(
            tg.UnsupportedError, match=r"'test_onnx_cube' has no ONNX form \(.*test_interop_onnx.py:\d+"
        ):
            interop.to_onnx(inside, path, normal(rng, np.float32, T, B))
    finally:
        tg.REGISTRY.pop("test_onnx_cube")
    assert not path.exists()


def test_a_users_elementwise_primitive_is_exported_by_its_expression(path: Path, rng: np.random.Generator) -> None:
    cube = tg.primitive(
        "test_onnx_cube", forward=lambda x: x * x * x, vjp=lambda g, x: g * 3.0 * x * x, expression=lambda x: x * x * x
    )
    try:
        exported(path, Function(lambda x: cube(x)), normal(rng, np.float32, 3, 4))
    finally:
        tg.REGISTRY.pop("test_onnx_cube")


def test_a_failed_export_keeps_the_old_file(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(b"old")
    with pytest.raises(tg.TraceError, match=r"test_interop_onnx\.py"):
        interop.to_onnx(Function(lambda x: x * float(x.sum())), path, normal(rng, np.float32, 3))
    with pytest.raises(tg.FileError, match="no such file or directory"):
        interop.to_onnx(nn.Linear(F, 1), path.parent / "no" / "model.onnx", normal(rng, np.float32, 2, F))
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == [path.name]


# ---------------------------------------------------------------------------- every primitive


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 1000))
def test_any_size(tmp_path_factory: Any, t: int, b: int, seed: int) -> None:
    if not hasattr(test_any_size, "made"):
        where = tmp_path_factory.mktemp("onnx") / "model.onnx"
        model = nn.Sequential(nn.LSTM(F, H), lambda y: y[1:] - y[:-1].mean((0, 1)), lambda y: y.reshape(-1, H))
        interop.to_onnx(model, where, np.zeros((4, 2, F), np.float32))
        test_any_size.made = model, session(where)  # type: ignore[attr-defined]
    model, running = test_any_size.made
    x = np.random.default_rng(seed).standard_normal((t + 1, b, F)).astype(np.float32)
    with tg.no_grad():
        expected = model(x).numpy()
    (found,) = running.run(None, {"x": x})
    close(found, expected, "output")


def test_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "interop.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "interop.md", "exec"), namespace)
