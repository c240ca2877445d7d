"""The comparison with the peers: what it computes, what it refuses, and that its short form runs.

Nothing here looks at how long anything took: figures come from fake workers or are only required to be there.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare  # noqa: E402
from peers import contenders, driver, numpy_peer, ours, report, suites, work  # noqa: E402
from peers.contenders import CONTENDERS, Contender  # noqa: E402
from peers.driver import Process, Sample, WorkerError, WrongResult  # noqa: E402
from peers.work import CELLS, SHAPES, Case, Work  # noqa: E402

TINY = Work("step", "lstm", "tiny")
MINIMAL = suites.Settings(("tiny",), ("tiny",), ("tiny",), rounds=2, budget=1e-4, memory="tiny", memory_steps=2)


def reference_of(item: Work) -> dict[str, np.ndarray]:
    """By NumPy in float64."""
    return numpy_peer.build(item._replace(dtype="float64"), {}).result()


# ---------------------------------------------------------------------------- the work


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_of_an_lstm(shape):
    steps, batch, width, hidden, layers = SHAPES[shape]
    expected = 24 * steps * batch * hidden * (width + hidden) + (layers - 1) * 48 * steps * batch * hidden**2
    assert work.flop(Work("step", "lstm", shape)) == expected
    assert work.flop(Work("forward", "lstm", shape)) == expected / 3


@pytest.mark.parametrize(
    ("cell", "share"), [("peephole-norm", 1), ("eight-matmuls", 1), ("minimal-gated", 0.5), ("multiplicative", 1.25)]
)
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


def run_with(monkeypatch: Any, folder: Path, *taking_part: Contender) -> suites.Run:
    """A run of the step suite at tiny with these contenders, NumPy as reference, no peaks."""
    monkeypatch.setattr(suites, "CONTENDERS", {c.name: c for c in taking_part})
    monkeypatch.setattr(suites, "PEAKS", {})
    with suites.Run(MINIMAL, str(folder), lambda _: None) as run:
        run.references[TINY._replace(dtype="float64")] = reference_of(TINY)
        suites.run_suite(run, "step", 1)
    return run


def test_a_wrong_contender_is_an_error_and_no_row(odd_contenders, monkeypatch, tmp_path):
    run = run_with(monkeypatch, tmp_path, CONTENDERS["NumPy by hand"], odd_contenders("wrong", WRONG))
    assert list(run.rows[0]["contenders"]) == ["NumPy by hand"]
    assert len(run.errors) == 1 and "wrong, step tiny: weight_hh_l0 differs" in run.errors[0]


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


# ---------------------------------------------------------------------------- taking turns


class FakeProcess:
    """Answers like a worker whose calls take a given time; writes down who was asked for how many calls."""

    def __init__(self, name: str, seconds: float, log: list[tuple[str, int]]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def ask(self, do: str, calls: int = 0, warm: int = 0) -> dict[str, float]:
        self.log.append((self.name, calls))
        return {"seconds": self.seconds * calls, "cpu": self.seconds * calls, "at": 0.0, "until": 0.0}


def test_rounds_rotate_and_slow_contenders_sit_out(monkeypatch):
    monkeypatch.setattr(driver, "SETTLE", 0.0)
    log: list[tuple[str, int]] = []
    processes: Any = [FakeProcess("a", 0.01, log), FakeProcess("b", 0.02, log), FakeProcess("slow", 1.0, log)]
    peak: Any = FakeProcess("peak", 1.0, log)
    samples = driver.take_turns(processes, 4, 0.1, [peak])
    rounds = log[6:]  # two calls of each to learn its speed
    assert rounds == [
        ("a", 10), ("b", 5), ("slow", 1), ("peak", 0), ("b", 5), ("a", 10), ("peak", 0),
        ("a", 10), ("b", 5), ("peak", 0), ("a", 10), ("b", 5), ("slow", 1), ("peak", 0),
    ]  # fmt: skip
    assert samples["slow"].seconds == [pytest.approx(1.0), None, None, pytest.approx(1.0)]
    assert samples["a"].seconds == pytest.approx([0.01] * 4) and samples["a"].cores == pytest.approx(1.0)


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    samples = {
        "ours": Sample([1.0, 2.0, 4.0], 1.0, 0.0),
        "torch": Sample([2.0, 6.0, 4.0], 1.0, 0.0),
        "autograd": Sample([9.0, None, None], 1.0, 0.0),
    }
    row = suites._row("step", TINY, 1, samples, dict.fromkeys(samples, 0.0))
    assert row["fastest_peer"] == "torch"
    assert row["speedup"] == {"q1": 1.5, "median": 2.0, "q3": 2.5}
    assert row["contenders"]["autograd"]["median"] == 9.0


# ---------------------------------------------------------------------------- environment and report


def test_the_environment_is_the_contenders_not_the_callers(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("TINYGRAD_LSTM_NATIVE", "0")
    plain = contenders.environment(CONTENDERS["torch"], 2)
    assert not {"MALLOC_TRIM_THRESHOLD_", "OMP_WAIT_POLICY", "TINYGRAD_LSTM_NATIVE"} & set(plain)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TINYGRAD_LSTM_NUM_THREADS", "NPROC")
    assert [plain[name] for name in names] == ["2"] * 5
    trim_off = contenders.environment(CONTENDERS["torch, trim off"], 1)
    assert trim_off["MALLOC_TRIM_THRESHOLD_"] == trim_off["MALLOC_MMAP_THRESHOLD_"] == "4000000000"


def test_the_reference_falls_back_to_what_is_there(monkeypatch):
    monkeypatch.setattr(contenders, "installed", lambda c: c.package == "numpy")
    found = contenders.reference(custom=False)
    assert found is not None and found.name == "NumPy by hand"
    assert contenders.reference(custom=True) is None


def filled_run(folder: Path) -> suites.Run:
    """Two rows and the rates of two libraries."""
    run = suites.Run(MINIMAL, str(folder))
    for factor in (2.0, 8.0):
        samples = {"ours": Sample([1e-3], 1.0, 0.0), "torch": Sample([factor * 1e-3], 1.0, 0.0)}
        run.rows.append(suites._row("step", TINY, 1, samples, dict.fromkeys(samples, 0.0)))
    run.rates[1] = {"peak NumPy": {"(2, 2, 2)": 1e9}, "peak torch": {"(2, 2, 2)": 2e9}}
    return run


def test_fraction_of_the_bound_and_geometric_mean(tmp_path):
    run = filled_run(tmp_path)
    report.bounds(run)
    assert run.rows[0]["bound"] == work.flop(TINY) / 2e9
    assert run.rows[0]["fraction"] == pytest.approx(work.flop(TINY) / 2e9 / 1e-3)
    assert report.geometric_mean(run.rows) == pytest.approx(4.0)
    text = report.tables(run)
    assert "geometric mean of fastest peer / ours: 4.00" in text
    assert "GEMM bound" in text and "peak torch" in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(filled_run(tmp_path), str(tmp_path / "ratios.png"))
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [["--threads", "0"], ["--rounds", "0"], ["--budget", "nan"], ["--suite", "speed"], ["--shapes", "huge"]],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main(arguments)
    assert exit_.value.code == 2 and "error" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the command


def command(folder: Path, *options: str) -> dict[str, Any]:
    """The command in its short form; its JSON."""
    line = [sys.executable, "-W", "error", str(BENCHMARKS / "compare.py"), "--short", "--json", "out.json", *options]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_as_a_command(tmp_path):
    found = command(tmp_path, "--suite", "memory", "--only", "NumPy by hand")
    entry = found["rows"][0]["contenders"]["NumPy by hand"]
    kept = 4 * 50 * 32 * 64 * 4 * 2  # gates and their cotangents at small, float32
    assert kept < entry["peak"] < 20 * kept and not found["errors"]
    assert found["machine"]["versions"]["numpy"] == np.__version__


@pytest.mark.slow
def test_the_short_form_runs_every_suite(tmp_path):
    found = command(tmp_path)
    assert {row["suite"] for row in found["rows"]} == set(suites.SUITES)
    for row in found["rows"]:
        assert row["label"] and any(name.startswith("ours") for name in row["contenders"])
        if row.get("flop"):
            assert row["bound"] > 0 and row["fraction"] > 0
    assert set(dataclasses.asdict(compare.SHORT)) == set(found["settings"])


def test_case_is_what_the_workers_use():
    case = ours.build(Work("forward", "lstm", "online"), {})
    assert isinstance(case, Case) and case.result()["y"].shape == (1, 1, 64)
