"""To and from other libraries: PyTorch's parameters, safetensors files, ONNX models.

Nothing foreign is imported before it is needed: ``to_torch`` needs torch, ``to_onnx`` and ``from_onnx`` the extra
``onnx``.
"""

from typing import TYPE_CHECKING

from tinygrad_lstm.hints import MissingNameError
from tinygrad_lstm.interop.model import OnnxModel, from_onnx
from tinygrad_lstm.interop.to_graph import to_onnx
from tinygrad_lstm.interop.weights import from_torch, load_safetensors, save_safetensors, to_torch

__all__ = ["OnnxModel", "from_onnx", "from_torch", "load_safetensors", "save_safetensors", "to_onnx", "to_torch"]


if not TYPE_CHECKING:  # a type checker is to find names that do not exist

    def __getattr__(name: str) -> None:
        raise MissingNameError(__name__, name)
