"""Optimizers: 20-step trajectories against torch, states that go on bit for bit, clipping, refusals."""

import time

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, optim
from tinygrad_lstm.kernels.elementwise import THRESHOLD

CASES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.2}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.5}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "alpha": 0.9, "eps": 1e-3}),
    ("Adagrad", {}),
    ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-3}),
    ("Adadelta", {}),
    ("Adadelta", {"rho": 0.8, "weight_decay": 0.1, "lr": 0.5, "eps": 1e-3}),
    ("Adam", {}),
    ("Adam", {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.3, "amsgrad": True, "maximize": True}),
    ("NAdam", {}),
    ("NAdam", {"weight_decay": 0.1, "momentum_decay": 0.01}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
]
IDS = [f"{name}-{k}" for k, (name, _) in enumerate(CASES)]


@pytest.mark.conformance
@pytest.mark.parametrize("name, options", CASES, ids=IDS)
@pytest.mark.parametrize("sizes", [[(3, 4), (5,), ()], [(THRESHOLD + 5,)]], ids=["small", "large"])
def test_trajectories_follow_torch(name, options, sizes, rng):
    torch = pytest.importorskip("torch")
    start = [rng.normal(size=size) for size in sizes]
    ours = [nn.Parameter(a) for a in start]
    theirs = [torch.nn.Parameter(torch.tensor(a)) for a in start]
    optimizer, reference = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    for step in range(20):
        for p, q in zip(ours, theirs, strict=True):
            g = rng.normal(size=p.shape)
            p.grad, q.grad = g.copy(), torch.tensor(g)
        if step == 7 and len(ours) > 1:  # a parameter that is not used in this step
            ours[1].grad = theirs[1].grad = None
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.numpy(), q.detach().numpy(), rtol=0, atol=1e-9)


@pytest.mark.conformance
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "Adadelta", "Adam", "AdamW", "NAdam", "LBFGS"])
def test_defaults_are_those_of_torch(name):
    torch = pytest.importorskip("torch")
    ours = getattr(optim, name)([nn.Parameter([1.0])]).param_groups[0]
    theirs = getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    for key, value in ours.items():
        if key != "params":
            assert theirs[key] == value, key


def rosenbrock(p):
    return 100.0 * (p[1] - p[0] ** 2) ** 2 + (1.0 - p[0]) ** 2


@pytest.mark.conformance
@pytest.mark.parametrize(
    "options",
    [
        {"line_search_fn": "strong_wolfe"},
        {"line_search_fn": "strong_wolfe", "history_size": 2, "max_iter": 7, "lr": 0.5},
        {"lr": 0.001, "max_iter": 4},
        {"lr": 0.001, "max_iter": 20, "max_eval": 5},
    ],
)
def test_lbfgs_follows_torch(options):
    torch = pytest.importorskip("torch")
    start = np.array([-1.2, 1.0])
    p, q = nn.Parameter(start), torch.nn.Parameter(torch.tensor(start))
    optimizer, reference = optim.LBFGS([p], **options), torch.optim.LBFGS([q], **options)

    def closure():
        optimizer.zero_grad()
        loss = rosenbrock(p)
        loss.backward()
        return loss

    def reference_closure():
        reference.zero_grad()
        loss = rosenbrock(q)
        loss.backward()
        return loss

    for _ in range(5):
        loss, expected = optimizer.step(closure), reference.step(reference_closure)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-15)
    np.testing.assert_allclose(p.numpy(), q.detach().numpy(), rtol=0, atol=1e-9)


def test_lbfgs_finds_the_minimum():
    p = nn.Parameter(np.array([-1.2, 1.0]))
    other = nn.Parameter(np.zeros((2, 2)))  # never gets a gradient
    optimizer = optim.LBFGS([p, other], line_search_fn="strong_wolfe", max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = rosenbrock(p)
        loss.backward()
        return loss

    optimizer.step(closure)
    np.testing.assert_allclose(p.numpy(), [1, 1], atol=1e-4)
    assert not other.numpy().any()
    for closure, message in ((3, "takes a closure or nothing, found 3"), (lambda: None, "the closure returns .* None")):
        with pytest.raises(tg.DTypeError, match=message):
            optimizer.step(closure)
    with pytest.raises(tg.DTypeError, match=r"SGD\.step takes a closure or nothing"):
        optim.SGD([nn.Parameter([1.0])]).step(3)
    with pytest.raises(tg.ArgumentError, match="closure"):
        optimizer.step()


# ---------------------------------------------------------------------------- states


def model_and_optimizer(name, options):
    tg.seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    return model, getattr(optim, name)(model, **options)


def train(model, optimizer, seeds):
    for seed in seeds:
        x = np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32)

        def closure(x=x):
            optimizer.zero_grad()
            loss = (model(x) ** 2).mean()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("name, options", [*CASES, ("LBFGS", {})], ids=[*IDS, "LBFGS"])
