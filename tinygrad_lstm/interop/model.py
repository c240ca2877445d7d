"""An ONNX graph as a Module: its nodes run as ops, so that it can be trained further."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm import serialization
from tinygrad_lstm.errors import ArgumentError, CheckpointError, DTypeError, Error, ShapeError, UnsupportedError
from tinygrad_lstm.interop import operators_loops, operators_shape
from tinygrad_lstm.interop.operators import OPERATORS, Call, Value
from tinygrad_lstm.interop.package import onnx_library
from tinygrad_lstm.interop.to_graph import PARAMETERS
from tinygrad_lstm.nn.module import Module, Parameter, Place
from tinygrad_lstm.tape import recording
from tinygrad_lstm.tensor import Tensor, asarray

__all__ = ["OnnxModel", "from_onnx"]

_FAMILIES = (operators_loops, operators_shape)  # importing them has entered their operators into the table


class Node(NamedTuple):
    """One node; attributes are numbers, strings, arrays, lists of them, and Graphs."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]

    def __str__(self) -> str:
        return f"node {self.name or self.outputs[0]!r} ({self.op})"


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in order, with the names of what goes in and out, and constants by name."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: dict[str, np.ndarray]


class Declared(NamedTuple):
    """An input: a dimension is a length, or a name or None where any length will do."""

    name: str
    dtype: np.dtype | None
    shape: tuple[int | str | None, ...] | None


def from_onnx(path: serialization.PathLike) -> OnnxModel:
    """Read an ONNX model as a Module that can be run and trained further.

    Models of :func:`to_onnx` come back exact to rounding; so do recurrent models of other exporters: the operators
    LSTM, GRU and RNN in all directions with lengths, Scan, and the usual products, reductions, shapes and activations.
    Needs the extra ``onnx``.

    Parameters
    ----------
    path : str or path-like

    Returns
    -------
    OnnxModel
        ``model(x, ...)`` or ``model(x=x, ...)`` with the graph's inputs in order or by name; one Tensor, or a tuple for
        several outputs.  Its Parameters are the initializers of floating dtype with at least one axis (in a model of
        :func:`to_onnx` those that were Parameters), under their names in the file: ``state_dict()`` of a model of
        :func:`to_onnx` is that of the module that was exported.

    Raises
    ------
    FileNotFoundError
    CheckpointError
        The file is damaged, is no ONNX model, or its external data are missing.
    UnsupportedError
        An operator that is not known here; the message names the node.
    DependencyError
        onnx is not installed.

    Examples
    --------
    >>> model = interop.from_onnx("lstm.onnx")                 # doctest: +SKIP
    >>> model(x).shape                                         # doctest: +SKIP
    """
    onnx = onnx_library("from_onnx")
    target = serialization.regular_file(path, "ONNX model")
    model = _parsed(onnx, target)
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    try:
        graph = _graph(onnx, model.graph)
        declared = [_declared(onnx, value) for value in model.graph.input if value.name not in graph.constants]
        notes = {entry.key: entry.value for entry in model.metadata_props}
        trained = json.loads(notes.pop(PARAMETERS)) if PARAMETERS in notes else None
        if trained is not None and not all(names and isinstance(names, list) for names in trained.values()):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{target} is damaged: its graph cannot be read") from None
    _check(target, graph, version, set(graph.constants) | {d.name for d in declared})
    return OnnxModel(graph, declared, version, trained, notes)


def _parsed(onnx: Any, target: str) -> Any:
    with open(target, "rb") as file:
        content = file.read()
    try:
        model = onnx.load_model_from_string(content)
        whole = model.ir_version > 0 and len(model.graph.output) > 0
    except Exception:  # protobuf's own, which differ between its implementations
        whole = False
    if not whole:
        what = "is empty" if not content else "is cut off, damaged or no ONNX model"
        raise CheckpointError(f"{target} {what}: its {len(content)} bytes hold no graph")
    try:
        onnx.external_data_helper.load_external_data_for_model(model, os.path.dirname(os.path.abspath(target)))
    except Exception:
        raise CheckpointError(f"{target} keeps its weights in files beside it, which are missing or damaged") from None
    return onnx.inliner.inline_local_functions(model) if len(model.functions) else model


