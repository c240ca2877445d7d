"""Whole models from data to gradient or accuracy, and the ways in which a recurrent layer could be subtly wrong.

The default path (the cell recorded once, moved about, fused and replayed) is compared with ``tg.eager()`` (the
cell called step by step, op by op), which is compared with formulas and finite differences elsewhere.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops, optim

LAYERS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
F64 = np.float64


@pytest.fixture(params=sorted(LAYERS))
def kind(request) -> Any:
    """Each recurrent layer in turn."""
    return LAYERS[request.param]


def sequence(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


def gradients(model: Any, run: Callable[[], tg.Tensor]) -> dict[str, np.ndarray]:
    """``.grad`` of every parameter after one backward."""
    model.zero_grad()
    run().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def weighted(outputs: tg.Tensor) -> tg.Tensor:
    """A scalar in which every output has another weight."""
    weights = np.cos(np.arange(outputs.size, dtype=outputs.dtype)).reshape(outputs.shape)
    return (outputs * weights).sum()


def assert_alike(found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] is not None, f"{name} has no gradient"
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=1e-12, err_msg=name)


# ---------------------------------------------------------------------------- TMVA's criterion


def events(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The two classes of TMVA's recurrent test, alternating: x ``(5, count, 2)``, labels ``(count,)``.

    Every feature is normal with width 1.  Its mean is 4 at every step in class 0, and 2 * step, with steps 0..4, in
    class 1: averaged over time, the classes do not differ.  To both is added the running sum of the feature
    index j (0 for j = 0, 0 + 1 for j = 1), which says nothing about the class.
    """
    labels = np.arange(count) % 2
    step_means = np.where(labels == 1, 2.0 * np.arange(5)[:, None], 4.0)
    means = step_means[:, :, None] + np.cumsum([0.0, 1.0])
    return rng.normal(means, 1.0).astype(np.float32), labels.astype(np.float32)


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that an event of class 1 has a higher score than one of class 0; ties count half."""
    ones, zeros = scores[labels == 1][:, None], scores[labels == 0][None, :]
    return float(((ones > zeros) + 0.5 * (ones == zeros)).mean())


class Classifier(nn.Module):
    """10 units; the outputs of all 5 steps, side by side, into a 10-unit tanh layer and one output."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.recurrent = layer(2, 10)
        self.hidden = nn.Linear(5 * 10, 10)
        self.output = nn.Linear(10, 1)

    def forward(self, x: np.ndarray) -> tg.Tensor:
        outputs, _ = self.recurrent(x)
        flat = ops.reshape(ops.swapaxes(outputs, 0, 1), (x.shape[1], 50))
        return self.output(ops.tanh(self.hidden(flat)))[:, 0]


