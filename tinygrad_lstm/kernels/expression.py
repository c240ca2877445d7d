"""Scalar expressions: an elementwise function written once, printed for NumPy and for native code.

    >>> from tinygrad_lstm.kernels import expression as e
    >>> gelu = e.build(lambda x: 0.5 * x * (1 + e.erf(x * 0.7071067811865476)), 1)
    >>> print(gelu.source.rstrip())
    def expression(x0):
        t0 = multiply(0.5, x0)
        t1 = multiply(x0, 0.7071067811865476)
        t2 = erf(t1)
        t3 = add(1, t2)
        return multiply(t0, t3)

An :class:`Expr` is an immutable node.  :func:`build` numbers the nodes by value, so equal subexpressions
are computed once, folds what depends on constants alone, and returns an :class:`Expression`.  Python
numbers are weak constants (NEP 50): they take the dtype of what they meet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..errors import ArgumentError, DTypeError
from .printer import HELPERS, numpy_source
from .table import LEAVES, Leaf

__all__ = ["Expr", "Expression", "Node", "build", "cast", "constant", *LEAVES]

Number: TypeAlias = bool | int | float
Operand: TypeAlias = "Expr | bool | int | float"


class Expr:
    """A node of a symbolic scalar expression: ``op`` applied to ``args``, or an input, or a constant.

    ``op`` is the name of a leaf (:data:`.table.LEAVES`), or ``input`` (``param`` is its index),
    ``constant`` (``param`` is the Python number) or ``cast`` (``param`` is the name of the dtype).
    """

    __slots__ = ("args", "op", "param")

    op: str
    args: tuple[Expr, ...]
    param: Any

    def __init__(self, op: str, args: tuple[Expr, ...] = (), param: Any = None) -> None:
        set_ = object.__setattr__
        set_(self, "op", op)
        set_(self, "args", args)
        set_(self, "param", param)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("an Expr is immutable")

    def __repr__(self) -> str:
        if self.op == "input":
            return f"x{self.param}"
        if self.op == "constant":
            return repr(self.param)
        inside = ", ".join(map(repr, self.args)) + (f", {self.param}" if self.param is not None else "")
        return f"{self.op}({inside})"

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Expr:
        """``np.tanh(x)`` is the leaf ``tanh``; arithmetic of NumPy scalars with an Expr comes here as well."""
        leaf = LEAVES.get(ufunc.__name__) or _BY_UFUNC.get(ufunc)
        if method != "__call__" or keywords or leaf is None:
            raise _not_available(f"numpy.{ufunc.__name__}" + (f" with {', '.join(keywords)}" if keywords else ""))
        return _apply(leaf.name, *inputs)

    def __array_function__(self, function: Any, types: Any, args: Any, keywords: Any) -> Expr:
        """``np.where`` and ``np.clip``, which are no ufuncs."""
        if function is np.where and len(args) == 3 and not keywords:
            return _apply("where", *args)
        if function is np.clip and len(args) == 3 and not keywords:
            return _apply("minimum", _apply("maximum", *args[:2]), args[2])
        raise _not_available(f"numpy.{function.__name__}")

    def __bool__(self) -> bool:
        raise DTypeError(
            "an expression has no truth value while it is being built; use where(condition, a, b) instead of "
            "`if`, and logical_and, logical_or, logical_not instead of `and`, `or`, `not`"
        )

    def __add__(self, other: Operand) -> Expr:
        return _apply("add", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return _apply("add", other, self)

    def __sub__(self, other: Operand) -> Expr:
        return _apply("subtract", self, other)

    def __rsub__(self, other: Operand) -> Expr:
        return _apply("subtract", other, self)

    def __mul__(self, other: Operand) -> Expr:
        return _apply("multiply", self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return _apply("multiply", other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return _apply("divide", self, other)

    def __rtruediv__(self, other: Operand) -> Expr:
        return _apply("divide", other, self)

    def __mod__(self, other: Operand) -> Expr:
        return _apply("remainder", self, other)

    def __rmod__(self, other: Operand) -> Expr:
        return _apply("remainder", other, self)

    def __floordiv__(self, other: Operand) -> Expr:
        return _apply("floor_divide", self, other)

    def __rfloordiv__(self, other: Operand) -> Expr:
        return _apply("floor_divide", other, self)

    def __pow__(self, other: Operand) -> Expr:
        # The two rewrites that ndarray.__pow__ makes and that keep the dtype.
        if type(other) in (int, float) and other == 2 and type(other) is int:
            return _apply("square", self)
        if type(other) is float and other == 0.5:
            return _apply("sqrt", self)
        return _apply("power", self, other)

    def __rpow__(self, other: Operand) -> Expr:
        return _apply("power", other, self)

    def __neg__(self) -> Expr:
        return _apply("negative", self)

    def __pos__(self) -> Expr:
        return self

    def __abs__(self) -> Expr:
        return _apply("absolute", self)

    def __lt__(self, other: Operand) -> Expr:
        return _apply("less", self, other)

    def __le__(self, other: Operand) -> Expr:
        return _apply("less_equal", self, other)

    def __gt__(self, other: Operand) -> Expr:
        return _apply("greater", self, other)

    def __ge__(self, other: Operand) -> Expr:
        return _apply("greater_equal", self, other)

    def __and__(self, other: Operand) -> Expr:
        return _apply("logical_and", self, other)

    def __or__(self, other: Operand) -> Expr:
        return _apply("logical_or", self, other)

    def __invert__(self) -> Expr:
        return _apply("logical_not", self)


_BY_UFUNC: dict[Any, Leaf] = {leaf.numpy: leaf for leaf in LEAVES.values()}


def _not_available(what: str) -> DTypeError:
    return DTypeError(
        f"{what} cannot stand in an expression; arithmetic, comparisons and these functions (of numpy or ops) can: "
        f"{', '.join(sorted(LEAVES))}"
    )


def constant(value: Any) -> Expr:
    """A weak constant: a Python bool, int or float (a NumPy scalar counts as the Python number)."""
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) not in (bool, int, float):
        raise DTypeError(
            f"an expression takes Expr and Python numbers, found {type(value).__name__}; pass arrays as inputs"
        )
    return Expr("constant", (), value)


def cast(x: Operand, dtype: Any) -> Expr:
    """``x`` converted to ``dtype`` (anything that ``np.dtype`` takes)."""
    return Expr("cast", (_lift(x),), np.dtype(dtype).name)


def _lift(x: Any) -> Expr:
    return x if isinstance(x, Expr) else constant(x)


def _apply(name: str, *args: Operand) -> Expr:
    return Expr(name, tuple(map(_lift, args)))


def _leaf_function(leaf: Leaf) -> Callable[..., Expr]:
    def function(*args: Operand) -> Expr:
        if len(args) != leaf.arity:
            raise ArgumentError(f"{leaf.name} takes {leaf.arity} argument(s), found {len(args)}")
        return _apply(leaf.name, *args)

    function.__name__ = function.__qualname__ = leaf.name
    function.__doc__ = f"The node ``{leaf.name}`` of {leaf.arity} argument(s); see :data:`.table.LEAVES`."
    return function


# One function per row of the table: exp, tanh, where, maximum, ...
globals().update({name: _leaf_function(leaf) for name, leaf in LEAVES.items()})


def __getattr__(name: str) -> Callable[..., Expr]:
    # Only reached for names that do not exist; tells type checkers that the leaves above do.
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, slots=True)
class Node:
    """One numbered operation: ``op`` on the results of earlier nodes ``args``; ``param`` as in Expr."""

    op: str
    args: tuple[int, ...]
    param: Any = None

    @property
    def text(self) -> str:
        """A stable content string, unambiguous for every constant (-0.0, NaN, True against 1)."""
        param = ""
        if self.param is not None:
            value = self.param.hex() if isinstance(self.param, float) else str(self.param)
            param = f"{type(self.param).__name__}:{value}"
        return f"{self.op}({','.join(map(str, self.args))}{';' if param else ''}{param})"


class Expression:
    """An immutable elementwise function of ``n_inputs`` arrays; equal and hashed by content.

    ``nodes`` are in order of computation, the inputs first; ``outputs`` are indices into them.
    ``single`` tells that the function returned one Expr rather than a tuple.
    """

    def __init__(self, n_inputs: int, nodes: Iterable[Node], outputs: tuple[int, ...], single: bool) -> None:
        self.n_inputs = n_inputs
        self.nodes = tuple(nodes)
        self.outputs = outputs
        self.single = single
        self.key = f"{n_inputs}|{' '.join(node.text for node in self.nodes)}|{outputs}{'' if single else 't'}"
        self._hash = hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Expression) and self.key == other.key)

    def __repr__(self) -> str:
        return f"Expression({self.key})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Expression, (self.n_inputs, self.nodes, self.outputs, self.single)

    def __call__(self, *arrays: Any) -> Any:
        return self.numpy(*arrays)

    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The rows of the table that occur, one entry per node."""
        return tuple(LEAVES[node.op] for node in self.nodes if node.op in LEAVES)

    @functools.cached_property
    def worth_compiling(self) -> bool:
        """Whether one native loop can beat NumPy's at all: several operations, or one that NumPy lacks."""
        # Functions of NumPy 2.0 do not say where they are from.
        homes = [getattr(leaf.numpy, "__module__", "numpy") for leaf in self.leaves]
        return len(homes) >= 2 or any(home.endswith(".special") for home in homes)

    @functools.cached_property
    def uses_every_input(self) -> bool:
        """Whether every output depends on every input (its shape then is the broadcast of all inputs)."""
        reached: list[frozenset[int]] = []
        for node in self.nodes:
            own = frozenset((node.param,)) if node.op == "input" else frozenset()
            reached.append(own.union(*(reached[i] for i in node.args)))
        return all(len(reached[i]) == self.n_inputs for i in self.outputs)

    @functools.cached_property
    def ufunc(self) -> Callable[..., Any] | None:
        """The NumPy callable when the whole expression is one leaf on the inputs in order, else None."""
        inputs = tuple(range(self.n_inputs))
        last = self.nodes[-1] if self.nodes else None
        plain = last is not None and len(self.nodes) == self.n_inputs + 1 and last.op in LEAVES
        if plain and self.single and last is not None and last.args == inputs:
            return LEAVES[last.op].numpy
        return None

    @functools.cached_property
    def source(self) -> str:
        """The NumPy program as readable text."""
        return numpy_source(self)

    @functools.cached_property
    def numpy(self) -> Callable[..., Any]:
        """``callable(*arrays) -> array`` (a tuple for several outputs), computed by NumPy.

        0-d results are NumPy scalars, as with any ufunc.  An output that is an input is a copy of it; an
        output that is a constant has the broadcast shape of all inputs and their dtype with the constant.
        """
        if self.ufunc is not None:
            return self.ufunc
        namespace: dict[str, Any] = {name: leaf.numpy for name, leaf in LEAVES.items()}
        namespace.update(HELPERS)
        exec(compile(self.source, f"<expression {self._hash & 0xFFFFFFFF:08x}>", "exec"), namespace)
        function: Callable[..., Any] = namespace["expression"]
        return function

    def result_dtypes(self, dtypes: Iterable[Any]) -> tuple[np.dtype, ...]:
        """The dtypes of the outputs for inputs (arrays, not Python numbers) of the given dtypes."""
        found = node_dtypes(self, tuple(np.dtype(d) for d in dtypes))
        inputs = [np.dtype(d) for d in dtypes]
        return tuple(
            np.result_type(*inputs, self.nodes[i].param) if self.nodes[i].op == "constant" else found[i]
            for i in self.outputs
        )


