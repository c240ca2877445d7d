"""The CPU that code is compiled for, and LLVM behind it: from the IR of a module to machine code, and into memory.

``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES`` name another CPU than this one, as they do for Numba.  Imports llvmlite;
imported lazily.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm

__all__ = ["Target", "compiler", "load", "machine_code", "python_function", "target"]


class Target(NamedTuple):
    """What LLVM compiles for."""

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
    """The CPU of this machine, or the one that the environment names.  Asked once a process."""
    cpu = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None and cpu.lower() == "generic":
        features = ""
    if features is None:
        try:
            features = llvm.get_host_cpu_features().flatten()
        except RuntimeError:  # LLVM cannot tell
            features = ""
    return Target(llvm.get_process_triple(), cpu, features)


def compiler() -> str:
    """What besides the IR decides the machine code."""
    return f"llvmlite {llvmlite.__version__} LLVM {llvm.llvm_version_info} {tuple(target())}"


@functools.lru_cache(maxsize=1)
def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    wanted = target()
    # On x86, LLVM's loader of object code wants addresses that do not move.
    relocation = "static" if wanted.triple.startswith(("x86", "i386", "i686")) else "default"
    return llvm.Target.from_triple(wanted.triple).create_target_machine(
        cpu=wanted.cpu, features=wanted.features, opt=3, reloc=relocation, codemodel="jitdefault", jit=True
    )


@functools.lru_cache(maxsize=1)
def _engine() -> Any:
    empty = llvm.parse_assembly("")
    empty.triple = target().triple
    return llvm.create_mcjit_compiler(empty, _machine())


def machine_code(text: str) -> bytes:
    """The object code of a module of LLVM IR, optimised."""
    machine = _machine()
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = target().triple, str(machine.target_data)
    module.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = False  # the vectors are explicit
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    code: bytes = machine.emit_object(module)
    return code


def load(code: bytes, names: Sequence[str]) -> list[int]:
    """The addresses of these functions of an object, which stays in memory for as long as the process lives.

    One thread at a time: :func:`.codecache.load` sees to that.
    """
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return [engine.get_function_address(name) for name in names]


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