@pytest.mark.parametrize("seed", range(5))
def test_two_classes_from_64_events(kind, seed):
    """TMVA's criterion: 50 steps of plain SGD at .1 on one full batch; the loss is binary cross-entropy."""
    tg.seed(seed)
    rng = np.random.default_rng(seed)
    x, y = events(rng, 64)
    model = Classifier(kind)
    optimizer = optim.SGD(model, lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        nn.bce_with_logits(model(x), y).backward()
        optimizer.step()
    fresh, labels = events(rng, 2000)
    with tg.no_grad():
        scores = model(fresh).numpy()
    assert area_under_curve(scores, labels) > 0.95


# ---------------------------------------------------------------------------- a whole model's gradient


class Tagger(nn.Module):
    """A class for every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, num_layers=2, bidirectional=True, dtype=F64)
        self.output = nn.Linear(6, 3, dtype=F64)

    def forward(self, x: Any, lengths: Any = None) -> tg.Tensor:
        return self.output(self.lstm(x, lengths=lengths)[0])


@pytest.mark.parametrize("eager", [False, True], ids=["default", "eager"])
def test_gradient_of_a_whole_model(rng, eager):
    model, x = Tagger(), sequence(rng, 4, 2, 2)
    classes = np.array([[0, 2], [1, 1], [2, -100], [0, -100]])

    def loss(parameters: dict[str, tg.Tensor], x: tg.Tensor) -> tg.Tensor:
        own = model.__tree_leaves__()
        model.__tree_swap__(parameters)
        try:
            with tg.eager() if eager else tg.scope("default"):
                return nn.cross_entropy(model(x, lengths=[4, 2]), classes)
        finally:
            model.__tree_swap__(own)

    assert tg.gradcheck(loss, model.state_dict(), x)


def test_second_derivative_of_a_whole_model(rng):
    layer, output = nn.LSTM(1, 2, dtype=F64), nn.Linear(2, 2, dtype=F64)

    def loss(x: tg.Tensor, h: tg.Tensor, c: tg.Tensor) -> tg.Tensor:
        return nn.cross_entropy(output(layer(x, (h, c))[0]), np.array([[0], [1], [1]]))

    assert tg.gradcheck(loss, sequence(rng, 3, 1, 1), sequence(rng, 1, 1, 2), sequence(rng, 1, 1, 2), order=2)


# ---------------------------------------------------------------------------- nothing is hand-written


@pytest.fixture
def doubled_tanh() -> Iterator[Callable[[], None]]:
    """A function that declares tanh's derivative to be twice what it is; undone afterwards."""
    primitive = tg.REGISTRY["tanh"]
    rules = primitive.rules
    yield lambda: primitive.set_rules((lambda g, out: 2.0 * (g * (1.0 - out * out)),))
    primitive.set_rules(rules)


def test_doubled_tanh_reaches_every_path(kind, rng, doubled_tanh):
    """No gradient of a layer is written by hand, and no cached program outlives the rules it was made from."""
    layer = kind(3, 4, dtype=F64)
    x = sequence(rng, 5, 2, 3)

    def default() -> dict[str, np.ndarray]:
        return gradients(layer, lambda: weighted(layer(x)[0]))

    def eager() -> dict[str, np.ndarray]:
        with tg.eager():
            return default()

    right = default()  # the caches are warm now
    assert_alike(eager(), right)
    doubled_tanh()
    wrong = eager()
    assert_alike(default(), wrong)
    for name, value in right.items():
        assert not np.allclose(wrong[name], value, rtol=1e-3), f"{name} did not change"


def test_doubled_tanh_doubles_a_single_step(rng, doubled_tanh):
    """h' = tanh(...) once: its gradient is exactly doubled."""
    layer, x = nn.RNN(3, 4, dtype=F64), sequence(rng, 1, 2, 3)
    right = gradients(layer, lambda: weighted(layer(x)[0]))
    doubled_tanh()
    found = gradients(layer, lambda: weighted(layer(x)[0]))
    assert_alike(found, {name: 2.0 * value for name, value in right.items()})


def test_the_two_paths_are_two(rng):
    """What this file compares differs: the default path is one scan, the eager one is not."""
    layer = nn.LSTM(3, 4)
    x = sequence(rng, 5, 2, 3).astype(np.float32)
    with tg.Tape() as tape:
        layer(x)
    assert [r.primitive.name for r in tape.records].count("scan") == 1
    with tg.Tape() as tape, tg.eager():
        layer(x)
    names = [r.primitive.name for r in tape.records]
    assert "scan" not in names
    assert names.count("tanh") == 2 * 5


# ---------------------------------------------------------------------------- a cell that mixes the batch


class BatchNormCell(nn.Module):
    """Normalises over the batch inside of the cell: no row can be computed without the others."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.units = units
        self.from_input = nn.Linear(inputs, units, dtype=F64)
        self.from_state = nn.Linear(units, units, dtype=F64)
        self.scale = nn.Parameter(np.linspace(0.5, 1.5, units))

    def initial_state(self, batch: int) -> tg.Tensor:
        return tg.tensor(np.zeros((batch, self.units)))

    def forward(self, x: tg.Tensor, h: tg.Tensor) -> tuple[tg.Tensor, tg.Tensor]:
        z = self.from_input(x) + self.from_state(h)
        centred = z - ops.mean(z, axis=0)
        z = self.scale * centred / ops.sqrt(ops.mean(centred * centred, axis=0) + 1e-3)
        h = ops.tanh(z)
        return h, h


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_batch_norm_cell(rng, batch):
    layer, x = nn.Recurrent(BatchNormCell(3, 5)), sequence(rng, 6, batch, 3)
    found = layer(x)
    slopes = gradients(layer, lambda: weighted(layer(x)[0]))
    with tg.eager():
        expected = layer(x)
        expected_slopes = gradients(layer, lambda: weighted(layer(x)[0]))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-10, atol=1e-12)
    assert_alike(slopes, expected_slopes, rtol=1e-8)


# ---------------------------------------------------------------------------- buffers


def test_called_twice_before_backward(kind, rng):
    layer = kind(3, 4, dtype=F64)
    first, second = sequence(rng, 5, 2, 3), sequence(rng, 5, 2, 3)
    one = gradients(layer, lambda: weighted(layer(first)[0]))
    two = gradients(layer, lambda: weighted(ops.square(layer(second)[0])))
    total = {name: one[name] + two[name] for name in one}

    for order in (0, 1):
        layer.zero_grad()
        pair = [weighted(layer(first)[0]), weighted(ops.square(layer(second)[0]))]
        pair[order].backward()
        assert_alike({name: p.grad for name, p in layer.named_parameters()}, (one, two)[order])
        pair[1 - order].backward()
        assert_alike({name: p.grad for name, p in layer.named_parameters()}, total)


def test_old_outputs_and_gradients_stay(kind, rng):
    layer = kind(3, 4)
    x = sequence(rng, 5, 2, 3).astype(np.float32)
    outputs, final = layer(x)
    states = final if isinstance(final, tuple) else (final,)
    weighted(outputs).backward()
    kept = [outputs.data, *(s.data for s in states), *(p.grad for p in layer.parameters())]
    copies = [array.copy() for array in kept]
    for k in range(4):
        weighted(layer((k + 2) * x)[0]).backward()
        with tg.no_grad():
            layer(-x)
    for array, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    for p, copy in zip(layer.parameters(), copies[1 + len(states) :], strict=True):
        assert not np.array_equal(p.grad, copy), "the later calls accumulated nothing"


# ---------------------------------------------------------------------------- threads


def test_two_threads_on_one_layer(kind, rng):
    """Each thread has its own tape; outputs and gradients are those of one call after the other."""
    inputs = [sequence(rng, steps, batch, 3) for steps, batch in ((6, 2), (6, 2), (9, 5))]

    def results(layer: Any, x: np.ndarray) -> list[np.ndarray]:
        with tg.Tape() as tape:
            t = tg.tensor(x)
            outputs, _ = layer(t)
            loss = weighted(outputs)
        slopes = tape.gradient(loss, [t, *layer.parameters()])
        return [outputs.numpy(), *(g.numpy() for g in slopes)]

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns often
    try:
        for _ in range(5):
            layer = kind(3, 4, dtype=F64)  # nothing is cached yet: both threads record the cell
            found: dict[int, list[list[np.ndarray]]] = {0: [], 1: []}
            failures: list[BaseException] = []
            start = threading.Barrier(2)

            def work(me: int, layer: Any = layer, found: Any = found, failures: Any = failures, start: Any = start):
                try:
                    start.wait(60)
                    for k in range(6):
                        found[me].append(results(layer, inputs[(k + me) % 3]))
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=work, args=(me,)) for me in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
            assert not failures, failures
            expected = [results(layer, x) for x in inputs]
            for me in (0, 1):
                for k, one in enumerate(found[me]):
                    assert all(np.array_equal(a, b) for a, b in zip(one, expected[(k + me) % 3], strict=True))
    finally:
        sys.setswitchinterval(switch)


# ---------------------------------------------------------------------------- what changes between calls


class LookingCell(nn.Module):
    """Attends to a memory ``(N, 4)``, its own or one that it did not make, and leaks with a plain number ``p``."""

    def __init__(self, memory: Callable[[], tg.Tensor] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(np.linspace(-1.0, 1.0, 12).reshape(3, 4))
        self.tables = [nn.Parameter(np.eye(4))]
        self.p = 0.9
        self.memory = memory

    def initial_state(self, batch: int) -> tg.Tensor:
        return tg.tensor(np.zeros((batch, 4)))

    def forward(self, x: tg.Tensor, h: tg.Tensor) -> tuple[tg.Tensor, tg.Tensor]:
        memory = self.tables[0] if self.memory is None else self.memory()
        h = self.p * h + ops.tanh(ops.softmax((x @ self.weight + h) @ memory.T) @ memory)
        return h, h


@pytest.mark.parametrize("change", ["memory", "length of memory", "number", "parameter", "in a list", "data"])
def test_changes_after_the_first_call_count(rng, change):
    memories = [tg.tensor(sequence(rng, 6, 4), requires_grad=True)]
    layer = nn.Recurrent(LookingCell((lambda: memories[0]) if "memory" in change else None))
    x = sequence(rng, 5, 2, 3)

    def compared() -> dict[str, np.ndarray]:
        """Outputs and gradients of the default path, which are those of the eager one."""
        both = []
        for eager in (False, True):
            memories[0].zero_grad()
            with tg.eager() if eager else tg.scope("default"):
                outputs = layer(x)[0]
                found = gradients(layer, lambda outputs=outputs: weighted(outputs))
            if "memory" in change:
                found["cell.tables.0"] = memories[0].grad  # instead of the cell's own, which is not used
            both.append({**found, "outputs": outputs.numpy()})
        assert_alike(*both)
        return both[0]

    before = compared()
    compared()
    if change == "number":
        layer.cell.p = 0.3
    elif change == "parameter":
        layer.cell.weight = nn.Parameter(sequence(rng, 3, 4))
    elif change == "in a list":
        layer.cell.tables[0] = nn.Parameter(sequence(rng, 9, 4))  # which the module does not notice, of another shape
    elif change == "data":
        layer.cell.weight.data = sequence(rng, 3, 4)
    else:
        memories[0] = tg.tensor(sequence(rng, 6 if change == "memory" else 9, 4), requires_grad=True)
    after = compared()
    assert not np.allclose(before["outputs"], after["outputs"])
    assert not np.allclose(before["cell.weight"], after["cell.weight"])


def test_replaced_parameters_of_a_layer_count(kind, rng):
    layer, x = kind(3, 4, dtype=F64), sequence(rng, 5, 2, 3)
    before = layer(x)[0].numpy()
    layer.weight_hh_l0 = nn.Parameter(sequence(rng, *layer.weight_hh_l0.shape))
    replaced = layer(x)[0].numpy()
    assert not np.allclose(before, replaced)
    layer.weight_ih_l0.data = sequence(rng, *layer.weight_ih_l0.shape)
    found, slopes = layer(x)[0].numpy(), gradients(layer, lambda: weighted(layer(x)[0]))
    assert not np.allclose(found, replaced)
    with tg.eager():
        np.testing.assert_allclose(found, layer(x)[0].numpy(), rtol=1e-12)
        assert_alike(slopes, gradients(layer, lambda: weighted(layer(x)[0])))
