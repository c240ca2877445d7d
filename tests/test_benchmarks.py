"""The comparison with the peers: what each contender computes, and what is refused before anything is timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_parts import MINIMAL, TINY, reference_of
from hypothesis import given
from hypothesis import strategies as st
from peers import contenders, driver, numpy_peer, ours, suites, work
from peers import run as run_module
from peers.contenders import CONTENDERS, Contender
from peers.driver import Process, WorkerError, WrongResult
from peers.run import Run
from peers.work import CELLS, LAYERS, OWN_CELLS, SHAPES, Case, Work

# ---------------------------------------------------------------------------- the work


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_of_an_lstm(shape):
    steps, batch, width, hidden, layers = SHAPES[shape]
    expected = 24 * steps * batch * hidden * (width + hidden) + (layers - 1) * 48 * steps * batch * hidden**2
    assert work.flop(Work("step", "lstm", shape)) == expected
    assert work.flop(Work("forward", "lstm", shape)) == expected / 3


@pytest.mark.parametrize(
    ("cell", "share"),     [
        ("peephole-norm", 1), ("eight-matmuls", 1), ("minimal-gated", 0.5), ("multiplicative", 1.25), ("gru", 0.75),
        ("rnn", 0.25), ("projection", 0.75), ("peephole", 1), ("layer-norm", 1), ("zoneout", 1),
    ],
)  # fmt: skip
def test_operations_of_the_cells_as_shares_of_the_lstm(cell, share):
    assert work.flop(Work("step", cell, "small")) == share * work.flop(Work("step", "lstm", "small"))


def test_weights_and_inputs_are_the_same_numbers_in_both_precisions():
    for item in (TINY, Work("step", "peephole-norm", "tiny")):
        single, double = work.weights(item), work.weights(item._replace(dtype="float64"))
        assert {v.dtype.name for v in single.values()} == {"float32"}
        assert {v.dtype.name for v in double.values()} == {"float64"}
        assert all((single[name] == double[name]).all() for name in double)
    assert (work.inputs(TINY) == work.inputs(TINY._replace(dtype="float64"))).all()


def test_training_targets_are_the_next_character():
    data = work.tokens(Work("training", "lstm", "character-tiny"))
    assert (data.x[:, 1:] == data.y[:, :-1]).all() and (data.x[1:, 0] == data.y[:-1, -1]).all()
    assert data.x.min() >= 0 and data.x.max() < data.vocabulary


# ---------------------------------------------------------------------------- the peers that are always there


@pytest.mark.parametrize("shape", ["tiny", "stack", "online"])
def test_numpy_by_hand_has_the_gradients_of_central_differences(shape, monkeypatch):
    item = Work("step", "lstm", shape, "float64")
    if shape == "stack":  # two layers, but small
        monkeypatch.setitem(SHAPES, shape, (6, 3, 4, 5, 2))
    values = work.weights(item) | {"x": work.inputs(item)}
    slopes = numpy_peer.build(item, {}).result()
    rng, found, expected = np.random.default_rng(0), [], []
    for name in values:
        direction = rng.standard_normal(values[name].shape)
        losses = []
        for sign in (1, -1):
            moved = values | {name: values[name] + sign * 1e-5 * direction}
            monkeypatch.setattr(numpy_peer, "inputs", lambda _, moved=moved: moved["x"])
            monkeypatch.setattr(numpy_peer, "weights", lambda _, moved=moved: moved)
            losses.append(float(numpy_peer.build(item, {}).call()))
        expected.append((losses[0] - losses[1]) / 2e-5)
        found.append(float((slopes[name] * direction).sum()))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_numpy_by_hand_gives_the_same_result_again():
    case = numpy_peer.build(TINY, {})
    first = case.result()
    case.call()
    assert all((value == first[name]).all() for name, value in case.result().items())


@pytest.mark.parametrize("kind", ["step", "forward"])
def test_ours_agrees_with_numpy_by_hand(kind):
    item = Work(kind, "lstm", "tiny")
    error, where = driver.largest_error(ours.build(item, {}).result(), reference_of(item))
    assert error <= driver.BOUND, where


@pytest.mark.conformance
@pytest.mark.parametrize("cell", ("lstm", *CELLS))
@pytest.mark.parametrize("kind", ["step", "forward"])
def test_every_peer_agrees_with_the_reference(cell, kind, monkeypatch):
    torch_peer = pytest.importorskip("peers.torch_peer")
    jax_peer = pytest.importorskip("peers.jax_peer")
    autograd_peer = pytest.importorskip("peers.autograd_peer")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(SHAPES, "tiny", (7, 3, 4, 5, 1))
    item = Work(kind, cell, "tiny")
    form = {"form": "loop"}
    expected = torch_peer.build(item._replace(dtype="float64"), form).result()
    found = {
        "ours": ours.build(item, {}), "torch loop": torch_peer.build(item, form),
        "jax concat": jax_peer.build(item, {"hoist": False}),
        "jax hoisted": jax_peer.build(item, {"hoist": True, "unroll": 5}),
    }  # fmt: skip
    if kind == "step":
        found["autograd"] = autograd_peer.build(item, {})
    if cell == "lstm":
        found |= {"torch": torch_peer.build(item, {"form": "fused"}), "NumPy": numpy_peer.build(item, {})}
    for name, case in found.items():
        arrays = case.result()
        error, where = driver.largest_error(arrays, expected)
        assert error <= driver.BOUND, (name, where)
        assert {np.asarray(value).dtype.name for key, value in arrays.items() if key != "loss"} == {"float32"}, name


@pytest.mark.conformance
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("cell", OWN_CELLS)
@pytest.mark.parametrize("kind", ["step", "forward"])
def test_our_cells_agree_with_the_reference(cell, kind, monkeypatch):
    torch_peer = pytest.importorskip("peers.torch_peer")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(SHAPES, "tiny", (7, 3, 4, 6, 1))
    item = Work(kind, cell, "tiny")
    form = contenders.reference(item).options
    assert form["form"] == ("fused" if cell in LAYERS else "loop")
    expected = torch_peer.build(item._replace(dtype="float64"), form).result()
    for case in (ours.build(item, {}), torch_peer.build(item, form)):
        case.call()
        arrays = case.result()
        error, where = driver.largest_error(arrays, expected)
        assert error <= driver.BOUND, where
        assert {np.asarray(value).dtype.name for key, value in arrays.items() if key != "loss"} == {"float32"}


def test_zoneout_is_compared_with_given_masks_and_timed_with_new_ones(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", (7, 3, 4, 6, 1))
    item = Work("forward", "zoneout", "tiny")
    case = ours.build(item, {})
    compared, timed = [case.result()["y"] for _ in range(2)], [case.call().numpy() for _ in range(2)]
    assert (compared[0] == compared[1]).all() and (timed[0] != timed[1]).any()
    h_stays, c_stays = work.zoneout_masks(item)
    assert h_stays.shape == c_stays.shape == (7, 3, 6) and h_stays.mean() < 0.2 < c_stays.mean() < 0.8
    assert (compared[0][0][h_stays[0]] == 0).all() and (compared[0][0][~h_stays[0] & ~c_stays[0]] != 0).all()


def test_a_memory_budget_is_the_layers_and_its_plan_is_stated():
    item = Work("step", "lstm", "long")
    limited, free = ours.build(item, {"memory": 0.05}).facts(), ours.build(item, {"memory": None}).facts()
    assert limited["peak"] <= 0.05 * limited["whole"] and 0 < limited["recomputed"] < limited["steps"] == 1000
    assert free["peak"] == free["whole"] == limited["whole"] and free["recomputed"] == 0
    assert ours.build(TINY, {}).facts is None


@pytest.mark.conformance
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_onnxruntime_has_the_gates_and_layers_of_the_reference(layers, bound, monkeypatch):
    onnx_peer = pytest.importorskip("peers.onnx_peer")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(SHAPES, "tiny", (7, 3, 4, 5, layers))
    item = Work("forward", "lstm", "tiny")
    case = onnx_peer.build(item, {"bound": bound})
    found = case.result()
    error, _ = driver.largest_error(found, reference_of(item))
    assert error <= driver.BOUND
    case.call()
    assert (case.result()["y"] == found["y"]).all()
    for wrong in (item._replace(kind="step"), item._replace(cell="minimal-gated"), item._replace(dtype="float64")):
        with pytest.raises(ValueError, match="forward passes of the LSTM"):
            onnx_peer.build(wrong, {"bound": bound})


def test_a_contender_takes_part_only_where_all_its_packages_are(monkeypatch):
    both = CONTENDERS["onnxruntime"]
    for missing in both.package.split():
        monkeypatch.setattr(
            contenders.importlib.util, "find_spec", lambda name, gone=missing: None if name == gone else 1
        )
        assert not contenders.installed(both) and contenders.installed(CONTENDERS["NumPy by hand"])


# ---------------------------------------------------------------------------- right before fast


@given(st.integers(0, 11), st.floats(1e-4, 1e3), st.booleans())
def test_an_error_in_one_entry_is_found(position, size, negative):
    expected = {"a": np.linspace(-2, 1, 12).reshape(3, 4), "b": np.zeros(0)}
    found = {name: value.copy() for name, value in expected.items()}
    found["a"].flat[position] += -size if negative else size
    error, where = driver.largest_error(found, expected)
    assert where == "a" and error == pytest.approx(size / 2)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": np.ones(3), "b": np.ones(1)}, "expected"),
        ({}, "expected"),
        ({"a": np.ones((3, 1))}, "shape"),
        ({"a": np.array([1, np.nan, 1])}, "not finite"),
        ({"a": np.array([1, np.inf, 1])}, "not finite"),
    ],
)
def test_results_of_another_form_are_wrong(found, message):
    with pytest.raises(WrongResult, match=message):
        driver.largest_error(found, {"a": np.ones(3)})


@pytest.fixture
def odd_contenders(tmp_path, monkeypatch):
    """Contenders of one's own: a module in a folder that both this process and the workers look into."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(driver, "SETTLE", 0.0)

    def make(name: str, text: str) -> Contender:
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        return Contender(name, name, "numpy", {}, {}, frozenset({"step"}))

    return make


