"""Parameters to and from torch, and as plain safetensors files.

Names and layouts are PyTorch's already, so nothing is renamed or transposed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from tinygrad_lstm import serialization
from tinygrad_lstm.errors import ArgumentError, CheckpointError, DependencyError, DTypeError
from tinygrad_lstm.foreign import array_of, widened
from tinygrad_lstm.nn.module import Module

if TYPE_CHECKING:
    import torch

__all__ = ["from_torch", "load_safetensors", "save_safetensors", "to_torch"]

M = TypeVar("M", bound=Module)

# The types of the format, and the NumPy dtype in which their bytes are read.
_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


def from_torch(state_dict: Any) -> Any:
    """The arrays of a torch state dict, for :meth:`Module.load_state_dict`.

    Parameters
    ----------
    state_dict : mapping of names to torch tensors, or a torch module
        Mappings, lists and tuples inside of it (an optimizer's state) come back as dicts, lists and tuples; numbers,
        strings and None in them as they are.

    Returns
    -------
    dict
        Copies, C-contiguous, in the tensors' dtypes; bfloat16, which NumPy has not, becomes float32 (the same numbers).

    Raises
    ------
    DTypeError
        A value is no dense tensor of real numbers (complex, sparse, quantised); the message names it.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import interop, nn
    >>> arrays = interop.from_torch({"weight": np.ones((1, 2), np.float32)})  # a torch tensor, as a rule
    >>> nn.Linear(2, 1, bias=False).load_state_dict(arrays)
    LoadResult(missing=[], unexpected=[])
    """
    if hasattr(state_dict, "state_dict"):
        state_dict = state_dict.state_dict()
    if not isinstance(state_dict, Mapping):
        raise DTypeError(
            f"from_torch: found {type(state_dict).__name__}, expected a mapping of names to tensors; "
            "give model.state_dict()"
        )
    return {key: _from_torch(str(key), value, inside=False) for key, value in state_dict.items()}


def _from_torch(name: str, value: Any, inside: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _from_torch(f"{name}.{key}", item, True) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_from_torch(f"{name}.{k}", item, True) for k, item in enumerate(value)])
    if not hasattr(value, "dtype"):
        if inside and (value is None or isinstance(value, (bool, int, float, str))):
            return value
        raise DTypeError(f"from_torch: {name} is of type {type(value).__name__}, expected a tensor")
    return np.array(array_of(name, value, "from_torch"), order="C")


def to_torch(module: Module | Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A state dict of torch tensors: what the torch module of the same architecture loads with ``strict=True``.

    Parameters
    ----------
    module : Module, or a state dict of one

    Returns
    -------
    dict of name to torch.Tensor
        Copies on the CPU, in the parameters' dtypes, without ``requires_grad``.

    Raises
    ------
    DependencyError
        torch is not installed.
    DTypeError
        A dtype that torch has not (longdouble).

    Examples
    --------
    >>> from tinygrad_lstm import interop, nn
    >>> theirs = interop.to_torch(nn.LSTM(3, 5))                        # doctest: +SKIP
    >>> torch.nn.LSTM(3, 5).load_state_dict(theirs)                     # doctest: +SKIP
    <All keys matched successfully>
    """
    arrays = _arrays(module, "to_torch")
    try:
        import torch
    except ImportError:
        raise DependencyError("to_torch: torch is not installed; pip install torch") from None
    found = {}
    for name, array in arrays.items():
        try:
            found[name] = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
        except TypeError:
            raise DTypeError(f"to_torch: {name} is {array.dtype}, which torch has not; convert with astype") from None
    return found


def _arrays(module: Any, who: str) -> dict[str, np.ndarray]:
    """The arrays of a module or state dict by name."""
    state = module.state_dict() if isinstance(module, Module) else module
    if not isinstance(state, Mapping):
        raise DTypeError(f"{who}: found {type(module).__name__}, expected a Module or its state_dict()")
    for name in state:
        if not isinstance(name, str):
            raise DTypeError(f"{who}: the name {name!r} is no string")
    return {name: array_of(name, value, who) for name, value in state.items()}


def save_safetensors(
    path: serialization.PathLike, module: Module | Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write parameters as a plain safetensors file, under their names, atomically.

    ``safetensors.numpy.load_file`` and ``safetensors.torch.load_file`` read it; for what else belongs to a training
    run (optimizers, steps, generators) use :func:`tinygrad_lstm.save`.

    Parameters
    ----------
    path : str or path-like
    module : Module, or a state dict of one
        A parameter with several names is stored under each of them.
    metadata : dict of str to str, optional
        Notes in the header of the file.

    Raises
    ------
    FileError
        The file could not be written; an old one is still there.
    DTypeError
        A dtype that the format has not.

    Examples
    --------
    >>> import os, tempfile
    >>> from tinygrad_lstm import interop, nn
    >>> path = os.path.join(tempfile.mkdtemp(), "linear.safetensors")
    >>> interop.save_safetensors(path, nn.Linear(2, 3))
    >>> {name: array.shape for name, array in interop.load_safetensors(path).items()}
    {'bias': (3,), 'weight': (3, 2)}
    """
    from safetensors.numpy import save as serialised

    arrays = {}
    for name, array in _arrays(module, "save_safetensors").items():
        dtype = array.dtype.newbyteorder("=")
        if dtype not in serialization.DTYPES:
            raise DTypeError(
                f"save_safetensors: {name} is {array.dtype}, which the format has not; convert with astype"
            )
        if name == "__metadata__":
            raise ArgumentError("save_safetensors: '__metadata__' is no name for an array, the format uses it itself")
        arrays[name] = np.asarray(array, dtype, order="C")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise DTypeError(f"save_safetensors: metadata are strings by name, found {key!r}: {value!r}")
    # Loaders of torch models ask for this entry: the layout of the arrays is PyTorch's.
    content = serialised(arrays, {"format": "pt", **(metadata or {})})
    with serialization.replacing(path) as file:
        file.write(_in_order(content))


def _in_order(content: bytes) -> bytes:
    """The file with its metadata sorted: the writer keeps no order, and equal parameters shall make equal files."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data stay aligned
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@overload
def load_safetensors(path: serialization.PathLike, module: None = None) -> dict[str, np.ndarray]: ...
@overload
def load_safetensors(path: serialization.PathLike, module: M) -> M: ...
def load_safetensors(path: serialization.PathLike, module: Any = None) -> Any:
    """Read a safetensors file: into a module, or as a dict of arrays by name.

    Parameters
    ----------
    path : str or path-like
    module : Module, optional
        Gets every array of the file, cast to its dtype; names and shapes must agree (``load_state_dict``).

    Returns
    -------
    the module, or a dict of name to array
        Without a module the arrays have the dtypes of the file; bfloat16, which NumPy has not, becomes float32 (the
        same numbers).

    Raises
    ------
    FileNotFoundError
    CheckpointError
        The file is damaged or no safetensors file.
    DTypeError
        An array of a type that NumPy has not (8-bit floats); the message names it.
    ArgumentError, ShapeError
        The file does not fit the module; the module is as it was.
    """
    import safetensors

    target = serialization.regular_file(path, "safetensors file")
    with open(target, "rb") as file:
        content = file.read()
    try:
        entries = safetensors.deserialize(content)
    except (safetensors.SafetensorError, ValueError, OverflowError):
        raise CheckpointError(
            f"{target} is cut off, damaged or of another kind: its {len(content)} bytes are no whole safetensors file"
        ) from None
    arrays = {name: _array(target, name, entry) for name, entry in sorted(entries)}
    if module is None:
        return arrays
    if not isinstance(module, Module):
        raise DTypeError(f"load_safetensors: found {type(module).__name__}, expected a Module or None")
    module.load_state_dict(arrays)
    return module


def _array(target: str, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    if entry["dtype"] not in _DTYPES:
        raise DTypeError(f"{target}: {name} has the type {entry['dtype']}, which NumPy has not")
    flat = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
    flat = widened(flat) if entry["dtype"] == "BF16" else flat.astype(flat.dtype.newbyteorder("="))
    return flat.reshape(entry["shape"])
