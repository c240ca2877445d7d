"""What is proved and generated before a loop runs natively: rows, views, the program's text, where it is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cells import body_of, recipes, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cells import CASES, F, H, outcome, runs

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.compiler import native
from tinygrad_lstm.compiler.expand import expand
from tinygrad_lstm.compiler.narrow import narrow
from tinygrad_lstm.compiler.rows import row_values
from tinygrad_lstm.compiler.views import Root, View, contiguous, is_contiguous
from tinygrad_lstm.compiler.writer import collapsed
from tinygrad_lstm.kernels import codecache
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Program
from tinygrad_lstm.trace import trace

__all__ = ["runs"]

Runs = list[bool]
N = 4  # rows, and the width of everything: no shape tells one from the other

# ---------------------------------------------------------------------------- which rows depend on which


def program_of(body: Callable[..., Any], *shapes: tuple[int, ...], captures: int = 0) -> Program:
    """A program of float64 inputs; the last ``captures`` of them are captures."""
    traced = trace(lambda *leaves: body(*leaves), [Aval(shape, np.float64) for shape in shapes], flat=True)
    inputs = traced.program.inputs
    n = len(inputs) - captures
    return traced.program.replaced(inputs=inputs[:n], captures=(*inputs[n:], *traced.program.captures))


square = (N, N)
cube = (N, N, N)
ROW_BY_ROW: dict[str, tuple[Any, ...]] = {
    "product with a matrix": (lambda h, u: [h @ u], square, square, 1),
    "product of a row's matrices": (lambda h, u: [h @ ops.swapaxes(h, 1, 2) + u], cube, square, 1),
    "product with matrices of every row": (lambda h, u: [h @ u], cube, cube, 1),
    "one matrix times a row's": (lambda h, u: [u @ h], cube, square, 1),
    "row sums": (lambda h, u: [h * h.sum(axis=-1, keepdims=True) + u], square, square, 1),
    "softmax of a row": (lambda h, u: [ops.softmax(h) * u], square, square, 1),
    "features reversed": (lambda h, u: [h[:, ::-1] + h[..., :1] + u], square, square, 1),
    "a row's axes swapped": (lambda h, u: [ops.swapaxes(h, 1, 2) + u], cube, square, 1),
    "a row reshaped": (lambda h, u: [ops.tanh(h.reshape(N, 2, 2)).reshape(N, N) * u], square, square, 1),
    "one vector for all": (lambda h, u: [h + u], square, (N,), 1),
    "transposed twice": (lambda h, u: [(h @ u.T) * 2.0], square, square, 1),
    "features rotated": (lambda h, u: [ops.concatenate([h[:, 1:], h[:, :1]], axis=1) * u], square, square, 1),
}
MIXED: dict[str, tuple[Any, ...]] = {
    "transposed": (lambda h, u: [h.T @ u], square, square, 1, "transpose"),
    "times itself": (lambda h, u: [h @ h + u], square, square, 1, "matmul"),
    "on the right": (lambda h, u: [u @ h], square, square, 1, "matmul"),
    "a vector times a matrix": (lambda h, u: [h @ u], (N,), square, 1, "reshape"),
    "a vector added to rows": (lambda h, b: [ops.tanh(h + b), b], square, (N,), 0, "add"),
    "batch mean": (lambda h, u: [h - h.mean(axis=0) + u], square, square, 1, "sum"),
    "batch sum kept": (lambda h, u: [h - h.sum(axis=0, keepdims=True) + u], square, square, 1, "sum"),
    "sum of everything": (lambda h, u: [h * h.sum() + u], square, square, 1, "sum"),
    "batch softmax": (lambda h, u: [ops.softmax(h, axis=0) + u], square, square, 1, "softmax"),
    "batch maximum": (lambda h, u: [h - ops.max(h, axis=0) + u], square, square, 1, "max"),
    "batch reversed": (lambda h, u: [h[::-1] + u], square, square, 1, "getitem"),
    "batch flipped": (lambda h, u: [ops.flip(h, 0) + u], square, square, 1, "flip"),
    "batch rolled": (lambda h, u: [ops.roll(h, 1, axis=0) + u], square, square, 1, "roll"),
    "batch cumulated": (lambda h, u: [ops.cumsum(h, axis=0) + u], square, square, 1, "cumsum"),
    "the first row for all": (lambda h, u: [h + h[0] + u], square, square, 1, "getitem"),
    "rows in halves": (lambda h, u: [ops.concatenate([h[2:], h[:2]], axis=0) + u], square, square, 1, "getitem"),
    "merged with a row's axis": (
        lambda h, u: [ops.softmax(h.reshape(2, 2 * N)).reshape(N, N) + u], square, square, 1, "reshape",
    ),
    "a new axis in front": (lambda h, u: [(h[None] * u[:, :, None]).sum(axis=1)], square, square, 1, "getitem"),
    "batch axis moved": (lambda h, u: [ops.swapaxes(h, 0, 1) * u], cube, square, 1, "transpose"),
    "rows against rows": (lambda h, u: [(h[:, None] * h[None]).sum(axis=1) + u], square, square, 1, "getitem"),
    "outer product over rows": (lambda h, u: [h.T @ h + u], square, square, 1, "transpose"),
}  # fmt: skip


def depends_across(program: Program, seed: int = 0) -> bool:
    """Whether changing row 0 of what changes from step to step changes another row of the results."""
    rng = np.random.default_rng(seed)
    values = lambda slots: [0.7 * rng.standard_normal(program.avals[s].shape) for s in slots]
    inputs, captures = values(program.inputs), values(program.captures)
    changed = [a.copy() for a in inputs]
    for a in changed:
        a[0] += 1.0
    before, after = program.run(inputs, captures), program.run(changed, captures)
    same = lambda a, b: not np.shape(a) or np.allclose(a[1:], b[1:], rtol=1e-9, atol=1e-12)
    return not all(map(same, before, after))


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_rows_that_stay_apart(name: str) -> None:
    body, *shapes, captures = ROW_BY_ROW[name]
    program = program_of(body, *shapes, captures=captures)
    found = row_values(program, 1)
    assert found.mixing is None and found.batch == N
    assert not depends_across(program)
    assert {slot for slot in program.outputs if isinstance(slot, int)} <= found.mapped


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_mix(name: str) -> None:
    """The proof fails, and says at which operation; the numbers say that it has to."""
    body, *shapes, captures, op = MIXED[name]
    program = program_of(body, *shapes, captures=captures)
    found = row_values(program, 1 if captures else 2)
    assert found.mixing is not None and found.mixing.equation.primitive.name == op and found.mixing.why
    assert depends_across(program)


def test_a_batch_of_one_is_not_spread_over_rows() -> None:
    """(1, H) + (5, H): five rows of results for one row of the batch."""
    for body, wide in ((lambda h, u: [h * 2.0, h + u], (5, N)), (lambda h, u: [h * 2.0, h[:, None] @ u], (5, N, N))):
        program = program_of(body, (1, N), wide, captures=1)
        assert row_values(program, 1).mixing is not None


@settings(max_examples=100)
@given(recipe=recipes(), seed=st.integers(0, 99))
def test_proved_rows_are_independent(recipe: Any, seed: int) -> None:
    """Random bodies, before and after the passes: where the proof holds, row 0 changes nothing else."""
    program = random_program(recipe, seed)
    for shown in (program, narrow(expand(program))):
        if row_values(shown, 2).mixing is None:
            assert not depends_across(shown, seed)


# ---------------------------------------------------------------------------- passes on the executor


def random_program(recipe: Any, seed: int) -> Program:
    t = tensors(seed, 2)
    body = body_of(recipe, t)

    def flat(h: Any, c: Any, x: Any) -> list[Any]:
        (new_h, new_c), ys = body((h, c), x)
        return [new_h, new_c, *(ys[key] for key in sorted(ys))]

    return trace(flat, [Aval(t[key].shape[key == "x" :], np.float64) for key in "hcx"], flat=True).program


@settings(max_examples=60)
@given(recipe=recipes(), seed=st.integers(0, 99), special=st.sampled_from([None, np.nan, np.inf, -np.inf, 1e4]))
def test_expanding_and_narrowing_keep_the_values(recipe: Any, seed: int, special: float | None) -> None:
    program = random_program(recipe, seed)
    rng = np.random.default_rng(seed)
    values = lambda slots: [rng.standard_normal(program.avals[s].shape) for s in slots]
    inputs, captures = values(program.inputs), values(program.captures)
    if special is not None:
        inputs[0][1, 2] = special
        inputs[2][2, :] = special
    with np.errstate(all="ignore"):
        for a, b in zip(program.run(inputs, captures), narrow(expand(program)).run(inputs, captures), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-12)


def test_composites_are_taken_apart() -> None:
    body = lambda h: [
        ops.softmax(h),
        ops.logsumexp(h, axis=-1),
        ops.norm(h, axis=-1),
        h.reshape(N, 2, 2).sum(axis=(1, 2)),
    ]
    names = {e.primitive.name for e in expand(program_of(body, square)).equations}
    assert not names & {"softmax", "logsumexp", "norm"} and {"sum", "max", "exp"} <= names
    split = narrow(program_of(lambda h: list(ops.chunk(ops.tanh(h * 2.0), 2)), square))
    assert split.equations[0].primitive.name == "split"


# ---------------------------------------------------------------------------- views


@st.composite
def views(draw: Any) -> tuple[np.ndarray, View]:
    """An array of offsets and the view that describes it."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    array = 8 * np.arange(int(np.prod(shape))).reshape(shape)
    view = View(Root("t", 0), 0, tuple(shape), contiguous(shape, 8), np.dtype("float64"))
    for axis in range(len(shape)):
        start, step = draw(st.integers(0, array.shape[axis] - 1)), draw(st.sampled_from([1, 1, 2, -1]))
        index = (slice(None),) * axis + (slice(start, None, step),)
        moved = start * view.strides[axis]
        array = array[index]
        strides = tuple(s * step if k == axis else s for k, s in enumerate(view.strides))
        view = view.moved(moved, array.shape, strides)
    order = draw(st.permutations(range(array.ndim)))
    view = view.moved(0, tuple(view.shape[k] for k in order), tuple(view.strides[k] for k in order))
    return array.transpose(order), view