def test_a_resumed_run_is_the_same_bit_for_bit(name, options, tmp_path):
    model, optimizer = model_and_optimizer(name, options)
    train(model, optimizer, range(3))
    path = tmp_path / "state.safetensors"
    tg.save(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(3, 6))
    resumed, second = model_and_optimizer(name, {} if name != "SGD" else {"lr": 9.0})
    loaded = tg.load(path)
    resumed.load_state_dict(loaded["model"])
    second.load_state_dict(loaded["optimizer"])
    train(resumed, second, range(3, 6))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_state_is_a_copy():
    model, optimizer = model_and_optimizer("Adam", {})
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    kept = state["state"]["0"]["exp_avg"].copy()
    train(model, optimizer, range(2))
    np.testing.assert_array_equal(state["state"]["0"]["exp_avg"], kept)
    assert state["param_groups"][0]["betas"] == [0.9, 0.999] and state["param_groups"][0]["params"] == [0, 1, 2, 3]


def test_states_that_do_not_fit():
    model, optimizer = model_and_optimizer("Adam", {})
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    with pytest.raises(tg.ArgumentError, match=r"\[4\] parameters.*\[1\]"):
        optim.Adam([nn.Parameter([1.0])]).load_state_dict(state)
    others = [nn.Parameter(np.zeros((2, 2))) for _ in range(4)]
    with pytest.raises(tg.ShapeError, match=r"exp_avg of parameter 0 has shape \(4, 3\), expected \(2, 2\)"):
        optim.Adam(others).load_state_dict(state)
    for nothing in ({"epoch": 3}, {}, None, [1]):
        with pytest.raises(
            tg.ArgumentError, match=r"no state of an optimizer: found .*expected .*'param_groups'"
        ) as info:
            optimizer.load_state_dict(nothing)
        assert "KeyError" not in str(info.value)
    with pytest.raises(tg.ArgumentError, match="a group is a dict with 'params'"):
        optimizer.load_state_dict({"state": {}, "param_groups": [3]})
    with pytest.raises(tg.ArgumentError, match="the state of parameter 0 is a dict, found 3"):
        optimizer.load_state_dict({**state, "state": {"0": 3}})


OPTIMIZERS = ["SGD", "RMSprop", "Adagrad", "Adadelta", "Adam", "NAdam", "LBFGS"]


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("saved", OPTIMIZERS)
@pytest.mark.parametrize("loading", OPTIMIZERS)
def test_the_state_of_another_optimizer_is_refused(saved, loading, stepped):
    def made(name):
        p = nn.Parameter([1.0, 2.0])
        optimizer = getattr(optim, name)([p], lr=0.5)
        if stepped:
            optimizer.step(lambda: (p * p).sum()) if name != "LBFGS" else optimizer.step(closure(optimizer, p))
            p.grad = np.ones(2, np.float32)
            optimizer.step() if name != "LBFGS" else None
        return optimizer

    def closure(optimizer, p):
        def run():
            optimizer.zero_grad()
            loss = (p * p).sum()
            loss.backward()
            return loss

        return run

    state, optimizer = made(saved).state_dict(), made(loading)
    before = str(optimizer.state_dict())
    if saved == loading or (saved, loading, stepped) == ("NAdam", "Adam", False):
        optimizer.load_state_dict(state)  # (NAdam's options are Adam's and one more; before a step it counts nothing)
        return
    with pytest.raises(tg.ArgumentError, match=f"{loading}.load_state_dict: this is the state of another optimizer"):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == before


