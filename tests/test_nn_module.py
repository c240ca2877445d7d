"""Module and Parameter: the tree, its names, its values, its version."""

import collections
import copy
import gc
import pickle

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.nn import module as module_file


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(2, 3), nn.Linear(3, 2)]
        self.heads = {"a": nn.Linear(2, 1), "b": {"deep": nn.Parameter([1.0])}}
        self.scale = nn.Parameter(np.float64([2.0, 3.0]))
        self.size = 7

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.heads["a"](x)


NAMES = ["scale", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "heads.a.weight"]


def test_the_tree():
    model = Block()
    names = [name for name, _ in model.named_parameters()]
    assert names == [
        "heads.b.deep", "scale", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias",
        "heads.a.weight", "heads.a.bias",
    ]  # fmt: skip
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules()] == ["", "layers.0", "layers.1", "heads.a"]
    assert [type(child).__name__ for child in model.children()] == ["Linear"] * 3
    assert len(list(model.modules())) == 4
    assert model.count() == 9 + 8 + 3 + 2 + 1
    assert model(np.ones((4, 2), np.float32)).shape == (4, 1)


def test_parameter():
    array = np.ones(3)
    p = nn.Parameter(array)
    array[0] = 5
    assert p.tolist() == [1, 1, 1] and p.dtype == np.float64 and p.requires_grad
    assert nn.Parameter([1.0]).dtype == np.float32
    assert nn.Parameter(tg.tensor([1.0])).dtype == np.float32
    with pytest.raises(tg.DTypeError, match="int64"):
        nn.Parameter([1])


def test_forgotten_super_init():
    class Broken(nn.Module):
        def __init__(self):
            self.size = 3  # plain values may come first
            self.layer = nn.Linear(2, 2)

    with pytest.raises(tg.ArgumentError, match=r"Broken.__init__ sets 'layer' before it calls super\(\).__init__"):
        Broken()


def test_tuples_of_parameters_are_refused():
    model = nn.Module()
    with pytest.raises(tg.DTypeError, match="use a list"):
        model.pair = (nn.Parameter([1.0]), nn.Parameter([2.0]))
    model.modules_in_a_tuple = (nn.Linear(1, 1),)
    assert model.count() == 2


def test_shared_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.output = nn.Linear(3, 5, bias=False)
            self.output.weight = self.embedding.weight

        def forward(self, ids):
            return self.output(self.embedding(ids))

    model = Tied()
    assert model.count() == 15 and len(list(model.parameters())) == 1
    assert list(model.state_dict()) == ["embedding.weight", "output.weight"]
    gradient = tg.grad(lambda m: m([0, 1]).sum())(model)
    model([0, 1]).sum().backward()
    assert list(gradient) == ["embedding.weight"]
    np.testing.assert_allclose(gradient["embedding.weight"].numpy(), model.embedding.weight.grad, rtol=1e-6)
    assert model.output.weight is model.embedding.weight


def test_a_module_that_holds_its_parent():
    parent, child = nn.Module(), nn.Linear(1, 1)
    parent.child = child
    child.parent = parent
    assert parent.count() == 2
    assert [name for name, _ in parent.named_parameters()] == ["child.weight", "child.bias"]
    parent.eval()
    assert parent.version


# ---------------------------------------------------------------------------- values


def test_state_dict_is_a_copy_and_loads_back():
    model, other = Block(), Block()
    state = model.state_dict()
    assert all(type(a) is np.ndarray for a in state.values())
    state["scale"][0] = 100
    assert model.scale.numpy()[0] == 2
    result = other.load_state_dict(model.state_dict())
    assert result == ([], [])
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(p.numpy(), q.numpy(), err_msg=name)


