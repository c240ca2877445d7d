"""Operators of ONNX that rearrange, join, cut and index."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.errors import UnsupportedError
from tinygrad_lstm.interop.operators import Call, operator
from tinygrad_lstm.tensor import asarray


@operator("Constant")
def _constant(call: Call) -> Any:
    for name, value in call.attributes.items():
        if name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
            dtype = None if name == "value" else np.float32 if "float" in name else np.int64
            return np.asarray(value, dtype)
    raise UnsupportedError(f"{', '.join(call.attributes)} is not supported, only arrays and numbers")


@operator("ConstantOfShape")
def _constant_of_shape(call: Call) -> Any:
    value = np.asarray(call.get("value", np.zeros(1, np.float32))).reshape(-1)
    return np.full(tuple(call.ints(0, "shape") or ()), value[0], value.dtype)


@operator("Shape")
def _shape(call: Call) -> Any:
    return np.array(call.args[0].shape[call.get("start", 0) : call.get("end")], np.int64)


@operator("Size")
def _size(call: Call) -> Any:
    return np.array(math.prod(call.args[0].shape), np.int64)


@operator("Reshape")
def _reshape(call: Call) -> Any:
    x = asarray(call.args[0])
    wanted = call.ints(1, "shape") or []
    if not call.get("allowzero"):
        wanted = [x.shape[k] if n == 0 else n for k, n in enumerate(wanted)]
    return ops.reshape(x, tuple(wanted))


@operator("Flatten")
def _flatten(call: Call) -> Any:
    x = asarray(call.args[0])
    axis = call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return ops.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


@operator("Transpose")
def _transpose(call: Call) -> Any:
    return ops.transpose(call.args[0], call.get("perm"))


@operator("Squeeze")
def _squeeze(call: Call) -> Any:
    axes = call.ints(1, "axes")
    return ops.squeeze(call.args[0], None if axes is None else tuple(axes))


@operator("Unsqueeze")
def _unsqueeze(call: Call) -> Any:
    return ops.expand_dims(call.args[0], tuple(call.ints(1, "axes") or ()))


@operator("Expand")
def _expand(call: Call) -> Any:
    x = asarray(call.args[0])
    wanted = call.ints(1, "shape") or []
    shape = [1] * (len(wanted) - x.ndim) + list(x.shape)
    wanted = [1] * (len(shape) - len(wanted)) + wanted
    return ops.broadcast_to(x, tuple(n if m == 1 else m for n, m in zip(shape, wanted, strict=True)))


@operator("Tile")
def _tile(call: Call) -> Any:
    return ops.tile(call.args[0], tuple(call.ints(1, "repeats") or ()))


@operator("Concat")
def _concat(call: Call) -> Any:
    return ops.concatenate(call.args, call.get("axis"))


@operator("Split")
def _split(call: Call) -> list[Any]:
    x, axis = asarray(call.args[0]), call.get("axis", 0)
    sizes = call.ints(1, "split")
    if sizes is None:
        length, parts = x.shape[axis], call.get("num_outputs", call.n_outputs)
        each = -(-length // parts)  # the last one may be smaller
        sizes = [each] * (parts - 1) + [length - each * (parts - 1)]
    return ops.split(x, list(itertools.accumulate(sizes))[:-1], axis)


@operator("Slice")
def _slice(call: Call) -> Any:
    x = asarray(call.args[0])
    starts, ends = call.ints(1, "starts") or [], call.ints(2, "ends") or []
    axes = call.ints(3, "axes") or list(range(len(starts)))
    steps = call.ints(4, "steps") or [1] * len(starts)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        first = -x.shape[axis]
        past = step < 0 and end < first  # in front of the first element, where Python would count anew
        index[axis] = slice(max(start, first) if step < 0 else start, None if past else end, step)
    return x[tuple(index)]


@operator("Pad")
def _pad(call: Call) -> Any:
    call.only(mode=("constant",))
    x = asarray(call.args[0])
    widths, fill = call.ints(1, "pads") or [], call.known(2, "value")
    axes = call.ints(3, "axes") or list(range(x.ndim))
    pairs = [(0, 0)] * x.ndim
    for k, axis in enumerate(axes):
        before, after = widths[k], widths[k + len(axes)]
        x = ops.split(x, [max(-before, 0), x.shape[axis] - max(-after, 0)], axis)[1]  # negative widths cut off
        pairs[axis] = (max(before, 0), max(after, 0))
    return ops.pad(x, pairs, constant_values=0.0 if fill is None or not fill.size else fill.item())


@operator("Trilu")
def _trilu(call: Call) -> Any:
    (k,) = call.ints(1, "k") or [0]
    return (ops.triu if call.get("upper", 1) else ops.tril)(call.args[0], k)


# ---------------------------------------------------------------------------- indexing


@operator("Gather")
def _gather(call: Call) -> Any:
    return ops.take(call.args[0], call.args[1], call.get("axis", 0))


@operator("GatherElements")
def _gather_elements(call: Call) -> Any:
    x, indices = asarray(call.args[0]), call.args[1]
    axis = call.get("axis", 0) % x.ndim
    index = tuple(slice(None) if k == axis else slice(0, n) for k, n in enumerate(indices.shape))
    return ops.take_along_axis(x[index], indices, axis)


@operator("GatherND")
def _gather_nd(call: Call) -> Any:
    call.only(batch_dims=(0,))
    x, indices = asarray(call.args[0]), call.args[1]
    return x[tuple(indices[..., k] for k in range(indices.shape[-1]))]


@operator("ScatterND")
def _scatter_nd(call: Call) -> Any:
    call.only(reduction=("add",))
    x, indices, updates = asarray(call.args[0]), call.args[1], call.args[2]
    depth = indices.shape[-1]
    rows = math.prod(x.shape[:depth])
    flat: Any = 0
    for k in range(depth):
        one = indices[..., k]
        # From the end is counted per axis, before the axes become one.
        one = ops.where(ops.less(one, 0), one + x.shape[k], one)
        flat = flat * x.shape[k] + one
    added = ops.scatter_add(ops.reshape(x, (rows, *x.shape[depth:])), flat, updates)
    return ops.reshape(added, x.shape)


@operator("OneHot")
def _one_hot(call: Call) -> Any:
    indices = asarray(call.args[0]).astype(np.int64)
    (depth,) = call.ints(1, "depth") or [0]
    off, on = call.args[2][0], call.args[2][1]
    classes = np.arange(depth)
    hits = ops.equal(ops.expand_dims(ops.where(ops.less(indices, 0), indices + depth, indices), -1), classes)
    axis = call.get("axis", -1)
    return ops.moveaxis(ops.where(hits, on, off), -1, axis)
