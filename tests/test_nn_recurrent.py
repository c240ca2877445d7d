"""The driver: lengths, padding, trajectories, states, users' cells, both directions, noise; and the refusals."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.tree import flatten

F, H, T, B = 3, 4, 6, 3
CELLS = [nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.PeepholeLSTMCell, nn.LayerNormLSTMCell]


def sequence(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def randomised(module, seed=1):
    rng = np.random.default_rng(seed)
    for p in module.parameters():
        p.data = rng.normal(size=p.shape) * 0.5
    return module


def make(kind, **options):
    return randomised(kind(F, H, dtype=np.float64, **options))


def loop(cell, x, state=None):
    """The plain Python loop that the driver stands for."""
    state = cell.initial_state(x.shape[1]) if state is None else state
    outputs = []
    for t in range(x.shape[0]):
        y, state = cell(x[t], state)
        outputs.append(y)
    return ops.stack(outputs), state


def leaves(tree):
    return [np.asarray(leaf) for leaf in flatten(tree)[0]]


def assert_trees(a, b, tolerance=1e-12):
    for left, right in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance)


def gradients(f, module, x):
    g_module, g_x = tg.grad(f, argnums=(0, 1))(module, x)
    return [*g_module.values(), g_x]


# ---------------------------------------------------------------------------- one driver for every cell


@pytest.mark.parametrize("kind", CELLS)
def test_the_driver_is_a_loop(kind):
    cell, x = make(kind), sequence(T, B, F)
    layer = nn.Recurrent(cell)
    assert_trees(layer(x), loop(cell, tg.tensor(x)))

    def total(run):
        def f(_, x):
            y, state = run(x)
            return (y * y).sum() + sum([(s * s * s).sum() for s in flatten(state)[0]], 0.0)

        return f

    assert_trees(gradients(total(layer), layer, x), gradients(total(lambda x: loop(cell, x)), layer, x))


@pytest.mark.parametrize("kind", CELLS)
def test_second_order(kind):
    cell, x = make(kind), sequence(3, 2, F)
    layer = nn.Recurrent(cell)
    assert tg.gradcheck(lambda x: (layer(x)[0] ** 2).sum(), x, order=2)


def published_peephole(cell, x, h, c):
    w = {name: p.numpy() for name, p in cell.named_parameters()}
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    z = x @ w["weight_ih"].T + w["bias_ih"] + h @ w["weight_hh"].T + w["bias_hh"]
    i = sigmoid(z[:, :H] + w["weight_ci"] * c)
    f = sigmoid(z[:, H : 2 * H] + w["weight_cf"] * c)
    c = f * c + i * np.tanh(z[:, 2 * H : 3 * H])
    o = sigmoid(z[:, 3 * H :] + w["weight_co"] * c)
    return o * np.tanh(c), c


def test_peephole_equations():
    cell = make(nn.PeepholeLSTMCell)
    x, h, c = sequence(B, F), sequence(B, H, seed=2), sequence(B, H, seed=3)
    _, (h_new, c_new) = cell(x, (tg.tensor(h), tg.tensor(c)))
    assert_trees([h_new, c_new], published_peephole(cell, x, h, c))


def test_layer_norm_equations():
    cell = make(nn.LayerNormLSTMCell)
    x, h, c = sequence(B, F), sequence(B, H, seed=2), sequence(B, H, seed=3)
    w = {name: p.numpy() for name, p in cell.named_parameters()}
    assert "bias_ih" not in w

    def norm(z, name):
        z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    z = norm(x @ w["weight_ih"].T, "norm_x") + norm(h @ w["weight_hh"].T, "norm_h")
    c_new = sigmoid(z[:, H : 2 * H]) * c + sigmoid(z[:, :H]) * np.tanh(z[:, 2 * H : 3 * H])
    h_new = sigmoid(z[:, 3 * H :]) * np.tanh(norm(c_new, "norm_c"))
    assert_trees(cell(x, (tg.tensor(h), tg.tensor(c)))[1], (h_new, c_new))


class Tuple(nn.Module):
    """A user's cell: dict state, dict output, an attention memory that it closes over."""

    def __init__(self, memory=None):
        super().__init__()
        self.w = nn.Parameter(sequence(F, H, seed=5))
        self.u = nn.Parameter(sequence(H, H, seed=6) * 0.3)
        self.memory = memory

    def initial_state(self, batch):
        return {"h": tg.tensor(np.zeros((batch, H))), "count": tg.tensor(np.zeros((batch, 1)))}

    def forward(self, x, state):
        h = ops.tanh(x @ self.w + state["h"] @ self.u)
        if self.memory is not None:
            h = h + ops.softmax(h @ self.memory.T) @ self.memory
        tg.name(h, "hidden")
        count = state["count"] + 1.0
        return {"y": h, "twice": 2.0 * h}, {"h": h, "count": count}


