"""The ``onnx`` package, imported when it is needed."""

from __future__ import annotations

from typing import Any

from tinygrad_lstm.errors import DependencyError
from tinygrad_lstm.hints import how_to_install

__all__ = ["onnx_library"]


def onnx_library(who: str) -> Any:
    """The module ``onnx``; raises DependencyError with the extra to install where it is missing."""
    try:
        import onnx
    except ImportError:
        raise DependencyError(f"{who} needs the package onnx; {how_to_install('onnx')}") from None
    return onnx
