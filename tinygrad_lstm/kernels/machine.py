"""From the IR of a module to machine code, by Numba's code generator, and into memory, by LLVM's loader.

``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES`` name another CPU than this one; ``NUMBA_DUMP_OPTIMIZED`` and
``NUMBA_DUMP_ASSEMBLY`` print what was made.  Numba is imported only when something has to be compiled.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm

__all__ = ["Target", "compiler", "load", "machine_code", "overridden", "python_function", "target"]


class Target(NamedTuple):
    """What Numba compiles for."""

    triple: str
    cpu: str
    features: str  # "+avx,-avx512f,..."

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector register."""
        enabled = set(self.features.split(","))
        return 64 if "+avx512f" in enabled else 32 if "+avx" in enabled else 16


@functools.lru_cache(maxsize=1)
def target() -> Target:
    """The CPU of this machine, or the one that the environment names.  Asked once a process; imports Numba."""
    return Target(*_generator().magic_tuple())


@functools.lru_cache(maxsize=1)
def compiler() -> str:
    """What besides the IR decides the machine code, found without Numba."""
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM cannot tell
        features = ""
    named = {name: value for name, value in sorted(os.environ.items()) if name in _DECISIVE}
    versions = importlib.metadata.version("numba"), llvmlite.__version__, llvm.llvm_version_info
    return f"{versions} {llvm.get_process_triple()} {llvm.get_host_cpu_name()} {features} {named}"


def overridden() -> bool:
    """Whether the program itself (or a file of Numba's settings) names another CPU than the environment does, which
    :func:`compiler` does not know."""
    config: Any = sys.modules.get("numba.core.config")
    if config is None:
        return False
    named = [os.environ.get(name) for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]
    return named != [config.CPU_NAME, config.CPU_FEATURES]


_DECISIVE = {"NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX", "NUMBA_OPT", "NUMBA_LOOP_VECTORIZE"}


@functools.lru_cache(maxsize=1)
def _generator() -> Any:
    from numba.core.codegen import JITCPUCodegen

    return JITCPUCodegen("tinygrad_lstm")


@functools.lru_cache(maxsize=1)
def _engine() -> Any:
    """What loads objects."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    empty = llvm.parse_assembly("")
    empty.triple = llvm.get_process_triple()
    # An engine wants to know a machine even if it is only to load what was compiled.
    return llvm.create_mcjit_compiler(empty, llvm.Target.from_triple(empty.triple).create_target_machine(jit=True))


# A fork waits for what another thread does with LLVM: else the child would inherit the locks of Numba and llvmlite,
# held by nobody.  What is freed at the end of a call takes llvmlite's too, so the lock is held around whole calls.
_lock = threading.RLock()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _lock.acquire(),
        after_in_parent=lambda: _lock.release(),
        after_in_child=_after_fork_in_child,
    )


def machine_code(text: str) -> bytes:
    """The object code of a module of LLVM IR, optimised."""
    with _lock:
        return _machine_code(text)


def _machine_code(text: str) -> bytes:
    from numba.core.compiler_lock import global_compiler_lock

    with global_compiler_lock:
        library = _generator().create_library("tinygrad_lstm")
        library.enable_object_caching()
        library.add_llvm_module(llvm.parse_assembly(text))
        library.finalize()
        _, _, (code, _) = library.serialize_using_object_code()
        return bytes(code)


def load(code: bytes, names: Sequence[str]) -> list[int]:
    """The addresses of these functions of an object, which stays in memory for as long as the process lives."""
    with _lock:
        return _load(code, names)


def _load(code: bytes, names: Sequence[str]) -> list[int]:
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    addresses = [engine.get_function_address(name) for name in names]
    for name, address in zip(names, addresses, strict=True):
        llvm.add_symbol(name, address)  # for the programs that call this one
    return addresses


class _Method(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p)
    )  # fmt: skip


_FASTCALL = 0x80  # METH_FASTCALL: the arguments come as a C array


def python_function(address: int, name: str) -> Callable[..., Any]:
    """The function of Python that a :func:`.wrapper.wrapper` at this address is."""
    method = _Method(name.encode(), address, _FASTCALL, None)
    # The function holds its address, and looks there even when it is freed, in the last moments of the interpreter.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(method))
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    make = prototype(("PyCFunction_NewEx", ctypes.pythonapi))
    function: Callable[..., Any] = make(ctypes.byref(method), None, None)
    return function
