"""RNN, LSTM and GRU against torch: values and all gradients, float64, 1e-9."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import nn, optim

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # its threads spin, which costs seconds at these sizes when others run too
pytestmark = pytest.mark.conformance

TOLERANCE = 1e-9
F, H, T, B = 3, 5, 6, 4
LENGTHS = [6, 3, 1, 4]


def both(kind, **options):
    """Our layer and torch's with the same weights."""
    theirs = getattr(torch.nn, kind)(F, H, dtype=torch.float64, **options)
    ours = getattr(nn, kind)(F, H, dtype=np.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def parts(state):
    return list(state) if isinstance(state, tuple) else [state]


def run_torch(layer, x, state, lengths, batch_first):
    if lengths is None:
        y, final = layer(x, state)
    else:
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=False
        )
        y, final = layer(packed, state)
        steps = x.shape[1 if batch_first else 0]
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=batch_first, total_length=steps)
    return [y, *parts(final)]


def compare(kind, x, *, lengths=None, with_state=True, seed=0, **options):
    """Run both forward and backward and compare outputs, states, and the gradients of x, states, parameters."""
    rng = np.random.default_rng(seed)
    ours, theirs = both(kind, **options)
    unbatched = x.ndim == 2
    count = ours.num_layers * ours.directions
    batch = None if unbatched else x.shape[0 if ours.batch_first else 1]
    starts = []
    if with_state:
        for size in ours._cells[0].state_sizes():
            starts.append(rng.normal(size=(count, size) if unbatched else (count, batch, size)))
    leaves = [tg.tensor(a, requires_grad=True) for a in (x, *starts)]
    torch_leaves = [torch.tensor(a, requires_grad=True) for a in (x, *starts)]
    pick = (lambda s: tuple(s) if kind == "LSTM" else s[0]) if with_state else (lambda s: None)
    y, final = ours(leaves[0], pick(leaves[1:]), lengths)
    found = [y, *parts(final)]
    expected = run_torch(theirs, torch_leaves[0], pick(torch_leaves[1:]), lengths, ours.batch_first)
    weights = [rng.normal(size=t.shape) for t in found]
    sum([(t * w).sum() for t, w in zip(found, weights, strict=True)], 0.0).backward()
    sum((t * torch.tensor(w)).sum() for t, w in zip(expected, weights, strict=True)).backward()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b.detach().numpy(), rtol=0, atol=TOLERANCE)
    for a, b in zip(leaves, torch_leaves, strict=True):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=0, atol=TOLERANCE)
    named = dict(theirs.named_parameters())
    assert [name for name, _ in ours.named_parameters()] == list(named)
    for name, p in ours.named_parameters():
        np.testing.assert_allclose(p.grad, named[name].grad.numpy(), rtol=0, atol=TOLERANCE, err_msg=name)


def sequence(*shape):
    return np.random.default_rng(1).normal(size=shape)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_layers(kind, lengths, bidirectional, num_layers):
    compare(kind, sequence(T, B, F), lengths=lengths, bidirectional=bidirectional, num_layers=num_layers)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
def test_batch_first(kind, lengths):
    compare(kind, sequence(B, T, F), lengths=lengths, batch_first=True, bidirectional=True)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_without_bias_and_without_state(kind):
    compare(kind, sequence(T, B, F), bias=False, with_state=False, num_layers=2)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(kind, batch_first):
    compare(kind, sequence(T, F), num_layers=2, bidirectional=True, batch_first=batch_first)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("with_state", [False, True])
def test_projection(lengths, with_state):
    compare(
        "LSTM", sequence(T, B, F), lengths=lengths, with_state=with_state, proj_size=2, num_layers=2, bidirectional=True
    )


def test_relu():
    compare("RNN", sequence(T, B, F), nonlinearity="relu", num_layers=2)


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(["RNN", "LSTM", "GRU"]), data=st.data())
def test_any_shape(kind, data):
    steps, batch = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    lengths = data.draw(st.none() | st.lists(st.integers(1, steps), min_size=batch, max_size=batch))
    options = {
        "num_layers": data.draw(st.integers(1, 3)),
        "bidirectional": data.draw(st.booleans()),
        "bias": data.draw(st.booleans()),
    }
    compare(kind, sequence(steps, batch, F), lengths=lengths, **options)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_dropout_is_off_in_evaluation(kind):
    ours, theirs = both(kind, num_layers=2, dropout=0.5)
    ours.eval()
    theirs.eval()
    x = sequence(T, B, F)
    np.testing.assert_allclose(ours(x)[0].numpy(), theirs(torch.tensor(x))[0].detach().numpy(), rtol=0, atol=TOLERANCE)


