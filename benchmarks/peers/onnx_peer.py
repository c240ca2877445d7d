"""onnxruntime: the forward pass of an LSTM as ONNX's own operator, the weights constants of the model.

An InferenceSession packs constant weights when it is built; that, and no gradient, is what users of a trained model
have.  Gates are in ONNX's order i, o, f, c (its c is g here).
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np

from .work import Case, Work, inputs, shape_of, weights

onnx: Any = importlib.import_module("onnx")
onnxruntime: Any = importlib.import_module("onnxruntime")
LIBRARIES = ("onnx", "onnxruntime")
#: Versions that every onnxruntime of the last years reads: the helper would write its own newest ones.
OPSET, IR_VERSION = 17, 8


def build(work: Work, options: dict[str, Any]) -> Case:
    """``options['bound']``: x and y stay where they are, instead of a new y at every call."""
    if work.kind != "forward" or work.cell != "lstm" or work.dtype != "float32":
        raise ValueError("onnxruntime takes part in forward passes of the LSTM in float32 alone")
    steps, batch, _, hidden, _ = shape_of(work)
    ready, x = session(lstm(work)), inputs(work)
    if not options["bound"]:
        names = [ready.get_outputs()[0].name]

        def call() -> np.ndarray:
            y: np.ndarray = ready.run(names, {"x": x})[0]
            return y

        return Case(call, lambda: {"y": call()[:, 0]})

    y = np.full((steps, 1, batch, hidden), np.nan, np.float32)
    binding, keep = bound(ready, {"x": x}, y)

    def run() -> Any:
        ready.run_with_iobinding(binding)
        return keep

    def result() -> dict[str, np.ndarray]:
        run()
        return {"y": y[:, 0].copy()}

    return Case(run, result)


def reordered(value: np.ndarray) -> np.ndarray:
    """Rows i, f, g, o to ONNX's i, o, f, c."""
    i, f, g, o = np.split(value, 4)
    return np.concatenate([i, o, f, g])


def lstm(work: Work) -> bytes:
    """The model: an LSTM node per layer; between two of them the axis of directions (one) is taken away."""
    helper, w = onnx.helper, weights(work)
    steps, batch, width, hidden, layers = shape_of(work)
    constants, nodes, value = {}, [], "x"
    for k in range(layers):
        constants[f"W{k}"] = reordered(w[f"weight_ih_l{k}"])[None]
        constants[f"R{k}"] = reordered(w[f"weight_hh_l{k}"])[None]
        both = [reordered(w[f"{name}_l{k}"]) for name in ("bias_ih", "bias_hh")]
        constants[f"B{k}"] = np.concatenate(both)[None]
        nodes.append(
            helper.make_node("LSTM", [value, f"W{k}", f"R{k}", f"B{k}"], [f"Y{k}"], name=f"l{k}", hidden_size=hidden)
        )
        if k < layers - 1:
            constants["directions"], value = np.array([1], np.int64), f"y{k}"
            nodes.append(helper.make_node("Squeeze", [f"Y{k}", "directions"], [value]))
    return model(nodes, constants, (steps, batch, width), f"Y{layers - 1}", (steps, 1, batch, hidden))


def model(
    nodes: list[Any], constants: dict[str, np.ndarray], taken: tuple[int, ...], given: str, size: tuple[int, ...]
) -> bytes:
    """From ``x`` with shape ``taken`` to ``given`` with shape ``size``; checked by onnx."""
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "comparison",
        [helper.make_tensor_value_info("x", float32, taken)],
        [helper.make_tensor_value_info(given, float32, size)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(made, full_check=True)
    found: bytes = made.SerializeToString()
    return found


def session(serialized: bytes) -> Any:
    """With the number of threads that all contenders have."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def bound(ready: Any, given: dict[str, np.ndarray], out: np.ndarray) -> tuple[Any, Any]:
    """A binding of a session's inputs and its output to these arrays, and what must stay alive with it."""
    binding, keep = ready.io_binding(), [out]
    for name, value in given.items():
        fixed = onnxruntime.OrtValue.ortvalue_from_numpy(value)
        binding.bind_ortvalue_input(name, fixed)
        keep += [value, fixed]
    binding.bind_output(
        ready.get_outputs()[0].name, device_type="cpu", element_type=np.float32, shape=out.shape,
        buffer_ptr=out.ctypes.data,
    )  # fmt: skip
    return binding, keep
