"""Parameters in safetensors files, what is imported when, and which lengths of a recorded module are free."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from interop_parts import Function

import tinygrad_lstm as tg
from tinygrad_lstm import interop, nn, ops
from tinygrad_lstm.hints import how_to_install
from tinygrad_lstm.interop.recorded import record_forward
from tinygrad_lstm.interop.scalars import COMPOSED, OPERATORS
from tinygrad_lstm.interop.sizes import Differs, Size, Varying, fit, samples_of, varying
from tinygrad_lstm.kernels import expression as e
from tinygrad_lstm.kernels.table import LEAVES


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# ---------------------------------------------------------------------------- what is imported


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_nothing_foreign_is_imported_before_it_is_needed() -> None:
    loaded = "[name for name in ('onnx', 'torch', 'tinygrad_lstm.interop') if name in sys.modules]"
    assert run(f"import sys, tinygrad_lstm as tg; print({loaded})") == "[]"
    assert run(f"import sys, tinygrad_lstm as tg; tg.interop.from_onnx; print({loaded})") == "['tinygrad_lstm.interop']"


def test_a_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    for call in (
        lambda: interop.to_onnx(nn.Linear(2, 1), path, np.zeros((1, 2), np.float32)),
        lambda: interop.from_onnx(path),
    ):
        with pytest.raises(tg.DependencyError, match=re.escape(how_to_install("onnx"))):
            call()
    with pytest.raises(ImportError, match="to_torch: torch is not installed"):
        interop.to_torch(nn.Linear(2, 1))


# ---------------------------------------------------------------------------- safetensors


def test_a_file_is_what_the_safetensors_library_reads(path: Path) -> None:
    model = nn.Sequential(nn.LSTM(3, 4, bidirectional=True), nn.Linear(8, 1, dtype=np.float64))
    interop.save_safetensors(path, model, {"note": "demo"})
    found = safetensors.numpy.load_file(path)
    state = model.state_dict()
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with safetensors.safe_open(path, framework="numpy") as reader:
        assert reader.metadata() == {"format": "pt", "note": "demo"}


def test_loading_into_a_module_is_strict_and_casts(path: Path) -> None:
    model, other = nn.GRU(3, 4), nn.GRU(3, 4, dtype=np.float64)
    interop.save_safetensors(path, model)
    assert interop.load_safetensors(path, other) is other
    for name, array in other.state_dict().items():
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, model.state_dict()[name])
    wrong = nn.LSTM(3, 4)
    before = wrong.state_dict()
    with pytest.raises(tg.ShapeError, match="weight_ih_l0: shape"):
        interop.load_safetensors(path, wrong)
    with pytest.raises(tg.ArgumentError, match=r"missing: .*weight_ih_l1"):
        interop.load_safetensors(path, nn.GRU(3, 4, num_layers=2))
    assert all(np.array_equal(a, before[name]) for name, a in wrong.state_dict().items())
    with pytest.raises(tg.DTypeError, match="expected a Module or None"):
        interop.load_safetensors(path, 3)  # type: ignore[call-overload]


def write_raw(path: Path, kind: str, shape: list[int], data: bytes) -> None:
    """A safetensors file by its specification: 8 bytes of length, a JSON header, the data."""
    header = json.dumps({"w": {"dtype": kind, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("BOOL", "?"), ("U8", "u1"), ("I16", "<i2"), ("U32", "<u4"), ("I64", "<i8"), ("F16", "<f2"), ("F64", "<f8")],
)
def test_arrays_of_other_writers(kind: str, dtype: str, path: Path) -> None:
    array = np.array([[1, 0, 1], [3, 2, 0]]).astype(dtype)
    write_raw(path, kind, [2, 3], array.tobytes())
    found = interop.load_safetensors(path)["w"]
    assert found.dtype == array.dtype.newbyteorder("=") and found.flags.writeable
    np.testing.assert_array_equal(found, array)


def test_bfloat16_becomes_float32(path: Path) -> None:
    # sign, 8 bits of exponent, 7 of fraction: 1.5 = 0 01111111 1000000
    bits = np.array([0x3FC0, 0xC000, 0x7F80, 0x0001], "<u2")
    write_raw(path, "BF16", [4], bits.tobytes())
    found = interop.load_safetensors(path)["w"]
    assert found.dtype == np.float32 and found.tolist() == [1.5, -2.0, float("inf"), 2.0**-133]


def test_files_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    write_raw(path, "F8_E4M3", [2], b"\0\0")
    with pytest.raises(tg.DTypeError, match="w has the type F8_E4M3, which NumPy has not"):
        interop.load_safetensors(path)
    interop.save_safetensors(path, nn.Linear(3, 2))
    content = path.read_bytes()
    for length in (0, 5, 8, 60, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(tg.CheckpointError, match=f"its {length} bytes are no whole safetensors file"):
            interop.load_safetensors(path)
    with pytest.raises(FileNotFoundError):
        interop.load_safetensors(tmp_path / "other")
    with pytest.raises(tg.CheckpointError, match="is a folder, no safetensors file"):
        interop.load_safetensors(tmp_path)


def test_a_failed_save_keeps_the_old_file(path: Path) -> None:
    interop.save_safetensors(path, nn.Linear(3, 2))
    before = path.read_bytes()
    for state, message in [
        ({"w": np.zeros(2, np.longdouble)}, "which the format has not"),
        ({"w": np.zeros(2, complex)}, "expected real numbers"),
        ({3: np.zeros(2)}, "the name 3 is no string"),
        ([1], "expected a Module or its state_dict"),
    ]:
        with pytest.raises(tg.DTypeError, match=message):
            interop.save_safetensors(path, state)  # type: ignore[arg-type]
    with pytest.raises(tg.ArgumentError, match="__metadata__"):
        interop.save_safetensors(path, {"__metadata__": np.zeros(2)})
    with pytest.raises(tg.DTypeError, match="metadata are strings"):
        interop.save_safetensors(path, nn.Linear(3, 2), {"epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(tg.FileError, match="no such file or directory"):
        interop.save_safetensors(path.parent / "no" / "file", nn.Linear(3, 2))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_from_torch_refuses_what_is_no_tensor() -> None:
    for given_, message in [
        ([np.zeros(2)], "found list, expected a mapping"),
        ({"lr": 0.1}, "lr is of type float, expected a tensor"),
        ({"w": np.zeros(2, complex)}, "w has dtype complex128"),
        ({"w": np.array(["a"])}, "w has dtype <U1"),
    ]:
        with pytest.raises(tg.DTypeError, match=message):
            interop.from_torch(given_)
    inner = np.arange(3.0)
    tree = interop.from_torch({"state": {0: {"step": 7, "m": [inner, None]}}})
    assert tree["state"][0]["step"] == 7 and tree["state"][0]["m"][1] is None
    copied = tree["state"][0]["m"][0]
    assert copied is not inner and not np.shares_memory(copied, inner)


# ---------------------------------------------------------------------------- lengths as polynomials


@given(
    st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(-9, 9), min_size=16, max_size=16)))
)
def test_any_polynomial_is_found_again(drawn: Any) -> None:
    count, factors = drawn
    symbols = list("abcd")[:count]
    products = [()] + [(s,) for s in symbols] + [(s, t) for k, s in enumerate(symbols) for t in symbols[k + 1 :]]
    wanted = {m: f for m, f in zip(products, factors, strict=False) if f}
    at = samples_of(symbols)
    values = [sum(f * int(np.prod([s[x] for x in m], dtype=int)) for m, f in wanted.items()) for s in at]
    found = fit(values, at)
    if isinstance(found, Size):
        assert {m: f for f, m in found.terms} == wanted
    else:
        assert set(wanted) <= {()} and found == wanted.get((), 0)


@pytest.mark.parametrize("function", [lambda n: n // 2, lambda n: n * n, lambda n: max(n, 11), lambda n: n % 3])
def test_other_dependences_are_refused(function: Any) -> None:
    at = samples_of(["n", "m"])
    with pytest.raises(Differs):
        fit([function(s["n"]) for s in at], at)


def test_constants_that_grow() -> None:
    at = samples_of(["t", "b"])
    zeros = varying([np.zeros((s["b"], 4), np.float32) for s in at], at)
    assert isinstance(zeros, Varying) and zeros.step is None and zeros.part.shape == (1, 4)
    rows = varying([np.tile(np.arange(4.0), (s["b"], 1)) for s in at], at)
    assert isinstance(rows, Varying) and rows.part.tolist() == [[0, 1, 2, 3]]
    count = varying([2 + 3 * np.arange(s["t"])[:, None] for s in at], at)
    assert isinstance(count, Varying) and (count.part.item(), int(count.step)) == (2, 3)
    fixed = np.arange(6.0)
    assert varying([fixed.copy() for _ in at], at).tolist() == fixed.tolist()  # type: ignore[union-attr]
    for wrong in (
        lambda s: np.arange(s["t"]) ** 2,
        lambda s: np.tri(s["t"]),
        lambda s: np.array([s["t"]]),
        lambda s: np.random.default_rng(s["t"]).random(s["b"]),
    ):
        with pytest.raises(Differs):
            varying([wrong(s) for s in at], at)


# ---------------------------------------------------------------------------- recording a module


def symbols(module: nn.Module, example: Any) -> list[str]:
    return list(record_forward(module, example).symbols)


def test_which_axes_are_free() -> None:
    x = np.zeros((4, 2, 3), np.float32)
    assert symbols(nn.LSTM(3, 5), x) == ["x_axis0", "x_axis1"]
    assert symbols(nn.LSTM(3, 5), (x, None, [4, 2])) == ["x_axis0", "x_axis1"]
    assert symbols(Function(lambda x: x @ x.T), x[0]) == ["input_0_axis0", "input_0_axis1"]
    assert symbols(Function(lambda x: ops.stack([row * 2 for row in x])), x) == ["input_0_axis1", "input_0_axis2"]
    # Two inputs that are added: their axes go together, whatever their lengths have in common.
    y = np.zeros((2, 2), np.float32)
    forward = record_forward(Function(lambda a, b: a + b), (y, y))
    assert forward.symbols == {"input_0_axis0": (0, 0), "input_0_axis1": (0, 1)}
    shapes = [forward.program.avals[slot].shape for slot in forward.program.inputs]
    assert shapes[0] == shapes[1]


def test_the_mode_of_every_part_is_put_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
    model[1].eval()
    version = model.version
    for example in (np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)):
        try:
            record_forward(model, example)
        except tg.ShapeError:
            assert example.shape == (2, 4)
        assert [part.training for part in model.modules()] == [True, True, False]
    assert model.version == version
    shared = nn.Dropout(0.5)
    nested = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    nested[1].training = False  # it alone: what it shares stays in training
    record_forward(nested, np.zeros((2, 3), np.float32))
    assert (nested.training, nested[0].training, nested[1].training, shared.training) == (True, True, False, True)


def test_what_cannot_be_recorded() -> None:
    x = np.zeros((2, 3), np.float32)
    rng = np.random.default_rng(0)
    for function, kind, message in [
        (lambda x: x if x.sum() > 0 else -x, tg.TraceError, r"Function cannot be recorded: .*test_interop.py:\d+"),
        (lambda x: x + rng.random(3, np.float32), tg.GraphError, "computes something else at every call"),
        (lambda x: x @ np.ones((4, 1)), tg.ShapeError, "matmul of shapes"),
        (lambda: 0, tg.ArgumentError, "1 arguments in example_inputs do not fit"),
    ]:
        module = Function(function)
        if message.startswith("1 arguments"):
            module = nn.Module()
            module.forward = function  # type: ignore[method-assign]
        with pytest.raises(kind, match=message):
            record_forward(module, x)
    with pytest.raises(tg.ArgumentError, match="no array among example_inputs"):
        record_forward(nn.Linear(3, 1), None)


# ---------------------------------------------------------------------------- elementwise, leaf by leaf


def test_every_leaf_has_a_form() -> None:
    assert set(LEAVES) == set(OPERATORS) | set(COMPOSED)
    assert not set(OPERATORS) & set(COMPOSED)


@pytest.mark.parametrize("name", [name for name in COMPOSED if LEAVES[name].arity == 1])
def test_composed_forms_are_exact(name: str) -> None:
    if name == "isfinite":
        x = np.array([0.0, np.inf, -np.inf, np.nan, 1e308])
    else:
        x = np.concatenate([np.logspace(-300, 2, 200), [0.0]])
        x = x if name.startswith("log2") else np.concatenate([x, -np.logspace(-300, -0.001, 100)])
    with np.errstate(divide="ignore"):
        expected = LEAVES[name].numpy(x)
        found = e.build(COMPOSED[name], 1).numpy(x)
    np.testing.assert_allclose(found, expected, rtol=4e-15 if name != "exp2" else 1e-13)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_the_composed_angle(y: float, x: float) -> None:
    with np.errstate(all="ignore"):
        found = e.build(COMPOSED["arctan2"], 2).numpy(np.array([y]), np.array([x]))[0]
        # Zeros have no sign here.
        np.testing.assert_allclose(found, np.arctan2(y + 0.0, x + 0.0), rtol=1e-12, atol=1e-300)


def test_the_document_lists_the_operators_that_are_known() -> None:
    from tinygrad_lstm.interop.operators import OPERATORS as KNOWN

    text = (Path(__file__).parent.parent / "docs" / "interop.md").read_text(encoding="utf-8")
    quoted = " ".join(line[1:] for line in text.splitlines() if line.startswith(">"))
    assert quoted.split() == sorted(KNOWN)
