"""ONNX models of others as modules: against onnxruntime and torch, values and gradients; what is refused, and how."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import interop, nn, ops, optim

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import helper  # noqa: E402
from onnx_parts import close, compared, normal, write  # noqa: E402 - needs both

pytestmark = pytest.mark.conformance

T, B, F, H = 5, 3, 2, 4
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


# ---------------------------------------------------------------------------- the recurrent operators

VARIANTS = [
    (op, direction, bias, lengths, state, extra)
    for op, direction, bias, lengths, state in itertools.product(
        GATES, ("forward", "reverse", "bidirectional"), (False, True), (False, True), (False, True)
    )
    for extra in ("", "clip", "activations", *(["peephole"] if op == "LSTM" else ["linear"] if op == "GRU" else []))
]
ACTIVATIONS = {
    "LSTM": (["HardSigmoid", "Relu", "Softsign"], [0.3], [0.4]),
    "GRU": (["HardSigmoid", "LeakyRelu"], [0.3, 0.1], [0.4]),
    "RNN": (["LeakyRelu"], [0.2], []),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v)))
def test_recurrent_operators(variant: Any, path: Path, rng: np.random.Generator) -> None:
    op, direction, bias, lengths, state, extra = variant
    d = 2 if direction == "bidirectional" else 1
    g = GATES[op]
    inputs = {"X": normal(rng, T, B, F)}
    constants = {"W": normal(rng, d, g * H, F), "R": normal(rng, d, g * H, H)}
    names = ["X", "W", "R", "", "", "", "", ""]
    if bias:
        names[3], constants["B"] = "B", normal(rng, d, 2 * g * H)
    if lengths:
        names[4], inputs["L"] = "L", np.array([5, 2, 3], np.int32)
    if state:
        names[5], inputs["h"] = "h", normal(rng, d, B, H)
        if op == "LSTM":
            names[6], inputs["c"] = "c", normal(rng, d, B, H)
    if extra == "peephole":
        names[7], constants["P"] = "P", normal(rng, d, 3 * H)
    while not names[-1]:
        names.pop()
    options: dict[str, Any] = {"direction": direction, "hidden_size": H}
    if extra == "clip":
        options["clip"] = 0.4
    if extra == "linear":
        options["linear_before_reset"] = 1
    if extra == "activations":
        functions, alpha, beta = ACTIVATIONS[op]
        options |= {"activations": functions * d, "activation_alpha": alpha * d}
        options |= {"activation_beta": beta * d} if beta else {}
    outputs = ["Y", "Y_h", "Y_c"][: 3 if op == "LSTM" else 2]
    write(path, helper.make_node(op, names, outputs, **options), inputs, constants, outputs)
    compared(path, inputs)


@pytest.mark.parametrize("op", GATES)
def test_batch_first_layout_is_the_other_one_turned(op: str, path: Path, rng: np.random.Generator) -> None:
    # onnxruntime has no kernel for layout=1: the specification says which axes change places.
    constants = {"W": normal(rng, 2, GATES[op] * H, F), "R": normal(rng, 2, GATES[op] * H, H)}
    x, h = normal(rng, T, B, F), normal(rng, 2, B, H)
    found = []
    for layout in (0, 1):
        inputs = {"X": x, "h": h} if layout == 0 else {"X": x.swapaxes(0, 1), "h": h.swapaxes(0, 1)}
        node = helper.make_node(
            op, ["X", "W", "R", "", "", "h"], ["y", "y_h"], direction="bidirectional", hidden_size=H, layout=layout
        )
        write(path, node, inputs, constants, ["y", "y_h"])
        found.append([t.numpy() for t in interop.from_onnx(path)(**inputs)])
    np.testing.assert_array_equal(found[1][0], found[0][0].transpose(2, 0, 1, 3))  # (T, D, B, H) -> (B, T, D, H)
    np.testing.assert_array_equal(found[1][1], found[0][1].swapaxes(0, 1))


# ---------------------------------------------------------------------------- torch's exporter


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=["1", "2"])
def test_models_of_torch(kind: str, options: dict[str, Any], path: Path, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(11, F)
            self.layer = getattr(torch.nn, kind)(F, H, **options)
            width = H * (2 if options else 1)
            self.norm, self.output = torch.nn.LayerNorm(width), torch.nn.Linear(width, 3)

        def forward(self, tokens: Any) -> Any:
            y = self.norm(self.layer(self.embedding(tokens))[0])
            return torch.log_softmax(self.output(torch.nn.functional.gelu(y)), -1)

    net = Net().eval()
    tokens = torch.from_numpy(rng.integers(0, 11, (T, B)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (tokens,), str(path), dynamo=False, opset_version=17, input_names=["tokens"], output_names=["y"],
            dynamic_axes={"tokens": {0: "T", 1: "B"}},
        )  # fmt: skip
    assert kind in {node.op_type for node in onnx.load(path).graph.node}
    model = interop.from_onnx(path)
    for shape in ((T, B), (2, 4)):
        tokens = rng.integers(0, 11, shape)
        expected = net(torch.from_numpy(tokens))
        close(model(tokens), expected.detach().numpy(), str(shape))
    # Gradients, of what has the same layout in both.
    weights = rng.standard_normal(expected.shape).astype(np.float32)
    (expected * torch.from_numpy(weights)).sum().backward()
    (model(tokens) * weights).sum().backward()
    close(model.weights["embedding.weight"].grad, net.embedding.weight.grad.numpy(), "embedding")
    close(model.weights["norm.weight"].grad, net.norm.weight.grad.numpy(), "norm")
    assert all(p.grad is not None and np.abs(p.grad).sum() > 0 for p in model.parameters())


# ---------------------------------------------------------------------------- a read model is a module


def test_gradients_are_those_of_the_module_that_was_exported(path: Path, rng: np.random.Generator) -> None:
    net = nn.Sequential(nn.LSTM(F, H, num_layers=2, bidirectional=True), nn.Linear(2 * H, 1))
    x = normal(rng, T, B, F)
    interop.to_onnx(net, path, x)
    model = interop.from_onnx(path)
    for module in (net, model):
        ops.sum(ops.tanh(module(x))).backward()
    ours = dict(net.named_parameters())
    assert len(ours) == 18
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad, ours[name].grad, rtol=1e-4, atol=1e-6, err_msg=name)


def test_it_compiles_trains_copies_and_is_exported_again(path: Path, rng: np.random.Generator) -> None:
    net, x = nn.GRU(F, H), normal(rng, T, B, F)
    interop.to_onnx(net, path, x)
    model = interop.from_onnx(path)
    expected = net(x)[0].numpy()
    close(tg.compile(lambda x: model(x)[0])(x), expected, "compiled")
    close(copy.deepcopy(model)(x)[0], expected, "copied")
    interop.to_onnx(model, path, x)
    again = interop.from_onnx(path)
    close(again(x)[0], expected, "exported again")
    optimizer = optim.Adam(model, lr=0.05)
    losses = []
    for _ in range(20):
        loss = ops.mean(ops.square(model(x)[0] - 0.3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_inputs_by_position_and_name(path: Path, rng: np.random.Generator) -> None:
    x, y = normal(rng, 2, 3), normal(rng, 2, 3)
    write(path, helper.make_node("Sub", ["a", "b"], ["y"]), {"a": x, "b": y}, {})
    model = interop.from_onnx(path)
    for found in (model(x, y), model(b=y, a=x), model(x, b=y), model(x.tolist(), y)):
        np.testing.assert_array_equal(found.numpy(), x - y)
    for call, message in [
        (lambda: model(x), "'b' is missing; the inputs are a, b"),
        (lambda: model(x, y, x), "found 3 inputs; the inputs are a, b"),
        (lambda: model(x, y, a=x), "'a' is given twice"),
        (lambda: model(x, c=y), "no input is named 'c'"),
    ]:
        with pytest.raises(tg.ArgumentError, match=message):
            call()
    with pytest.raises(tg.DTypeError, match="'a' is float64, the model expects float32"):
        model(x.astype(np.float64), y)
    with pytest.raises(tg.ShapeError, match=r"'b' has shape \(2,\)"):
        model(x, y[:, 0])


# ---------------------------------------------------------------------------- what is refused


def test_unknown_operators_are_named(path: Path) -> None:
    x = np.ones((2, 2), np.float32)
    write(path, helper.make_node("Det", ["x"], ["y"], name="volume"), {"x": x}, {})
    with pytest.raises(
        tg.UnsupportedError, match=r"node 'volume' \(Det\) has an operator that from_onnx does not know"
    ):
        interop.from_onnx(path)
    write(path, helper.make_node("CumSum", ["x", "k"], ["y"], name="sums", exclusive=1), {"x": x}, {"k": np.array(0)})
    with pytest.raises(tg.UnsupportedError, match=r"node 'sums' \(CumSum\): exclusive=1 is not supported"):
        interop.from_onnx(path)(x)


def test_a_node_that_fails_is_named(path: Path) -> None:
    x = np.ones((2, 3), np.float32)
    write(
        path,
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        {"x": x},
        {"w": np.ones((3, 1), np.float32)},
    )
    with pytest.raises(tg.ShapeError, match=r"node 'product' \(MatMul\): matmul of shapes \(2, 2\) and \(3, 1\)"):
        interop.from_onnx(path)(x[:, :2])
    write(path, helper.make_node("Gather", ["x", "k"], ["y"], name="row"), {"x": x}, {"k": np.array([7])})
    with pytest.raises(tg.OutOfRangeError, match=r"node 'row' \(Gather\): take: index 7"):
        interop.from_onnx(path)(x)


def test_damaged_and_missing_files(path: Path, rng: np.random.Generator) -> None:
    interop.to_onnx(nn.LSTM(F, H), path, normal(rng, T, B, F))
    content = path.read_bytes()
    for length in [0, 1, 10, len(content) // 3, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(
            tg.CheckpointError, match="is empty" if not length else "is cut off, damaged or no ONNX model"
        ):
            interop.from_onnx(path)
    path.write_text("no model at all")
    with pytest.raises(tg.CheckpointError, match="no ONNX model"):
        interop.from_onnx(path)
    with pytest.raises(FileNotFoundError):
        interop.from_onnx(path.with_name("other.onnx"))
    with pytest.raises(tg.CheckpointError, match="is a folder"):
        interop.from_onnx(path.parent)


def test_a_graph_that_reads_what_nothing_makes(path: Path) -> None:
    x = np.ones((2, 2), np.float32)
    write(path, helper.make_node("Relu", ["x"], ["y"], name="first"), {"x": x}, {})
    model = onnx.load(path)
    model.graph.node[0].input[0] = "nobody"
    onnx.save(model, path)
    with pytest.raises(tg.CheckpointError, match=r"'first' .* reads 'nobody', which nothing before it makes"):
        interop.from_onnx(path)


def test_weights_beside_the_model(path: Path, rng: np.random.Generator) -> None:
    x = normal(rng, T, B, F)
    net = nn.LSTM(F, 32)
    interop.to_onnx(net, path, x)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    close(interop.from_onnx(path)(x)[0], net(x)[0].numpy(), "external data")
    (path.parent / "weights.bin").unlink()
    with pytest.raises(tg.CheckpointError, match="weights in files beside it, which are missing"):
        interop.from_onnx(path)
