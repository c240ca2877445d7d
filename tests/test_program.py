"""Program: single assignment, the executor, apply, keys, printing; tracing with data-free tensors; trees."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.errors import TraceError
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Literal, Program
from tinygrad_lstm.trace import trace
from tinygrad_lstm.tree import flatten, leaf_paths, tree_map, unflatten

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def record(f: Any, *shapes: tuple[int, ...], dtype: Any = F64) -> Program:
    return trace(f, [Aval(s, dtype) for s in shapes], flat=True).program


def cell(x: Any, h: Any, w: Any) -> Any:
    i, g = ops.split(x @ w + h, 2, axis=-1)
    h = ops.concatenate([ops.sigmoid(i) * ops.tanh(g), i * 2.0], axis=-1)
    return h, h.sum()


SHAPES = [(2, 3), (2, 4), (3, 4)]


def operands() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s) for s in SHAPES]


# ---------------------------------------------------------------------------- structure


def test_every_slot_is_assigned_once_and_read_after_it_was_assigned():
    program = record(cell, *SHAPES)
    assigned = [*program.inputs, *program.captures]
    for equation in program.equations:
        assert set(equation.reads()) <= set(assigned)
        assigned += equation.outputs
    assert len(assigned) == len(set(assigned))
    assert {o for o in program.outputs if isinstance(o, int)} <= set(assigned)
    assert len(program) == len(program.equations)


def test_a_program_holds_shapes_and_dtypes_and_no_values():
    program = record(cell, *SHAPES)
    assert [tuple(a) for a in program.output_avals()] == [((2, 4), F64), ((), F64)]
    assert [program.avals[s].shape for s in program.inputs] == SHAPES
    for equation in program.equations:
        for operand in equation.operands:
            assert isinstance(operand, (int, Literal))


def test_from_a_tape_and_from_a_trace_come_the_same_numbers():
    args = operands()
    expected = [o.numpy() for o in cell(*map(tg.tensor, args))]
    tensors = [tg.tensor(a) for a in args]
    with tg.Tape() as tape:
        outs = cell(*tensors)
    for program in (tape.to_program(tensors, outs), record(cell, *SHAPES)):
        for found, e in zip(program.run(args), expected, strict=True):
            np.testing.assert_array_equal(found, e)
        again = program.run([a * 2 for a in args])
        for found, e in zip(again, cell(*[tg.tensor(a * 2) for a in args]), strict=True):
            np.testing.assert_array_equal(found, e.numpy())


def test_run_does_not_write_to_its_inputs():
    args = operands()
    before = [a.copy() for a in args]
    record(cell, *SHAPES).run(args)
    for a, b in zip(args, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_captures():
    w, bias = tg.tensor(np.full((2,), 3.0)), tg.tensor(np.array([1.0, 2.0]), requires_grad=True)
    traced = trace(lambda x: x * w + bias * w, [Aval((2,), F64)], flat=True)
    assert [id(c) for c in traced.captures] == [id(w), id(bias)]
    (out,) = traced.program.run([np.ones(2)], [w.numpy(), bias.numpy()])
    np.testing.assert_array_equal(out, [6.0, 9.0])
    (out,) = traced.program.run([np.ones(2)], [np.zeros(2), np.ones(2)])
    np.testing.assert_array_equal(out, [0.0, 0.0])


def test_outputs_that_are_inputs_captures_or_numbers():
    c = tg.tensor(np.array(5.0))
    traced = trace(lambda x: (x, c, 7.0, x * 1.0, x), [Aval((), F64)], flat=True)
    values = dict(zip(traced.captures, [t.numpy() for t in traced.captures], strict=True))
    found = traced.program.run([np.array(2.0)], list(values.values()))
    assert [float(v) for v in found] == [2.0, 5.0, 7.0, 2.0, 2.0]


def test_the_number_of_arguments_is_checked():
    program = record(cell, *SHAPES)
    with pytest.raises(tg.Error, match=r"3 inputs.*2"):
        program.run(operands()[:2])


def test_apply_runs_through_the_ops_and_is_recorded():
    program = record(cell, *SHAPES)
    args = [tg.tensor(a, requires_grad=True) for a in operands()]
    program.apply(args)[1].backward()
    expected = tg.grad(lambda *a: cell(*a)[1], (0, 1, 2))(*operands())
    for a, e in zip(args, expected, strict=True):
        np.testing.assert_allclose(a.grad, e.numpy(), rtol=1e-14)


def test_unused_outputs_and_dead_values():
    program = record(lambda x: (ops.split(x, 3)[1], ops.sin(x))[0], (6,))
    (out,) = program.run([np.arange(6.0)])
    np.testing.assert_array_equal(out, [2.0, 3.0])


# ---------------------------------------------------------------------------- identity and text


def test_equal_bodies_have_equal_keys_and_different_ones_do_not():
    key = record(cell, *SHAPES).key
    assert record(cell, *SHAPES).key == key
    others = [
        record(cell, *SHAPES, dtype=F32), record(cell, (5, 3), (5, 4), (3, 4)), record(lambda *a: cell(*a)[0], *SHAPES),
        record(lambda x, h, w: (lambda o: (o[0] * 1.0, o[1]))(cell(x, h, w)), *SHAPES),
        record(lambda *a: cell(*a)[::-1], *SHAPES),
    ]  # fmt: skip
    keys = [key, *(p.key for p in others)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("a", "b"), [
    (lambda x: x * 1.0, lambda x: x * 1), (lambda x: x * 1.0, lambda x: x * 1.0000000000000002),
    (lambda x: x + 0.0, lambda x: x + -0.0), (lambda x: x.sum(0), lambda x: x.sum(0, keepdims=True)),
    (lambda x: ops.leaky_relu(x, 0.1), lambda x: ops.leaky_relu(x, 0.2)), (lambda x: x[0], lambda x: x[1]),
    (lambda x: x - x.T, lambda x: x.T - x), (lambda x: x.astype(np.float32), lambda x: x.astype(np.float16)),
], ids=range(8))  # fmt: skip
def test_small_differences_change_the_key(a, b):
    assert record(a, (3, 3)).key != record(b, (3, 3)).key


def test_a_changed_rule_changes_the_key():
    tanh = tg.REGISTRY["tanh"]
    rules = tanh.rules
    before = record(lambda x: ops.tanh(x), (3,)).key
    try:
        tanh.set_rules((lambda g, out: g * 2.0 * (1.0 - out * out),))
        assert record(lambda x: ops.tanh(x), (3,)).key != before
    finally:
        tanh.set_rules(rules)


def test_printing():
    def named(x: Any) -> Any:
        with tg.scope("encoder"):
            gate = tg.name(ops.sigmoid(x), "i")
        return gate * 0.5

    program = record(named, (2, 3), dtype=F32)
    text = str(program)
    for word in ("sigmoid", "multiply", "float32[2,3]", ":i", "encoder", "0.5", "return"):
        assert word in text
    assert program.avals[program.labelled("i")].shape == (2, 3)
    with pytest.raises(tg.Error, match="'f'"):
        program.labelled("f")
    assert "2 equations" in repr(program)


# ---------------------------------------------------------------------------- tracing


@pytest.mark.parametrize("ask", [
    lambda t: float(t.sum()), lambda t: bool(t.sum() > 0), lambda t: int(t[0]), lambda t: t.item(),
    lambda t: t.tolist(), lambda t: t.numpy(),
    lambda t: np.asarray(t), lambda t: t.data, lambda t: f"{t.sum():.2f}", lambda t: [0, 1][t.astype(int)[0]],
    lambda t: np.array(t),
    lambda t: ops.dropout(t, 0.5), lambda t: t[t > 0], lambda t: t.detach().numpy(),
], ids=range(14))  # fmt: skip
def test_asking_a_traced_tensor_for_values_says_where(ask):
    with pytest.raises(TraceError) as caught:
        trace(lambda t: ask(t) and t, [Aval((1,), F64)], flat=True)
    assert "test_program.py" in str(caught.value) or "dropout" in str(caught.value) or "mask" in str(caught.value)
    _ = tg.tensor(1.0) * 2.0  # the recording is over


def test_shapes_and_dtypes_may_be_asked_for():
    def body(t: Any) -> Any:
        assert (t.shape, t.dtype, t.ndim, t.size, len(t)) == ((2, 3), F32, 2, 6, 2)
        assert "traced" in repr(t)
        return t.reshape(t.size) * float(t.shape[0]), sum(row.sum() for row in t)

    assert [tuple(a) for a in record(body, (2, 3), dtype=F32).output_avals()] == [((6,), F32), ((), F32)]


def test_errors_in_a_traced_body_are_those_of_the_op():
    with pytest.raises(tg.ShapeError, match="matmul"):
        record(lambda a, b: a @ b, (2, 3), (2, 3))
    with pytest.raises(tg.ShapeError):
        record(lambda a, b: a + b, (2,), (3,))


def test_trees_as_arguments_and_results():
    traced = trace(lambda s, x: {"h": s[0] + x["a"], "c": (s[1],)}, [(Aval((2,), F64),) * 2, {"a": Aval((2,), F64)}])
    out = unflatten(traced.out_tree, traced.program.run([np.ones(2), np.zeros(2), np.full(2, 5.0)]))
    assert out["h"].tolist() == [6.0, 6.0]
    assert out["c"][0].tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------------- trees

Pair = namedtuple("Pair", "left right")
LEAVES = st.integers() | st.text(max_size=2)
TREES = st.recursive(
    LEAVES | st.none(),
    lambda t: (
        st.lists(t, max_size=3)
        | st.tuples(t, t)
        | st.dictionaries(st.text(max_size=2), t, max_size=3)
        | st.builds(Pair, t, t)
    ),
    max_leaves=8,
)


@given(TREES)
def test_unflatten_is_the_inverse_of_flatten(tree):
    leaves, treedef = flatten(tree)
    assert unflatten(treedef, leaves) == tree
    assert treedef.n_leaves == len(leaves) == len(leaf_paths(tree))
    assert hash(treedef) == hash(flatten(tree)[1])
    assert tree_map(lambda x: x, tree) == tree
    assert [leaf for leaf in leaves if leaf is None] == []


def test_trees_of_different_structure_are_refused():
    with pytest.raises(tg.ShapeError, match="structure"):
        tree_map(lambda a, b: a, [1, 2], (1, 2))
    assert tree_map(lambda a, b: a + b, {"a": [1, None]}, {"a": [2, None]}) == {"a": [3, None]}
    assert leaf_paths({"a": [1, Pair(2, None)]}) == ["['a'][0]", "['a'][1][0]"]
