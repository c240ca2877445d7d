"""The examples: the worked example's digits, every short form as a command, every full form with its threshold."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def load(script: str) -> ModuleType:
    """An example as a module, without running its main part."""
    spec = importlib.util.spec_from_file_location(f"example_{Path(script).stem}", EXAMPLES / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(script: str, *options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """An example as a command, warnings being errors."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)


# ---------------------------------------------------------------------------- the worked example


@pytest.fixture(scope="module")
def worked():
    """What the worked example computes: values, derivatives, gradients, new weights."""
    return load("numerical_example.py").run()


def test_published_outputs_and_weights(worked):
    values, _, _, updated = worked
    assert [round(float(value["out"]), 5) for value in values] == [0.53631, 0.77198]
    assert np.round(updated["W_a"], 5).tolist() == [0.45267, 0.25922]
    assert round(float(updated["U_a"]), 5) == 0.15104
    assert round(float(updated["b_a"]), 5) == 0.20364
    assert np.round(updated["W_o"], 5).tolist() == [0.60259, 0.41626]


def test_every_number_against_the_equations_by_hand(worked):
    """The account's own formulas, forward and backward, written out for one unit and two steps."""
    values, derivatives, gradients, updated = worked
    w = {"a": [0.45, 0.25], "i": [0.95, 0.8], "f": [0.7, 0.45], "o": [0.6, 0.4]}
    u = {"a": 0.15, "i": 0.8, "f": 0.1, "o": 0.25}
    b = {"a": 0.2, "i": 0.65, "f": 0.15, "o": 0.1}
    x, labels = np.array([[1.0, 2.0], [0.5, 3.0]]), [0.5, 1.25]

    def logistic(z):
        return 1 / (1 + np.exp(-z))

    gate, state, out = [], [0.0], [0.0]
    for t in range(2):
        net = {k: np.dot(w[k], x[t]) + u[k] * out[t] + b[k] for k in w}
        gate.append({k: np.tanh(net[k]) if k == "a" else logistic(net[k]) for k in w})
        g = gate[t]
        state.append(g["a"] * g["i"] + g["f"] * state[t])
        out.append(np.tanh(state[t + 1]) * g["o"])
    delta_out = [out[1] - labels[0], out[2] - labels[1]]
    delta_state = [0.0, 0.0]
    delta: list[dict[str, float]] = [{}, {}]
    for t in (1, 0):
        g, squashed = gate[t], np.tanh(state[t + 1])
        if t == 0:
            delta_out[0] += sum(u[k] * delta[1][k] for k in u)
        delta_state[t] = delta_out[t] * g["o"] * (1 - squashed**2)
        if t == 0:
            delta_state[0] += delta_state[1] * gate[1]["f"]
        delta[t] = {
            "a": delta_state[t] * g["i"] * (1 - g["a"] ** 2),
            "i": delta_state[t] * g["a"] * g["i"] * (1 - g["i"]),
            "f": delta_state[t] * state[t] * g["f"] * (1 - g["f"]),
            "o": delta_out[t] * squashed * g["o"] * (1 - g["o"]),
        }
        slopes = {"a": delta_state[t] * g["i"], "i": delta_state[t] * g["a"], "f": delta_state[t] * state[t]}
        slopes["o"] = delta_out[t] * squashed
        for k in w:
            np.testing.assert_allclose(values[t][k], g[k], rtol=1e-13)
            np.testing.assert_allclose(derivatives[t][k], slopes[k], rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(derivatives[t][f"net_{k}"], delta[t][k], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(values[t]["state"], state[t + 1], rtol=1e-13)
        np.testing.assert_allclose(derivatives[t]["state"], delta_state[t], rtol=1e-12)
        np.testing.assert_allclose(derivatives[t]["out"], delta_out[t], rtol=1e-12)
    for k in w:
        slope_w = delta[0][k] * x[0] + delta[1][k] * x[1]
        slope_u = delta[1][k] * out[1]
        slope_b = delta[0][k] + delta[1][k]
        for name, old, slope in ((f"W_{k}", w[k], slope_w), (f"U_{k}", u[k], slope_u), (f"b_{k}", b[k], slope_b)):
            np.testing.assert_allclose(gradients[name], slope, rtol=1e-12)
            np.testing.assert_allclose(updated[name], np.asarray(old) - 0.1 * slope, rtol=1e-13)


def test_worked_example_prints_every_gate(tmp_path):
    done = run_script("numerical_example.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  ([aifo]) +(-?\d\.\d{5}) +(-?\d\.\d{5}) +(-?\d\.\d{5})$", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == list("aifoaifo")
    # The published first step: values of the gates, then their deltas (f meets no state yet, its delta is 0).
    assert [row[1] for row in rows[:4]] == ["0.81775", "0.96083", "0.85195", "0.81757"]
    assert [row[3] for row in rows[4:]] == ["-0.01938", "-0.00112", "-0.00631", "-0.05538"]
    assert rows[2][3] == "0.00000"


def test_worked_example_fails_on_other_digits(worked):
    module = load("numerical_example.py")
    values, _, _, updated = worked
    assert module.agrees(values, updated)
    assert not module.agrees(values, {**updated, "b_a": updated["b_a"] + 2e-5})


# ---------------------------------------------------------------------------- as commands


@pytest.mark.parametrize("script", SCRIPTS)
def test_short_form(script, tmp_path):
    done = run_script(script, "--quick", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"\d\.\d", done.stdout), "it prints no number that could be judged"
    assert not list(tmp_path.iterdir()), "it left files behind"


def test_watched_bptt_writes_its_pages(tmp_path):
    done = run_script("watch_bptt.py", "--out", "seen", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in (tmp_path / "seen").iterdir()} == {"rnn.html", "rnn.svg", "lstm.html", "lstm.svg"}
    found = re.search(r"after 79 steps back: rnn (\S+), lstm (\S+)", done.stdout)
    assert found and float(found[2]) > 1000 * float(found[1])


def test_every_example_is_in_the_readme():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert SCRIPTS
    assert [script for script in SCRIPTS if f"`{script}`" not in readme] == []


@pytest.mark.slow
def test_digits_reach_their_accuracy(tmp_path):
    done = run_script("digits.py", folder=tmp_path)
    found = [float(v) for v in re.findall(r"; (\d+\.\d+) % of 450 held-out", done.stdout)]
    assert len(found) == 3, done.stdout + done.stderr
    assert sum(found) / 3 >= 97.0
    assert min(found) >= 96.0
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_custom_cell_solves_the_adding_problem(tmp_path):
    done = run_script("custom_cell.py", folder=tmp_path)
    found = re.search(r"on 2,000 fresh sequences: (\d\.\d+); of always saying 1: (\d\.\d+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) < 0.01
    assert abs(float(found[2]) - 1 / 6) < 0.02
    assert done.returncode == 0


@pytest.mark.slow
def test_char_lm_beats_the_table_of_triples(tmp_path):
    done = run_script("char_lm.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"held out: (\d\.\d+) bits per character; a table of triples (\d\.\d+)", done.stdout)
    assert found, done.stdout
    assert float(found[1]) < float(found[2])
