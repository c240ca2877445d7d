"""What the tests of ONNX models share: run a file with onnxruntime, and compare a module with what it became."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from interop_parts import Function as Function
from onnx import helper

import tinygrad_lstm as tg
from tinygrad_lstm import interop, nn
from tinygrad_lstm.tree import flatten

onnxruntime.set_default_logger_severity(3)


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in flatten(tree if isinstance(tree, tuple) else (tree,))[0]]


def close(found: Any, expected: np.ndarray, what: str) -> None:
    found = np.asarray(found)
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    near = 1e-10 if expected.dtype == np.float64 else 2e-5
    np.testing.assert_allclose(found, expected, rtol=near, atol=near / 5, err_msg=what)


def exported(path: Path, module: nn.Module, example: Any, *others: Any, back: bool = True) -> Any:
    """Write a module, check the model, and compare it at the example and at other sizes; the onnxruntime session.

    ``back``: also with what from_onnx makes of it.
    """
    interop.to_onnx(module, path, example)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    running = session(path)
    names = [value.name for value in running.get_inputs()]
    module.eval()
    read = interop.from_onnx(path) if back else None
    for arguments in (example, *others):
        given = leaves(arguments)
        tensors = tuple(
            tg.asarray(a) if isinstance(a, np.ndarray) else a
            for a in (arguments if isinstance(arguments, tuple) else (arguments,))
        )
        with tg.no_grad():
            expected = [t.numpy() for t in flatten(module(*tensors))[0]]
            again = flatten(read(*given))[0] if read is not None else expected
        found = running.run(None, dict(zip(names, given, strict=True)))
        assert len(found) == len(expected) == len(again)
        for k, (a, b, c) in enumerate(zip(found, again, expected, strict=True)):
            close(a, c, f"onnxruntime, output {k}")
            close(b, c, f"from_onnx, output {k}")
    return running


def write(
    path: Path, nodes: Any, inputs: dict[str, np.ndarray], constants: dict[str, np.ndarray], outputs: Any = ("y",),
    opset: int = 17,
) -> None:  # fmt: skip
    kind = helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        nodes if isinstance(nodes, list) else [nodes],
        "graph",
        [helper.make_tensor_value_info(n, kind(a.dtype), [None] * a.ndim) for n, a in inputs.items()],
        [helper.make_empty_tensor_value_info(o) for o in outputs],
        [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    model = onnx.shape_inference.infer_shapes(model)
    for value in model.graph.output:  # onnxruntime asks for the types of outputs
        if not value.type.tensor_type.elem_type:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(model, path)


def compared(path: Path, inputs: dict[str, np.ndarray]) -> Any:
    model = interop.from_onnx(path)
    with tg.no_grad():
        found = model(**inputs)
    for a, b in zip(found if isinstance(found, tuple) else (found,), session(path).run(None, inputs), strict=True):
        close(a, b, path.name)
    return model


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (0.7 * rng.standard_normal(shape)).astype(np.float32)
