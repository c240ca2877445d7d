"""Linear, Embedding, LayerNorm, Dropout against torch; initial values."""

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def compare(ours, theirs, x, torch, floating=True):
    ours.load_state_dict(theirs.state_dict())
    a = tg.tensor(x, requires_grad=floating)
    b = torch.tensor(x, requires_grad=floating)
    found, expected = ours(a), theirs(b)
    np.testing.assert_allclose(found.numpy(), expected.detach().numpy(), rtol=0, atol=1e-12)
    weight = np.random.default_rng(0).normal(size=found.shape)
    (found * weight).sum().backward()
    (expected * torch.tensor(weight)).sum().backward()
    if floating:
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=0, atol=1e-11)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=0, atol=1e-11, err_msg=name)


@pytest.mark.conformance
@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias, rng, torch):
    compare(
        nn.Linear(3, 5, bias, dtype=np.float64),
        torch.nn.Linear(3, 5, bias, dtype=torch.float64),
        rng.normal(size=shape),
        torch,
    )


@pytest.mark.conformance
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding(padding_idx, rng, torch):
    ours = nn.Embedding(5, 3, padding_idx, dtype=np.float64)
    theirs = torch.nn.Embedding(5, 3, padding_idx, dtype=torch.float64)
    if padding_idx is not None:
        assert not ours.weight.numpy()[padding_idx].any()
    compare(ours, theirs, np.array([[0, 2, 4], [2, 2, 1]]), torch, floating=False)


@pytest.mark.conformance
@pytest.mark.parametrize("shape", [4, (3, 4)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
def test_layer_norm(shape, options, rng, torch):
    compare(
        nn.LayerNorm(shape, dtype=np.float64, **options),
        torch.nn.LayerNorm(shape, dtype=torch.float64, **options),
        rng.normal(size=(2, 3, 4)),
        torch,
    )


@pytest.mark.conformance
def test_every_initial_distribution_of_torch(torch):
    torch.manual_seed(0)
    for make in (
        lambda lib, **kw: lib.Linear(50, 40, **kw),
        lambda lib, **kw: lib.Embedding(50, 40, **kw),
        lambda lib, **kw: lib.LSTM(20, 25, **kw),
    ):
        ours, theirs = nn.init.torch_default(make(nn)), make(torch.nn)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            a, b = p.numpy(), q.detach().numpy()
            assert a.std() == pytest.approx(b.std(), rel=0.2), name
            assert np.abs(a).max() == pytest.approx(np.abs(b).max(), rel=0.3), name


# ---------------------------------------------------------------------------- refusals


def test_refusals():
    layer = nn.Linear(3, 2)
    with pytest.raises(tg.ShapeError, match=r"\(4, 5\).*in_features=3"):
        layer(np.zeros((4, 5), np.float32))
    with pytest.raises(tg.DTypeError, match=r"float64.*float32"):
        layer(np.zeros((4, 3)))
    table = nn.Embedding(5, 2)
    for bad in (5, -1):
        with pytest.raises(tg.OutOfRangeError, match=rf"id {bad} .*0\.\.4"):
            table([0, bad])
    with pytest.raises(tg.DTypeError, match="float32"):
        table([0.0])
    with pytest.raises(tg.OutOfRangeError, match="padding_idx 5"):
        nn.Embedding(5, 2, padding_idx=5)
    with pytest.raises(tg.ShapeError, match=r"\(2, 3\).*\(4,\)"):
        nn.LayerNorm(4)(np.zeros((2, 3), np.float32))
    for make in (
        lambda: nn.Linear(0, 1),
        lambda: nn.Dropout(1.1),
        lambda: nn.LayerNorm(()),
        lambda: nn.Embedding(1, 0),
    ):
        with pytest.raises(tg.ArgumentError):
            make()
    for make, message in (
        (lambda: nn.Linear(2.5, 2), r"Linear: in_features is an int, found 2\.5"),
        (lambda: nn.Linear(2, "3"), "Linear: out_features is an int, found '3'"),
        (lambda: nn.Embedding(True, 2), "Embedding: num_embeddings is an int, found True"),
        (lambda: nn.Embedding(5, 2, padding_idx=1.0), r"Embedding: padding_idx is an int, found 1\.0"),
        (lambda: nn.LayerNorm(2.0), r"LayerNorm: .*normalized_shape is an int, found 2\.0"),
        (lambda: nn.Dropout("a"), "Dropout: p is a number, found 'a'"),
        (lambda: nn.Dropout(None), "Dropout: p is a number, found None"),
    ):
        with pytest.raises(tg.DTypeError, match=message):
            make()


class Reader(nn.Module):
    """A cell that looks its ids up itself; with ``own`` also the id that its state says."""

    def __init__(self, padding_idx, own=False):
        super().__init__()
        self.table, self.cell, self.own = nn.Embedding(5, 3, padding_idx), nn.GRUCell(3, 4), own

    def initial_state(self, batch):
        h = self.cell.initial_state(batch)
        return (h, tg.tensor(np.zeros(batch, np.int64))) if self.own else h

    def forward(self, ids, state):
        if not self.own:
            return self.cell(self.table(ids), state)
        h, last = state
        _, h = self.cell(self.table(last), h)
        return h, (h, ids.astype(np.int64))


@pytest.mark.parametrize("compile_loops", ["never", "always"])
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16])
def test_recorded_ids_are_checked(compile_loops, padding_idx, dtype, monkeypatch):
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", compile_loops)
    table = nn.Embedding(5, 3, padding_idx)
    layers = [nn.Recurrent(Reader(padding_idx)), nn.Recurrent(Reader(padding_idx, own=True))]
    called, summed = tg.compile(lambda m, ids: m(ids)), tg.compile(lambda m, ids: (m(ids) * 2.0).sum())
    in_loop = tg.compile(lambda m, ids: m(ids[:, None])[0])
    runs = [lambda ids: called(table, ids), lambda ids: summed(table, ids)]
    in_loops = []
    for layer in layers:
        in_loops += [lambda ids, m=layer: m(ids[:, None])[0], lambda ids, m=layer: in_loop(m, ids)]
    good = np.array([4, 0, 3, 1], dtype)
    np.testing.assert_array_equal(called(table, good).numpy(), table.weight.numpy()[good])
    for run in runs + in_loops:
        for bad in (5, 9) if dtype is np.uint16 else (5, -1, -5):
            for _ in range(2):
                said = rf"Embedding: id {bad} .*0\.\.4"
                if padding_idx is not None and run in in_loops:  # fused with the look for the padding
                    said += r"|take: index \d is outside of an axis of length 5"
                with pytest.raises(tg.OutOfRangeError, match=said):
                    run(np.array([0, bad, 2, 1], dtype))
        run(good)
    layers[0](good[:, None])[0].sum().backward()
    gradient = layers[0].cell.table.weight.grad
    moved = [True, True, False, True, True] if padding_idx is None else [False, True, False, True, True]
    assert (np.abs(gradient).sum(axis=1) > 0).tolist() == moved