@pytest.mark.conformance
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "Adadelta", "Adam", "AdamW", "NAdam"])
def test_states_of_torch_are_taken(name):
    torch = pytest.importorskip("torch")
    theirs, ours = torch.nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter([1.0, 2.0])
    reference, optimizer = getattr(torch.optim, name)([theirs], lr=0.1), getattr(optim, name)([ours], lr=0.7)
    for step in range(3):
        theirs.grad = torch.tensor([1.0, -2.0])
        reference.step()
        if step == 1:
            state = reference.state_dict()
            arrays = {
                k: {n: v if v is None else v.numpy() for n, v in own.items()} for k, own in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": arrays})
            ours.data = theirs.detach().numpy().copy()
        elif step == 2:
            ours.grad = np.array([1.0, -2.0], np.float32)
            optimizer.step()
    np.testing.assert_allclose(ours.numpy(), theirs.detach().numpy(), rtol=1e-6)


def test_a_parameter_without_axes_has_a_state():
    p = nn.Parameter(np.array(1.0))
    optimizer = optim.NAdam([p])
    p.grad = np.array(1.0)
    optimizer.step()
    again = optim.NAdam([p])
    again.load_state_dict(optimizer.state_dict())
    assert again.state[id(p)] == optimizer.state[id(p)]


# ---------------------------------------------------------------------------- stepping


def test_groups():
    a, b = nn.Parameter([1.0]), nn.Parameter([1.0])
    optimizer = optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1)
    a.grad = b.grad = np.ones(1)
    optimizer.step()
    np.testing.assert_allclose([a.item(), b.item()], [0.9, 0.5], rtol=1e-6)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    np.testing.assert_allclose([a.item(), b.item()], [0.9, 0.0], rtol=1e-6, atol=1e-9)
    optimizer.zero_grad()
    assert a.grad is None and b.grad is None


def test_a_module_or_a_generator_of_parameters():
    model = nn.Linear(2, 1)
    for given in (model, model.parameters(), list(model.parameters())):
        assert len(optim.Adam(given).param_groups[0]["params"]) == 2
    named = optim.Adam(model.named_parameters())
    assert named.param_groups[0]["params"] == [model.weight, model.bias]
    one = optim.Adam([{"params": model.weight}, {"params": list(model.named_parameters())[1:], "lr": 0.5}])
    assert [group["params"] for group in one.param_groups] == [[model.weight], [model.bias]]
    assert optim.SGD({"params": model.weight}).param_groups[0]["params"] == [model.weight]
    model.weight.grad = np.array([[3.0, 4.0]], np.float32)
    assert optim.clip_grad_norm(model.weight, 1.0) == 5.0
    optim.clip_grad_value(model.weight, 0.7)
    np.testing.assert_allclose(model.weight.grad, [[0.6, 0.7]], rtol=1e-5)
    assert len(optim.Adam([{"params": model}]).param_groups[0]["params"]) == 2


def test_steps_are_in_place_and_noticed():
    p = nn.Parameter(np.ones(3))
    array, version = p._data, p.version
    loss = (p * p).sum()
    p.grad = np.ones(3)
    optim.SGD([p], lr=1.0).step()
    assert p._data is array and p.version > version and p.tolist() == [0, 0, 0]
    with pytest.raises(tg.GraphError, match="changed in place"):
        loss.backward()


def test_parameters_of_any_layout():
    """A transposed or read-only array set as data is replaced, not written to."""
    base = np.arange(6.0).reshape(2, 3)
    frozen = np.ones((3, 2))
    frozen.setflags(write=False)
    for array in (base.T, frozen):
        p = nn.Parameter(np.zeros((3, 2)))
        p.data = array
        p.grad = np.ones((2, 3)).T
        expected = array - 1.0
        optim.SGD([p], lr=1.0).step()
        np.testing.assert_array_equal(p.numpy(), expected)
    np.testing.assert_array_equal(base, np.arange(6.0).reshape(2, 3))


def test_float32_state_and_weights_stay_float32():
    for size in (3, THRESHOLD):
        p = nn.Parameter(np.ones(size, np.float32))
        optimizer = optim.Adam([p])
        p.grad = np.ones(size, np.float32)
        optimizer.step()
        assert p.dtype == np.float32
        assert all(v.dtype == np.float32 for v in optimizer.state[id(p)].values() if isinstance(v, np.ndarray))


def test_closure_and_weight_decay_of_infinity():
    p = nn.Parameter(np.array([np.inf]))
    p.grad = np.ones(1)
    optimizer = optim.SGD([p], lr=1.0)
    assert optimizer.step(lambda: 3) == 3
    assert p.item() == np.inf  # no decay: no 0 * inf