def test_load_state_dict_names_every_problem():
    model = nn.Linear(2, 3)
    before = model.state_dict()
    bad = {"weight": np.zeros((3, 4)), "extra": np.zeros(1)}
    with pytest.raises(tg.ArgumentError) as info:
        model.load_state_dict(bad)
    text = str(info.value)
    assert "weight: shape (3, 4), expected (3, 2)" in text and "missing: bias" in text and "unexpected: extra" in text
    with pytest.raises(tg.ShapeError, match="mis-shaped"):
        model.load_state_dict({"weight": np.ones((2, 3)), "bias": np.zeros(3)})
    with pytest.raises(tg.ShapeError):
        model.load_state_dict({"weight": np.ones((2, 3))}, strict=False)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    result = model.load_state_dict({"bias": [1.0, 2.0, 3.0], "extra": np.zeros(1)}, strict=False)
    assert result.missing == ["weight"] and result.unexpected == ["extra"]
    assert model.bias.tolist() == [1, 2, 3]
    with pytest.raises(tg.DTypeError, match="bias"):
        model.load_state_dict({"bias": np.zeros(3, complex)}, strict=False)


def test_load_state_dict_casts_and_copies():
    model = nn.Linear(2, 1)
    weight = np.array([[1.0, 2.0]])
    model.load_state_dict({"weight": weight, "bias": tg.tensor([3], dtype=np.int64)})
    weight[:] = 0
    assert model.weight.dtype == np.float32 and model.weight.tolist() == [[1, 2]] and model.bias.tolist() == [3]


def test_load_after_forward_is_noticed():
    model = nn.LayerNorm(2)
    x = tg.tensor(np.ones((1, 2), np.float32), requires_grad=True)
    loss = model(x).sum()
    model.load_state_dict({"weight": np.zeros(2), "bias": np.zeros(2)})
    with pytest.raises(tg.GraphError, match="changed in place"):
        loss.backward()


def test_astype_zero_grad_and_modes():
    model = Block()
    model.heads["a"].weight.grad = np.ones((1, 2))
    assert model.astype(np.float64) is model
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    assert model(np.ones((4, 2))).dtype == np.float64
    assert model.heads["a"].weight.grad is None
    model(np.ones((4, 2))).sum().backward()
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert model.training and not model.eval().layers[0].training
    assert model.train().heads["a"].training
    with pytest.raises(tg.DTypeError):
        model.astype(np.int32)


def test_version_changes_with_the_structure():
    model = Block()
    seen = [model.version]

    def changed():
        seen.append(model.version)
        return seen[-1] != seen[-2]

    model.layers[0].weight = nn.Parameter(np.ones((3, 2), np.float32))
    assert changed()
    model.heads["a"].note = 3
    assert changed()
    del model.heads["a"].note
    assert changed()
    model.layers.append(nn.Linear(2, 2))
    assert changed()
    model.layers[2] = nn.Linear(2, 2)
    assert changed()
    model.eval()
    model.scale.data = np.zeros(2)
    model.load_state_dict(model.state_dict())
    assert not changed()
    assert len(set(seen)) == len(seen) - 1


def test_a_failed_delete_says_so():
    with pytest.raises(AttributeError):
        del Block().nothing


