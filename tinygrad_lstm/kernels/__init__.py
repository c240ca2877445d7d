"""Arrays in, arrays out: elementwise expressions, matrix products, threads, and the cache of native code.

Nothing here knows a Tensor, and importing this package does not import LLVM: native kernels are compiled when
they are first called, and kept on disk.

- elementwise: :mod:`.expression` (functions on symbolic scalars), :mod:`.table` (their leaves), :mod:`.elementwise`
  (on arrays, by NumPy or natively), :mod:`.native`, :mod:`.lowering`, :mod:`.vector`, :mod:`.fit` (how);
- products: :mod:`.matmul` (which product goes where), :mod:`.gemm` with :mod:`.gemm_native` and :mod:`.microkernel`;
- rows: :mod:`.rows` (what compiled loops are made of), :mod:`.softmax`, :mod:`.tables`;
- many tensors in one call: :mod:`.multi`;
- :mod:`.threads` and :mod:`.launch` (a pool without the GIL), :mod:`.pool` (memory that is used again),
  :mod:`.codecache` (machine code on disk, by content), :mod:`.translate` and :mod:`.dialect` (from text to LLVM IR),
  :mod:`.machine` (LLVM).

Examples
--------
>>> import numpy as np
>>> from tinygrad_lstm.kernels import build, evaluate
>>> from tinygrad_lstm.kernels import expression as e
>>> gate = build(lambda z, c: e.sigmoid(z) * c, 2)
>>> evaluate(gate, [np.zeros(2), np.array([1.0, 3.0])]).tolist()
[0.5, 1.5]
"""

from __future__ import annotations

from . import expression
from .elementwise import evaluate, fused
from .expression import Expr, Expression, build
from .matmul import matmul

__all__ = ["Expr", "Expression", "build", "evaluate", "expression", "fused", "matmul"]
