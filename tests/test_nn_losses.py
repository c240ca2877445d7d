"""Losses: against torch, at the edges, in two orders of derivative, and their refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops

REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def compare(ours, theirs, x, torch, rtol=1e-10):
    a, b = tg.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    found, expected = ours(a), theirs(b)
    np.testing.assert_allclose(found.numpy(), expected.detach().numpy(), rtol=1e-12, atol=1e-12)
    weight = np.random.default_rng(0).normal(size=found.shape)
    (found * weight).sum().backward()
    (expected * torch.tensor(weight)).sum().backward()
    np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=rtol, atol=1e-12)


@pytest.mark.conformance
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss"])
def test_regression_losses(name, reduction, rng, torch):
    x, y = rng.normal(size=(4, 5)) * 2, rng.normal(size=(4, 5))
    reference = getattr(torch.nn.functional, name)
    compare(
        lambda t: getattr(nn, name)(t, y, reduction=reduction),
        lambda t: reference(t, torch.tensor(y), reduction=reduction),
        x,
        torch,
    )


@pytest.mark.conformance
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_huber_delta(reduction, rng, torch):
    x, y = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    compare(
        lambda t: nn.huber_loss(t, y, delta=0.3, reduction=reduction),
        lambda t: torch.nn.functional.huber_loss(t, torch.tensor(y), delta=0.3, reduction=reduction),
        x,
        torch,
    )


@pytest.mark.conformance
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_binary_losses(reduction, rng, torch):
    x, y = rng.normal(size=(4, 5)) * 3, rng.uniform(size=(4, 5))
    weight = rng.uniform(0.5, 2, size=5)
    functional = torch.nn.functional
    compare(
        lambda t: nn.bce_with_logits(t, y, reduction=reduction),
        lambda t: functional.binary_cross_entropy_with_logits(t, torch.tensor(y), reduction=reduction),
        x,
        torch,
    )
    compare(
        lambda t: nn.bce_with_logits(t, y, pos_weight=weight, reduction=reduction),
        lambda t: functional.binary_cross_entropy_with_logits(
            t, torch.tensor(y), pos_weight=torch.tensor(weight), reduction=reduction
        ),
        x,
        torch,
    )
    p = rng.uniform(0.01, 0.99, size=(4, 5))
    compare(
        lambda t: nn.bce_loss(t, y, reduction=reduction),
        lambda t: functional.binary_cross_entropy(t, torch.tensor(y), reduction=reduction),
        p,
        torch,
    )


@pytest.mark.conformance
def test_bce_at_certainty(torch):
    p, y = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0])
    compare(
        lambda t: nn.bce_loss(t, y, reduction="none"),
        lambda t: torch.nn.functional.binary_cross_entropy(t, torch.tensor(y), reduction="none"),
        p,
        torch,
        rtol=1e-8,  # torch keeps its limit of 1e-12 in float32
    )


@pytest.mark.conformance
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignored", [False, True])
def test_cross_entropy(reduction, smoothing, ignored, rng, torch):
    x, target = rng.normal(size=(6, 3, 5)) * 3, rng.integers(0, 5, (6, 3))
    if ignored:
        target[rng.uniform(size=target.shape) < 0.4] = -100
    reference = torch.nn.functional.cross_entropy
    compare(
        lambda t: nn.cross_entropy(t, target, label_smoothing=smoothing, reduction=reduction),
        lambda t: reference(t.movedim(-1, 1), torch.tensor(target), label_smoothing=smoothing, reduction=reduction),
        x,
        torch,
    )
    if not smoothing:
        compare(
            lambda t: nn.nll_loss(ops.log_softmax(t), target, reduction=reduction),
            lambda t: reference(t.movedim(-1, 1), torch.tensor(target), reduction=reduction),
            x,
            torch,
        )


@pytest.mark.conformance
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ctc(reduction, rng, torch):
    steps, batch, classes = 9, 4, 5
    x = rng.normal(size=(steps, batch, classes))
    targets = rng.integers(1, classes, (batch, 3))
    targets[0] = 2  # repeated labels need a blank between them
    frames, sizes = [9, 7, 5, 6], [3, 2, 3, 0]
    compare(
        lambda t: nn.ctc_loss(ops.log_softmax(t), targets, frames, sizes, reduction=reduction),
        lambda t: torch.nn.functional.ctc_loss(
            t.log_softmax(-1), torch.tensor(targets), torch.tensor(frames), torch.tensor(sizes), reduction=reduction
        ),
        x,
        torch,
    )


@pytest.mark.conformance
def test_ctc_without_an_alignment(rng, torch):
    x, targets = rng.normal(size=(2, 2, 4)), np.array([[1, 1], [1, 2]])
    log_probs = ops.log_softmax(x)
    assert nn.ctc_loss(log_probs, targets, [2, 2], [2, 2], reduction="none").numpy()[0] == np.inf
    compare(
        lambda t: nn.ctc_loss(ops.log_softmax(t), targets, [2, 2], [2, 2], zero_infinity=True),
        lambda t: torch.nn.functional.ctc_loss(
            t.log_softmax(-1), torch.tensor(targets), torch.tensor([2, 2]), torch.tensor([2, 2]), zero_infinity=True
        ),
        x,
        torch,
    )


# ---------------------------------------------------------------------------- without a reference


@settings(max_examples=30)
@given(data=st.data())
def test_cross_entropy_is_its_definition(data):
    rows, classes = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 6))
    seed = data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    x, target = rng.normal(size=(rows, classes)), rng.integers(0, classes, rows)
    found = nn.cross_entropy(x, target, reduction="none").numpy()
    expected = -np.log(np.exp(x) / np.exp(x).sum(-1, keepdims=True))[np.arange(rows), target]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_derivatives(reduction, smoothing, rng):
    target = np.array([[0, 2], [-100, 1]])
    x = rng.normal(size=(2, 2, 3))

    def f(t):
        return nn.cross_entropy(t, target, label_smoothing=smoothing, reduction=reduction)

    assert tg.gradcheck(f, x)
    assert tg.gradcheck(f, x, order=2)
    weights = rng.normal(size=(2, 2))

    def per_row(t):
        return (nn.cross_entropy(t, target, label_smoothing=smoothing, reduction="none") * weights).sum()

    assert tg.gradcheck(per_row, x, order=2)
    v = rng.normal(size=x.shape)
    _, tangent = tg.jvp(f, (x,), (v,))
    np.testing.assert_allclose(tangent.item(), (tg.grad(f)(x).numpy() * v).sum(), rtol=1e-10)


def test_other_losses_second_order(rng):
    y = rng.uniform(size=4)
    for f in (nn.mse_loss, nn.huber_loss, nn.bce_with_logits):
        assert tg.gradcheck(lambda t, f=f: f(t, y), rng.normal(size=4), order=2)
    assert tg.gradcheck(lambda t: nn.bce_loss(t, y), rng.uniform(0.2, 0.8, 4), order=2)
    assert tg.gradcheck(lambda p, t: nn.bce_loss(p, t), rng.uniform(0.2, 0.8, 4), y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_logits(dtype):
    x = tg.tensor(np.array([[1e4, -1e4], [1e4, -1e4]], dtype), requires_grad=True)
    loss = nn.cross_entropy(x, [0, 1], reduction="none")
    np.testing.assert_array_equal(loss.numpy(), [0, 2e4])
    loss.sum().backward()
    np.testing.assert_array_equal(x.grad, [[0, 0], [1, -1]])
    assert loss.dtype == dtype
    z = tg.tensor(np.array([1e4, -1e4], dtype), requires_grad=True)
    loss = nn.bce_with_logits(z, [0.0, 1.0], reduction="sum")
    loss.backward()
    assert loss.item() == 2e4
    np.testing.assert_array_equal(z.grad, [1, -1])


def test_everything_ignored():
    x = tg.tensor(np.ones((2, 3)), requires_grad=True)
    loss = nn.cross_entropy(x, [-100, -100])
    loss.backward()
    assert loss.item() == 0.0
    np.testing.assert_array_equal(x.grad, np.zeros((2, 3)))
    assert nn.nll_loss(ops.log_softmax(np.ones((2, 3))), [7, 7], ignore_index=7).item() == 0.0
    assert nn.cross_entropy(np.ones((0, 3)), []).item() == 0.0


def test_an_ignored_class_inside_the_range():
    x = np.array([[1.0, 2.0], [3.0, 0.0]])
    assert nn.cross_entropy(x, [0, 1], ignore_index=1).item() == nn.cross_entropy(x[:1], [0]).item()


def test_refusals():
    x = np.zeros((4, 5, 6))
    with pytest.raises(tg.ShapeError, match=r"N, C, \.\.\."):
        nn.cross_entropy(x, np.zeros((4, 6), int))
    with pytest.raises(tg.ShapeError, match=r"target of shape \(3,\)"):
        nn.cross_entropy(np.zeros((4, 5)), np.zeros(3, int))
    with pytest.raises(tg.OutOfRangeError, match=r"target 5 .* 0\.\.4"):
        nn.cross_entropy(np.zeros((2, 5)), [1, 5])
    with pytest.raises(tg.OutOfRangeError, match="target -1"):
        nn.cross_entropy(np.zeros((2, 5)), [1, -1])
    with pytest.raises(tg.DTypeError, match="float64"):
        nn.cross_entropy(np.zeros((2, 5)), np.zeros(2))
    with pytest.raises(tg.ArgumentError, match="avg"):
        nn.mse_loss(np.zeros(2), np.zeros(2), reduction="avg")
    with pytest.raises(tg.ShapeError, match=r"\(2, 1\).*\(2,\)"):
        nn.mse_loss(np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(tg.OutOfRangeError, match=r"1\.5"):
        nn.bce_loss(np.array([0.5, 1.5]), np.zeros(2))
    with pytest.raises(tg.OutOfRangeError, match="target 0"):
        nn.ctc_loss(np.zeros((3, 1, 4)), [[0]], [3], [1])
    with pytest.raises(tg.OutOfRangeError, match="length 4"):
        nn.ctc_loss(np.zeros((3, 1, 4)), [[1]], [4], [1])


def test_a_number_as_target():
    assert nn.mse_loss(np.array([1.0, 3.0]), 1.0).item() == 2.0


# ---------------------------------------------------------------------------- compiled, with targets as an argument


def compiled_like_plain(loss, x, *others):
    """Value and gradient of a loss that is compiled with everything as an argument; returns the compiled function."""
    fast = tg.compile(loss)
    expected = tg.value_and_grad(lambda x: ops.sum(loss(x, *others)))(x)
    for _ in range(2):
        t = tg.tensor(x, requires_grad=True)
        value = ops.sum(fast(t, *others))
        value.backward()
        assert value.item() == pytest.approx(expected[0].item(), rel=1e-12)
        np.testing.assert_allclose(t.grad, expected[1].numpy(), rtol=1e-10, atol=1e-14)
    return fast


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8])
def test_compiled_nll(reduction, dtype, rng):
    x, y = rng.standard_normal((4, 3, 5)), rng.integers(0, 5, (4, 3)).astype(dtype)
    ignored = 2 if dtype is np.uint8 else -100
    y[1, 1] = ignored
    fast = compiled_like_plain(
        lambda x, y: nn.nll_loss(ops.log_softmax(x), y, ignore_index=ignored, reduction=reduction), x, y
    )
    # By its definition, and with other targets than those that were recorded.
    other = np.where(y == ignored, y, (y + 3) % 5).astype(dtype)
    other = np.where((other == ignored) & (y != ignored), 0, other).astype(dtype)
    log_probs = np.log(np.exp(x) / np.exp(x).sum(-1, keepdims=True))
    losses = np.array([
        0.0 if c == ignored else -row[c] for row, c in zip(log_probs.reshape(-1, 5), other.ravel(), strict=True)
    ]).reshape(4, 3)  # fmt: skip
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (other != ignored).sum()}[reduction]
    np.testing.assert_allclose(fast(x, other).numpy(), expected, rtol=1e-12)
    everything = np.full_like(y, ignored)
    assert ops.sum(fast(x, everything)).item() == 0.0
    bad = other.copy()
    bad[0, 0] = 5
    with pytest.raises(tg.OutOfRangeError, match=r"nll_loss: target 5 .*0\.\.4"):
        fast(x, bad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_ctc(reduction, rng):
    x, targets = rng.standard_normal((7, 3, 5)), rng.integers(1, 5, (3, 3))
    targets[0, :2] = 2  # a repeated label needs a blank between
    frames, sizes = np.array([7, 5, 6]), np.array([3, 2, 0])

    def loss(x, targets, frames, sizes):
        return nn.ctc_loss(ops.log_softmax(x), targets, frames, sizes, reduction=reduction)

    fast = compiled_like_plain(loss, x, targets, frames, sizes)
    others = (rng.integers(1, 5, (3, 3)), np.array([4, 7, 7]), np.array([1, 3, 2]))
    np.testing.assert_allclose(fast(x, *others).numpy(), loss(x, *others).numpy(), rtol=1e-12)
    for k, message in ((0, "target 0"), (5, "target 5")):
        bad = others[0].copy()
        bad[1, 2] = k
        with pytest.raises(tg.OutOfRangeError, match=message):
            fast(x, bad, *others[1:])
        bad[1, 2], bad[0, 2] = 1, k  # past its length: not looked at
        fast(x, bad, *others[1:])
    with pytest.raises(tg.OutOfRangeError, match=r"target_lengths.*length 4"):
        fast(x, *others[:2], np.array([4, 1, 1]))
    with pytest.raises(tg.OutOfRangeError, match=r"blank=5.*0\.\.4"):
        nn.ctc_loss(x, *others, blank=5)


def test_compiled_bce_checks_its_input(rng):
    x, y = rng.uniform(0.1, 0.9, (3, 2)), rng.uniform(0, 1, (3, 2))
    fast = compiled_like_plain(nn.bce_loss, x, y)
    np.testing.assert_allclose(
        tg.hessian(lambda x: fast(x, y))(x).numpy(), tg.hessian(lambda x: nn.bce_loss(x, y))(x).numpy(), rtol=1e-10
    )
    assert tg.jvp(lambda x: fast(x, y), (x,), (y,))[1].item() == pytest.approx(
        tg.jvp(lambda x: nn.bce_loss(x, y), (x,), (y,))[1].item()
    )
    for bad in (1.5, -0.1, np.nan):
        x[1, 1] = bad
        with pytest.raises(tg.OutOfRangeError, match=rf"bce_loss: input holds {bad}"):
            fast(x, y)
