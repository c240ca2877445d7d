"""Who takes part, and the environment that each one's process gets.

Thread counts and malloc's settings belong to a process, so every contender has one of its own.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

from .work import CELLS, LAYERS, Work

__all__ = [
    "CONTENDERS", "OURS", "PEAKS", "ROOT", "Contender", "avx512", "environment", "installed", "is_ours", "reference",
]  # fmt: skip

OURS = "ours"
ROOT = Path(__file__).resolve().parents[2]
#: glibc gives large freed arrays back to the system after each step; the page faults cost a peer up to half its time.
NO_TRIM = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
#: NumPy's OpenBLAS takes its AVX2 kernels on AMD; these are its AVX-512 ones.
AVX512_BLAS = {"OPENBLAS_CORETYPE": "SKYLAKEX"}
#: Settings of the caller's shell that would change a contender behind our back.
_REMOVED = ("MALLOC_", "OPENBLAS_", "OMP_", "MKL_", "GOMP_", "KMP_", "XLA_FLAGS", "JAX_", "NUMBA_", "TINYGRAD_LSTM_")


class Contender(NamedTuple):
    """How to start one.

    Attributes
    ----------
    module : name of a module with ``build(work, options) -> Case`` and ``LIBRARIES``
    package : what must be installed, separated by blanks
    options : handed to ``build``
    env : added to its environment
    suites : where it takes part
    """

    name: str
    module: str
    package: str
    options: dict[str, Any]
    env: dict[str, str]
    suites: frozenset[str]


def _contender(
    name: str, module: str, package: str, suites: str, env: dict[str, str] | None = None, **options: Any
) -> Contender:  # fmt: skip
    return Contender(name, f"peers.{module}", package, options, env or {}, frozenset(suites.split()))


_LAYER = "step forward"  # the suites of the LSTM layer
CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        _contender(OURS, "ours", "tinygrad_lstm", f"{_LAYER} custom cells training memory memory-budget first-call"),
        _contender("torch", "torch_peer", "torch", f"{_LAYER} cells training memory first-call", form="fused"),
        _contender("torch, trim off", "torch_peer", "torch", f"{_LAYER} cells training memory", NO_TRIM, form="fused"),
        _contender("torch loop", "torch_peer", "torch", f"{_LAYER} custom cells first-call", form="loop"),
        _contender("torch loop, trim off", "torch_peer", "torch", "custom cells", NO_TRIM, form="loop"),
        _contender("jax concat", "jax_peer", "jax", f"{_LAYER} custom memory first-call", hoist=False),
        _contender("jax concat, unroll 5", "jax_peer", "jax", "step", hoist=False, unroll=5),
        _contender("jax hoisted", "jax_peer", "jax", f"{_LAYER} custom memory first-call", hoist=True),
        _contender("jax hoisted, unroll 5", "jax_peer", "jax", f"{_LAYER} custom", hoist=True, unroll=5),
        _contender("NumPy by hand", "numpy_peer", "numpy", f"{_LAYER} memory first-call"),
        _contender("NumPy by hand, AVX-512", "numpy_peer", "numpy", _LAYER, AVX512_BLAS),
        _contender("onnxruntime", "onnx_peer", "onnx onnxruntime", "forward first-call", bound=False),
        _contender("onnxruntime, bound", "onnx_peer", "onnx onnxruntime", "forward", bound=True),
        _contender("autograd", "autograd_peer", "autograd", "step custom"),
    )
}
#: Matrix products: the best of them is this machine's limit.
PEAKS: dict[str, Contender] = {
    c.name: c
    for c in (
        _contender("peak NumPy", "peak", "numpy", "peak", library="numpy"),
        _contender("peak NumPy, AVX-512", "peak", "numpy", "peak", AVX512_BLAS, library="numpy"),
        _contender("peak torch", "peak", "torch", "peak", library="torch"),
        _contender("peak onnxruntime", "peak", "onnx onnxruntime", "peak", library="onnxruntime"),
        _contender("peak jax", "peak", "jax", "peak", library="jax"),
        _contender("peak ours", "peak", "tinygrad_lstm.kernels.gemm", "peak", library="ours"),
    )
}


def avx512() -> bool | None:
    """Whether this processor has AVX-512; None where the system does not say (only Linux's does)."""
    info = Path("/proc/cpuinfo")
    return "avx512f" in info.read_text(encoding="utf-8", errors="replace") if info.exists() else None


def installed(contender: Contender) -> bool:
    """Whether its packages can be imported, and this processor has what its settings ask for."""
    if "AVX-512" in contender.name and not avx512():
        return False
    try:
        return all(importlib.util.find_spec(package) is not None for package in contender.package.split())
    except ModuleNotFoundError:  # a parent package is missing
        return False


def environment(contender: Contender, threads: int, extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of its process: the caller's without what would interfere, with the number of threads."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(_REMOVED)}
    kept = os.environ.get("TINYGRAD_LSTM_CACHE_DIR")
    if kept:
        env["TINYGRAD_LSTM_CACHE_DIR"] = kept
    names = ("OMP", "MKL", "OPENBLAS", "NUMBA", "TINYGRAD_LSTM")
    env |= {f"{name}_NUM_THREADS": str(threads) for name in names}
    # XLA's own flags leave the product's thread pool as it is; the count of processors that it believes in does not.
    env["NPROC"] = str(threads)
    env["JAX_PLATFORMS"] = "cpu"
    if threads == 1:
        env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    # The code beside the benchmarks is measured, whatever else is installed.
    before = [str(ROOT / "benchmarks"), str(ROOT)]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [*before, os.environ.get("PYTHONPATH")]))
    return env | contender.env | (extra or {})


def is_ours(name: str) -> bool:
    """Whether a column is this library, in one setting or another."""
    return name == OURS or name.startswith(OURS + ",")


def reference(work: Work) -> Contender | None:
    """What computes the float64 reference: torch if it is there; without it NumPy for the LSTM, autograd for others."""
    candidates = [CONTENDERS["torch" if work.cell in LAYERS else "torch loop"]]
    if work.cell == "lstm" and work.kind != "training":
        candidates.append(CONTENDERS["NumPy by hand"])
    elif work.cell in CELLS and work.kind == "step":
        candidates.append(CONTENDERS["autograd"])
    return next((c for c in candidates if installed(c)), None)
