"""Steps and clipping of many tensors in one native call: the same as tensor by tensor, and noticed as before."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_optim import CASES, IDS

import tinygrad_lstm as tg
from tinygrad_lstm import nn, optim
from tinygrad_lstm.kernels import codecache, multi
from tinygrad_lstm.kernels import expression as e
from tinygrad_lstm.kernels.elementwise import THRESHOLD
from tinygrad_lstm.kernels.multi import multi_tensor, sums_of_squares, worth_a_kernel

SHAPES = [(65, 131), (), (5,), (0, 3), (16, 16), (1, 7), (7, 1), (2, 3, 4), (64, 128)]


@pytest.fixture
def native(monkeypatch):
    """Every call is worth a kernel."""
    monkeypatch.delenv("TINYGRAD_LSTM_NATIVE", raising=False)
    monkeypatch.setattr(multi, "ARRAY_WEIGHT", THRESHOLD)


@pytest.fixture
def no_compiler(monkeypatch):
    """Asking for native code is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("native code was asked for")

    multi_tensor.cache_clear()  # with what it has compiled
    monkeypatch.setattr(codecache, "load", refuse)


def plainly(monkeypatch, function):
    """Run something without native code."""
    with monkeypatch.context() as patch:
        patch.setenv("TINYGRAD_LSTM_NATIVE", "0")
        return function()


@pytest.fixture
def torch_in_double():
    """torch; it keeps numbers like NAdam's product of momenta in its default dtype."""
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch
    torch.set_default_dtype(before)


