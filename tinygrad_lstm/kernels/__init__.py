"""Arrays in, arrays out: elementwise expressions, matrix products, and the cache of native code.

Nothing here knows a Tensor, and importing this package imports neither Numba nor LLVM: native kernels
are compiled when they are first called, and kept on disk.
"""

from __future__ import annotations

from . import expression
from .elementwise import evaluate, fused
from .expression import Expr, Expression, build
from .matmul import matmul

__all__ = ["Expr", "Expression", "build", "evaluate", "expression", "fused", "matmul"]