def offsets(view: View) -> np.ndarray:
    grid = np.indices(view.shape).reshape(len(view.shape), -1)
    return view.offset + np.array(view.strides, int) @ grid


@given(pair=views(), data=st.data())
def test_views_are_those_of_numpy(pair: tuple[np.ndarray, View], data: Any) -> None:
    array, view = pair
    np.testing.assert_array_equal(offsets(view), array.ravel())
    wide = (*data.draw(st.lists(st.integers(1, 3), max_size=2)), *(n if n > 1 else 3 for n in view.shape))
    np.testing.assert_array_equal(offsets(view.broadcast(wide)), np.broadcast_to(array, wide).ravel())
    goal = data.draw(st.sampled_from([(array.size,), (1, *array.shape), (*array.shape, 1), (1, array.size, 1)]))
    reshaped = view.reshaped(goal)
    if reshaped is not None:
        np.testing.assert_array_equal(offsets(reshaped), array.reshape(goal).ravel())
    else:
        assert not is_contiguous(view)


@given(pair=views(), last_fixed=st.booleans())
def test_collapsed_loops_visit_the_same_elements(pair: tuple[np.ndarray, View], last_fixed: bool) -> None:
    _, view = pair
    dense = contiguous(view.shape, 8)
    lengths, (a, b) = collapsed(view.shape, [view.strides, dense], last_fixed)
    assert len(lengths) <= max(1, len(view.shape)) and all(x != 1 for x in lengths[:-1])
    if last_fixed:
        assert lengths[-1] == view.shape[-1]
    for strides, expected in ((a, view.strides), (b, dense)):
        loops = View(view.root, view.offset, tuple(lengths), tuple(strides), view.dtype)
        np.testing.assert_array_equal(offsets(loops), offsets(view.moved(0, view.shape, tuple(expected))))