def _graph(onnx: Any, proto: Any) -> Graph:
    constants = {tensor.name: _array(onnx, tensor) for tensor in proto.initializer}
    nodes = []
    for node in proto.node:
        domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}::"
        attributes = {a.name: _attribute(onnx, a) for a in node.attribute}
        nodes.append(Node(domain + node.op_type, node.name, tuple(node.input), tuple(node.output), attributes))
    names = [tuple(value.name for value in values) for values in (proto.input, proto.output)]
    return Graph(names[0], names[1], tuple(nodes), constants)


def _array(onnx: Any, tensor: Any) -> np.ndarray:
    array = onnx.numpy_helper.to_array(tensor)
    if array.dtype.kind not in "fiub":
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        raise UnsupportedError(
            f"from_onnx: the constant {tensor.name!r} is of type {kind}; NumPy's numbers are supported"
        )
    return np.array(array)  # what the library gives may be read-only


def _attribute(onnx: Any, attribute: Any) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return _array(onnx, value)
    if isinstance(value, onnx.GraphProto):
        return _graph(onnx, value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (int, float)):
        return value
    return [item.decode() if isinstance(item, bytes) else item for item in value]


def _declared(onnx: Any, value: Any) -> Declared:
    kind = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)) if kind.elem_type else None
    if not kind.HasField("shape"):
        return Declared(value.name, dtype, None)
    shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
    return Declared(value.name, dtype, tuple(shape))


def _check(target: str, graph: Graph, version: int, known: set[str]) -> None:
    """Refuse what cannot run, before it runs: unknown operators, and names that nothing defines."""
    known = known | set(graph.constants) | {""}
    for node in graph.nodes:
        if node.op not in OPERATORS:
            raise UnsupportedError(
                f"{target}: {node} has an operator that from_onnx does not know (operator set {version}); "
                "docs/interop.md lists those that it knows"
            )
        missing = [name for name in node.inputs if name not in known]
        if missing:
            raise CheckpointError(f"{target} is damaged: {node} reads {missing[0]!r}, which nothing before it makes")
        for part in node.attributes.values():
            if isinstance(part, Graph):
                _check(target, part, version, known | set(part.inputs))
        known.update(node.outputs)
    for name in graph.outputs:
        if name not in known:
            raise CheckpointError(f"{target} is damaged: nothing makes its output {name!r}")