def test_trees_as_state_and_output():
    layer, x = nn.Recurrent(Tuple(), return_gates=True), sequence(T, B, F)
    outputs, final, traj = layer(x, lengths=[6, 2, 0])
    assert outputs["twice"].shape == (T, B, H) and list(final) == ["h", "count"]
    assert final["count"].tolist() == [[6], [2], [0]]
    assert set(traj) == {"hidden", "state1"} and traj["hidden"].shape == (1, T, B, H)


def test_memory_that_differs_at_each_call():
    cell, x = Tuple(), sequence(T, B, F)
    layer = nn.Recurrent(cell)
    for seed in (7, 8):
        memory = tg.tensor(sequence(5, H, seed=seed), requires_grad=True)
        cell.memory = memory
        y, _ = layer(x)
        with tg.eager():
            expected, _ = layer(x)
        assert_trees(y, expected)
        (y["y"] ** 2).sum().backward()
        found, memory.grad = memory.grad, None
        (expected["y"] ** 2).sum().backward()
        np.testing.assert_allclose(found, memory.grad, atol=1e-12)


def test_parameters_that_change_between_calls():
    cell, x = make(nn.LSTMCell), sequence(T, B, F)
    layer = nn.Recurrent(cell)
    layer(x)
    cell.weight_hh.data = cell.weight_hh.data * 0.5
    assert_trees(layer(x), loop(cell, tg.tensor(x)))
    cell.bias_ih = nn.Parameter(np.ones(4 * H))
    assert_trees(layer(x), loop(cell, tg.tensor(x)))
    layer(x)[0].sum().backward()
    assert cell.bias_ih.grad is not None


def test_a_plain_attribute_that_changes():
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = 0.5

        def initial_state(self, batch):
            return tg.tensor(np.zeros((batch, F)))

        def forward(self, x, h):
            h = self.p * h + x
            return h, h

    cell, x = Leaky(), sequence(T, B, F)
    layer = nn.Recurrent(cell)
    layer(x)
    cell.p = 0.25
    assert_trees(layer(x), loop(cell, tg.tensor(x)))


def test_learned_state_beside_a_counter():
    class Counting(nn.Module):
        def initial_state(self, batch):
            return np.full(batch, 3), np.zeros((batch, 2), np.float32)

        def forward(self, x, state):
            n, h = state
            h = h + x * ops.expand_dims(n, 1).astype(np.float32)
            return h, (n + 1, h)

    layer = nn.Recurrent(Counting(), learn_state=True)
    assert [name for name, _ in layer.named_parameters()] == ["learned_state.0"]
    layer.learned_state[0].data = np.float32([[1.0, 2.0]])
    outputs, (n, _) = layer(np.ones((2, 3, 2), np.float32))
    assert n.tolist() == [5, 5, 5] and outputs[-1].tolist() == [[8.0, 9.0]] * 3


def test_learned_state():
    layer, x = nn.Recurrent(make(nn.LSTMCell), learn_state=True), sequence(T, B, F)
    assert [name for name, _ in layer.named_parameters()][:2] == ["learned_state.0", "learned_state.1"]
    layer.learned_state[1].data = sequence(1, H, seed=4)
    y, _ = layer(x)
    c = np.repeat(layer.learned_state[1].numpy(), B, axis=0)
    assert_trees(y, layer(x, (np.zeros((B, H)), c))[0])
    y.sum().backward()
    assert layer.learned_state[0].grad.any() and layer.learned_state[1].grad.shape == (1, H)


