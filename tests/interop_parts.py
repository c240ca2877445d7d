"""What tests of interop share."""

from __future__ import annotations

from typing import Any

from tinygrad_lstm import nn


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)