@functools.lru_cache(maxsize=4096)
def node_dtypes(expression: Expression, dtypes: tuple[np.dtype, ...]) -> tuple[Any, ...]:
    """NumPy's dtype of every node, a Python type for a weak constant; asked of NumPy on empty arrays."""
    if len(dtypes) != expression.n_inputs:
        raise ArgumentError(f"the expression has {expression.n_inputs} inputs, found {len(dtypes)} dtypes")
    values: list[Any] = []
    for node in expression.nodes:
        if node.op == "input":
            values.append(np.empty(0, dtypes[node.param]))
        elif node.op == "constant":
            values.append(node.param)
        elif node.op == "cast":
            values.append(np.empty(0, node.param))
        else:
            values.append(LEAVES[node.op].numpy(*(values[i] for i in node.args)))
    return tuple(value.dtype if isinstance(value, (np.ndarray, np.generic)) else type(value) for value in values)


def build(function: Callable[..., Any], n_inputs: int) -> Expression:
    """The :class:`Expression` of ``function`` called on ``n_inputs`` symbolic scalars.

    The function returns one Expr (or number) or a tuple or list of them.  Raises DTypeError for anything
    else, and for a Python branch on a symbolic value.
    """
    if n_inputs < 1:
        raise ArgumentError(f"an expression needs at least one input, found n_inputs={n_inputs}")
    inputs = tuple(Expr("input", (), i) for i in range(n_inputs))
    result = function(*inputs)
    single = not isinstance(result, (tuple, list))
    roots = [_lift(r) for r in ((result,) if single else result)]
    if not roots:
        raise ArgumentError("the function of an expression returned an empty tuple, expected at least one output")
    nodes: list[Node] = [Node("input", (), i) for i in range(n_inputs)]
    numbers: dict[str, int] = {node.text: i for i, node in enumerate(nodes)}
    done: dict[int, int] = {}  # id(Expr) -> number; `roots` keeps every Expr alive meanwhile
    stack = list(reversed(roots))
    while stack:  # iterative: a chain of thousands of nodes must not meet the recursion limit
        expr = stack[-1]
        if id(expr) in done:
            stack.pop()
            continue
        waiting = [arg for arg in expr.args if id(arg) not in done]
        if waiting:
            stack.extend(reversed(waiting))
            continue
        stack.pop()
        if expr.op == "input" and expr.param >= n_inputs:
            raise ArgumentError(f"input x{expr.param} does not belong to this expression of {n_inputs} inputs")
        node = _fold(Node(expr.op, tuple(done[id(arg)] for arg in expr.args), expr.param), nodes)
        number = numbers.setdefault(node.text, len(nodes))
        if number == len(nodes):
            nodes.append(node)
        done[id(expr)] = number
    return _prune(Expression(n_inputs, nodes, tuple(done[id(root)] for root in roots), single))


def _fold(node: Node, nodes: list[Node]) -> Node:
    """A leaf of constants alone becomes a (weak) constant: NumPy would make a strong float64 of it."""
    if node.op not in LEAVES or any(nodes[i].op != "constant" for i in node.args):
        return node
    with np.errstate(all="ignore"):
        value = LEAVES[node.op].numpy(*(nodes[i].param for i in node.args))
    return Node("constant", (), np.asarray(value).item())


def _prune(expression: Expression) -> Expression:
    """Without the nodes that no output needs (the operands of what was folded)."""
    needed = set(expression.outputs)
    for index in reversed(range(len(expression.nodes))):
        if index in needed:
            needed.update(expression.nodes[index].args)
    kept = [i for i, _ in enumerate(expression.nodes) if i in needed or i < expression.n_inputs]
    renumber = {old: new for new, old in enumerate(kept)}
    nodes = [
        Node(expression.nodes[i].op, tuple(renumber[a] for a in expression.nodes[i].args), expression.nodes[i].param)
        for i in kept
    ]
    outputs = tuple(renumber[i] for i in expression.outputs)
    return Expression(expression.n_inputs, nodes, outputs, expression.single)