def test_dropout_acts_between_layers_only():
    tg.seed(0)
    layer = nn.LSTM(F, H, 2, dropout=1.0, dtype=np.float64)
    second = nn.LSTM(H, H, dtype=np.float64)
    second.load_state_dict({k.replace("l1", "l0"): v for k, v in layer.state_dict().items() if k.endswith("l1")})
    expected, _ = second(np.zeros((T, B, H)))  # everything between the layers was dropped
    np.testing.assert_array_equal(layer(sequence(T, B, F))[0].numpy(), expected.numpy())


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("bias", [False, True])
def test_cells(kind, bias):
    theirs = getattr(torch.nn, kind)(F, H, bias=bias, dtype=torch.float64)
    ours = getattr(nn, kind)(F, H, bias=bias, dtype=np.float64)
    ours.load_state_dict(theirs.state_dict())
    rng = np.random.default_rng(2)
    arrays = [rng.normal(size=(B, F)), *[rng.normal(size=(B, H)) for _ in ours.state_sizes()]]
    x, *state = [tg.tensor(a, requires_grad=True) for a in arrays]
    tx, *torch_state = [torch.tensor(a, requires_grad=True) for a in arrays]
    pick = (lambda s: tuple(s)) if kind == "LSTMCell" else (lambda s: s[0])
    _, final = ours(x, pick(state))
    expected = theirs(tx, pick(torch_state))
    sum(((k + 1.0) * (t * t).sum() for k, t in enumerate(parts(final))), 0.0).backward()
    sum((k + 1.0) * (t * t).sum() for k, t in enumerate(parts(expected))).backward()
    for a, b in zip(parts(final), parts(expected), strict=True):
        np.testing.assert_allclose(a.numpy(), b.detach().numpy(), rtol=0, atol=TOLERANCE)
    for a, b in zip((x, *state), (tx, *torch_state), strict=True):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=0, atol=TOLERANCE)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=0, atol=TOLERANCE, err_msg=name)


def test_state_dicts_are_interchangeable():
    ours, theirs = both("LSTM", num_layers=2, bidirectional=True, proj_size=2)
    other = torch.nn.LSTM(F, H, num_layers=2, bidirectional=True, proj_size=2, dtype=torch.float64)
    other.load_state_dict({name: torch.tensor(a) for name, a in ours.state_dict().items()})
    for a, b in zip(theirs.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_float32_agrees_with_float64():
    tg.seed(3)
    layer = nn.LSTM(F, H, 2, bidirectional=True, dtype=np.float64)
    single = nn.LSTM(F, H, 2, bidirectional=True)
    single.load_state_dict(layer.state_dict())
    x = sequence(T, B, F)
    np.testing.assert_allclose(single(x.astype(np.float32))[0].numpy(), layer(x)[0].numpy(), atol=2e-6)


def test_hundred_steps_of_adam_follow_torch():
    """A two-layer model: embedding, LSTM, linear, cross-entropy, clipping; the loss curves agree."""
    classes, steps = 11, 100
    torch.manual_seed(0)

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(classes, 6, dtype=torch.float64)
            self.lstm = torch.nn.LSTM(6, 8, num_layers=2, dtype=torch.float64)
            self.output = torch.nn.Linear(8, classes, dtype=torch.float64)

        def forward(self, ids):
            return self.output(self.lstm(self.embedding(ids))[0])

    class Ours(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(classes, 6, dtype=np.float64)
            self.lstm = nn.LSTM(6, 8, num_layers=2, dtype=np.float64)
            self.output = nn.Linear(8, classes, dtype=np.float64)

        def forward(self, ids):
            return self.output(self.lstm(self.embedding(ids))[0])

    theirs, ours = Theirs(), Ours()
    ours.load_state_dict(theirs.state_dict())
    reference, optimizer = torch.optim.Adam(theirs.parameters(), lr=0.01), optim.Adam(ours, lr=0.01)
    rng = np.random.default_rng(4)
    curves = []
    for _ in range(steps):
        ids = rng.integers(0, classes, (7, 3))
        target = (ids * 3 + 1) % classes
        loss = nn.cross_entropy(ours(ids), target)
        optimizer.zero_grad()
        loss.backward()
        norm = optim.clip_grad_norm(ours, 0.5)
        optimizer.step()
        expected = torch.nn.functional.cross_entropy(
            theirs(torch.tensor(ids)).reshape(-1, classes), torch.tensor(target).reshape(-1)
        )
        reference.zero_grad()
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        curves.append((loss.item(), expected.item(), norm, float(expected_norm)))
    curves = np.array(curves)
    np.testing.assert_allclose(curves[:, 0], curves[:, 1], rtol=1e-9)
    np.testing.assert_allclose(curves[:, 2], curves[:, 3], rtol=1e-8)
    assert curves[-1, 0] < 0.5 * curves[0, 0]
