"""Single operators of ONNX as ops, against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import helper  # noqa: E402
from onnx_parts import compared, normal, write  # noqa: E402 - needs both

pytestmark = pytest.mark.conformance


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


SINGLE: dict[str, Any] = {
    "Gemm": ({"alpha": 0.5, "beta": 2.0, "transB": 1}, ["x", "w", "b"]),
    "LeakyRelu": ({"alpha": 0.2}, ["x"]),
    "Elu": ({"alpha": 0.7}, ["x"]),
    "Selu": ({}, ["x"]),
    "HardSigmoid": ({"alpha": 0.3, "beta": 0.4}, ["x"]),
    "HardSwish": ({}, ["x"]),
    "Softsign": ({}, ["x"]),
    "Reciprocal": ({}, ["x"]),
    "PRelu": ({}, ["x", "b3"]),
    "ReduceMean": ({"axes": [0], "keepdims": 0}, ["x"]),
    "ReduceL1": ({"axes": [-1]}, ["x"]),
    "ReduceL2": ({}, ["x"]),
    "ReduceSumSquare": ({"axes": [1]}, ["x"]),
    "ReduceSum": ({"keepdims": 0}, ["x", "axis1"]),
    "ReduceMax": ({"axes": [1]}, ["x"]),
    "ReduceProd": ({"axes": [0, 1]}, ["x"]),
    "Flatten": ({"axis": 2}, ["x3"]),
    "Transpose": ({}, ["x3"]),
    "Unsqueeze": ({}, ["x", "axis1"]),
    "Squeeze": ({}, ["one"]),
    "Softmax": ({"axis": 0}, ["x"]),
    "LogSoftmax": ({}, ["x3"]),
    "LayerNormalization": ({"axis": 1, "epsilon": 1e-3}, ["x3", "w3", "w3"]),
    "Tile": ({}, ["x", "twice"]),
    "Pad": ({}, ["x", "pads", "fill"]),
    "Expand": ({}, ["x", "bigger"]),
    "Where": ({}, ["mask", "x", "b3"]),
    "Clip": ({}, ["x", "low", "high"]),
    "CumSum": ({"reverse": 1}, ["x", "zero"]),
    "Trilu": ({"upper": 0}, ["w3"]),
    "Mean": ({}, ["x", "b3", "x"]),
    "Max": ({}, ["x", "b3"]),
    "Sum": ({}, ["x", "x", "b3"]),
    "ArgMax": ({"axis": 1}, ["x"]),
    "Slice": ({}, ["x", "starts", "ends", "axes", "steps"]),
    "Gather": ({"axis": 1}, ["x", "places"]),
    "GatherElements": ({"axis": 1}, ["x", "spots"]),
    "GatherND": ({}, ["x", "pairs"]),
    "OneHot": ({}, ["ids", "depth", "values"]),
    "ScatterND": ({"reduction": "add"}, ["x", "pairs", "two"]),
    "Einsum": ({"equation": "ij,kj->ik"}, ["x", "w"]),
    "Gelu": ({"approximate": "tanh"}, ["x"]),
    "IsInf": ({}, ["low"]),
    "Dropout": ({}, ["x"]),
    "Mod": ({}, ["ids", "ids1"]),
    "Reshape": ({}, ["x3", "shape"]),
    "Identity": ({}, ["x"]),
    "Not": ({}, ["mask"]),
    "Xor": ({}, ["mask", "mask"]),
}
VALUES: dict[str, np.ndarray] = {
    "x": normal(np.random.default_rng(0), 3, 4),
    "x3": normal(np.random.default_rng(1), 2, 3, 4),
    "w": normal(np.random.default_rng(2), 5, 4),
    "b": normal(np.random.default_rng(3), 5),
    "b3": normal(np.random.default_rng(4), 3, 1),
    "w3": normal(np.random.default_rng(5), 3, 4),
    "one": normal(np.random.default_rng(6), 3, 1, 2, 1),
    "axis1": np.array([1]),
    "twice": np.array([2, 3]),
    "pads": np.array([1, 0, 0, 2]),
    "fill": np.float32([1.5]).reshape(()),
    "bigger": np.array([2, 1, 1]),
    "mask": np.array([[True, False, True, True]]),
    "low": np.array(-0.4, np.float32),
    "high": np.array(0.5, np.float32),
    "zero": np.array(0),
    "starts": np.array([-1, 1]),
    "ends": np.array([-100, 4]),
    "axes": np.array([0, 1]),
    "steps": np.array([-1, 2]),
    "places": np.array([[0, -1], [2, 2]]),
    "spots": np.array([[0, -1], [2, 2]]),
    "pairs": np.array([[0, 1], [-1, 3]]),
    "ids": np.array([2, 0, -1]),
    "ids1": np.array([2]),
    "depth": np.array(3),
    "values": np.array([-1, 2], np.float32),
    "two": np.array([5, 7], np.float32),
    "shape": np.array([0, -1]),
}
NEW = {"Gelu": 20}  # the operator set in which it is new


@pytest.mark.parametrize("op", SINGLE)
def test_single_operators(op: str, path: Path) -> None:
    options, names = SINGLE[op]
    floats = [n for n in names if VALUES[n].dtype != np.int64 and VALUES[n].ndim > 0 and n not in ("values",)]
    inputs = {name: VALUES[name] for name in floats[:1]}
    constants = {name: VALUES[name] for name in names if name not in inputs}
    node = helper.make_node(op, names, ["y"], **options)
    write(path, [node] if inputs else [node, helper.make_node("Identity", ["x"], ["z"])], inputs or {"x": VALUES["x"]},
          constants, opset=NEW.get(op, 17))  # fmt: skip
    model = onnx.load(path)
    kinds = {"ArgMax": 7, "IsInf": 9, "Mod": 7, "Not": 9, "Xor": 9}
    model.graph.output[0].type.tensor_type.elem_type = kinds.get(op, 1)
    onnx.save(model, path)
    compared(path, inputs or {"x": VALUES["x"]})


@pytest.mark.parametrize("op", ["Div", "Mod", "fmod"])
def test_division_of_what_is_computed(op: str, path: Path) -> None:
    """Integers are divided towards zero; Mod has the sign of the divisor, with fmod that of the dividend."""
    options = {"fmod": 1} if op == "fmod" else {}
    last = helper.make_node("Div" if op == "Div" else "Mod", ["n", "by"], ["y"], **options)
    nodes = [helper.make_node("Cast", ["x"], ["n"], to=1 if op == "fmod" else 7), last]
    by = np.array([3, -2, 1, -7])
    inputs = {"x": 10 * VALUES["x"]}
    write(path, nodes, inputs, {"by": by.astype(np.float32) if op == "fmod" else by}, opset=17)
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.elem_type = 1 if op == "fmod" else 7
    onnx.save(model, path)
    compared(path, inputs)


@given(st.data())
def test_slices_as_numpy(data: st.DataObject) -> None:
    from tinygrad_lstm.interop.model import Node
    from tinygrad_lstm.interop.operators import OPERATORS, Call

    assert Node  # the table is complete once the model's module is imported
    n = data.draw(st.integers(1, 6))
    start, end = data.draw(st.integers(-9, 9)), data.draw(st.integers(-9, 9))
    step = data.draw(st.sampled_from([-3, -2, -1, 1, 2, 3]))
    x = np.arange(float(n))
    # The specification: negative positions count from the end, then both are clamped.
    s, e = (start + n if start < 0 else start), (end + n if end < 0 else end)
    s, e = (min(max(s, 0), n), min(max(e, 0), n)) if step > 0 else (min(max(s, 0), n - 1), min(max(e, -1), n - 1))
    args = [x, *(np.array([v]) for v in (start, end, 0, step))]
    (found,) = OPERATORS["Slice"](Call("Slice", args, {}, 1, 17, lambda *_: []))
    assert np.asarray(found).tolist() == [x[k] for k in range(s, e, step)]
