"""The fastest matrix product (float32) that a library is seen to do: the limit of everything made of such products."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .work import Case, Work

LIBRARIES = ("numpy",)
#: Large, and as in a recurrent step (hot in the cache); (M, K, N).
SIZES = ((1024, 1024, 1024), (512, 512, 2048), (256, 256, 256), (64, 256, 1024))


def build(work: Work, options: dict[str, Any]) -> Case:
    """``options['library']``: a name in PREPARED; the result is the best operations per second at every size."""
    rng = np.random.default_rng(0)
    best = dict.fromkeys(map(str, SIZES), 0.0)
    products = []
    for rows, inner, columns in SIZES:
        a, b = rng.random((rows, inner), np.float32), rng.random((inner, columns), np.float32)
        out = np.zeros((rows, columns), np.float32)
        run = PREPARED[options["library"]](a, b, out)
        run()
        np.testing.assert_allclose(out, a.astype(float) @ b, rtol=1e-5)
        work_of_one = 2.0 * rows * inner * columns
        products.append((str((rows, inner, columns)), run, work_of_one, max(1, int(2e9 / work_of_one))))

    def call() -> None:
        for size, run, operations, repeats in products:
            begin = time.perf_counter()
            for _ in range(repeats):
                run()
            best[size] = max(best[size], operations * repeats / (time.perf_counter() - begin))

    return Case(call, lambda: best)


def _numpy(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Callable[[], Any]:
    return lambda: np.dot(a, b, out=out)


def _torch(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    x, y, z = (torch.from_numpy(v) for v in (a, b, out))
    return lambda: torch.mm(x, y, out=z)


def _onnxruntime(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Callable[[], Any]:
    """The second operand a constant of the model, which is packed once."""
    from . import onnx_peer

    node = onnx_peer.onnx.helper.make_node("MatMul", ["x", "b"], ["y"])
    ready = onnx_peer.session(onnx_peer.model([node], {"b": b}, a.shape, "y", out.shape))
    binding, keep = onnx_peer.bound(ready, {"x": a}, out)

    def run() -> Any:
        ready.run_with_iobinding(binding)
        return keep

    return run


def _jax(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Callable[[], Any]:
    """Has no ``out``: what it computes is copied there the first time, for the check."""
    from .jax_peer import jax, jnp

    x, y, product = jnp.asarray(a), jnp.asarray(b), jax.jit(jnp.matmul)
    out[:] = product(x, y)
    return lambda: product(x, y).block_until_ready()


def _ours(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Callable[[], Any]:
    """The kernel on a packed operand; more threads than one go through the seam, which splits products."""
    if int(os.environ["TINYGRAD_LSTM_NUM_THREADS"]) > 1:
        from tinygrad_lstm.kernels.matmul import matmul

        return lambda: matmul(a, b, out=out)
    from tinygrad_lstm.kernels import gemm  # type: ignore[attr-defined, unused-ignore]

    kernels = gemm.functions("float32")
    (rows, inner), columns = a.shape, b.shape[1]
    packed = np.zeros(gemm.packed_bytes(inner, columns, "float32") + 64, np.uint8)
    address = -(-packed.ctypes.data // 64) * 64  # on a cache line
    gemm.call(kernels.pack, inner, columns, b.ctypes.data, *b.strides, address)
    call, function, to, row = gemm.call, kernels.gemm_packed, out.ctypes.data, out.strides[0]
    operand, strides, keep = a.ctypes.data, a.strides, (a, packed, out)

    def run() -> Any:
        call(function, rows, columns, inner, operand, *strides, address, to, row, 0)
        return keep

    return run


PREPARED: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Callable[[], Any]]] = {
    "numpy": _numpy,
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "jax": _jax,
    "ours": _ours,
}
