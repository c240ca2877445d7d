"""Pooled memory is used again, and never while anything can see it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tinygrad_lstm.kernels import pool

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