WRONG = """
from peers import numpy_peer
LIBRARIES = ("numpy",)
def build(work, options):
    case = numpy_peer.build(work, options)
    def result():
        found = case.result()
        found["weight_hh_l0"] *= 1.001
        return found
    return case._replace(result=result)
"""


def run_with(monkeypatch: Any, folder: Path, *taking_part: Contender) -> Run:
    """A run of the step suite at tiny with these contenders, NumPy as reference, no peaks."""
    monkeypatch.setattr(run_module, "CONTENDERS", {c.name: c for c in taking_part})
    monkeypatch.setattr(run_module, "PEAKS", {})
    with Run(MINIMAL, str(folder), lambda _: None) as run:
        run.references[TINY._replace(dtype="float64")] = reference_of(TINY)
        suites.run_suite(run, "step", 1)
    return run


def test_a_wrong_contender_is_an_error_and_no_row(odd_contenders, monkeypatch, tmp_path):
    run = run_with(monkeypatch, tmp_path, CONTENDERS["NumPy by hand"], odd_contenders("wrong", WRONG))
    assert list(run.rows[0]["contenders"]) == ["NumPy by hand"]
    assert len(run.errors) == 1 and "wrong, step tiny: weight_hh_l0 differs" in run.errors[0]


def test_a_first_call_that_was_wrong_has_no_figure(odd_contenders, monkeypatch, tmp_path):
    wrong = odd_contenders("wrong", WRONG)._replace(suites=frozenset({"step", "first-call"}))
    monkeypatch.setattr(run_module, "CONTENDERS", {c.name: c for c in (wrong, CONTENDERS["NumPy by hand"])})
    settings = dataclasses.replace(MINIMAL, first=(("step", "lstm", "tiny"),), repeats=1)
    with Run(settings, str(tmp_path), lambda _: None) as run:
        run.references[TINY._replace(dtype="float64")] = reference_of(TINY)
        suites.run_suite(run, "first-call", 1)
    assert list(run.rows[0]["contenders"]) == ["NumPy by hand"]
    assert len(run.errors) == 1 and "weight_hh_l0 differs" in run.errors[0]


