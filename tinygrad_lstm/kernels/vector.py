"""Values in LLVM registers: one lane or many, written with Python's operators.

Imported only while native code is generated.  A :class:`Value` holds an LLVM value of float, double, i1
(truth values), i32 or i64, scalar or vector; the mathematics in :mod:`.lowering` is written in terms of it once and
serves every lane count.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

__all__ = ["Lanes", "Value"]

_SCALAR = {
    "float32": ir.FloatType(), "float64": ir.DoubleType(), "bool": ir.IntType(1), "int32": ir.IntType(32),
    "int64": ir.IntType(64),
}  # fmt: skip
_WHOLE = frozenset({"int32", "int64"})
_SUFFIX = {"float32": "f32", "float64": "f64"}


class Lanes:
    """Where instructions go (``builder``) and how many lanes they have (1 means scalars)."""

    def __init__(self, builder: Any, count: int) -> None:
        self.builder, self.count = builder, count

    def type(self, dtype: str) -> Any:
        scalar = _SCALAR[dtype]
        return scalar if self.count == 1 else ir.VectorType(scalar, self.count)

    def integer(self, bits: int) -> Any:
        scalar = ir.IntType(bits)
        return scalar if self.count == 1 else ir.VectorType(scalar, self.count)

    def literal(self, type_: Any, number: Any) -> Any:
        return ir.Constant(type_, number if self.count == 1 else [number] * self.count)

    def constant(self, number: Any, dtype: str) -> Value:
        number = bool(number) if dtype == "bool" else int(number) if dtype in _WHOLE else float(number)
        return Value(self, self.literal(self.type(dtype), number), dtype)

    def call(self, name: str, dtype: str, *args: Any, bool_result: bool = False) -> Any:
        """An LLVM intrinsic on values of one dtype.  Vector forms are declared by their mangled name."""
        vector = "" if self.count == 1 else f"v{self.count}"
        type_ = self.type(dtype)
        mangled = f"llvm.{name}.{vector}{_SUFFIX[dtype]}"
        module = self.builder.module
        function = module.globals.get(mangled)
        if function is None:
            function = ir.Function(module, ir.FunctionType(type_, [type_] * len(args)), mangled)
        return self.builder.call(function, args)


class Value:
    """One register: arithmetic with values of the same dtype and with Python numbers."""

    __slots__ = ("dtype", "ir", "lanes")

    def __init__(self, lanes: Lanes, value: Any, dtype: str) -> None:
        self.lanes, self.ir, self.dtype = lanes, value, dtype

    def _other(self, other: Any) -> Any:
        if isinstance(other, Value):
            assert other.dtype == self.dtype, (self.dtype, other.dtype)
            return other.ir
        return self.lanes.constant(other, self.dtype).ir

    def _wrap(self, value: Any, dtype: str | None = None) -> Value:
        return Value(self.lanes, value, dtype or self.dtype)

    @property
    def whole(self) -> bool:
        """Whether it holds integers, which wrap around."""
        return self.dtype in _WHOLE

    def _either(self, floating: str, whole: str) -> Any:
        """The instruction for floats or for integers."""
        return getattr(self.lanes.builder, whole if self.whole else floating)

    def __add__(self, other: Any) -> Value:
        return self._wrap(self._either("fadd", "add")(self.ir, self._other(other)))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Value:
        return self._wrap(self._either("fsub", "sub")(self.ir, self._other(other)))

    def __rsub__(self, other: Any) -> Value:
        return self._wrap(self._either("fsub", "sub")(self._other(other), self.ir))

    def __mul__(self, other: Any) -> Value:
        return self._wrap(self._either("fmul", "mul")(self.ir, self._other(other)))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Value:
        return self._wrap(self.lanes.builder.fdiv(self.ir, self._other(other)))

    def __rtruediv__(self, other: Any) -> Value:
        return self._wrap(self.lanes.builder.fdiv(self._other(other), self.ir))

    def remainder(self, other: Value) -> Value:
        """What truncated division leaves, of the sign of the dividend, as C's ``%`` and ``fmod``."""
        return self._wrap(self._either("frem", "srem")(self.ir, other.ir))

    def quotient(self, other: Value) -> Value:
        """Truncated division of integers."""
        return self._wrap(self.lanes.builder.sdiv(self.ir, other.ir))

    def __neg__(self) -> Value:
        return 0 - self if self.whole else self._wrap(self.lanes.builder.fneg(self.ir))

    def __abs__(self) -> Value:
        return (self < 0).choose(-self, self) if self.whole else self.intrinsic("fabs")

    def _compare(self, sign: str, other: Any) -> Value:
        return self._wrap(self._either("fcmp_ordered", "icmp_signed")(sign, self.ir, self._other(other)), "bool")

    def __lt__(self, other: Any) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Any) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Any) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Any) -> Value:
        return self._compare(">=", other)

    def equals(self, other: Any) -> Value:
        return self._compare("==", other)

    def differs(self, other: Any) -> Value:
        return self._wrap(self._either("fcmp_unordered", "icmp_signed")("!=", self.ir, self._other(other)), "bool")

    def is_nan(self) -> Value:
        if self.whole:
            return self.differs(self)
        return self._wrap(self.lanes.builder.fcmp_unordered("uno", self.ir, self.ir), "bool")

    def __and__(self, other: Value) -> Value:
        return self._wrap(self.lanes.builder.and_(self.ir, other.ir))

    def __or__(self, other: Value) -> Value:
        return self._wrap(self.lanes.builder.or_(self.ir, other.ir))

    def __invert__(self) -> Value:
        return self._wrap(self.lanes.builder.not_(self.ir))

    def choose(self, yes: Any, no: Any) -> Value:
        """``yes`` where this truth value holds, else ``no`` (at least one of them a Value)."""
        like = yes if isinstance(yes, Value) else no
        return like._wrap(self.lanes.builder.select(self.ir, like._other(yes), like._other(no)))

    def intrinsic(self, name: str, *others: Any) -> Value:
        return self._wrap(self.lanes.call(name, self.dtype, self.ir, *(self._other(o) for o in others)))

    def fma(self, factor: Any, term: Any) -> Value:
        """``self * factor + term``, fused where the CPU can (``fmuladd``: never a library call)."""
        return self.intrinsic("fmuladd", factor, term)

    def to(self, dtype: str) -> Value:
        """Converted as NumPy's ``astype`` does between bool, integers and floats: as C does."""
        if dtype == self.dtype:
            return self
        builder, type_ = self.lanes.builder, self.lanes.type(dtype)
        if dtype == "bool":
            return self.differs(0.0)
        if dtype in _WHOLE:
            if self.dtype == "bool":
                convert = builder.zext
            elif self.whole:
                convert = builder.sext if dtype == "int64" else builder.trunc
            else:
                convert = builder.fptosi
        elif self.dtype == "bool":
            convert = builder.uitofp
        elif self.whole:
            convert = builder.sitofp
        else:
            convert = builder.fpext if dtype == "float64" else builder.fptrunc
        return self._wrap(convert(self.ir, type_), dtype)

    def bits(self) -> Any:
        """The raw integer register of the same width."""
        return self.lanes.builder.bitcast(self.ir, self.lanes.integer(32 if self.dtype == "float32" else 64))

    def from_bits(self, raw: Any) -> Value:
        """A value of this dtype with the given raw bits."""
        return self._wrap(self.lanes.builder.bitcast(raw, self.lanes.type(self.dtype)))
