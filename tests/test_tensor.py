"""Tensors: how they are made, what they hold, how they behave as arrays."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops

# ---------------------------------------------------------------------------- making


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1.5, np.float32),
        ([1.0, 2.0], np.float32),
        ([[1, 2.5], [3, 4]], np.float32),
        ((1.0, (2.0)), np.float32),
        ([], np.float32),
        (3, np.int64),
        ([1, 2], np.int64),
        (True, np.bool_),
        ([True, False], np.bool_),
        (np.float64(1.5), np.float64),
        ([np.float64(1.5)], np.float64),
        (np.ones(2), np.float64),
        (np.ones(2, np.float16), np.float16),
        (np.ones(2, np.int8), np.int8),
        ([np.ones(2), np.zeros(2)], np.float64),
        (range(3), np.int64),
    ],
    ids=repr,
)
@pytest.mark.parametrize("make", [tg.tensor, tg.asarray])
def test_dtype_of_a_new_tensor(make, value, dtype):
    t = make(value)
    assert t.dtype == dtype
    assert isinstance(t.data, np.ndarray)
    np.testing.assert_array_equal(t.data, np.asarray(value))
    assert not t.requires_grad
    assert t.grad is None


@pytest.mark.parametrize("value", ["text", None, print, 1j, np.array(["a"]), np.array([None]), {"a": 1}], ids=str)
def test_what_is_no_array_of_numbers_is_refused(value):
    with pytest.raises(tg.DTypeError):
        tg.tensor(value)


def test_ragged_lists_are_refused_with_a_shape_error():
    with pytest.raises(tg.ShapeError):
        tg.tensor([[1.0, 2.0], [3.0]])


def test_tensor_copies_and_asarray_aliases():
    a = np.zeros(3)
    copied, aliased = tg.tensor(a), tg.asarray(a)
    a[0] = 7.0
    assert copied.data[0] == 0.0
    assert aliased.data[0] == 7.0
    assert aliased.data is a


def test_asarray_of_a_tensor_is_the_tensor_and_tensor_of_one_is_a_copy():
    t = tg.tensor([1.0, 2.0], requires_grad=True)
    assert tg.asarray(t) is t
    other = tg.tensor(t)
    other.data[0] = 9.0
    assert t.data[0] == 1.0
    assert not other.requires_grad


def test_dtype_argument_converts():
    assert tg.tensor([1, 2], dtype=np.float64).dtype == np.float64
    assert tg.asarray(np.ones(2), np.float32).dtype == np.float32
    assert tg.tensor(2.9, dtype=np.int32).tolist() == 2


@pytest.mark.parametrize("value", [3, [1, 2], True, np.ones(2, np.int32), np.ones(2, bool)], ids=repr)
def test_requires_grad_on_integers_raises(value):
    with pytest.raises(tg.DTypeError, match="float"):
        tg.tensor(value, requires_grad=True)


@pytest.mark.parametrize("value", [3, True])
def test_requires_grad_cannot_be_set_on_integers(value):
    t = tg.tensor(value)
    with pytest.raises(tg.DTypeError):
        t.requires_grad = True
    assert not t.requires_grad


# ---------------------------------------------------------------------------- reading


def test_attributes():
    t = tg.tensor(np.arange(6.0).reshape(2, 3))
    assert (t.shape, t.ndim, t.size, len(t), t.dtype) == ((2, 3), 2, 6, 2, np.float64)
    assert t.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert t.numpy() is t.data
    assert np.asarray(t) is t.data
    assert t.T.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert [row.tolist() for row in t] == t.tolist()


@pytest.mark.parametrize("value", [2.5, [2.5], [[2.5]]])
def test_item(value):
    item = tg.tensor(value).item()
    assert item == 2.5
    assert type(item) is float
    assert float(tg.tensor(value)) == 2.5


def test_item_of_several_elements_names_the_shape():
    with pytest.raises(tg.ShapeError, match=r"\(2,\)"):
        tg.tensor([1.0, 2.0]).item()


def test_numbers_from_tensors():
    assert int(tg.tensor(3.0)) == 3
    assert [10, 11, 12][tg.tensor(1)] == 11
    assert f"{tg.tensor(2.0):.3f}" == "2.000"
    assert bool(tg.tensor(0.0)) is False
    with pytest.raises(tg.ShapeError):
        bool(tg.tensor([1.0, 2.0]))
    with pytest.raises(tg.DTypeError):
        [1, 2, 3][tg.tensor(1.0)]
    with pytest.raises(TypeError):
        len(tg.tensor(1.0))


def test_array_protocol():
    t = tg.tensor(np.arange(3.0))
    assert np.asarray(t, np.float32).dtype == np.float32
    copied = np.array(t)
    copied[0] = 5.0
    assert t.data[0] == 0.0
    with pytest.raises((ValueError, TypeError)):
        np.asarray(t, np.float32, copy=False)


def test_repr_shows_values_dtype_and_requires_grad():
    assert repr(tg.tensor([1.0, 2.0])) == "tensor([1., 2.])"
    assert "float64" in repr(tg.tensor(np.ones(2)))
    assert "requires_grad=True" in repr(tg.tensor([1.0], requires_grad=True))


def test_tensors_are_hashable_by_identity():
    a, b = tg.tensor([1.0, 2.0]), tg.tensor([1.0, 2.0])
    table = {a: "a", b: "b"}
    assert table[a] == "a"
    assert table[b] == "b"
    assert len({a, b, a}) == 2


# ---------------------------------------------------------------------------- the data setter


def test_data_is_settable():
    t = tg.tensor([1.0, 2.0], requires_grad=True)
    t.data = np.array([3.0, 4.0], np.float32)
    assert t.tolist() == [3.0, 4.0]
    t.data = [5.0, 6.0]
    assert t.tolist() == [5.0, 6.0]
    assert t.dtype == np.float32
    (t * t).sum().backward()
    assert t.grad.tolist() == [10.0, 12.0]


def test_data_keeps_shape_and_dtype():
    t = tg.tensor([1.0, 2.0])
    with pytest.raises(tg.ShapeError, match=r"\(3,\).*\(2,\)"):
        t.data = np.zeros(3)
    t.data = np.array([1.0, 2.0], np.float64)
    assert t.dtype == np.float32
    i = tg.tensor([1, 2])
    with pytest.raises(tg.DTypeError):
        i.data = np.array([0.5, 1.5])


# ---------------------------------------------------------------------------- grad


def test_grad_is_an_ndarray_of_shape_and_dtype():
    for dtype in (np.float16, np.float32, np.float64):
        for shape in ((), (3,), (0, 2)):
            t = tg.tensor(np.ones(shape), dtype=dtype, requires_grad=True)
            (t * 2.0).sum().backward()
            assert type(t.grad) is np.ndarray
            assert (t.grad.shape, t.grad.dtype) == (shape, dtype)
            np.testing.assert_array_equal(t.grad, np.full(shape, 2.0))


def test_grad_accumulates_and_an_old_one_kept_by_the_user_is_not_changed():
    t = tg.tensor([1.0, 2.0], requires_grad=True)
    (t * t).sum().backward()
    first = t.grad
    (t * 3.0).sum().backward()
    assert t.grad.tolist() == [5.0, 7.0]
    assert first.tolist() == [2.0, 4.0]
    t.zero_grad()
    assert t.grad is None


def test_gradients_of_two_leaves_do_not_share_memory():
    a, b = tg.tensor([1.0], requires_grad=True), tg.tensor([2.0], requires_grad=True)
    (a + b).sum().backward()
    assert not np.shares_memory(a.grad, b.grad)
    a.grad[0] = 50.0
    assert b.grad.tolist() == [1.0]


def test_the_cotangent_given_to_backward_is_not_written_to_or_kept():
    t = tg.tensor([1.0, 2.0], requires_grad=True)
    seed = np.array([1.0, 1.0], np.float32)
    y = t + t
    y.backward(seed)
    t.grad[0] = 9.0
    assert seed.tolist() == [1.0, 1.0]
    z = tg.tensor([1.0, 2.0], requires_grad=True)
    z.backward(seed)
    z.grad += 1.0
    assert seed.tolist() == [1.0, 1.0]


def test_grad_setter_checks_the_shape():
    t = tg.tensor([1.0, 2.0], requires_grad=True)
    t.grad = [1.0, 1.0]
    assert t.grad.dtype == np.float32
    with pytest.raises(tg.ShapeError):
        t.grad = np.ones(3)


# ---------------------------------------------------------------------------- detach, astype, copies


def test_detach_shares_values_and_cuts_the_graph():
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2.0
    d = y.detach()
    assert d.data is y.data
    assert not d.requires_grad
    (y * d).sum().backward()
    assert x.grad.tolist() == [4.0, 8.0]


def test_astype_converts_the_gradient_back():
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    y = x.astype(np.float64)
    assert y.dtype == np.float64
    (y * y).sum().backward()
    assert x.grad.dtype == np.float32
    assert x.grad.tolist() == [2.0, 4.0]
    assert x.astype(np.float32) is x or x.astype(np.float32).dtype == np.float32


def test_astype_to_an_integer_stops_the_gradient():
    x = tg.tensor([1.5, 2.5], requires_grad=True)
    assert not x.astype(np.int64).requires_grad
    (x * x.astype(np.int64)).sum().backward()
    assert x.grad.tolist() == [1.0, 2.0]


def test_requires_grad_of_results():
    x, c = tg.tensor([1.0], requires_grad=True), tg.tensor([1.0])
    assert (x + c).requires_grad
    assert not (c + c).requires_grad
    assert not (x > 0).requires_grad
    assert not ops.argmax(x).requires_grad
    assert not ops.stop_gradient(x).requires_grad
    with pytest.raises(tg.GraphError, match="detach"):
        (x + c).requires_grad = False


def test_a_leaf_can_be_frozen_and_thawed():
    x = tg.tensor([2.0], requires_grad=True)
    x.requires_grad = False
    assert not (x * x).requires_grad
    x.requires_grad = True
    (x * x).sum().backward()
    assert x.grad.tolist() == [4.0]


def test_gradients_flow_through_a_copy():
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    c = x.copy()
    assert not np.shares_memory(c.numpy(), x.numpy())
    (c * c).sum().backward()
    assert x.grad.tolist() == [2.0, 4.0]


def test_deepcopy_of_a_leaf():
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    y = copy.deepcopy(x)
    y.data[0] = 5.0
    assert x.tolist() == [1.0, 2.0]
    assert y.requires_grad


def test_errors_derive_from_error_and_their_builtin():
    pairs = [
        (tg.ShapeError, ValueError), (tg.DTypeError, TypeError), (tg.OutOfRangeError, IndexError),
        (tg.GraphError, RuntimeError), (tg.CheckpointError, ValueError), (tg.FileError, OSError),
        (tg.GradcheckError, AssertionError),
    ]  # fmt: skip
    for error, builtin in pairs:
        assert issubclass(error, tg.Error)
        assert issubclass(error, builtin)


@pytest.mark.parametrize(
    ("index", "value", "error", "said"),
    [
        (5, 1.0, tg.OutOfRangeError, r"index 5 .* shape \(2, 3\)"),
        ((0, 0, 0), 1.0, tg.OutOfRangeError, r"\(0, 0, 0\)"),
        ("a", 1.0, tg.OutOfRangeError, "'a'"),
        (0, np.ones(7), tg.ShapeError, r"shape \(7,\) for t\[0\] of shape \(3,\)"),
        (0, "x", tg.DTypeError, "str"),
        (0, None, tg.DTypeError, "NoneType"),
        (0, 300, tg.OutOfRangeError, "300 does not fit the dtype uint8"),
        (0, math.nan, tg.ArgumentError, "nan does not fit"),
    ],
)
def test_wrong_writes_are_explained(index, value, error, said):
    t = tg.tensor(np.zeros((2, 3), np.uint8))
    with pytest.raises(error, match=said):
        t[index] = value
    assert not t.numpy().any()


def test_a_read_only_array_is_not_written_to():
    array = np.zeros(3)
    array.flags.writeable = False
    with pytest.raises(tg.ArgumentError, match="read-only"):
        tg.asarray(array)[0] = 1.0
    t = tg.tensor(array)
    t[0] = 0.1
    t[1:] = [0.2, 0.3]
    assert t.tolist() == [0.1, 0.2, 0.3]


def test_asarray_in_another_dtype_keeps_the_graph():
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    tg.asarray(x, np.float64).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0] and x.grad.dtype == np.float32