# ---------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_lengths_are_shorter_sequences(kind, reverse):
    cell, x = make(kind), sequence(T, B, F)
    lengths = [6, 2, 0]
    start = (
        tuple(sequence(B, H, seed=k) for k in range(2))
        if len(flatten(cell.initial_state(1))[0]) == 2
        else sequence(B, H)
    )
    layer = nn.Recurrent(cell, reverse=reverse, return_states=True)
    y, final, traj = layer(x, start, lengths=lengths)
    for b, n in enumerate(lengths):
        row = lambda tree, b=b: [leaf[b : b + 1] for leaf in leaves(tree)]
        given = row(start)
        y_b, final_b, _ = layer(x[:n, b : b + 1], given if len(given) > 1 else given[0])
        np.testing.assert_allclose(y.numpy()[:n, b], y_b.numpy()[:, 0], atol=1e-12)
        np.testing.assert_array_equal(y.numpy()[n:, b], 0)
        np.testing.assert_array_equal(traj["h"].numpy()[0, n:, b], 0)
        assert_trees(row(final), final_b)
    assert_trees([leaf[2] for leaf in leaves(final)], [leaf[2] for leaf in leaves(start)])  # length 0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_the_padding_holds_changes_nothing(poison, bidirectional):
    layer = randomised(nn.LSTM(F, H, 2, bidirectional=bidirectional, dtype=np.float64))
    clean = sequence(T, B, F)
    dirty = clean.copy()
    lengths = [6, 2, 0]
    for b, n in enumerate(lengths):
        dirty[n:, b] = poison
    results = []
    for x in (clean, dirty):
        xs = tg.tensor(x, requires_grad=True)
        layer.zero_grad()
        y, (h, c) = layer(xs, lengths=lengths)
        ((y * y).sum() + (h * c).sum()).backward()
        results.append([y, h, c, xs.grad, *[p.grad for p in layer.parameters()]])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_lengths_are_refused():
    layer, x = nn.LSTM(F, H, dtype=np.float64), sequence(T, B, F)
    for bad in ([1.0, 2.0, 3.0], np.ones(3), [True, False, True]):
        with pytest.raises(tg.DTypeError, match="LSTM: lengths are int"):
            layer(x, lengths=bad)
    for bad in ([1, 2, 7], [-1, 2, 3]):
        with pytest.raises(tg.Error, match=rf"{bad[-1] if 7 in bad else -1}.*0\.\.6"):
            layer(x, lengths=bad)
    with pytest.raises(tg.ShapeError, match=r"\(2,\).*\(3,\)"):
        layer(x, lengths=[1, 2])
    np.testing.assert_array_equal(layer(x, lengths=tg.tensor([1, 2, 3]))[0].numpy()[3:], 0)


# ---------------------------------------------------------------------------- trajectories


@pytest.mark.parametrize("kind, states, gates", [(nn.RNN, "h", ""), (nn.LSTM, "hc", "ifgo"), (nn.GRU, "h", "rzn")])
def test_trajectories(kind, states, gates):
    layer = randomised(kind(F, H, 2, bidirectional=True, batch_first=True, dtype=np.float64))
    x, lengths = sequence(B, T, F), [6, 2, 0]
    y, final, traj = layer(x, lengths=lengths, return_states=True)
    assert set(traj) == set(states)
    y2, _, both = layer(x, lengths=lengths, return_states=True, return_gates=True)
    assert set(both) == set(states + gates)
    assert {v.shape for v in both.values()} == {(4, T, B, H)}
    np.testing.assert_array_equal(y.numpy(), y2.numpy())
    h = traj["h"].numpy()
    np.testing.assert_array_equal(np.concatenate([h[2], h[3]], -1).swapaxes(0, 1), y.numpy())
    np.testing.assert_array_equal(h[:, 2:, 1], 0)
    last = final[0] if kind is nn.LSTM else final
    np.testing.assert_array_equal(last.numpy()[0, :2], [h[0, 5, 0], h[0, 1, 1]])  # forward: the last valid step
    np.testing.assert_array_equal(last.numpy()[1, :2], h[1, 0, :2])  # reverse: ends at step 0
    with tg.eager():
        _, _, stepped = layer(x, lengths=lengths, return_gates=True)
    assert_trees({k: both[k] for k in sorted(both)}, {k: stepped[k] for k in sorted(stepped)})