def twins(shapes, dtype, seed=0):
    """The same parameters twice."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    return tuple([nn.Parameter(np.array(v)) for v in values] for _ in range(2))


def stored(gradient, layout):
    """The same values otherwise in memory, never the same array."""
    gradient = np.array(gradient)
    if layout == "transposed":
        return np.array(gradient, order="F")
    if layout == "strided":
        return np.repeat(gradient, 2, axis=-1)[..., ::2] if gradient.ndim else gradient
    if layout == "read-only":
        gradient.setflags(write=False)
    return gradient


# ---------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize(
    "name, options, dtype",
    [(*case, "float64") for case in CASES] + [(*CASES[k], "float32") for k in (2, 6, 10, 12, 16)],
    ids=[*IDS, *[f"{IDS[k]}-float32" for k in (2, 6, 10, 12, 16)]],
)
def test_native_steps_have_the_bits_of_numpy(name, options, dtype, layout, monkeypatch, native):
    ours, others = twins(SHAPES, dtype)
    fast, slow = getattr(optim, name)(ours, **options), getattr(optim, name)(others, **options)
    rng = np.random.default_rng(1)
    for _ in range(3):
        for p, q in zip(ours, others, strict=True):
            gradient = rng.normal(size=p.shape).astype(dtype)
            p.grad, q.grad = stored(gradient, layout), gradient
        fast.step()
        plainly(monkeypatch, slow.step)
    for p, q in zip(ours, others, strict=True):
        np.testing.assert_array_equal(p.numpy(), q.numpy())
        for key, value in slow.state[id(q)].items():
            np.testing.assert_array_equal(fast.state[id(p)][key], value)


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=5),
    st.sampled_from(["plain", "transposed", "strided", "read-only"]),
    st.sampled_from(["float32", "float64"]),
)
def test_shapes_and_layouts_of_any_kind(shapes, layout, dtype):
    rule = multi_tensor(_momentum, 2, 1, 2)
    rng = np.random.default_rng(len(shapes))
    arrays, expected = [], []
    for shape in shapes:
        p, v, g = (np.asarray(rng.normal(size=shape), dtype) for _ in range(3))
        new = np.asarray(0.5, dtype) * v + np.asarray(1 - 0.25, dtype) * g
        expected += [p - np.asarray(0.125, dtype) * new, new]
        arrays += [p, v, stored(g, layout)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi, "ARRAY_WEIGHT", THRESHOLD)
        rule(arrays, (0.125, 0.25))
    written = [a for k, a in enumerate(arrays) if k % 3 < 2]
    for found, value in zip(written, expected, strict=True):
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("layouts", [("plain", "strided", "plain"), ("strided", "transposed", "read-only")])
def test_the_same_bits_for_any_number_of_threads(layouts, native):
    rule = multi_tensor(_momentum, 2, 1, 2)
    shapes = [(300, 500), (7,), (400, 401), (600, 300)]
    results, norms, before = [], [], tg.get_num_threads()
    try:
        for threads in (1, 2, 3):
            tg.set_num_threads(threads)
            rng = np.random.default_rng(0)
            arrays = []
            for k, shape in enumerate(shapes):
                p, v, g = (rng.normal(size=shape) for _ in range(3))
                arrays += [p, v, stored(g, layouts[k % 3])]
            norms.append(sums_of_squares(arrays))
            rule(arrays, (0.125, 0.25))
            results.append(arrays)
    finally:
        tg.set_num_threads(before)
    for other, norm in zip(results[1:], norms[1:], strict=True):
        np.testing.assert_array_equal(norm, norms[0])
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)
    for p, v, g, shape in zip(results[0][::3], results[0][1::3], results[0][2::3], shapes, strict=True):
        assert p.shape == v.shape == g.shape == shape and not np.array_equal(p, v)


def test_parts_are_of_about_one_size():
    before = tg.get_num_threads()
    try:
        tg.set_num_threads(2)
        even = [np.empty(multi.PART) for _ in range(4)]
        assert multi.shares(even, 4 * multi.PART) == [0, 2, 4]
        assert multi.shares(even[:1], 4 * multi.PART) == [0, 1]  # one array is one part
        assert multi.shares(even[:1] * 8, multi.PART) == [0, 8]  # not worth it
        first = [np.empty(9 * multi.PART), *even]
        assert multi.shares(first, 13 * multi.PART) == [0, 1, 5]
    finally:
        tg.set_num_threads(before)


def _momentum(p, v, g, rate, damping):
    v = 0.5 * v + (1 - damping) * g
    return p - rate * v, v


@pytest.mark.conformance
@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_native_trajectories_follow_torch(name, options, rng, native, torch_in_double):
    """With a parameter that now and then has no gradient, and a group with a rate of its own."""
    torch = torch_in_double
    sizes = [(9, 5), (4,), (), (3, 2)]
    start = [rng.normal(size=size) for size in sizes]
    ours = [nn.Parameter(a) for a in start]
    theirs = [torch.nn.Parameter(torch.tensor(a)) for a in start]
    grouped = [
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.07, "weight_decay": 0.02}] for params in (ours, theirs)
    ]
    optimizer = getattr(optim, name)(grouped[0], **options)
    reference = getattr(torch.optim, name)(grouped[1], **options)
    for step in range(12):
        for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            g = rng.normal(size=p.shape)
            p.grad, q.grad = (None, None) if k == step % 5 else (g.copy(), torch.tensor(g))
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.numpy(), q.detach().numpy(), rtol=0, atol=1e-11)


def test_two_dtypes_and_float16_in_one_group(native, monkeypatch):
    rng = np.random.default_rng(3)
    values = [rng.normal(size=6).astype(dtype) for dtype in ("float32", "float64", "float16", "float32")]
    pairs = [([nn.Parameter(v.copy()) for v in values]) for _ in range(2)]
    optimizers = [optim.Adam(params, lr=0.1) for params in pairs]
    for params in pairs:
        for p, v in zip(params, values, strict=True):
            p.grad = v + 1
    optimizers[0].step()
    plainly(monkeypatch, optimizers[1].step)
    for p, q, v in zip(*pairs, values, strict=True):
        assert p.dtype == v.dtype and (p.numpy() != v).all()
        np.testing.assert_array_equal(p.numpy(), q.numpy())


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_gradient_that_shares_memory_with_its_parameter(shift, native):
    """Native loops read late; what is read must not have been overwritten by then."""
    memory = np.arange(1.0, 103.0)
    p = nn.Parameter(np.zeros(100))
    p.data = memory[1:101]
    p.grad = memory[1 + shift : 101 + shift]
    expected = memory[1:101] - 0.5 * memory[1 + shift : 101 + shift]
    optim.SGD([p], lr=0.5).step()
    np.testing.assert_array_equal(p.numpy(), expected)


# ---------------------------------------------------------------------------- compiled when, and how often


def test_the_rule_when_to_compile(monkeypatch):
    monkeypatch.delenv("TINYGRAD_LSTM_NATIVE", raising=False)
    assert worth_a_kernel(1, THRESHOLD) and worth_a_kernel(100, 100 * 16)
    assert not worth_a_kernel(4, 200)
    monkeypatch.setenv("TINYGRAD_LSTM_NATIVE", "0")
    assert not worth_a_kernel(1, 10**9)


def test_small_models_and_switched_off_ones_never_wait_for_a_compiler(no_compiler, monkeypatch):
    small = nn.Linear(4, 3)
    for p in small.parameters():
        p.grad = np.ones(p.shape, p.dtype)
    optim.Adam(small).step()
    assert optim.clip_grad_norm(small, 1.0) > 1.0
    large = nn.Parameter(np.ones(10 * THRESHOLD, np.float32))
    large.grad = np.ones(large.shape, np.float32)
    optimizer = optim.Adam([large])
    with pytest.raises(AssertionError, match="asked for"):
        optim.NAdam([large], decoupled_weight_decay=True, weight_decay=1.0).step()
    monkeypatch.setenv("TINYGRAD_LSTM_NATIVE", "0")
    optimizer.step()
    assert (large.numpy() < 1).all()


def test_new_hyperparameters_compile_nothing(native, monkeypatch):
    (p, *_), _ = twins([(50,)], "float64")
    optimizer = optim.AdamW([p])
    p.grad = np.ones(50)
    optimizer.step()

    def refuse(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(codecache, "load", refuse)
    before = p.numpy().copy()
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()
    np.testing.assert_array_equal(p.numpy(), before)
    optimizer.param_groups[0].update(lr=0.25, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.5)
    optimizer.step()
    assert (p.numpy() != before).all()


def test_one_call_for_all_tensors(native, monkeypatch):
    calls = []
    whole = multi.MultiTensor.__call__

    def counted(self, arrays, *rest):
        calls.append(len(arrays) // self.n_arrays)
        whole(self, arrays, *rest)

    monkeypatch.setattr(multi.MultiTensor, "__call__", counted)
    params, _ = twins([(3, 2), (4,), (5, 6), ()], "float32")
    optimizer = optim.Adam(params)
    for p in params:
        p.grad = np.ones(p.shape, np.float32)
    optimizer.step()
    assert calls == [4]
    params[1].grad = None
    optimizer.step()
    params[1].grad = np.ones(4, np.float32)
    calls.clear()
    optimizer.step()
    assert sorted(calls) == [1, 3]  # one that is a step behind needs other corrections


# ---------------------------------------------------------------------------- in place, and noticed


def test_native_steps_are_in_place_and_noticed(native):
    p = nn.Parameter(np.ones((4, 4)))
    other = nn.Parameter(np.ones(3))
    array, version = p._data, p.version
    loss = (p * p).sum()
    p.grad = np.ones((4, 4))
    optim.SGD([p, other], lr=1.0).step()
    assert p._data is array and p.version == version + 1 and not p.numpy().any()
    assert other.version == 0
    with pytest.raises(tg.GraphError, match="changed in place"):
        loss.backward()


def test_native_parameters_of_any_layout(native):
    base = np.arange(6.0).reshape(2, 3)
    frozen = np.ones((3, 2))
    frozen.setflags(write=False)
    params = [nn.Parameter(np.zeros((3, 2))) for _ in range(2)]
    for p, array in zip(params, (base.T, frozen), strict=True):
        p.data = array
        p.grad = np.ones((2, 3)).T
    optim.SGD(params, lr=1.0).step()
    np.testing.assert_array_equal(params[0].numpy(), base.T - 1)
    np.testing.assert_array_equal(params[1].numpy(), np.zeros((3, 2)))
    np.testing.assert_array_equal(base, np.arange(6.0).reshape(2, 3))
    assert (frozen == 1).all()


# ---------------------------------------------------------------------------- states from elsewhere


@pytest.mark.conformance
@pytest.mark.parametrize("name, options", [("Adam", {}), ("NAdam", {}), ("Adagrad", {}), ("SGD", {"momentum": 0.9})])
def test_a_state_of_torch_goes_on(name, options, rng, native):
    """torch keeps the number of steps as a tensor."""
    torch = pytest.importorskip("torch")
    start = rng.normal(size=(5, 4))
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = getattr(torch.optim, name)([theirs], lr=0.1, **options)

    def advance(optimizer, p, g, wrap):
        p.grad = wrap(g)
        optimizer.step()

    for _ in range(3):
        advance(reference, theirs, rng.normal(size=(5, 4)), torch.tensor)
    state = reference.state_dict()
    arrays = {
        k: {key: v.numpy().copy() if isinstance(v, torch.Tensor) else v for key, v in own.items()}
        for k, own in state["state"].items()
    }
    ours = nn.Parameter(theirs.detach().numpy().copy())
    optimizer = getattr(optim, name)([ours], lr=0.1, **options)
    known = {"params", *optimizer.defaults}
    groups = [{k: v for k, v in group.items() if k in known} for group in state["param_groups"]]
    optimizer.load_state_dict({"state": arrays, "param_groups": groups})
    for _ in range(3):
        g = rng.normal(size=(5, 4))
        advance(reference, theirs, g, torch.tensor)
        advance(optimizer, ours, g, np.array)
    np.testing.assert_allclose(ours.numpy(), theirs.detach().numpy(), rtol=0, atol=1e-9)
    assert all(isinstance(optimizer.state[id(ours)][key], (int, float)) for key in optimizer.counters)


# ---------------------------------------------------------------------------- norms and clipping


@given(st.integers(0, 300), st.sampled_from(["float32", "float64"]), st.integers(0, 7))
def test_sums_of_squares_are_exact_to_double_precision(size, dtype, offset):
    values = np.random.default_rng(size).normal(size=size + offset).astype(dtype)[offset:]
    expected = math.fsum(float(x) ** 2 for x in values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi, "ARRAY_WEIGHT", THRESHOLD)
        found = sums_of_squares([values, values.copy(), values[::-1]])
    assert found[0] == found[1]  # the same bits wherever it lies
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("size", [3, 10_000])
def test_sums_of_squares_at_the_edges(size):
    large = np.full(size, 1e30, np.float32)
    assert sums_of_squares([large])[0] == pytest.approx(size * 1e60, rel=1e-6)  # does not overflow as float32
    for bad in (math.nan, math.inf):
        values = np.ones(size, np.float32)
        values[-1] = bad
        found = sums_of_squares([np.ones(size, np.float32), values])
        assert found[0] == size and (found[1] == bad or (math.isnan(bad) and math.isnan(found[1])))
    assert sums_of_squares([]).shape == (0,) and sums_of_squares([np.empty((0, 3))])[0] == 0.0


@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "read-only"])
def test_clipping_natively(layout, rng, native):
    values = [np.asarray(rng.normal(size=shape), np.float32) for shape in SHAPES]
    params = [nn.Parameter(np.zeros(v.shape, np.float32)) for v in values] + [nn.Parameter([1.0])]
    for p, v in zip(params, values, strict=False):
        p.grad = stored(v, layout)
    arrays = [p.grad for p in params[:-1]]
    expected = math.sqrt(math.fsum(float(x) ** 2 for v in values for x in v.reshape(-1)))
    assert optim.clip_grad_norm(params, 1e9) == pytest.approx(expected, rel=1e-12)
    for p, v, array in zip(params, values, arrays, strict=False):
        assert p.grad is array
        np.testing.assert_array_equal(array, v)
    assert optim.clip_grad_norm(params, 1.0) == pytest.approx(expected, rel=1e-12)
    factor = np.float32(1.0 / (expected + 1e-6))
    for p, v, array in zip(params, values, arrays, strict=False):
        assert (p.grad is array) == (layout != "read-only")
        np.testing.assert_array_equal(p.grad, v * factor)
        assert p.grad.dtype == np.float32
    assert params[-1].grad is None


def test_norms_that_are_not_finite_natively(native):
    params, _ = twins([(4,), (3,)], "float32")
    params[0].grad, params[1].grad = np.array([np.inf, 1, 2, 3], np.float32), np.ones(3, np.float32)
    assert optim.clip_grad_norm(params, 1.0) == math.inf
    assert math.isnan(params[0].grad[0]) and not params[1].grad.any()
    params[0].grad = np.array([np.nan, 1, 2, 3], np.float32)
    assert math.isnan(optim.clip_grad_norm(params, 1.0)) and np.isnan(params[1].grad).all()


# ---------------------------------------------------------------------------- rules


def test_rules_may_have_transcendental_functions(native):
    rule = multi_tensor(_squash, 1, 1, 1)
    for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-14)):
        p, g = np.linspace(-2, 2, 37).astype(dtype), np.linspace(1, 3, 37).astype(dtype)
        expected = np.tanh(p.astype(float)) * np.exp(0.5) + g
        rule([p, g], [0.5])
        np.testing.assert_allclose(p, expected, rtol=tolerance, atol=tolerance)


def _squash(p, g, rate):
    return (e.tanh(p) * e.exp(rate) + g,)


def test_refusals():
    rule = multi_tensor(_squash, 1, 1, 1)
    for arrays, numbers in (([np.ones(2)], [1.0]), ([np.ones(2), np.ones(2)], [1.0, 2.0])):
        with pytest.raises(tg.ArgumentError, match="expected"):
            rule(arrays, numbers)
    with pytest.raises(tg.ArgumentError, match="1 results for 2 written"):
        multi_tensor(_squash, 2, 0, 1)
    with pytest.raises(tg.ArgumentError, match="0 or 1"):
        multi_tensor(_squash, 1, 2, 0)
    rule([], [1.0])
