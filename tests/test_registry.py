"""Every primitive of the registry, enrolled in every check.  A primitive without sample inputs fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from samples import BINARY, NO_ZERO_D, SAMPLES, ZERO_D, ZERO_SIZE, Sample, spread

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.errors import TraceError
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.trace import trace
from tinygrad_lstm.tree import flatten


def cases(table: dict[str, list[Sample]], needs_gradient: bool = False) -> list[Any]:
    return [
        pytest.param(name, s, id=f"{name}-{k}")
        for name, samples in sorted(table.items())
        for k, s in enumerate(samples)
        if not needs_gradient or (name in tg.REGISTRY and tg.REGISTRY[name].differentiable and s.floats())
    ]


ALL = cases(SAMPLES)
SMOOTH = cases(SAMPLES, needs_gradient=True)


def leaves(tree: Any) -> list[Any]:
    return flatten(tree)[0]


def float_outputs(result: Any) -> list[tg.Tensor]:
    return [t for t in leaves(result) if t.dtype.kind == "f"]


def only_floats(name: str, s: Sample) -> tuple[Any, list[np.ndarray]]:
    """The application as a function of its floating operands alone (returning floating outputs), and their values."""
    function, chosen = s.function(name), s.floats()

    def call(*floats: Any) -> Any:
        args = list(s.args)
        for k, value in zip(chosen, floats, strict=True):
            args[k] = value
        return tuple(float_outputs(function(*args)))

    return call, [s.args[k] for k in chosen]


def like(rng: np.random.Generator, arrays: list[Any]) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(rng.standard_normal(a.shape)) for a in arrays)


def inner(a: Any, b: Any) -> float:
    return float(sum(np.sum(np.asarray(x) * np.asarray(y)) for x, y in zip(a, b, strict=True)))


# ---------------------------------------------------------------------------- who is enrolled


REFUSES = {"opaque"}  # differentiating it is an error: test_primitive.py


def not_enrolled(registry: dict[str, Any]) -> list[str]:
    """Primitives without samples, and differentiable ones none of whose samples has a floating operand."""
    own = {name: p for name, p in registry.items() if not name.startswith(("test_", "doc_")) and name not in REFUSES}
    missing = [name for name in own if not (SAMPLES.get(name) and ZERO_SIZE.get(name))]
    missing += [name for name in own if not (ZERO_D.get(name) or name in NO_ZERO_D)]
    missing += [n for n, p in own.items() if p.differentiable and not any(s.floats() for s in SAMPLES.get(n, []))]
    return sorted(set(missing))


def test_every_primitive_has_samples():
    assert not_enrolled(tg.REGISTRY) == []


def test_samples_name_existing_primitives():
    assert sorted({*SAMPLES, *ZERO_SIZE, *ZERO_D} - tg.REGISTRY.keys()) == []


def test_a_primitive_without_samples_is_noticed():
    prim = tg.REGISTRY["tanh"]
    assert not_enrolled({**tg.REGISTRY, "unheard_of": prim}) == ["unheard_of"]


def test_a_primitive_without_a_vjp_sample_is_noticed(monkeypatch):
    monkeypatch.setitem(SAMPLES, "tanh", [Sample((np.array([1, 2]),), {})])
    assert not_enrolled(tg.REGISTRY) == ["tanh"]


# ---------------------------------------------------------------------------- the checker itself


def made_up(request: pytest.FixtureRequest, vjp: Any, **keywords: Any) -> Any:
    """A primitive that lives as long as one test."""
    name = f"test_{request.node.name}"
    request.addfinalizer(lambda: tg.REGISTRY.pop(name, None))
    return tg.primitive(name, forward=lambda x: np.sin(x), vjp=vjp, **keywords)


def test_gradcheck_accepts_the_right_rule(request):
    good = made_up(request, lambda g, x: g * ops.cos(x))
    assert tg.gradcheck(good, spread((3,)), order=2)


@pytest.mark.parametrize("factor", [1.001, 0.999, -1.0, 0.0])
def test_gradcheck_rejects_a_slightly_wrong_rule(request, factor):
    bad = made_up(request, lambda g, x: g * ops.cos(x) * factor)
    with pytest.raises(tg.GradcheckError, match="argument 0, index"):
        tg.gradcheck(bad, spread((3,)))


def test_gradcheck_rejects_a_wrong_second_derivative(request):
    # The first derivative is right; the part of the rule that depends on x is hidden from the tape.
    bad = made_up(request, lambda g, x: g * ops.stop_gradient(ops.cos(x)))
    assert tg.gradcheck(bad, spread((3,)))
    with pytest.raises(tg.GradcheckError, match="second derivative"):
        tg.gradcheck(bad, spread((3,)), order=2)


def test_gradcheck_rejects_one_wrong_element(request):
    wrong = np.array([1.0, 1.0, 1.001])
    bad = made_up(request, lambda g, x: g * ops.cos(x) * wrong)
    with pytest.raises(tg.GradcheckError, match=r"index \(2,\)"):
        tg.gradcheck(bad, spread((3,)))


def test_the_jvp_check_rejects_a_slightly_wrong_jvp(request):
    bad = made_up(request, lambda g, x: g * ops.cos(x), jvp=lambda t, x, out: t[0] * ops.cos(x) * 1.001)
    s = Sample((spread((3,)),), {})
    with pytest.raises(AssertionError):
        test_jvp_is_the_transpose_of_vjp(bad.name, s)
    with pytest.raises(AssertionError):
        test_jvp_against_differences(bad.name, s)


# ---------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("name", "s"), SMOOTH)
def test_gradcheck(name, s, order):
    tolerance = {"rtol": 1e-3, "atol": 1e-3, "step": 1e-3} if s.params.get("dtype") == np.float32 else {}
    assert tg.gradcheck(s.function(name) if order == 1 else s.squared(name), *s.args, order=order, **tolerance)


@pytest.mark.parametrize(("name", "s"), SMOOTH)
def test_jvp_against_differences(name, s):
    rng = np.random.default_rng(5)
    call, points = only_floats(name, s)
    directions = like(rng, points)
    out, tangent = tg.jvp(call, tuple(points), directions)
    coarse = any(o.dtype == np.float32 for o in out)
    h, tolerance = (1e-3, 1e-3) if coarse else (1e-6, 1e-7)
    ahead = call(*[p + h * d for p, d in zip(points, directions, strict=True)])
    behind = call(*[p - h * d for p, d in zip(points, directions, strict=True)])
    for o, t, a, b in zip(out, tangent, ahead, behind, strict=True):
        assert t.shape == o.shape
        assert t.dtype == o.dtype
        np.testing.assert_allclose(t.numpy(), (a.numpy() - b.numpy()) / (2 * h), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "s"), SMOOTH)
def test_jvp_is_the_transpose_of_vjp(name, s):
    rng = np.random.default_rng(6)
    call, points = only_floats(name, s)
    v = like(rng, points)
    out, pullback = tg.vjp(call, *points)
    w = tuple(a.astype(o.dtype) for a, o in zip(like(rng, out), out, strict=True))
    pulled = pullback(w)
    pushed = tg.jvp(call, tuple(points), v)[1]
    scale = max(1.0, abs(inner(pushed, w)))
    rtol = 1e-6 if any(o.dtype == np.float32 for o in out) else 1e-12
    assert abs(inner(pushed, w) - inner(v, pulled)) <= rtol * scale


@pytest.mark.parametrize(("name", "s"), SMOOTH)
def test_forward_over_reverse_is_reverse_over_reverse(name, s):
    rng = np.random.default_rng(7)
    call, points = only_floats(name, s)
    weights = [np.asarray(rng.uniform(0.5, 1.5, o.shape)) for o in call(*points)]
    v = like(rng, points)

    def scalar(*xs: Any) -> Any:
        return sum(((o * o * w).sum() for o, w in zip(call(*xs), weights, strict=True)), tg.asarray(0.0))

    numbers = tuple(range(len(points)))
    forward = tg.jvp(tg.grad(scalar, numbers), tuple(points), v)[1]

    def slope(*xs: Any) -> Any:
        return sum(((g * d).sum() for g, d in zip(tg.grad(scalar, numbers)(*xs), v, strict=True)), tg.asarray(0.0))

    reverse = tg.grad(slope, numbers)(*points)
    rtol = 1e-5 if s.params.get("dtype") == np.float32 else 1e-9
    for f, r in zip(forward, reverse, strict=True):
        np.testing.assert_allclose(f.numpy(), r.numpy(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", sorted(set(tg.REGISTRY) & set(SAMPLES)))
def test_a_primitive_without_derivative_gives_none(name):
    if tg.REGISTRY[name].differentiable:
        return
    for s in SAMPLES[name]:
        args = [tg.tensor(a, requires_grad=a.dtype.kind == "f") if isinstance(a, np.ndarray) else a for a in s.args]
        for out in leaves(s.function(name)(*args)):
            assert not out.requires_grad
            with tg.Tape() as tape:
                out = leaves(s.function(name)(*args))[0]
            floats = [a for a in args if isinstance(a, tg.Tensor) and a.dtype.kind == "f"]
            assert tape.gradient(out, floats, np.ones(out.shape)) == [None] * len(floats)


# ---------------------------------------------------------------------------- broadcasting, layouts, odd shapes

PAIRS = [
    ((3, 4), (4,)),
    ((3, 1), (1, 4)),
    ((), (2, 3)),
    ((1,), (2, 3)),
    ((2, 3), ()),
    ((2, 1, 3), (4, 1)),
    ((0, 1), (1, 3)),
]


@pytest.mark.parametrize("shapes", PAIRS, ids=str)
@pytest.mark.parametrize("name", sorted(n for n in BINARY if tg.REGISTRY[n].differentiable))
def test_broadcast_gradient_is_the_summed_gradient(name, shapes):
    """Against the same op on operands that were repeated beforehand: the gradient is then summed by NumPy."""
    low, high = BINARY[name]
    x, y = spread(shapes[0], low, high), spread(shapes[1], low, high + 0.1, 1)
    full = np.broadcast_shapes(*shapes)
    w = spread(full, seed=2)
    out, pullback = tg.vjp(tg.REGISTRY[name], x, y)
    assert out.shape == full
    _, plain = tg.vjp(tg.REGISTRY[name], np.array(np.broadcast_to(x, full)), np.array(np.broadcast_to(y, full)))
    for got, wide, operand in zip(pullback(w), plain(w), (x, y), strict=True):
        lead = len(full) - operand.ndim
        axes = (*range(lead), *(k + lead for k, n in enumerate(operand.shape) if n == 1))
        np.testing.assert_allclose(got.numpy(), wide.numpy().sum(axes).reshape(operand.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "s"), cases(ZERO_SIZE))
def test_zero_size(name, s):
    check_values_and_gradients(name, s, s.args)


@pytest.mark.parametrize(("name", "s"), cases(ZERO_D))
def test_zero_d(name, s):
    check_values_and_gradients(name, s, s.args)
    if tg.REGISTRY[name].differentiable and s.floats() and s.params.get("dtype") != np.float32:
        assert tg.gradcheck(s.function(name), *s.args, order=2)


def strided(a: np.ndarray) -> np.ndarray:
    """The same values, every second element of a larger array."""
    if not a.ndim:
        return a
    wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), 99, a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


LAYOUTS = {
    "strided": strided,
    "fortran": lambda a: np.asfortranarray(a),
    "reversed": lambda a: np.flip(np.flip(a).copy())[...] if a.ndim else a,
    "readonly": lambda a: np.broadcast_to(a, a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "s"), ALL)
def test_layouts(name, s, layout):
    args = [LAYOUTS[layout](a) if isinstance(a, np.ndarray) else a for a in s.args]
    before = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
    check_values_and_gradients(name, s, args)
    for a, b in zip(args, before, strict=True):
        np.testing.assert_array_equal(a, b)  # nothing was written to an operand


def check_values_and_gradients(name: str, s: Sample, args: Any) -> None:
    """Values, gradients and tangents on ``args`` equal those on fresh contiguous copies, with the right shapes."""
    plain = s._replace(args=tuple(np.array(a, order="C") if isinstance(a, np.ndarray) else a for a in args))
    out = leaves(s.function(name)(*args))
    expected = leaves(plain.function(name)(*plain.args))
    for o, e in zip(out, expected, strict=True):
        assert (o.shape, o.dtype) == (e.shape, e.dtype)
        np.testing.assert_allclose(o.numpy(), e.numpy(), rtol=1e-14, atol=1e-14)
    call, points = only_floats(name, s._replace(args=tuple(args)))
    if not points or not tg.REGISTRY[name].differentiable:
        return
    rng = np.random.default_rng(8)
    results, pullback = tg.vjp(call, *points)
    w = like(rng, results)
    grads = pullback(w)
    call_plain, points_plain = only_floats(name, plain)
    grads_plain = tg.vjp(call_plain, *points_plain)[1](w)
    tangents = tg.jvp(call, tuple(points), like(rng, points))[1]
    assert [t.shape for t in tangents] == [r.shape for r in results]
    for g, e, p in zip(grads, grads_plain, points, strict=True):
        assert (g.shape, g.dtype) == (p.shape, p.dtype)
        np.testing.assert_allclose(g.numpy(), e.numpy(), rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("name", "s"), ALL)
def test_float32_against_float64(name, s):
    narrow = s._replace(args=tuple(a.astype(np.float32) if k in s.floats() else a for k, a in enumerate(s.args)))
    wide = s._replace(args=tuple(a.astype(np.float64) if k in s.floats() else a for k, a in enumerate(narrow.args)))
    fixed = "dtype" in s.params
    out = leaves(narrow.function(name)(*narrow.args))
    for o, e in zip(out, leaves(wide.function(name)(*wide.args)), strict=True):
        assert fixed or o.dtype == (np.float32 if e.dtype == np.float64 else e.dtype)
        np.testing.assert_allclose(o.numpy(), e.numpy(), rtol=2e-5, atol=2e-5)
    if not tg.REGISTRY[name].differentiable:
        return
    call, points = only_floats(name, narrow)
    results, pullback = tg.vjp(call, *points)
    w = like(np.random.default_rng(9), results)
    call64, points64 = only_floats(name, wide)
    for g, e in zip(pullback(w), tg.vjp(call64, *points64)[1](w), strict=True):
        assert g.dtype == np.float32
        np.testing.assert_allclose(g.numpy(), e.numpy(), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- Program against eager


@pytest.mark.parametrize(("name", "s"), [*ALL, *cases(ZERO_SIZE), *cases(ZERO_D)])
def test_program_runs_as_eager(name, s):
    arrays = [a for a in s.args if isinstance(a, np.ndarray)]

    def body(*tensors: Any) -> Any:
        rest = iter(tensors)
        return leaves(s.function(name)(*[next(rest) if isinstance(a, np.ndarray) else a for a in s.args]))

    avals = [Aval(a.shape, a.dtype) for a in arrays]
    if name == "getitem" and any(a.dtype == bool for a in arrays):
        with pytest.raises(TraceError, match="mask"):
            trace(body, avals, flat=True)
        return
    recorded = trace(body, avals, flat=True)
    expected = leaves(s.function(name)(*s.args))
    assert [(a.shape, a.dtype) for a in recorded.program.output_avals()] == [(e.shape, e.dtype) for e in expected]
    found = recorded.program.run(arrays, [c.numpy() for c in recorded.captures])
    for f, e in zip(found, expected, strict=True):
        assert (np.shape(f), np.asarray(f).dtype) == (e.shape, e.dtype)
        np.testing.assert_array_equal(f, e.numpy())
    assert name in str(recorded.program) or name in {"checkpoint", "compiled"}


# ---------------------------------------------------------------------------- one more leading axis


def batchable() -> list[Any]:
    """Those that declare it, with operands of one rank."""

    def fits(s: Sample) -> bool:
        return len({a.ndim for a in s.args if isinstance(a, np.ndarray)}) == 1

    return [
        c for c in ALL if c.values[0] in tg.REGISTRY and tg.REGISTRY[c.values[0]].batch == "same" and fits(c.values[1])
    ]


@pytest.mark.parametrize(("name", "s"), batchable())
def test_what_declares_batch_same_is_right_with_one_more_axis(name, s):
    """``batch="same"``: with the same parameters, a stack of operands gives the stack of the results."""
    arrays = [k for k, a in enumerate(s.args) if isinstance(a, np.ndarray)]
    steps = [[a + 0.01 * t if k in s.floats() else a for k, a in enumerate(s.args)] for t in range(3)]
    stacked = [np.stack([step[k] for step in steps]) if k in arrays else a for k, a in enumerate(s.args)]
    together = leaves(s.function(name)(*stacked))
    apart = [leaves(s.function(name)(*step)) for step in steps]
    for k, whole in enumerate(together):
        np.testing.assert_allclose(whole.numpy(), np.stack([a[k].numpy() for a in apart]), rtol=1e-13, atol=1e-13)