def test_deep_copies_and_pickles_are_independent():
    model = nn.LSTM(2, 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = np.ones((4, 1, 2), np.float32)
        np.testing.assert_array_equal(twin(x)[0].numpy(), model(x)[0].numpy())
        twin.weight_ih_l0.data = np.zeros((12, 2), np.float32)
        assert model.weight_ih_l0.numpy().any()
        assert all(p.requires_grad for p in twin.parameters())


# ---------------------------------------------------------------------------- functions of a module


def test_gradients_of_a_module():
    model = nn.Linear(2, 1)
    x = np.ones((3, 2), np.float32)
    value, gradient = tg.value_and_grad(lambda m: (m(x) ** 2).sum())(model)
    loss = (model(x) ** 2).sum()
    loss.backward()
    assert value.item() == loss.item() and list(gradient) == ["weight", "bias"]
    np.testing.assert_array_equal(gradient["weight"].numpy(), model.weight.grad)
    assert isinstance(model.weight, nn.Parameter)


def test_nested_gradients_of_a_module():
    model = nn.Module()
    model.w = nn.Parameter(np.array([3.0]))
    names = []

    def slope(m):
        names.append([name for name, _ in m.named_parameters()])  # also while variables stand in
        return tg.grad(lambda inner: (inner.w**3).sum())(m)["w"].sum()

    assert tg.grad(slope)(model)["w"].tolist() == [18.0]
    assert names == [["w"]] and module_file._stand_ins == {}


def test_the_tree_is_restored_after_an_error():
    model = Block()
    before = dict(model.named_parameters())

    def fails(m):
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        tg.grad(fails)(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[k] is after[k] for k in before)
    assert module_file._stand_ins == {}


def test_swapping_a_stand_in_for_itself_leaves_it_a_parameter():
    model = nn.Linear(2, 1)
    own = model.__tree_leaves__()
    first = {name: tg.tensor(p.numpy() + 1.0) for name, p in own.items()}
    model.__tree_swap__(first)
    model.__tree_swap__({**first, "bias": tg.tensor(np.zeros(1, np.float32))})
    model.__tree_swap__(first)  # the weight is its own stand-in both times
    assert model.__tree_leaves__() == first
    model.__tree_swap__(own)
    assert model.__tree_leaves__() == own
    assert not module_file._stand_ins


def test_parameters_in_lists_take_part():
    model = nn.Module()
    model.weights = [nn.Parameter(np.array(2.0)), {"k": nn.Parameter(np.array(3.0))}]
    gradient = tg.grad(lambda m: m.weights[0] * m.weights[1]["k"])(model)
    assert {k: g.item() for k, g in gradient.items()} == {"weights.0": 3.0, "weights.1.k": 2.0}


def test_a_module_goes_away():
    gc.collect()
    model = nn.LSTM(2, 3)
    model(np.ones((4, 1, 2), np.float32))[0].sum().backward()
    import weakref

    gone = weakref.ref(model._cells[0])
    del model
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------------------- provenance and text


def test_provenance_follows_the_attributes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.LSTM(2, 3, num_layers=2)
            self.heads = [nn.Linear(3, 1)]

        def forward(self, x):
            return self.heads[0](self.encoder(x)[0])

    with tg.Tape() as tape, tg.eager():
        Model()(np.ones((2, 1, 2), np.float32))
    places = {record.place.where for record in tape.records}
    assert {"encoder.l0", "encoder.l1", "heads.0"} <= places


def test_text():
    text = repr(Block())
    assert text.splitlines()[0] == "Block()  23 parameters"
    assert "  layers.0: Linear(2, 3)  9 parameters" in text
    assert "    weight: (3, 2) float32" in text
    assert Block().summary() == text
    frozen = nn.Linear(1, 1)
    frozen.bias.requires_grad = False
    assert "bias: (1,) float32 frozen" in repr(frozen)


def test_a_module_without_forward():
    with pytest.raises(tg.ArgumentError, match=r"Empty has no forward\(\)"):
        type("Empty", (nn.Module,), {})()(1)


def test_sequential():
    model = nn.Sequential(nn.Linear(2, 3), ops.tanh, nn.LSTM(3, 4), nn.Dropout(0.0))
    assert model(np.ones((5, 1, 2), np.float32)).shape == (5, 1, 4)
    assert len(model) == 4 and model[1] is ops.tanh and len(list(model)) == 4
    model.append(nn.Linear(4, 1))
    assert "4.weight" in model.state_dict()
    with pytest.raises(tg.DTypeError, match="part 0"):
        nn.Sequential(3)


def test_sequential_of_names():
    parts = collections.OrderedDict(encoder=nn.Linear(2, 3), squash=ops.tanh, head=nn.Linear(3, 1))
    model = nn.Sequential(parts)
    assert list(model.state_dict()) == ["encoder.weight", "encoder.bias", "head.weight", "head.bias"]
    assert model.head is parts["head"] and list(model) == list(parts.values()) and len(model) == 3
    x = np.ones((4, 2), np.float32)
    expected = nn.Sequential(*parts.values())(x).numpy()
    np.testing.assert_array_equal(model(x).numpy(), expected)
    np.testing.assert_array_equal(copy.deepcopy(model)(x).numpy(), expected)
    np.testing.assert_array_equal(tg.compile(lambda m, x: m(x))(model, x).numpy(), expected)
    model.head = nn.Linear(3, 2)  # stays in its place
    model.append(nn.Linear(2, 5))
    assert model(x).shape == (4, 5) and "3.weight" in model.state_dict()
    for name in ("", "forward", "a.b"):
        with pytest.raises(tg.ArgumentError, match=repr(name)):
            nn.Sequential({name: nn.Linear(1, 1)})


@pytest.mark.conformance
def test_sequential_of_names_has_torchs_names():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Sequential(
        collections.OrderedDict(first=torch.nn.Linear(2, 3), act=torch.nn.Tanh(), last=torch.nn.Linear(3, 1))
    )
    ours = nn.Sequential(collections.OrderedDict(first=nn.Linear(2, 3), act=ops.tanh, last=nn.Linear(3, 1)))
    ours.load_state_dict(theirs.state_dict())
    x = np.ones((4, 2), np.float32)
    np.testing.assert_allclose(ours(x).numpy(), theirs(torch.tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_names_with_dots_are_refused():
    model = nn.Module()
    with pytest.raises(tg.ArgumentError, match=r"'x\.y' .*'\.'"):
        model.parts = {"x.y": nn.Parameter([1.0]), "x": {"y": nn.Parameter([2.0])}}
    with pytest.raises(tg.ArgumentError, match=r"'x\.y'"):
        model.parts = {"x.y": [nn.Linear(1, 1)]}
    model.parts = {"x": {"y": nn.Parameter([2.0])}}
    model.numbers = {"x.y": 3.0}  # no parameter, no name
    assert list(model.state_dict()) == ["parts.x.y"]
    model.parts["a.b"] = nn.Parameter([1.0])
    with pytest.raises(tg.ArgumentError, match=r"'a\.b'"):
        model.state_dict()


def test_a_container_that_contains_itself():
    model = nn.Linear(1, 1)
    own: list = [1.0]
    own.append({"again": own})
    with pytest.raises(tg.ArgumentError, match="contains itself"):
        model.own = own
    model.own = kept = []
    kept.append(kept)
    for use in (lambda: list(model.parameters()), model.state_dict, lambda: model.version, lambda: repr(model)):
        with pytest.raises(tg.ArgumentError, match="list in a module's attributes contains itself"):
            use()
    model.own = [kept := [1], kept, {"k": kept}]  # more than once is no cycle
    assert len(list(model.parameters())) == 2 and model.version
    model.zero_grad()


def test_arguments_that_are_none():
    model = nn.Linear(1, 1)
    with pytest.raises(tg.DTypeError, match=r"load_state_dict takes a dict .*NoneType"):
        model.load_state_dict(None)
    with pytest.raises(tg.DTypeError, match="weight"):
        model.load_state_dict({"weight": None, "bias": None})
    with pytest.raises(tg.DTypeError, match=r"Linear\.astype: 'foo' is no dtype"):
        model.astype("foo")
    with pytest.raises(tg.DTypeError, match="int32"):
        model.astype("int32")


def test_slices_of_a_sequential_keep_parts_and_names():
    model = nn.Sequential(nn.Linear(2, 3), ops.tanh, nn.Linear(3, 4), nn.Linear(4, 1))
    x = np.ones((5, 2), np.float32)
    front, back = model[:2], model[2:]
    assert front[0] is model[0] and back[-1] is model[3] and len(back) == 2 and len(model[4:]) == 0
    assert list(back.state_dict()) == ["2.weight", "2.bias", "3.weight", "3.bias"]  # as in PyTorch
    np.testing.assert_array_equal(back(front(x)).numpy(), model(x).numpy())
    back.append(nn.Linear(1, 1))  # takes the place of none
    assert len(back) == 3 and back[1] is model[3] and back(front(x)).shape == (5, 1)
    for index, error in ((4, tg.OutOfRangeError), (-5, tg.OutOfRangeError), ("0", tg.DTypeError)):
        with pytest.raises(error, match="Sequential: "):
            model[index]