def test_trajectories_of_a_constructor_flag_and_unbatched():
    layer = nn.LSTM(F, H, dtype=np.float64, return_states=True)
    y, _, traj = layer(sequence(T, F))
    assert traj["c"].shape == (1, T, H)
    np.testing.assert_array_equal(traj["h"].numpy()[0], y.numpy())
    assert len(layer(sequence(T, F), return_states=False)) == 2


# ---------------------------------------------------------------------------- shapes at the edge


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@settings(max_examples=20)
@given(data=st.data())
def test_empty_and_single(kind, data):
    steps, batch = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    lengths = data.draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    layer = kind(F, H, 2, bidirectional=True)
    x = tg.tensor(np.ones((steps, batch, F), np.float32), requires_grad=True)
    start = np.ones((4, batch, H), np.float32)
    y, state, traj = layer(x, (start, start) if kind is nn.LSTM else start, lengths, return_gates=True)
    assert y.shape == (steps, batch, 2 * H) and y.dtype == np.float32
    assert all(v.shape == (4, steps, batch, H) for v in traj.values())
    if not steps:
        assert_trees(flatten(state)[0][0], start)
    (y.sum() + flatten(state)[0][0].sum()).backward()
    assert (x.grad is None and not steps) or x.grad.shape == x.shape


# ---------------------------------------------------------------------------- composition


def test_bidirectional_and_stack_are_the_layer():
    layer = randomised(nn.LSTM(F, H, 2, bidirectional=True, dtype=np.float64))
    sizes = [F, 2 * H]
    stack = nn.Stack([nn.Bidirectional(*[nn.LSTMCell(n, H, dtype=np.float64) for _ in range(2)]) for n in sizes])
    assert len(list(stack.parameters())) == 16
    stack.load_state_dict(dict(zip(stack.state_dict(), layer.state_dict().values(), strict=True)))
    x, lengths = sequence(T, B, F), [6, 2, 0]
    y, states, traj = stack(x, None, lengths, return_gates=True)
    expected, (h, c), expected_traj = layer(x, None, lengths, return_gates=True)
    assert_trees(y, expected)
    assert_trees([part[0] for pair in states for part in pair], list(h.numpy()))
    assert_trees({k: traj[k] for k in sorted(traj)}, {k: expected_traj[k] for k in sorted(traj)})
    again, _ = stack(x, states, lengths)
    assert_trees(again, layer(x, (h, c), lengths)[0])


def test_one_cell_in_both_directions_is_an_error():
    cell = nn.GRUCell(F, H)
    with pytest.raises(tg.ArgumentError, match="one cell object in both directions"):
        nn.Bidirectional(cell, cell)
    with pytest.raises(tg.ArgumentError, match="one cell object in both directions"):
        nn.Bidirectional(nn.Recurrent(cell), nn.Recurrent(cell, reverse=True))
    with pytest.raises(tg.ArgumentError, match="reverse=True"):
        nn.Bidirectional(nn.Recurrent(cell), nn.Recurrent(nn.GRUCell(F, H)))
    nn.Bidirectional(cell, copy.deepcopy(cell))


def test_batch_first():
    cell, x = make(nn.GRUCell), sequence(T, B, F)
    y, state = nn.Recurrent(cell, batch_first=True)(x.swapaxes(0, 1), lengths=[6, 2, 0])
    expected, expected_state = nn.Recurrent(cell)(x, lengths=[6, 2, 0])
    np.testing.assert_array_equal(y.numpy(), expected.numpy().swapaxes(0, 1))
    np.testing.assert_array_equal(state.numpy(), expected_state.numpy())


def test_layer_called_twice_before_backward():
    layer = randomised(nn.LSTM(F, H, dtype=np.float64))
    a, b = sequence(T, B, F), sequence(T, B, F, seed=9)
    first, second = layer(a)[0], layer(b)[0]
    ((first * first).sum() + (second * second).sum()).backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    expected = tg.grad(lambda m: (m(a)[0] ** 2).sum() + (m(b)[0] ** 2).sum())(layer)
    assert_trees(list(found.values()), list(expected.values()))