def test_refusals():
    p = nn.Parameter([1.0])
    for make, pattern in (
        (lambda: optim.SGD([]), "no parameters"),
        (lambda: optim.SGD([p, p]), "given twice"),
        (lambda: optim.SGD([p * 2]), "computed"),
        (lambda: optim.SGD([p], lr=-1), "lr is not negative, found -1"),
        (lambda: optim.Adam([p], betas=(0.9, 1.0)), "betas is below 1"),
        (lambda: optim.SGD([p], nesterov=True), "nesterov"),
        (lambda: optim.SGD([{"params": [p], "speed": 3}]), "speed"),
        (lambda: optim.LBFGS([p], line_search_fn="exact"), "exact"),
    ):
        with pytest.raises(tg.ArgumentError, match=pattern):
            make()
    with pytest.raises(tg.DTypeError, match="one Tensor"):
        optim.SGD(p)
    with pytest.raises(tg.DTypeError, match="found str"):
        optim.SGD(["weight"])
    for make, pattern in (
        (lambda: optim.Adam(None), "Adam: parameters are a Module or a list of Tensors, found None"),
        (lambda: optim.Adam([{"params": 3}]), "Adam: parameters .*found 3"),
        (lambda: optim.clip_grad_norm(None, 1.0), "clip_grad_norm: parameters .*found None"),
        (lambda: optim.clip_grad_norm(p, "a"), "clip_grad_norm: max_norm is a number, found 'a'"),
        (lambda: optim.clip_grad_norm(p, 1.0, None), "clip_grad_norm: norm_type is a number, found None"),
        (lambda: optim.clip_grad_value(p, [1.0]), "clip_grad_value: clip_value is a number"),
    ):
        with pytest.raises(tg.DTypeError, match=pattern):
            make()


# ---------------------------------------------------------------------------- clipping


@pytest.mark.conformance
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, np.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clip_grad_norm(norm_type, max_norm, rng):
    torch = pytest.importorskip("torch")
    grads = [rng.normal(size=(3, 4)), rng.normal(size=5)]
    ours = [nn.Parameter(np.zeros(g.shape)) for g in grads] + [nn.Parameter([1.0])]
    theirs = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads]
    for p, q, g in zip(ours, theirs, grads, strict=False):
        p.grad, q.grad = g.copy(), torch.tensor(g)
    norm = optim.clip_grad_norm(ours, max_norm, norm_type)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)), rel=1e-12)
    for p, q in zip(ours, theirs, strict=False):
        np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=1e-12)


def test_clipping_at_the_edges():
    p = nn.Parameter([1.0, 2.0])
    assert optim.clip_grad_norm([p], 1.0) == 0.0
    p.grad = np.array([np.nan, 1.0])
    assert np.isnan(optim.clip_grad_norm([p], 1.0)) and np.isnan(p.grad).all()
    read_only = np.array([3.0, 4.0], np.float32)
    read_only.setflags(write=False)
    p.grad = read_only
    assert optim.clip_grad_norm([p], 1.0) == 5.0
    np.testing.assert_allclose(p.grad, [0.6, 0.8], rtol=1e-5)
    p.grad = np.array([-3.0, 0.5], np.float32)
    optim.clip_grad_value([p], 1.0)
    assert p.grad.tolist() == [-1.0, 0.5]
    with pytest.raises(tg.ArgumentError):
        optim.clip_grad_norm([p], -1.0)


def test_an_update_costs_little():
    """Adam over 250,000 float32 parameters: one pass (measured .12 ms), the bound leaves room for busy machines."""
    p = nn.Parameter(np.ones(250_000, np.float32))
    p.grad = np.ones(250_000, np.float32)
    optimizer = optim.Adam([p])
    optimizer.step()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-3


def test_the_learning_rate_as_an_attribute() -> None:
    a, b = nn.Parameter([1.0]), nn.Parameter([1.0])
    optimizer = optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1)
    assert optimizer.lr == 0.1
    optimizer.lr = 0.25
    (a + b).sum().backward()
    optimizer.step()
    assert a.tolist() == b.tolist() == [0.75]
    with pytest.raises(tg.ArgumentError, match="lr is not negative"):
        optimizer.lr = -1.0
    assert optimizer.lr == 0.25
