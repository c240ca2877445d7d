"""The ``onnx`` package, imported when it is needed."""

from __future__ import annotations

from typing import Any

from tinygrad_lstm.errors import DependencyError

__all__ = ["onnx_library"]


def onnx_library(who: str) -> Any:
    """The module ``onnx``; raises DependencyError with the extra to install where it is missing."""
    try:
        import onnx
    except ImportError:
        raise DependencyError(f"{who} needs the package onnx; pip install 'tinygrad-lstm[onnx]'") from None
    return onnx
