"""Wrong numbers that were once found by trying to break the library; each would come back silently."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops


def scalar(value: float) -> tg.Tensor:
    return tg.tensor(np.array(value), requires_grad=True)


# ---------------------------------------------------------------------------- checkpoint


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda w: tg.checkpoint(lambda h: h * w)(2.0 * w), 12.0),  # the closure is an ancestor of the argument
        (lambda w: tg.checkpoint(lambda h: h * w)(w), 6.0),  # and the argument itself
        (lambda w: (lambda h: tg.checkpoint(lambda k: k * h)(h * 3.0))(w * 1.0), 18.0),  # and no leaf
    ],
    ids=["ancestor", "argument", "computed"],
)
def test_checkpoint_with_a_closure_that_its_arguments_depend_on(f: Any, expected: float) -> None:
    w = scalar(3.0)
    f(w).backward()
    assert w.grad == pytest.approx(expected)
    assert tg.gradcheck(f, np.array(3.0), order=2)


def test_checkpointed_cell_in_a_loop() -> None:
    cell = nn.GRUCell(2, 3, dtype=np.float64)
    xs = np.random.default_rng(0).standard_normal((4, 2, 2))

    def loss(step: Any) -> Any:
        h = cell.initial_state(2)
        for x in xs:
            h = step(tg.asarray(x), h)[1]
        return (h * h).sum()

    cell.zero_grad()
    loss(cell).backward()
    expected = cell.weight_hh.grad
    cell.zero_grad()
    loss(tg.checkpoint(cell)).backward()
    np.testing.assert_allclose(cell.weight_hh.grad, expected, rtol=1e-12)


def test_checkpoint_draws_the_same_mask_from_any_generator() -> None:
    generator = tg.Generator(0)
    x = tg.tensor(np.ones(1000), requires_grad=True)
    y = tg.checkpoint(lambda t: ops.dropout(t, 0.5, generator=generator))(x)
    after = generator.get_state()
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, y.numpy())
    assert generator.get_state() == after


# ---------------------------------------------------------------------------- scan


def test_no_grad_inside_of_a_body_wins() -> None:
    def f(w: Any, lr: Any) -> Any:
        def body(c: Any, x: Any) -> tuple[Any, Any]:
            with tg.no_grad():
                k = c * w
            return c * lr + k * x, c

        return ops.scan(body, lr * 1.0, np.arange(1.0, 4.0))[0]

    found = tg.grad(f, (0, 1))(np.array(2.0), np.array(0.5))
    with tg.eager():
        expected = tg.grad(f, (0, 1))(np.array(2.0), np.array(0.5))
    assert found[0].item() == expected[0].item() == 0.0
    assert found[1].item() == pytest.approx(expected[1].item())


def test_writing_to_an_output_that_is_a_residual_is_noticed() -> None:
    layer = nn.RNN(2, 3)
    out, _ = layer(np.ones((4, 2, 2), np.float32))
    loss = (out * 1.0).sum()
    out.numpy()[:] = 0
    with pytest.raises(tg.GraphError, match="changed in place"):
        loss.backward()


def test_outputs_belong_to_the_caller() -> None:
    x = np.ones((3, 2))
    _, ys = ops.scan(lambda c, x: (c, (x, c * 0.0 + 1.0, np.ones(2))), np.zeros(2), x)
    for y in ys:
        y.numpy()[:] = 5
    np.testing.assert_array_equal(x, 1.0)


def test_transposed_values_meet_higher_ranks() -> None:
    v, xs = np.random.default_rng(0).standard_normal((2, 2, 3)), np.random.default_rng(1).standard_normal((5, 2, 3))

    def f(v: Any, xs: Any) -> Any:
        return ops.sin(ops.scan(lambda c, x: (c.T.T, x.T @ v + c.T.sum()), np.ones((2, 3)), xs)[1]).sum()

    found = tg.grad(f, (0, 1))(v, xs)
    with tg.eager():
        expected = tg.grad(f, (0, 1))(v, xs)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12)


# ---------------------------------------------------------------------------- programs that are kept


class TwoWeights(nn.Module):
    def __init__(self, first: nn.Parameter, second: nn.Parameter) -> None:
        super().__init__()
        self.weights = [first, second]

    def initial_state(self, batch: int) -> Any:
        return tg.tensor(np.zeros((batch, 2), np.float32))

    def forward(self, x: Any, h: Any) -> Any:
        h = h * self.weights[0] + x * self.weights[1]
        return h, h


def test_a_shared_parameter_that_is_shared_no_more() -> None:
    shared = nn.Parameter(np.ones(2, np.float32))
    cell = TwoWeights(shared, shared)
    layer = nn.Recurrent(cell)
    x = np.ones((2, 1, 2), np.float32)
    assert layer(x)[1].tolist() == [[2.0, 2.0]]
    cell.weights[1] = nn.Parameter(np.full(2, 10, np.float32))
    assert layer(x)[1].tolist() == [[20.0, 20.0]]


def test_state_in_an_object_that_the_module_cannot_see() -> None:
    class Box:
        scale = 1.0

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.box = Box()

        def initial_state(self, batch: int) -> Any:
            return tg.tensor(np.zeros((batch, 2), np.float32))

        def forward(self, x: Any, h: Any) -> Any:
            return x * self.box.scale, h

    cell = Scaled()
    layer = nn.Recurrent(cell)
    x = np.ones((1, 1, 2), np.float32)
    layer(x)
    cell.box.scale = 10.0
    assert layer(x)[0].tolist() == [[[10.0, 10.0]]]


def test_many_shapes_from_many_threads() -> None:
    layer = nn.RNN(2, 3)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(40):
                layer(np.ones((int(rng.integers(1, 9)), int(rng.integers(1, 40)), 2), np.float32))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# ---------------------------------------------------------------------------- values and storage


def test_writes_are_noticed_after_a_state_dict_was_loaded() -> None:
    module = nn.Module()
    module.p = nn.Parameter(np.ones(2, np.float32))
    _ = module.p.reshape(1, 2)
    module.load_state_dict({"p": np.ones(2, np.float32)})
    y = (module.p * module.p).sum()
    module.p.data[:] = 5
    with pytest.raises(tg.GraphError, match="changed in place"):
        y.backward()


def test_writing_a_differentiable_tensor_into_another_one_is_refused() -> None:
    buffer = tg.tensor(np.zeros((2, 2)))
    with pytest.raises(tg.GraphError, match="stack"):
        buffer[0] = tg.tensor([1.0, 2.0], requires_grad=True) * 2
    buffer[0] = np.ones(2)
    assert buffer.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_mean_of_many_half_precision_numbers() -> None:
    assert ops.mean(np.ones(70000, np.float16)).item() == 1.0


# ---------------------------------------------------------------------------- errors of cells


class Wrong(nn.Module):
    def __init__(self, step: Any) -> None:
        super().__init__()
        self.step = step

    def initial_state(self, batch: int) -> Any:
        return tg.tensor(np.zeros((batch, 2), np.float32))

    def forward(self, x: Any, h: Any) -> Any:
        return self.step(x, h)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    ("step", "error", "text"),
    [
        (lambda x, h: x + h, tg.DTypeError, r"expected a pair \(output, state\)"),
        (lambda x, h: (h, ops.concatenate([h, h], -1)), tg.ShapeError, "Wrong: the state went in as"),
        (lambda x, h: (h, h.astype(np.float64)), tg.DTypeError, "Wrong: the state went in as"),
        (lambda x, h: (h, (h, h)), tg.ShapeError, "initial_state gives"),
    ],
    ids=["no pair", "grows", "dtype", "structure"],
)
def test_a_cell_that_returns_something_else(step: Any, error: Any, text: str, batch: int) -> None:
    with pytest.raises(error, match=text):
        nn.Recurrent(Wrong(step))(np.ones((3, batch, 2), np.float32))


def test_a_class_is_no_cell() -> None:
    with pytest.raises(tg.DTypeError, match="the class LSTMCell"):
        nn.Recurrent(nn.LSTMCell)


def test_a_users_product_compiled_has_the_shape_of_the_eager_one():
    """A function of whole rows is a ufunc to NumPy, too, but not elementwise."""
    product = tg.primitive(
        "regression_mv",
        forward=np.matmul,
        vjp=(lambda g, x1, x2: ops.outer(g, x2), lambda g, x1, x2: x1.T @ g),
    )
    a, v = np.ones((300, 300)), np.ones(300)
    assert tg.compile(lambda a, v: product(a, v))(a, v).shape == product(tg.tensor(a), tg.tensor(v)).shape == (300,)


def test_the_seed_of_a_gradient_may_be_written_to():
    gradient = tg.grad(lambda x: x)(2.0)
    gradient.data[...] = 5.0
    assert tg.grad(lambda x: x)(2.0).item() == 1.0
    x = tg.tensor(3.0, requires_grad=True)
    y = x * 2.0
    y.register_hook(lambda g: g.data.__imul__(3.0) is None or None)
    y.backward()
    assert x.grad == 6.0