# ---------------------------------------------------------------------------- dropout


def test_dropout():
    layer = nn.Dropout(0.25, generator=tg.Generator(3))
    x = tg.tensor(np.ones((200, 100), np.float32), requires_grad=True)
    y = layer(x)
    values = np.unique(y.numpy())
    assert values.tolist() == [0.0, np.float32(1 / 0.75)]
    assert np.mean(y.numpy() == 0) == pytest.approx(0.25, abs=0.02)
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, y.numpy())
    assert layer.eval()(x) is x
    np.testing.assert_array_equal(nn.Dropout(1.0)(x).numpy(), 0)
    again = nn.Dropout(0.25, generator=tg.Generator(3))(x)
    np.testing.assert_array_equal(again.numpy(), y.numpy())


# ---------------------------------------------------------------------------- initial values


def parameter(*shape, dtype=np.float64):
    return nn.Parameter(np.zeros(shape, dtype))


def test_distributions():
    n = 200
    p = parameter(n, 100)
    bound = np.sqrt(6 / 300)
    assert np.abs(nn.init.xavier_uniform(p).numpy()).max() == pytest.approx(bound, rel=0.01)
    assert nn.init.xavier_normal(p, gain=2.0).numpy().std() == pytest.approx(2 * np.sqrt(2 / 300), rel=0.02)
    assert np.abs(nn.init.kaiming_uniform(p).numpy()).max() == pytest.approx(np.sqrt(6 / 100), rel=0.01)
    assert np.abs(nn.init.kaiming_uniform(p, a=1.0).numpy()).max() == pytest.approx(np.sqrt(3 / 100), rel=0.01)
    assert nn.init.normal(p, 1.0, 2.0).numpy().mean() == pytest.approx(1.0, abs=0.1)
    assert nn.init.uniform(p, 2.0, 3.0).numpy().min() >= 2
    assert (nn.init.constant(p, 3.5).numpy() == 3.5).all() and not nn.init.zeros(p).numpy().any()
    with pytest.raises(tg.ShapeError, match=r"\(3,\)"):
        nn.init.xavier_uniform(parameter(3))


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (4, 2, 3)])
def test_orthogonal(shape):
    w = nn.init.orthogonal(parameter(*shape), gain=2.0).numpy().reshape(shape[0], -1)
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-12)


def test_defaults_of_recurrent_layers():
    layer = nn.LSTM(3, 6, 2, bidirectional=True, dtype=np.float64)
    for name, p in layer.named_parameters():
        a = p.numpy()
        if name.startswith("weight_hh"):
            for block in np.split(a, 4):
                np.testing.assert_allclose(block @ block.T, np.eye(6), atol=1e-12)
        elif name.startswith("weight_ih"):
            assert 0 < np.abs(a).max() <= np.sqrt(6 / (a.shape[1] + 6))
        elif name.startswith("bias_ih"):
            assert a.tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 12
        else:
            assert name.startswith("bias_hh") and not a.any()
    assert not nn.GRU(3, 6).bias_ih_l0.numpy().any()
    norm = nn.LayerNormLSTMCell(3, 2).norm_x.bias.tolist()
    assert norm == [0, 0, 1, 1, 0, 0, 0, 0]
    with pytest.raises(tg.ArgumentError, match="no hidden_size"):
        nn.init.lstm_default(nn.Linear(2, 2))


def test_the_seed_decides():
    states = []
    for _ in range(2):
        tg.seed(11)
        states.append(nn.LSTM(3, 4).state_dict())
    given = nn.LSTM(3, 4, generator=tg.Generator(11)).state_dict()
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name])
        np.testing.assert_array_equal(array, given[name])
    assert (nn.LSTM(3, 4).weight_ih_l0.numpy() != given["weight_ih_l0"]).any()
