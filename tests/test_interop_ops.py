"""Every primitive as ONNX nodes, against onnxruntime: the samples of the registry, and forms of shapes and indices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx_parts import Function, exported
from samples import SAMPLES

from tinygrad_lstm.interop.rules import RULES

pytestmark = pytest.mark.conformance

EXPORTED = sorted(name for name in SAMPLES if name in RULES or tg.REGISTRY[name].is_elementwise)


def single(value: Any) -> Any:
    """float64 arrays as float32: onnxruntime has no kernel of some functions for the former."""
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float64 else value


def test_what_is_not_exported_is_known() -> None:
    # Transposes of reads, fused losses, and what is only made while differentiating.
    assert sorted(set(SAMPLES) - set(EXPORTED)) == [
        "checkpoint", "cross_entropy", "cross_entropy_slope", "untake", "untake_along_axis",
    ]  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_samples_of_every_primitive(name: str, tmp_path: Path) -> None:
    tried = 0
    for sample in SAMPLES[name]:
        arrays = [k for k, a in enumerate(sample.args) if isinstance(a, np.ndarray)]

        def call(*given: Any, sample: Any = sample, arrays: Any = arrays) -> Any:
            args = list(map(single, sample.args))
            for k, value in zip(arrays, given, strict=True):
                args[k] = value
            return sample.function(name)(*args)

        if any(a.dtype == np.bool_ for a in map(sample.args.__getitem__, arrays)) and name in ("getitem", "put"):
            continue  # a mask gives a shape that depends on values: no recording at all
        given = [single(sample.args[k]) for k in arrays]
        if name == "compiled" or not arrays:  # takes its operands in float64; has none
            given = [sample.args[k] for k in arrays] or [np.zeros(1, np.float32)]
            call = (lambda *xs, s=sample: s.function(name)(*xs)) if arrays else (lambda x, s=sample: s.function(name)())
        if name == "put" and not all(item == ("array",) for item in sample.params.get("template", [("array",)])):
            with pytest.raises(tg.UnsupportedError, match="to_onnx: adding at an index"):
                exported(tmp_path / "model.onnx", Function(call), tuple(given))
            continue
        exported(tmp_path / "model.onnx", Function(call), tuple(given))
        tried += 1
    assert tried or name == "put"


def x_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


FORMS: dict[str, Any] = {
    "modulo": lambda x: (
        (x * 10.0).astype(np.int64) % -3,
        (x * 10.0).astype(np.int64) // -3,
        x % -0.75,
        x // 0.75,
        2.5 % (x * x + 0.5),
    ),
    "slice": lambda x: x[1:, :-1, -1],
    "slice_none": lambda x: x[:-1, None, ..., 0],
    "step": lambda x: x[..., ::2],
    "back": lambda x: x[::-1],
    "back_part": lambda x: x[..., 2:0:-1],
    "last": lambda x: (x[-1], x[x.shape[0] - 1]),
    "ints": lambda x: x[0, -1],
    "scalar": lambda x: x[0, 0, 0],
    "flat": lambda x: (x.reshape(-1, 3), x[1:].reshape(-1)),
    "flip": lambda x: (ops.flip(x, (0, 2)), ops.flip(x)),
    "roll": lambda x: ops.roll(x, (1, -7), (0, 2)),
    "pad": lambda x: ops.pad(x, ((1, 0), (0, 2), (0, 0)), constant_values=2.5),
    "tile": lambda x: ops.tile(x, (2, 1, 3)),
    "mean": lambda x: (ops.mean(x, 0), ops.var(x, (0, 1)), ops.std(x)),
    "counted": lambda x: x * x.shape[0] + x.shape[1] * 2 - 1,
    "ramp": lambda x: x + np.arange(x.shape[0], dtype=np.float32)[:, None, None] * 0.1,
    "zeros": lambda x: ops.concatenate([np.zeros((1, *x.shape[1:]), np.float32), x, x]),
    "tensordot": lambda x: ops.tensordot(x, x, ([0, 1], [0, 1])),
    "vector": lambda x: x @ np.ones(3, np.float32),
    "arrays": lambda x: x[np.array([0, 1]), :, np.array([0, 2])],
    "array_int": lambda x: x[:, 0, np.array([0, -2])],
    "grid": lambda x: x[:, np.array([[0], [1]]), np.array([[0, 2]])],
    "slice_arrays": lambda x: x[1:, np.array([0, 1]), np.array([0, 2])],
    "int_array": lambda x: x[0, np.array([0, 1])],
    "picked": lambda x: x[np.arange(2), ops.argmax(x[:2, 0], -1)],
    "arg": lambda x: (ops.argmax(x, 0), ops.argmin(x, -1, True), ops.argmax(x)),
    "along": lambda x: ops.take_along_axis(x, ops.argmax(x, 0, keepdims=True), 0),
    "one_hot": lambda x: ops.one_hot(ops.argmax(x, -1), 3),
    "diag": lambda x: (ops.diag(x[0, 0]), ops.diag(x[0, :2], 1)),
    "scatter": lambda x: ops.scatter_add(x[0], [1, 0, 1], x[1, 0]),
    "dtypes": lambda x: (x.astype(np.float64) * 2, x.astype(np.int32), x.astype(bool), x + np.arange(3)),
    "ints_divide": lambda x: (ops.argmax(x, -1) / 2, ops.argmax(x, -1) * 0.5, ops.argmax(x, -1) ** 2),
    "powers": lambda x: (x**2, x**3, 2.0**x, abs(x) ** 0.5),
    "logic": lambda x: (ops.logical_and(x > 0, x < 1), (x > 0).sum(0), (x > 0).max(0), (x > 0) > (x > 1)),
    "selected": lambda x: (ops.where(x > 0, 1, 0), ops.where(x > 0, x, 0.0)),
    "bounds": lambda x: (ops.clip(x, None, 0.5), ops.clip(x, -0.1, x.max()), ops.hard_sigmoid(x)),
    "constant": lambda x: (x * 0, tg.tensor(np.ones(2, np.float32))),
    "same": lambda x: (x, x),
    "checkpoint": lambda x: tg.checkpoint(lambda t: ops.tanh(t) * 2)(x),
    "compiled": tg.compile(lambda x: ops.tanh(x) + 1),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_at_other_lengths(name: str, tmp_path: Path) -> None:
    running = exported(tmp_path / "model.onnx", Function(FORMS[name]), x_of(4, 3, 3), x_of(6, 5, 3), x_of(3, 2, 3))
    assert running.get_inputs()[0].shape[:2] == ["input_0_axis0", "input_0_axis1"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "name", ["expm1", "log1p", "tanh", "sigmoid", "softplus", "exp2", "log2", "logsumexp", "softmax"]
)
def test_small_and_large_arguments(name: str, dtype: Any, tmp_path: Path) -> None:
    x = np.array([[1e-12, 3e-7, 1e-3, 0.5, 1.0, 20.0, 85.0], [2e-9, 1e-5, 0.1, 0.9, 3.0, 30.0, 60.0]], dtype)
    if name not in ("log2", "log1p"):
        x = np.concatenate([x, -x], axis=-1)
    exported(tmp_path / "model.onnx", Function(getattr(ops, name)), x)


def test_isfinite(tmp_path: Path) -> None:
    x = np.array([0.0, np.inf, -np.inf, np.nan, 3e38], np.float32)
    exported(tmp_path / "model.onnx", Function(ops.isfinite), x)