def test_a_contender_that_fails_or_dies_leaves_the_others(odd_contenders, monkeypatch, tmp_path):
    failing = odd_contenders("failing", "LIBRARIES = ()\ndef build(work, options): raise ValueError('no such layer')\n")
    dying = odd_contenders(
        "dying", "import os, sys\nLIBRARIES = ()\ndef build(*_):\n    sys.stderr.write('last words')\n"
        "    sys.stderr.flush()\n    os._exit(3)\n",
    )  # fmt: skip
    run = run_with(monkeypatch, tmp_path, failing, dying, CONTENDERS["NumPy by hand"])
    assert list(run.rows[0]["contenders"]) == ["NumPy by hand"]
    assert "ValueError: no such layer" in run.errors[0]
    assert "status 3" in run.errors[1] and "last words" in run.errors[1]


def test_what_a_library_prints_does_not_disturb_the_answers(odd_contenders):
    chatty = odd_contenders("chatty", "print('hello')\n" + WRONG)
    with Process(chatty, 1) as process:
        process.load()
        assert process.receive()["seconds"] >= 0
        assert set(process.ask("make", work=list(TINY), options={})) == {"build", "first"}
        answer = process.ask("batch", calls=2, warm=1)
        assert set(answer) == {"seconds", "cpu", "at", "until"}
    assert process.process.poll() == 0


def test_a_worker_names_an_unknown_library(odd_contenders):
    with Process(odd_contenders("lost", "LIBRARIES = ('no_such_library',)\n"), 1) as process:
        process.load()
        with pytest.raises(WorkerError, match="no_such_library"):
            process.receive()


def test_case_is_what_the_workers_use():
    case = ours.build(Work("forward", "lstm", "online"), {})
    assert isinstance(case, Case) and case.result()["y"].shape == (1, 1, 64)
