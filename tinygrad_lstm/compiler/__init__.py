"""From a recorded loop to native code.  Nothing here knows what an LSTM is.

Passes, each a function from Program to Program (or to a plan) in a file of its own, in the order in which they run:

- :mod:`.adjoint`: a loop body taken apart for reverse mode; :mod:`.recompute`: which of its values are kept;
- :mod:`.simplify` and :mod:`.algebra`: what is not needed, computed twice, or cancels;
- :mod:`.merge`: fewer and larger matrix products;
- :mod:`.loop` with :mod:`.batching`: hoist and sink, three programs before, in and behind the loop;
- :mod:`.expand`, :mod:`.narrow`: composite reductions taken apart, splits moved forward;
- :mod:`.rows`: the proof that threads may share the batch out;
- :mod:`.fuse`: elementwise equations and row reductions as one loop over a row;
- :mod:`.lowering` (on :mod:`.views`, to :mod:`.stages`) and :mod:`.generate`: buffers, then the text of native code.

:mod:`.native` runs what was generated, :mod:`.runner` everything else; :mod:`.schedule` is for memory budgets.
:mod:`.function` is ``tg.compile``, with :mod:`.reach`, :mod:`.recording`, :mod:`.whole` and :mod:`.blame`;
:mod:`.report` is ``tg.explain``.  How it fits together, and a run through all passes, stands in ``docs/design.md``.

Examples
--------
>>> import numpy as np
>>> from tinygrad_lstm.compiler.loop import plan_loop
>>> from tinygrad_lstm.primitive import Aval
>>> from tinygrad_lstm.trace import trace
>>> h, w = Aval((2, 3), np.dtype("f4")), Aval((3, 3), np.dtype("f4"))
>>> body = trace(lambda h, x, w, u: [np.tanh(x @ w + h @ u)], [h, h, w, w], flat=True).program
>>> body = body.replaced(inputs=body.inputs[:2], captures=body.inputs[2:])
>>> plan = plan_loop(body, n_carry=1, n_ys=0, steps=5)
>>> print(plan.before)
program(%0 float32[5,2,3], %1 float32[3,3], %2 float32[3,3])
  %3 float32[5,2,3] = matmul(%0, %1)
  return %3, %2
>>> print(plan.inner)
program(%0 float32[2,3], %4 float32[2,3]) captures(%3 float32[3,3])
  %5 float32[2,3] = matmul(%0, %3)
  %6 float32[2,3] = add(%4, %5)
  %7 float32[2,3] = tanh(%6)
  return %7
"""