# ---------------------------------------------------------------------------- when, and in what words


def test_neither_steps_nor_rows_are_in_the_text(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another length or batch compiles nothing, and finds the same text."""
    case = CASES["in_loop_input"]
    sources: list[list[str]] = []
    compiled = []
    run, program = native.NativeLoop.run, codecache._program
    watched = lambda self, *given: sources[-1].append(self.source) or run(self, *given)
    monkeypatch.setattr(native.NativeLoop, "run", watched)
    for steps, rows in ((3, 5), (11, 5), (3, 7), (1, 6), (2, 1), (6, 23)):
        sources.append([])
        outcome(case.make, *case.arrays(0, steps, rows), eager=False)
        monkeypatch.setattr(codecache, "_program", lambda *given: compiled.append(given) or program(*given))
    assert runs == [True] * 12 and len(sources[0]) == 2
    assert all(found == sources[0] for found in sources) and not compiled
    ops.scan(lambda h, x: (ops.tanh(h * 0.731 + x),) * 2, np.zeros((5, H)), np.ones((3, 5, H)))
    assert compiled, "a new program is compiled: the count above can tell"


def test_mixed_rows_are_reported(runs: Runs) -> None:
    case = CASES["batch_norm"]
    init, xs, captures = case.arrays(0, 3, 5)
    ops.scan(case.make(captures), init, xs)
    assert runs == [False]
    (note,) = tg.explain().notes
    assert "one thread" in note and "sum over the batch axis" in note and "native_cells.py" in note


def test_what_has_no_native_form_says_why(runs: Runs) -> None:
    case = CASES["scattered"]
    init, xs, captures = case.arrays(0, 3, 5)
    ops.scan(case.make(captures), init, xs)
    assert ("scatter_add", "no native form of scatter_add") in {
        (entry.op, entry.why) for entry in tg.explain().not_lowered
    }
    counting = lambda carry, x: ((ops.tanh(carry[0] + x), (carry[1] + 1) ** 3), carry[1])
    (_, n), ys = ops.scan(counting, (np.zeros((5, F)), np.zeros(5, int)), np.ones((3, 5, F)))
    assert "elementwise maths on int64" in {entry.why for entry in tg.explain().not_lowered}
    assert n.tolist() == [729] * 5 and ys.numpy()[:, 0].tolist() == [0, 1, 8]
    assert not runs


@pytest.mark.parametrize("kind", [np.float16, ">f8"])
def test_dtypes_without_native_form(kind: Any, runs: Runs) -> None:
    """Also where nothing but a sum reads them."""
    arrays = np.random.default_rng(0).standard_normal((5, 3, H)).astype(kind), np.zeros((5, H)), np.ones((3, 5, H))

    def body(carry: Any, x: Any) -> Any:
        memory, s = carry
        s = ops.tanh(s + memory.sum(axis=1).astype(np.float64) * x)
        return (memory, s), s

    found = ops.scan(body, arrays[:2], arrays[2])[1].numpy()
    with tg.eager():
        np.testing.assert_allclose(found, ops.scan(body, arrays[:2], arrays[2])[1].numpy(), rtol=1e-12)
    assert not runs


def test_when_a_loop_is_compiled(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    case = CASES["in_loop_input"]
    small, large = case.arrays(0, 2, 1), case.arrays(0, 40, 64)
    for mode, expected in (("never", []), ("always", [True] * 4), ("auto", [True] * 2), ("never", [])):
        monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", mode)
        runs.clear()
        for arrays in (small, large):
            outcome(case.make, *arrays, eager=False)
        assert runs == expected, mode


# ---------------------------------------------------------------------------- other processes, other machines

SCRIPT = """
import json, sys
import numpy as np
import tinygrad_lstm as tg
from tinygrad_lstm import nn
from tinygrad_lstm.compiler import native
from tinygrad_lstm.kernels import codecache
runs = []
run = native.NativeLoop.run
native.NativeLoop.run = lambda self, *a: runs.append(self.split) or run(self, *a)
tg.seed(0)
found = []
for layer in (nn.LSTM(3, 9), nn.Recurrent(nn.LayerNormLSTMCell(3, 5, dtype=np.float64))):
    x = np.random.default_rng(0).standard_normal((4, 7, 3))
    x = x.astype(np.float32) if isinstance(layer, nn.LSTM) else x
    y = layer(x)[0]
    (y * y).sum().backward()
    found += [y.numpy().astype(float).tolist(), *(p.grad.astype(float).tolist() for p in layer.parameters())]
print(json.dumps({"runs": runs, "found": found, "translates": "tinygrad_lstm.kernels.translate" in sys.modules,
                  "compiled": sum(program.compiled for program in codecache._loaded.values())}))
"""


def in_a_process(folder: Path, **variables: str) -> dict[str, Any]:
    environment = os.environ | {"TINYGRAD_LSTM_CACHE_DIR": str(folder), "TINYGRAD_LSTM_COMPILE": "always"} | variables
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def flat(nested: Any) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in nested])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A filled cache, and what the process said that filled it."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, in_a_process(folder)


@pytest.mark.slow
def test_a_second_process_compiles_nothing(here: tuple[Path, dict[str, Any]]) -> None:
    folder, first = here
    second = in_a_process(folder)
    assert first["runs"] == second["runs"] == [True] * 4
    assert second["found"] == first["found"]
    assert first["compiled"] > 4 and second["compiled"] == 0
    assert first["translates"] and not second["translates"], "what only compiling needs is not imported"


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [{"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}, {"NUMBA_CPU_NAME": "x86-64"},
     {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}],
    ids=["avx2", "x86-64", "generic"],
)  # fmt: skip
def test_older_processors(variables: dict[str, str], here: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Vectors of other lengths, and none of the newer instructions: the same numbers up to rounding."""
    there = in_a_process(tmp_path, **variables)
    assert there["runs"] == [True] * 4
    np.testing.assert_allclose(flat(there["found"]), flat(here[1]["found"]), rtol=0, atol=2e-5)