class OnnxModel(Module):
    """An ONNX graph, made by :func:`from_onnx`.

    Attributes
    ----------
    weights : dict of str to Parameter
        By the names of the initializers; a new dict each time.
    names : dict of name to list of str
        The names of each of them in ``state_dict``: a parameter that was shared has several.
    inputs : list of (name, dtype, shape)
        What the graph declares; in a shape, a name or None stands for any length.
    outputs : list of str
    opset : int
        The version of the operators.
    metadata : dict of str to str
        The notes in the file.
    """

    def __init__(
        self, graph: Graph, inputs: Sequence[Declared], version: int,
        trained: Mapping[str, Sequence[str]] | None = None, metadata: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()

        def is_weight(name: str, array: np.ndarray) -> bool:
            return array.dtype.kind == "f" and (array.ndim > 0 if trained is None else name in trained)

        self.graph, self.opset = graph, version
        self.inputs, self.outputs, self.metadata = list(inputs), list(graph.outputs), dict(metadata or {})
        trainable = {name: a for name, a in graph.constants.items() if is_weight(name, a)}
        # A list: names of initializers have dots, which keys in a module may not have.
        self.values = [Parameter(a) for a in trainable.values()]
        self.constants = {name: a for name, a in graph.constants.items() if name not in trainable}
        self.names = {name: list((trained or {}).get(name, [name])) for name in trainable}

    @property
    def weights(self) -> dict[str, Parameter]:
        """The parameters by the names of the initializers."""
        return dict(zip(self.names, self.values, strict=True))

    def _places(self) -> Iterator[Place]:
        for k, names in enumerate(self.names.values()):
            for name in names:
                yield Place(name, self.values, k)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The outputs, from the inputs in order or by name.

        Raises
        ------
        ArgumentError
            Inputs that are missing, unknown or given twice.
        ShapeError, DTypeError
            An input of another shape or dtype than the graph declares, or one at which a node fails.
        """
        environment: dict[str, Value] = {**self.constants, **self.weights}
        environment.update(self._given(inputs, named))
        outs = _run(self.graph, environment, self.opset)
        results = [asarray(out) for out in outs]
        return results[0] if len(results) == 1 else tuple(results)

    def _given(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Value]:
        names = [declared.name for declared in self.inputs]
        given = dict(zip(names, inputs, strict=False))
        twice = [name for name in named if name in given]
        unknown = [name for name in named if name not in names and name not in self.graph.inputs]
        missing = [name for name in names if name not in given and name not in named]
        if len(inputs) > len(names) or twice or unknown or missing:
            problem = (
                f"found {len(inputs)} inputs" if len(inputs) > len(names)
                else f"{twice[0]!r} is given twice" if twice
                else f"no input is named {unknown[0]!r}" if unknown
                else f"{', '.join(map(repr, missing))} is missing"
            )  # fmt: skip
            raise ArgumentError(f"OnnxModel: {problem}; the inputs are {', '.join(names) or 'none'}")
        given.update(named)
        return {name: self._checked(name, value) for name, value in given.items()}

    def _checked(self, name: str, value: Any) -> Tensor:
        tensor = asarray(value)
        declared = next((d for d in self.inputs if d.name == name), Declared(name, None, None))
        expected = declared.dtype
        if expected is not None and tensor.dtype != expected:
            if not isinstance(value, (Tensor, np.ndarray, np.generic)) and tensor.dtype.kind == expected.kind:
                return tensor.astype(expected)  # lists of Python numbers have no dtype of their own
            raise DTypeError(
                f"OnnxModel: {name!r} is {tensor.dtype}, the model expects {expected}; convert with astype"
            )
        shape = declared.shape
        if shape is not None and (
            len(shape) != tensor.ndim
            or any(isinstance(n, int) and n != m for n, m in zip(shape, tensor.shape, strict=True))
        ):
            raise ShapeError(f"OnnxModel: {name!r} has shape {tensor.shape}, the model expects {shape}")
        return tensor

    def extra_repr(self) -> str:
        """Inputs and outputs."""
        return f"{', '.join(d.name for d in self.inputs)} -> {', '.join(self.outputs)}"


def _run(graph: Graph, environment: dict[str, Value], version: int) -> list[Value]:
    """Run the nodes; ``environment`` is added to."""
    for node in graph.nodes:
        args = [environment[name] if name else None for name in node.inputs]

        def inner(part: Graph, values: Sequence[Value], around: dict[str, Value] = environment) -> list[Value]:
            inside = {**around, **part.constants, **dict(zip(part.inputs, values, strict=False))}
            return _run(part, inside, version)

        call = Call(node.op, args, node.attributes, len(node.outputs), version, inner)
        try:
            outs = _applied(call)
        except Error as error:
            # Innermost node first: one name is enough.
            raise error if str(error).startswith("node ") else type(error)(f"{node}: {error}") from None
        environment.update(zip(node.outputs, outs, strict=False))
    return [environment[name] for name in graph.outputs]


def _applied(call: Call) -> list[Value]:
    """The results of one node.  What is known beforehand (shapes, constants) stays an array, also in a recording."""
    if call.static:
        with recording(trace=None, enabled=False, tapes=()):
            return [out._data if isinstance(out, Tensor) else np.asarray(out) for out in call.run()]
    return call.run()
