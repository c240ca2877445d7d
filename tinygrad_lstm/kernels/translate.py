"""From the text of a module of small integer functions to LLVM IR: what native code is written in, but for the vectors.

The text is Python, and means what it means in Python, as far as it goes.  Values are int64, which wrap around, truth
values, and floats.  A function takes int64s; what it returns stands in its annotation: int (the default), bool, or
None.  There are

- assignments (also of several names at once), ``if``, ``while``, ``for`` over ``range``, ``break``, ``continue``,
  ``return``; a variable keeps the type of its first assignment; a step of ``range`` that is no literal is positive;
- ``+ - * // % & | ^ << >>``, comparisons, ``and``, ``or``, ``not`` (which give truth values), ``a if b else c``,
  ``min``, ``max``, ``abs``; nobody looks for a division by zero;
- numbers of the module, calls of its functions, and of each :class:`.Intrinsic` in it.

The rest of the module runs as Python when it is translated.  A decorator of :mod:`.dialect` says what a function
is.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from llvmlite import ir

from .dialect import Intrinsic
from .instructions import I64
from .wrapper import wrapper

__all__ = ["translate"]

_I1, _FLOAT, _DOUBLE = ir.IntType(1), ir.FloatType(), ir.DoubleType()
_COMPARE = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_RESULTS = {"int": I64, "bool": _I1, "None": ir.VoidType()}
_KINDS = {"private", "exported", "entry"}


def translate(source: str, name: str, filename: str) -> tuple[str, dict[str, bool]]:
    """The IR of the text ``source``, and its exported functions: whether Python may call them.

    The symbols of functions are ``<name>.<function>``, the wrappers for Python are ``<name>.<function>.python``.
    """
    tree = ast.parse(source, filename)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, filename, "exec"), namespace)
    module = ir.Module(name)
    functions: dict[str, Any] = {}
    found: list[tuple[ast.FunctionDef, str]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            kinds = [d.id for d in node.decorator_list if isinstance(d, ast.Name) and d.id in _KINDS]
            if kinds:
                found.append((node, kinds[0]))
                functions[node.name] = _declare(module, node, f"{name}.{node.name}", kinds[0])
    for node, kind in found:
        _Function(functions, namespace, node).write()
        if kind == "entry":
            wrapper(module, functions[node.name], node.name)
    return str(module), {node.name: kind == "entry" for node, kind in found if kind != "private"}


def _declare(module: Any, node: ast.FunctionDef, symbol: str, kind: str) -> Any:
    result = _RESULTS["int" if node.returns is None else ast.unparse(node.returns)]
    function = ir.Function(module, ir.FunctionType(result, [I64] * len(node.args.args)), symbol)
    function.attributes.add("nounwind")
    if kind == "private":
        function.linkage = "internal"
    return function


class _Function:
    """Writes the body of one function.  Variables are places on the stack, which LLVM turns into registers."""

    def __init__(self, functions: dict[str, Any], namespace: dict[str, Any], node: ast.FunctionDef) -> None:
        self.functions, self.namespace, self.node = functions, namespace, node
        self.function = functions[node.name]
        self.result = self.function.function_type.return_type
        self.variables: dict[str, Any] = {}
        self.loops: list[tuple[Any, Any]] = []  # where continue and break lead
        self.entry = self.function.append_basic_block("entry")
        self.b = ir.IRBuilder(self.function.append_basic_block("body"))

    def write(self) -> None:
        for argument, value in zip(self.node.args.args, self.function.args, strict=True):
            self.assign(argument.arg, value)
        self.block(self.node.body)
        if not self.b.block.is_terminated:
            self.leave(None)
        ir.IRBuilder(self.entry).branch(self.function.blocks[1])

    def error(self, node: ast.AST, what: str) -> Exception:
        line = getattr(node, "lineno", "?")
        return NotImplementedError(f"{self.node.name}, line {line}: {what} is not a part of native code")

    # Statements.

    def block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            if self.b.block.is_terminated:
                return  # behind a return, a break or a continue
            write = getattr(self, f"on_{type(statement).__name__}", None)
            if write is None:
                raise self.error(statement, type(statement).__name__)
            write(statement)

    def on_Pass(self, node: ast.Pass) -> None:
        pass

    def on_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.call(node.value)
        elif not isinstance(node.value, ast.Constant):  # a docstring
            raise self.error(node, "an expression without effect")

    def on_Assign(self, node: ast.Assign) -> None:
        if len(node.targets) > 1:
            raise self.error(node, "an assignment to several targets")
        (target,) = node.targets
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            values = [self.value(item) for item in node.value.elts]
            for item, value in zip(target.elts, values, strict=True):
                self.assign(self.name(item), value)
        else:
            self.assign(self.name(target), self.value(node.value))

    def on_AugAssign(self, node: ast.AugAssign) -> None:
        name = self.name(node.target)
        self.assign(name, self.binary(node, node.op, self.load(node, name), self.value(node.value)))

    def name(self, node: ast.AST) -> str:
        if not isinstance(node, ast.Name):
            raise self.error(node, "an assignment to anything but a name")
        return node.id

    def assign(self, name: str, value: Any) -> None:
        place = self.variables.get(name)
        if place is None:
            builder = ir.IRBuilder(self.entry)
            place = self.variables[name] = builder.alloca(value.type, name=name)
        self.b.store(self.convert(value, place.allocated_type), place)

    def on_Return(self, node: ast.Return) -> None:
        self.leave(None if node.value is None else self.value(node.value))

    def leave(self, value: Any) -> None:
        if isinstance(self.result, ir.VoidType):
            self.b.ret_void()
        else:
            self.b.ret(self.convert(self.result(0) if value is None else value, self.result))

    def on_Break(self, node: ast.Break) -> None:
        self.b.branch(self.loops[-1][1])

    def on_Continue(self, node: ast.Continue) -> None:
        self.b.branch(self.loops[-1][0])

    def on_If(self, node: ast.If) -> None:
        then, after = self.b.append_basic_block("then"), self.b.append_basic_block("endif")
        other = self.b.append_basic_block("else") if node.orelse else after
        self.b.cbranch(self.truth(self.value(node.test)), then, other)
        for block, body in ((then, node.body), (other, node.orelse)):
            if body:
                self.b.position_at_end(block)
                self.block(body)
                self.go(after)
        self.b.position_at_end(after)

    def go(self, block: Any) -> None:
        if not self.b.block.is_terminated:
            self.b.branch(block)

    def on_While(self, node: ast.While) -> None:
        head, body, after = (self.b.append_basic_block(text) for text in ("while", "do", "done"))
        self.b.branch(head)
        self.b.position_at_end(head)
        self.b.cbranch(self.truth(self.value(node.test)), body, after)
        self.inside(body, node, head, after)

    def inside(self, body: Any, node: ast.While | ast.For, following: Any, after: Any) -> None:
        if node.orelse:
            raise self.error(node, "else behind a loop")
        self.loops.append((following, after))
        self.b.position_at_end(body)
        self.block(node.body)
        self.go(following)
        self.loops.pop()
        self.b.position_at_end(after)

    def on_For(self, node: ast.For) -> None:
        call = node.iter
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range"):
            raise self.error(node, "a loop over anything but range")
        bounds = [self.convert(self.value(argument), I64) for argument in call.args]
        start, stop = (I64(0), bounds[0]) if len(bounds) == 1 else bounds[:2]
        step = bounds[2] if len(bounds) == 3 else I64(1)
        down = isinstance(step, ir.Constant) and step.constant < 0
        name = self.name(node.target)
        before = self.b.block
        head, body, following, after = (self.b.append_basic_block(t) for t in ("for", "do", "next", "done"))
        self.b.branch(head)
        self.b.position_at_end(head)
        count = self.b.phi(I64)
        count.add_incoming(start, before)
        self.b.cbranch(self.b.icmp_signed(">" if down else "<", count, stop), body, after)
        self.b.position_at_end(following)
        count.add_incoming(self.b.add(count, step, flags=["nsw"]), following)
        self.b.branch(head)
        self.b.position_at_end(body)
        self.assign(name, count)
        self.inside(self.b.block, node, following, after)

    # Expressions.

    def value(self, node: ast.AST) -> Any:
        write = getattr(self, f"of_{type(node).__name__}", None)
        if write is None:
            raise self.error(node, type(node).__name__)
        value = write(node)
        if value is None:
            raise self.error(node, "the value of a call without one")
        return value

    def of_Constant(self, node: ast.Constant) -> Any:
        return self.constant(node, node.value)

    def constant(self, node: ast.AST, number: Any) -> Any:
        if type(number) not in (bool, int, float):
            raise self.error(node, f"{number!r}")
        return {bool: _I1, int: I64, float: _DOUBLE}[type(number)](number)

    def of_Name(self, node: ast.Name) -> Any:
        return self.load(node, node.id)

    def load(self, node: ast.AST, name: str) -> Any:
        if name in self.variables:
            return self.b.load(self.variables[name])
        if name not in self.namespace:
            raise self.error(node, f"{name}, which has no value yet,")
        return self.constant(node, self.namespace[name])

    def of_BinOp(self, node: ast.BinOp) -> Any:
        return self.binary(node, node.op, self.value(node.left), self.value(node.right))

    def binary(self, node: ast.AST, operator: ast.operator, left: Any, right: Any) -> Any:
        kind = type(operator)
        if _floating(left) or _floating(right):
            type_ = self.common(left, right)
            name = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}.get(kind)
        else:
            type_ = I64
            name = {
                ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.BitAnd: "and_", ast.BitOr: "or_",
                ast.BitXor: "xor", ast.LShift: "shl", ast.RShift: "ashr",
            }.get(kind)  # fmt: skip
        left, right = self.convert(left, type_), self.convert(right, type_)
        if name is not None:
            return getattr(self.b, name)(left, right)
        if kind not in (ast.FloorDiv, ast.Mod) or _floating(left):
            raise self.error(node, kind.__name__)
        # C rounds towards zero, Python down: where the signs differ and something is left, that is one less.
        rest = self.b.srem(left, right)
        differ = self.b.icmp_signed("<", self.b.xor(rest, right), I64(0))
        less = self.b.and_(self.b.icmp_signed("!=", rest, I64(0)), differ)
        if kind is ast.Mod:
            return self.b.select(less, self.b.add(rest, right), rest)
        return self.b.sub(self.b.sdiv(left, right), self.b.zext(less, I64))

    def of_UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            return self.b.not_(self.truth(value))
        if isinstance(node.op, ast.USub):
            if isinstance(value, ir.Constant):
                return value.type(-value.constant)
            return self.b.fneg(value) if _floating(value) else self.b.neg(self.convert(value, I64))
        if isinstance(node.op, ast.Invert) and not _floating(value):
            return self.b.not_(self.convert(value, I64))
        raise self.error(node, type(node.op).__name__)

    def of_Compare(self, node: ast.Compare) -> Any:
        # No short cut: what a chain compares has no effects.
        values = [self.value(item) for item in (node.left, *node.comparators)]
        results = [self.compare(node, op, *pair) for op, pair in zip(node.ops, pairwise(values), strict=True)]
        return functools.reduce(self.b.and_, results)

    def compare(self, node: ast.AST, operator: ast.cmpop, left: Any, right: Any) -> Any:
        if type(operator) not in _COMPARE:
            raise self.error(node, type(operator).__name__)
        sign, type_ = _COMPARE[type(operator)], self.common(left, right)
        left, right = self.convert(left, type_), self.convert(right, type_)
        if not isinstance(type_, ir.IntType):
            return (self.b.fcmp_unordered if sign == "!=" else self.b.fcmp_ordered)(sign, left, right)
        # A truth value is 0 or 1, not -1.
        return (self.b.icmp_unsigned if type_ == _I1 else self.b.icmp_signed)(sign, left, right)

    def of_BoolOp(self, node: ast.BoolOp) -> Any:
        every = isinstance(node.op, ast.And)
        after = self.b.append_basic_block("known")
        known: list[tuple[Any, Any]] = []
        for item in node.values[:-1]:
            value = self.truth(self.value(item))
            known.append((_I1(not every), self.b.block))
            following = self.b.append_basic_block("and" if every else "or")
            self.b.cbranch(value, *((following, after) if every else (after, following)))
            self.b.position_at_end(following)
        known.append((self.truth(self.value(node.values[-1])), self.b.block))
        self.b.branch(after)
        self.b.position_at_end(after)
        return self.joined(known)

    def joined(self, known: list[tuple[Any, Any]]) -> Any:
        phi = self.b.phi(known[0][0].type)
        for value, block in known:
            phi.add_incoming(value, block)
        return phi

    def of_IfExp(self, node: ast.IfExp) -> Any:
        then, other, after = (self.b.append_basic_block(text) for text in ("then", "else", "chosen"))
        self.b.cbranch(self.truth(self.value(node.test)), then, other)
        ends = []
        for block, item in ((then, node.body), (other, node.orelse)):
            self.b.position_at_end(block)
            ends.append((self.value(item), self.b.block))
        type_ = self.common(ends[0][0], ends[1][0])
        known = []
        for value, block in ends:
            self.b.position_at_end(block)
            known.append((self.convert(value, type_), block))
            self.b.branch(after)
        self.b.position_at_end(after)
        return self.joined(known)

    def of_Call(self, node: ast.Call) -> Any:
        return self.call(node)

    def call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name) or node.keywords:
            raise self.error(node, "such a call")
        name, arguments = node.func.id, [self.value(argument) for argument in node.args]
        function = self.functions.get(name)
        if function is not None:
            if len(arguments) != len(function.args):
                raise self.error(node, f"{name} with {len(arguments)} arguments")
            return self.b.call(function, [self.convert(argument, I64) for argument in arguments])
        intrinsic = self.namespace.get(name)
        if isinstance(intrinsic, Intrinsic):
            return intrinsic.emit(self.b, *(self.widened(argument) for argument in arguments))
        if name in ("min", "max") and len(arguments) == 2:
            left, right = (self.convert(argument, I64) for argument in arguments)
            return self.b.select(self.b.icmp_signed("<" if name == "min" else ">", right, left), right, left)
        if name == "abs" and len(arguments) == 1:
            value = self.convert(arguments[0], I64)
            return self.b.select(self.b.icmp_signed("<", value, I64(0)), self.b.neg(value), value)
        raise self.error(node, name)

    # Types.

    def common(self, left: Any, right: Any) -> Any:
        for type_ in (_DOUBLE, _FLOAT, I64):
            if type_ in (left.type, right.type):
                return type_
        return _I1

    def widened(self, value: Any) -> Any:
        return self.convert(value, I64) if value.type == _I1 else value

    def truth(self, value: Any) -> Any:
        if value.type == _I1:
            return value
        zero = value.type(0)
        return self.b.fcmp_unordered("!=", value, zero) if _floating(value) else self.b.icmp_signed("!=", value, zero)

    def convert(self, value: Any, type_: Any) -> Any:
        if value.type == type_:
            return value
        if type_ == _I1:
            return self.truth(value)
        if type_ == I64 and value.type == _I1:
            return I64(int(value.constant)) if isinstance(value, ir.Constant) else self.b.zext(value, I64)
        if type_ == _DOUBLE and value.type == _FLOAT:
            return self.b.fpext(value, type_)
        if not isinstance(type_, ir.IntType) and isinstance(value.type, ir.IntType):
            return (self.b.uitofp if value.type == _I1 else self.b.sitofp)(value, type_)
        raise NotImplementedError(f"{self.node.name}: {value.type} where {type_} is needed")


def _floating(value: Any) -> bool:
    return not isinstance(value.type, ir.IntType)
