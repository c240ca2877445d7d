"""The comparison with the peers: turns, rows, tables, the figure, and that its short form runs.

Nothing here looks at how long anything took: figures come from fake workers or are only required to be there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import numpy as np
import pytest
from benchmark_parts import BENCHMARKS, MINIMAL, TINY
from peers import contenders, driver, figure, report, suites, work
from peers.contenders import CONTENDERS
from peers.driver import Sample
from peers.run import Run
from peers.work import Work

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


def test_rows_that_would_take_too_long_have_fewer_rounds(monkeypatch):
    monkeypatch.setattr(driver, "SETTLE", 0.0)

    def rounds(limit: float) -> int:
        log: list[tuple[str, int]] = []
        pair: Any = [FakeProcess("a", 1.0, log), FakeProcess("b", 2.0, log)]
        return len(driver.take_turns(pair, 20, 0.1, [], limit)["a"].seconds)

    # A call that is timed and one that is not: 2 s and 4 s a round.
    assert [rounds(limit) for limit in (1.0, 48.0, 1e9, float("inf"))] == [5, 8, 20, 20]


def test_of_a_package_only_the_fastest_form_stays():
    class Form(FakeProcess):
        closed = False

        def close(self) -> None:
            self.closed = True

    forms: Any = [Form(name, seconds, []) for name, seconds in (("ours", 1.0), ("jax 1", 3.0), ("jax 2", 2.0))]
    for form in forms:
        form.contender = CONTENDERS["ours" if form.name == "ours" else "jax concat"]
    kept, slower = suites.fastest_of(forms, "jax")
    assert [form.name for form in kept] == ["ours", "jax 2"] and slower == ["jax 1"]
    assert [form.closed for form in forms] == [False, True, False]


def test_large_custom_cells_leave_out_autograd_and_the_slower_forms_of_jax(monkeypatch):
    asked = {}
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(suites, "timed", lambda run, suite, entrants, threads, peaks, **more: asked.update(
        {entrants[0][1].shape: ([c.name for c, _ in entrants], more["thin_out"])}))  # fmt: skip
    for shape in ("small", "medium", "large"):
        suites.custom(Run(MINIMAL, ""), Work("step", "multiplicative", shape), 1, [])
    assert [("autograd" in names, thin) for names, thin in asked.values()] == [
        (True, None),
        (False, None),
        (False, "jax"),
    ]
    assert all(
        {"ours", "torch loop", "torch loop, trim off", "jax concat"} <= set(names) for names, _ in asked.values()
    )


def faked(monkeypatch: Any, seconds: dict[str, list[float]]) -> list[Any]:
    """The suites without processes: rows of these times; the entrants of each row."""
    entrants = []

    def timed(run: Run, suite: str, taking_part: Any, threads: int, peaks: Any, **more: Any) -> Any:
        entrants.append(taking_part)
        samples = {c.name: Sample(seconds.get(c.name, [9.0, 9.0]), 1.0, 0.0) for c, _ in taking_part}
        return suites.row_of(suite, "", taking_part[0][1], threads, samples, {name: {} for name in samples})

    monkeypatch.setattr(suites, "timed", timed)
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: name)
    return entrants


def test_a_cell_is_compared_by_operations_with_the_layer_in_the_same_rounds(monkeypatch):
    rows, run = [], Run(MINIMAL, "")
    entrants = faked(monkeypatch, {"ours": [3.0, 6.0], suites.NN_LSTM: [2.0, 5.0], "torch": [1.0, 3.0]})
    inner = suites.timed
    monkeypatch.setattr(suites, "timed", lambda *a, **k: rows.append(inner(*a, **k)) or rows[-1])
    for cell in ("gru", "lstm", "peephole"):
        suites.own(run, Work("step", cell, "small"), 1, [])
    # 1.5 and 1.2 times the time for three quarters of the operations, or for as many.
    assert rows[0]["per_flop"] == pytest.approx({"q1": 1.7, "median": 1.8, "q3": 1.9})
    assert "per_flop" not in rows[1] and rows[2]["per_flop"]["median"] == pytest.approx(1.35)
    assert rows[0]["fastest_peer"] == "torch" and rows[0]["speedup"]["median"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    names = [{c.name: each.cell for c, each in taking_part} for taking_part in entrants]
    assert names[0] == {"ours": "gru", "torch": "gru", "torch, trim off": "gru", suites.NN_LSTM: "lstm"}
    assert set(names[1]) == {"ours", "torch", "torch, trim off"}
    assert set(names[2]) == {"ours", "torch loop", "torch loop, trim off", suites.NN_LSTM}


def test_a_budget_is_compared_with_none_in_the_same_rounds(monkeypatch):
    rows, run = [], Run(dataclasses.replace(MINIMAL, memory_budget=("long", 0.05)), "")
    entrants = faked(monkeypatch, {"ours": [3.0, 6.0], suites.NO_BUDGET: [2.0, 5.0]})
    inner = suites.timed
    monkeypatch.setattr(suites, "timed", lambda *a, **k: rows.append(inner(*a, **k)) or rows[-1])
    suites.memory_budget(run, 1, [])
    assert rows[0]["slowdown"]["median"] == pytest.approx(1.35) and "speedup" not in rows[0]
    assert [(c.name, c.options, each.shape) for c, each in entrants[0]] == [
        ("ours", {"memory": 0.05}, "long"), (suites.NO_BUDGET, {"memory": None}, "long"),
    ]  # fmt: skip


def test_cells_of_one_layer_leave_out_shapes_of_several(monkeypatch):
    run = Run(dataclasses.replace(MINIMAL, cells_shapes=("stack",), custom_shapes=("stack",)), "")
    monkeypatch.setattr(run, "peaks", lambda threads: [])
    for suite in ("cells", "custom"):
        suites.run_suite(run, suite, 1)
    assert [note.split(":")[0] for note in run.notes] == ["cells", "custom"] and not run.rows


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    samples = {
        "ours": Sample([1.0, 2.0, 4.0], 1.0, 0.0),
        "torch": Sample([2.0, 6.0, 4.0], 1.0, 0.0),
        "autograd": Sample([9.0, None, None], 1.0, 0.0),
    }
    row = suites.row_of("step", "tiny", TINY, 1, samples, {name: {"error": 0.0} for name in samples})
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
    first = plain["PYTHONPATH"].split(os.pathsep)[:2]
    assert first == [str(BENCHMARKS), str(BENCHMARKS.parent)]  # this code, not another that is installed
    trim_off = contenders.environment(CONTENDERS["torch, trim off"], 1)
    assert trim_off["MALLOC_TRIM_THRESHOLD_"] == trim_off["MALLOC_MMAP_THRESHOLD_"] == "4000000000"


def test_the_reference_falls_back_to_what_is_there(monkeypatch):
    monkeypatch.setattr(contenders, "installed", lambda c: c.package == "numpy")
    found = contenders.reference(TINY)
    assert found is not None and found.name == "NumPy by hand"
    for kind, cell in (("step", "gru"), ("step", "peephole"), ("step", "minimal-gated"), ("training", "lstm")):
        assert contenders.reference(Work(kind, cell, "tiny")) is None
    monkeypatch.setattr(contenders, "installed", lambda c: c.package == "autograd")
    assert contenders.reference(Work("step", "minimal-gated", "tiny")) is CONTENDERS["autograd"]
    assert contenders.reference(Work("step", "peephole", "tiny")) is None


def filled_run(folder: Path) -> Run:
    """Two rows and the rates of two libraries."""
    run = Run(MINIMAL, str(folder))
    for factor in (2.0, 8.0):
        samples = {"ours": Sample([1e-3], 1.0, 0.0), "torch": Sample([factor * 1e-3], 1.0, 0.0)}
        run.rows.append(suites.row_of("step", "tiny", TINY, 1, samples, {name: {"error": 0.0} for name in samples}))
    run.rates[1] = {"peak NumPy": {"(2, 2, 2)": 1e9}, "peak torch": {"(2, 2, 2)": 2e9}}
    return run


def test_fraction_of_the_bound_and_geometric_mean(tmp_path):
    run = filled_run(tmp_path)
    report.bounds(run)
    assert run.rows[0]["bound"] == work.flop(TINY) / 2e9
    assert run.rows[0]["fraction"] == pytest.approx(work.flop(TINY) / 2e9 / 1e-3)
    assert report.geometric_mean(run.rows) == pytest.approx(4.0)
    text = report.tables(run)
    assert "geometric mean of fastest peer / ours: 4.00 (over 2 of 2)" in text
    assert "GEMM bound" in text and "peak torch" in text


def test_the_headline_states_the_machine_and_every_librarys_peak(tmp_path, monkeypatch):
    run = filled_run(tmp_path)
    for known, expected in ((True, ", AVX-512,"), (False, ", no AVX-512,"), (None, ", AVX-512 unknown,")):
        monkeypatch.setattr(report, "avx512", lambda known=known: known)
        text = report.headline(report.machine(), run)
        assert expected in text.splitlines()[0] and report.machine()["cpu"] in text.splitlines()[0]
        assert f"numpy {np.__version__}" in text
    assert f"commit {report.commit() or 'unknown'}," in text
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.commit() is None and "commit unknown" in report.headline(report.machine(), run)
    assert "1 thread: NumPy 1; torch 2 (the limit: torch)" in text
    assert report.peaks(run) == {1: {"NumPy": 1e9, "torch": 2e9}}


def test_tables_of_cells_and_of_a_budget(tmp_path):
    run = filled_run(tmp_path)
    run.rows[0] |= {"suite": "cells", "per_flop": {"q1": 1.0, "median": 1.25, "q3": 1.5}, "cell": "gru"}
    run.rows[1] |= {"suite": "memory-budget", "slowdown": {"q1": 1.0, "median": 1.3, "q3": 1.4}}
    run.rows[1]["contenders"]["ours"]["facts"] = {"peak": 50, "whole": 1000, "recomputed": 957, "steps": 1000}
    text = report.tables(run)
    assert "cells, tiny, 1 thread, ms" in text and "1.00-1.50" in text and "(target 1.4)" in text and "gru" in text
    assert "5.0 % of 1000" in text and "957 of 1000" in text and "(target 1.35)" in text


def test_the_figure_has_the_quartiles_of_the_rounds_that_both_took_part_in():
    samples = {
        "ours": Sample([1.0, 2.0, 4.0], 1.0, 0.0), "ours, nn.LSTM": Sample([1.0, 2.0, 4.0], 1.0, 0.0),
        "torch": Sample([2.0, None, 12.0], 1.0, 0.0),
    }  # fmt: skip
    row = suites.row_of("cells", "x", TINY, 1, samples, {name: {} for name in samples})
    assert figure.against_peers(row) == {"torch": {"q1": 2.25, "median": 2.5, "q3": 2.75}}
    assert figure.against_peers({"contenders": {"ours": {"base": 1}, "torch": {"base": 1}}}) == {}


def test_a_figure_of_every_kind_of_row(tmp_path):
    pytest.importorskip("matplotlib")
    run = filled_run(tmp_path)
    run.rows[0] |= {"suite": "cells", "per_flop": {"q1": 1.0, "median": 1.25, "q3": 1.5}}
    run.rows.append({"suite": "memory", "label": "large", "threads": 2, "contenders": {"ours": {"base": 1}}})
    run.rows.append(run.rows[1] | {"slowdown": {"q1": 1.0, "median": 1.3, "q3": 1.4}, "threads": 2})
    run.rows.append(run.rows[1] | {"contenders": {"ours": run.rows[1]["contenders"]["ours"]}})
    figure.plot(run, str(tmp_path / "all.png"))
    figure.plot(Run(MINIMAL, ""), str(tmp_path / "none.png"))
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("all.png", "none.png"))


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    figure.plot(filled_run(tmp_path), str(tmp_path / "ratios.png"))
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "0"],
        ["--rounds", "0"],
        ["--budget", "nan"],
        ["--suite", "speed"],
        ["--shapes", "huge"],
        ["--cells", "lost"],
        ["--json", "no_such_folder/out.json"],
        ["--plot", "no_such_folder/out.png"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main(arguments)
    assert exit_.value.code == 2 and "error" in capsys.readouterr().err


def test_a_figure_without_matplotlib_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        compare.main(["--plot", "out.png"])
    assert exit_.value.code == 2 and "matplotlib" in capsys.readouterr().err


def test_a_cell_narrows_the_suites_that_have_it():
    both = compare.settings(compare.parser().parse_args(["--cells", "minimal-gated", "gru", "multiplicative"]))
    assert both.cells == ("minimal-gated", "multiplicative") and both.own_cells == ("minimal-gated", "gru")


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
    assert found["machine"]["cpu"] and found["machine"]["avx512"] in (True, False)


@pytest.mark.slow
def test_the_short_form_runs_every_suite(tmp_path):
    found = command(tmp_path)
    assert {row["suite"] for row in found["rows"]} == set(suites.SUITES)
    for row in found["rows"]:
        assert row["label"] and any(name.startswith("ours") for name in row["contenders"])
        if row.get("flop"):
            assert row["bound"] > 0 and row["fraction"] > 0
        assert row["suite"] != "cells" or row["per_flop"]["median"] > 0
        assert row["suite"] != "memory-budget" or row["slowdown"]["median"] > 0
    assert set(dataclasses.asdict(compare.SHORT)) == set(found["settings"])
    assert all(rate > 1e9 for rate in found["peak_flop_per_second"]["1"].values()) and not found["errors"]
