"""Pooled memory is used again, and never while anything can see it."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from typing import Any

import numpy as np
import pytest

from tinygrad_lstm import nn
from tinygrad_lstm.kernels import pool
from tinygrad_lstm.kernels.locks import Lock

SHAPE = (300, 300)  # float64: above the pool's smallest size


@pytest.fixture(autouse=True)
def empty_pool():
    pool.clear()
    yield
    pool.clear()


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_a_dead_array_is_used_again() -> None:
    first = pool.empty(SHAPE, np.float64)
    place = address(first)
    del first
    assert address(pool.empty(SHAPE, np.float64)) == place


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[3], lambda a: a.T[1:2], lambda a: memoryview(a[2])])
def test_an_array_or_view_that_is_alive_keeps_its_memory(view) -> None:
    first = pool.empty(SHAPE, np.float64)
    place = address(first)
    held = view(first)
    del first
    assert address(pool.empty(SHAPE, np.float64)) != place
    del held


def test_small_arrays_are_plain_ones() -> None:
    assert pool.empty((3, 4), np.float32).base is None
    assert pool.idle_bytes() == 0


def test_shape_dtype_and_alignment() -> None:
    a = pool.empty((7, 11, 1031), np.float32)
    assert a.shape == (7, 11, 1031) and a.dtype == np.float32 and a.flags.c_contiguous and a.flags.writeable


def test_idle_memory_is_bounded() -> None:
    arrays = [pool.empty((k, 1 << 20), np.uint8) for k in range(1, 40)]
    del arrays
    pool.empty((50, 1 << 20), np.uint8)
    assert pool.idle_bytes() <= pool.MOST_IDLE + (50 << 20)
    pool.clear()
    assert pool.idle_bytes() == 0


def test_threads_never_share_a_block() -> None:
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            a = pool.empty(SHAPE, np.float64)
            a[0] = number
            a[-1] = number
            if not ((a[0] == number).all() and (a[-1] == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("shape", [(200, 131), (131, 200), (3, 4), (129,), (0, 5), (40, 30, 20)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_copies_are_in_order_and_apart(shape, order):
    array = np.asarray(np.random.default_rng(0).standard_normal(shape), order=order)
    copy = pool.copied(array, np.float32)
    assert copy.flags.c_contiguous and copy.flags.owndata and copy.dtype == np.float32
    np.testing.assert_array_equal(copy, array.astype(np.float32))


def test_arrays_start_on_lines_at_different_places_of_a_page() -> None:
    between = [np.empty(1 << 24, np.uint8)]
    between.clear()  # the C library makes smaller arrays in its heap from now on: they start anywhere in a page
    arrays = []
    for k in range(pool.PLACES):
        arrays.append(pool.empty(SHAPE, np.float64))
        between.append(np.empty(512 * 1024 - 448 * k, np.uint8))
    places = [address(array) for array in arrays]
    assert all(place % pool.LINE == 0 for place in places)
    assert len({place % pool.PAGE for place in places}) == len(places)
    for array in arrays:
        array[:] = 1.0  # all of it is there
        assert array.sum() == array.size


def test_memory_that_is_an_arrays_own() -> None:
    pooled, small = pool.empty(SHAPE, np.float64), np.empty(3)
    assert pool.has_own_memory(pooled) and pool.has_own_memory(small)
    assert not pool.has_own_memory(small[1:])
    view = pooled[1:]
    assert not pool.has_own_memory(pooled) and not pool.has_own_memory(view)
    del view
    assert pool.has_own_memory(pooled)
    other = np.empty(pooled.nbytes + 64, np.uint8)
    assert not pool.has_own_memory(other[: pooled.nbytes].view(np.float64).reshape(SHAPE))


@pytest.mark.parametrize("shape", [SHAPE, (300,), (300, 1), (2, 300, 300), ()])
@pytest.mark.parametrize("dtypes", ["f8 f8", "f4 f4", "f4 f8", "i8 i8"])
@pytest.mark.parametrize("ufunc", [np.add, np.multiply, np.maximum, np.less, np.true_divide])
def test_functions_of_two_arrays(ufunc, dtypes: str, shape, rng) -> None:
    a, b = (rng.integers(1, 9, s).astype(d) for s, d in zip((SHAPE, shape), dtypes.split(), strict=True))
    found = pool.applied(ufunc, a, b)
    expected = ufunc(a, b)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_shapes_that_do_not_fit_are_numpys_to_refuse() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        pool.applied(np.add, np.ones(SHAPE), np.ones((3, 4)))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(5,), (40, 50), (2, 3, 4)])
def test_taken(axis: int, shape, rng) -> None:
    a = rng.standard_normal(SHAPE)
    indices = rng.integers(-300, 300, shape)
    np.testing.assert_array_equal(pool.taken(a, indices, axis), np.take(a, indices, axis=axis))


def test_a_finalizer_may_make_arrays_while_the_pool_does() -> None:
    """The collector runs where it likes, also in the middle of handing out a block."""
    made: list[np.ndarray] = []

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            made.append(pool.empty(SHAPE, np.float64))

    def collecting(size: int) -> tuple[np.ndarray, int]:
        Cycle()
        gc.collect()
        return take(size)

    take = pool._take
    pool._take = collecting  # type: ignore[assignment]
    try:
        first = pool.empty(SHAPE, np.float64)
    finally:
        pool._take = take
    first[:], made[0][:] = 1.0, 2.0
    assert len(made) == 1 and first.max() == 1.0


def test_functions_of_whole_rows_are_left_to_numpy() -> None:
    a, b = np.ones((300, 300)), np.ones(300)
    assert pool.applied(np.matmul, a, b).shape == (300,)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_that_is_held_at_a_fork_is_free_in_the_child() -> None:
    lock = Lock()
    with lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: what is tried here
        child = os.fork()
        if not child:
            os._exit(0 if lock.acquire(blocking=False) else 1)
    assert os.waitpid(child, 0)[1] == 0 and lock.acquire(blocking=False)


# ---------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 3), (64, 33)])
def test_a_copy_on_lines(shape: tuple[int, ...], order: Any) -> None:
    array = np.asarray(np.random.default_rng(0).standard_normal(shape), order=order)
    copy = pool.on_lines(array)
    assert copy.ctypes.data % pool.LINE == 0
    assert not np.may_share_memory(copy, array)
    assert (copy.flags.c_contiguous, copy.flags.f_contiguous) == (array.flags.c_contiguous, array.flags.f_contiguous)
    np.testing.assert_array_equal(copy, array, strict=True)
    np.testing.assert_array_equal(pool.on_lines(array, np.float32), array.astype(np.float32), strict=True)


def test_parameters_start_on_lines_however_they_were_made() -> None:
    layer = nn.LSTM(5, 3)

    def places() -> set[int]:
        return {p.data.ctypes.data % pool.LINE for p in layer.parameters()}

    assert places() == {0}
    layer.load_state_dict({name: value.copy() for name, value in layer.state_dict().items()})
    assert places() == {0}
    layer.astype(np.float64)
    assert places() == {0}
