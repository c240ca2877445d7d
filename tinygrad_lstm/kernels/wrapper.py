"""What Python calls native functions through: numbers out of objects, the GIL released, a number into an object.

Faster than ctypes (which looks at every argument's type at every call), and no part of NumPy's or LLVM's.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .instructions import I64, declared

__all__ = ["wrapper"]

_I1 = ir.IntType(1)
_OBJECT = ir.IntType(8).as_pointer()


def _python(module: Any, name: str, result: Any, *arguments: Any) -> Any:
    """A function of CPython's stable interface."""
    return declared(module, ir.FunctionType(result, arguments), name)


def wrapper(module: Any, function: Any, name: str) -> None:
    """``PyObject *wrapper(PyObject *self, PyObject *const *arguments, Py_ssize_t count)`` around a function of int64.

    :func:`.machine.python_function` makes a function of Python of it.
    """
    type_ = ir.FunctionType(_OBJECT, [_OBJECT, _OBJECT.as_pointer(), I64])
    outer = ir.Function(module, type_, f"{function.name}.python")
    _, arguments, count = outer.args
    b = ir.IRBuilder(outer.append_basic_block("entry"))
    with b.if_then(b.icmp_signed("!=", count, I64(len(function.args))), likely=False):
        text = bytearray(f"{name} takes {len(function.args)} arguments\0".encode())
        message = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), len(text)), f"{function.name}.message")
        message.linkage, message.global_constant = "internal", True
        message.initializer = ir.Constant(message.value_type, text)
        kind = module.globals.get("PyExc_TypeError") or ir.GlobalVariable(module, _OBJECT, "PyExc_TypeError")
        set_ = _python(module, "PyErr_SetString", ir.VoidType(), _OBJECT, _OBJECT)
        b.call(set_, [b.load(kind), b.bitcast(message, _OBJECT)])
        b.ret(_OBJECT(None))
    convert = _python(module, "PyLong_AsLongLong", I64, _OBJECT)
    numbers = [b.call(convert, [b.load(b.gep(arguments, [I64(k)]))]) for k in range(len(function.args))]
    suspicious = _I1(0)
    for number in numbers:
        suspicious = b.or_(suspicious, b.icmp_signed("==", number, I64(-1)))
    with b.if_then(suspicious, likely=False):
        error = b.call(_python(module, "PyErr_Occurred", _OBJECT), [])
        with b.if_then(b.icmp_unsigned("!=", error, _OBJECT(None))):
            b.ret(_OBJECT(None))
    state = b.call(_python(module, "PyEval_SaveThread", _OBJECT), [])
    result = b.call(function, numbers)
    b.call(_python(module, "PyEval_RestoreThread", ir.VoidType(), _OBJECT), [state])
    if isinstance(function.function_type.return_type, ir.VoidType):
        result = I64(0)
    if result.type == _I1:
        make = _python(module, "PyBool_FromLong", _OBJECT, I64)
        result = b.zext(result, I64)
    else:
        make = _python(module, "PyLong_FromLongLong", _OBJECT, I64)
    b.ret(b.call(make, [result]))
