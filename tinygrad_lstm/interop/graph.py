"""An ONNX graph while it is being built: named values, constants, nested graphs of loop bodies.

A node is put into the outermost graph in which all of its operands are known.  So what a loop body computes from
weights alone stands in front of the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.interop.package import onnx_library
from tinygrad_lstm.interop.sizes import Size, Varying

__all__ = ["Builder", "Length", "Shape", "Value"]

Length = int | Size
Shape = tuple[Length, ...]


class Value(NamedTuple):
    """A value of the graph: its name, its dtype, and how deep the graph is in which it is made."""

    name: str
    dtype: np.dtype
    level: int


Operand = Value | np.ndarray | None  # an array is a constant, None an operand that is left out


class Builder:
    """Makes nodes.  ``graphs`` is the stack of the main graph and the bodies around the current place."""

    def __init__(self) -> None:
        self.onnx = onnx_library("to_onnx")
        self.graphs: list[list[Any]] = [[]]
        self.initializers: list[Any] = []
        self.where = ""  # a prefix for names of nodes: the module path
        self._names: dict[str, int] = {}
        self._constants: list[dict[Any, Value]] = [{}]
        self._lengths: dict[Length, Value] = {}

    # ------------------------------------------------------------------ names and nodes

    def fresh(self, wanted: str) -> str:
        """The wanted name, or with the first number that makes it unique."""
        count = self._names.get(wanted, 0)
        self._names[wanted] = count + 1
        return self.fresh(f"{wanted}_{count}") if count else wanted

    def node(
        self, op: str, operands: Sequence[Operand], dtypes: Sequence[Any], level: int | None = None, **attributes: Any
    ) -> list[Value]:
        """A node with one output for each dtype.  ``level``: at least as deep as this."""
        found = [o.level for o in operands if isinstance(o, Value)]
        depth = max([*found, level or 0])
        inputs = ["" if o is None else self._named(o, depth) for o in operands]
        name = self.fresh("/".join([*self.where.split("."), op] if self.where else [op]))
        outputs = [Value(self.fresh(name), np.dtype(dtype), depth) for dtype in dtypes]
        made = self.onnx.helper.make_node(op, inputs, [o.name for o in outputs], name=name, **attributes)
        self.graphs[depth].append(made)
        return outputs

    def one(self, op: str, operands: Sequence[Operand], dtype: Any, **attributes: Any) -> Value:
        """A node with one output."""
        return self.node(op, operands, [dtype], **attributes)[0]

    def _named(self, operand: Value | np.ndarray, depth: int) -> str:
        return (operand if isinstance(operand, Value) else self.constant(operand, depth)).name

    def tensor_type(self, dtype: Any) -> int:
        """ONNX's number of a dtype."""
        return int(self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def cast(self, value: Value | np.ndarray, dtype: Any) -> Value | np.ndarray:
        """The value in another dtype."""
        if value.dtype == np.dtype(dtype):
            return value
        if isinstance(value, np.ndarray):
            return value.astype(dtype)
        return self.one("Cast", [value], dtype, to=self.tensor_type(dtype))

    # ------------------------------------------------------------------ constants and lengths

    def constant(self, array: Any, depth: int = 0) -> Value:
        """A constant array, once in each graph."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants[depth]:
            name = self.fresh("constant")
            tensor = self.onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
            self.graphs[depth].append(self.onnx.helper.make_node("Constant", [], [name], name=name, value=tensor))
            self._constants[depth][key] = Value(name, array.dtype, depth)
        return self._constants[depth][key]

    def parameter(self, name: str, array: np.ndarray) -> Value:
        """A trained array: an initializer of the main graph, under its own name where that is free."""
        fresh = self.fresh(name)
        self.initializers.append(self.onnx.numpy_helper.from_array(np.array(array, order="C"), fresh))
        return Value(fresh, array.dtype, 0)

    def symbol(self, symbol: str, source: Value, axis: int) -> None:
        """Make the length of an axis of an input known under its symbol."""
        shape = self.one("Shape", [source], np.int64, start=axis, end=axis + 1)
        self._lengths[Size(((1, (symbol,)),))] = shape

    def length(self, length: Length) -> Value | np.ndarray:
        """A length as an int64 array of shape (1,)."""
        if not isinstance(length, Size):
            return np.array([length], np.int64)
        if length not in self._lengths:
            total: Value | np.ndarray | None = None
            for factor, symbols in length.terms:
                term: Value | np.ndarray | None = None
                for symbol in symbols:
                    one = self._lengths[Size(((1, (symbol,)),))]
                    term = one if term is None else self.one("Mul", [term, one], np.int64)
                if term is None:
                    term = np.array([factor], np.int64)
                elif factor != 1:
                    term = self.one("Mul", [term, np.array([factor], np.int64)], np.int64)
                total = term if total is None else self.one("Add", [total, term], np.int64)
            assert isinstance(total, Value)
            self._lengths[length] = total
        return self._lengths[length]

    def shape(self, lengths: Iterable[Length]) -> Value | np.ndarray:
        """Several lengths as an int64 vector."""
        lengths = list(lengths)
        if not any(isinstance(n, Size) for n in lengths):
            return np.array(lengths, np.int64)
        parts = [self.length(n) for n in lengths]
        return parts[0] if len(parts) == 1 else self.one("Concat", parts, np.int64, axis=0)

    def reshape(self, value: Value | np.ndarray, shape: Sequence[Length]) -> Value:
        """The value in another shape; lengths of 0 are taken as they are."""
        return self.one("Reshape", [value, self.shape(shape)], value.dtype, allowzero=1)

    def expand(self, value: Value | np.ndarray, shape: Sequence[Length]) -> Value:
        """The value broadcast to a shape."""
        return self.one("Expand", [value, self.shape(shape)], value.dtype)

    def varying(self, constant: Varying) -> Value:
        """A constant whose shape depends on lengths of the inputs."""
        if constant.step is None:
            return self.expand(constant.part, constant.shape)
        (axis,) = constant.growing
        count = self.reshape(self.length(constant.shape[axis]), ())
        index = self.one("Range", [np.array(0, np.int64), count, np.array(1, np.int64)], np.int64)
        spread = [-1 if k == axis else 1 for k in range(len(constant.shape))]
        placed = self.cast(self.one("Reshape", [index, np.array(spread, np.int64)], np.int64), constant.part.dtype)
        scaled = self.one("Mul", [placed, np.asarray(constant.step, constant.part.dtype)], constant.part.dtype)
        return self.one("Add", [scaled, constant.part], constant.part.dtype)

    # ------------------------------------------------------------------ nested graphs

    def enter(self) -> int:
        """Open the graph of a loop body; its depth."""
        self.graphs.append([])
        self._constants.append({})
        return len(self.graphs) - 1

    def leave(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Close it; the GraphProto."""
        self._constants.pop()
        return self.onnx.helper.make_graph(self.graphs.pop(), self.fresh(name), inputs, outputs)

    def declared(self, name: str, dtype: Any, shape: Sequence[Length]) -> Any:
        """The declaration of an input or output; a length that is one symbol has its name."""
        shown = [n.symbol if isinstance(n, Size) else n for n in shape]
        return self.onnx.helper.make_tensor_value_info(name, self.tensor_type(dtype), shown)
