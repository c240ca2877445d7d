"""The work that every contender does: shapes, weights, inputs, and the operations of its matrix products.

All of it is a function of a :class:`Work` alone, so that each worker makes its own copy and all have the same numbers.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "CELLS", "LAYERS", "OWN_CELLS", "SHAPES", "ZONEOUT", "Case", "Work", "flop", "inputs", "shape_of", "tokens",
    "weights", "zeros", "zoneout_masks",
]  # fmt: skip

#: name -> (T, B, I, H, layers)
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (50, 1, 8, 16, 1),
    "small": (50, 32, 32, 64, 1),
    "medium": (100, 32, 64, 128, 1),
    "large": (100, 64, 256, 256, 1),
    "xl": (50, 64, 512, 512, 1),
    "long": (1000, 8, 32, 64, 1),
    "stack": (100, 32, 64, 128, 2),
    "online": (1, 1, 32, 64, 1),
}
#: name -> (T, B, width of the embedding, H, layers) of the character model
TRAINING: dict[str, tuple[int, int, int, int, int]] = {
    "character": (100, 32, 64, 128, 2),
    "character-tiny": (20, 8, 16, 32, 2),
}
#: The cells of the suite ``custom``; each is typed once per library.
CELLS = ("peephole-norm", "minimal-gated", "multiplicative", "eight-matmuls")
#: What has a layer in torch.
LAYERS = ("lstm", "gru", "rnn", "projection")
#: The cells of the suite ``cells``: those that this library brings, and the smallest that a user types.
OWN_CELLS = (*LAYERS, "peephole", "layer-norm", "zoneout", "minimal-gated")
GATES = "ifgo"
#: Probabilities that an element of h, of c stays as it was (Krueger et al. 2017, character level).
ZONEOUT = (0.05, 0.5)


class Work(NamedTuple):
    """One measurement's subject.

    Attributes
    ----------
    kind : "step" (forward, sum of squares of every output, gradients of weights and x), "forward", "training" or "peak"
    cell : a name in CELLS or OWN_CELLS
    shape : a name in SHAPES or TRAINING
    dtype : "float32", or "float64" for the reference
    """

    kind: str
    cell: str
    shape: str
    dtype: str = "float32"

    @property
    def label(self) -> str:
        """For tables: the cell, unless it is the LSTM, and the shape."""
        return self.shape if self.cell == "lstm" else f"{self.cell} {self.shape}"


class Case(NamedTuple):
    """A contender ready to run: ``call`` is what is timed, ``result`` runs it once more and returns named arrays.

    Gradients are named like the weights, that of the input ``x``; ``loss`` is the sum of squares.  A forward pass
    returns ``y (T, B, H)``, training ``losses``, the losses of the first steps from the given weights.  ``facts`` is
    None or returns a dict of numbers that go to the row.
    """

    call: Any
    result: Any
    facts: Any = None


def shape_of(work: Work) -> tuple[int, int, int, int, int]:
    """``(T, B, I, H, layers)``."""
    return (TRAINING if work.kind == "training" else SHAPES)[work.shape]


def _weight_shapes(work: Work) -> dict[str, tuple[int, ...]]:
    _, _, width, hidden, layers = shape_of(work)
    if work.cell in LAYERS:
        shapes: dict[str, tuple[int, ...]] = {}
        rows = {"gru": 3, "rnn": 1}.get(work.cell, 4) * hidden
        fed = hidden // 2 if work.cell == "projection" else hidden
        for k in range(layers):
            shapes[f"weight_ih_l{k}"] = (rows, width if k == 0 else fed)
            shapes[f"weight_hh_l{k}"] = (rows, fed)
            shapes[f"bias_ih_l{k}"] = shapes[f"bias_hh_l{k}"] = (rows,)
            if work.cell == "projection":
                shapes[f"weight_hr_l{k}"] = (fed, hidden)
        return shapes
    if work.cell in ("peephole", "layer-norm", "zoneout"):
        rows = 4 * hidden
        shapes = {"weight_ih": (rows, width), "weight_hh": (rows, hidden)}
        if work.cell == "layer-norm":
            sizes = {"norm_x": rows, "norm_h": rows, "norm_c": hidden}
            return shapes | {f"{name}.{part}": (n,) for name, n in sizes.items() for part in ("weight", "bias")}
        shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        peepholes = ("weight_ci", "weight_cf", "weight_co") if work.cell == "peephole" else ()
        return shapes | dict.fromkeys(peepholes, (hidden,))
    if work.cell == "peephole-norm":
        vectors = [f"{name}_{gate}" for name in ("gain", "shift") for gate in GATES] + ["p_i", "p_f", "p_o"]
        return {"W": (width, 4 * hidden), "U": (hidden, 4 * hidden)} | dict.fromkeys(vectors, (hidden,))
    if work.cell == "minimal-gated":
        return {"W": (width, 2 * hidden), "U_f": (hidden, hidden), "U_g": (hidden, hidden), "b": (2 * hidden,)}
    if work.cell == "multiplicative":
        return {
            "W_m": (width, hidden), "U_m": (hidden, hidden), "W": (width, 4 * hidden), "V": (hidden, 4 * hidden),
            "b": (4 * hidden,),
        }  # fmt: skip
    if work.cell == "eight-matmuls":
        shapes = {f"W_{gate}": (width, hidden) for gate in GATES}
        shapes |= {f"U_{gate}": (hidden, hidden) for gate in GATES}
        return shapes | {f"b_{gate}": (hidden,) for gate in GATES}
    raise ValueError(f"no cell {work.cell!r}; there are {', '.join(dict.fromkeys(OWN_CELLS + CELLS))}")


def _generator(work: Work, salt: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{work.cell} {work.shape} {salt}".encode()))


def weights(work: Work) -> dict[str, np.ndarray]:
    """Uniform in +-1/sqrt(H), gains around one; float32 numbers, whatever the dtype they are stored in.

    The gain on what is normalised of h is around .3: with one, the gradients of the layer-norm cell explode (5,000 at
    the first step of medium, from 1 at the last), and nobody's float32 agrees with float64 in 3e-4 of them.
    """
    rng, scale = _generator(work, "weights"), np.float32(shape_of(work)[3] ** -0.5)
    found = {}
    for name, shape in _weight_shapes(work).items():
        value = (rng.random(shape, dtype=np.float32) * 2 - 1) * scale
        around_one = name.startswith("gain") or (name.startswith("norm") and name.endswith("weight"))
        gain = np.float32(0.3 if name == "norm_h.weight" else 1.0)
        found[name] = ((value + around_one) * gain).astype(work.dtype, copy=False)
    return found


def inputs(work: Work) -> np.ndarray:
    """``x (T, B, I)``, standard normal."""
    steps, batch, width, *_ = shape_of(work)
    return _generator(work, "x").standard_normal((steps, batch, width), dtype=np.float32).astype(work.dtype, copy=False)


def zeros(work: Work) -> np.ndarray:
    """An initial state ``(B, H)``."""
    _, batch, _, hidden, _ = shape_of(work)
    return np.zeros((batch, hidden), work.dtype)


def zoneout_masks(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Where h and c stay as they were, bool ``(T, B, H)``: what results are compared with; timed calls draw anew."""
    steps, batch, _, hidden, _ = shape_of(work)
    rng = _generator(work, "stays")
    h, c = (rng.random((steps, batch, hidden)) < rate for rate in ZONEOUT)
    return h, c


def flop(work: Work) -> float:
    """Operations of the matrix products alone: two per weight, step and row forward; the same for dx, and for dW.

    For an LSTM layer's gradient step that is 24 * T * B * H * (I + H).
    """
    if work.kind not in ("step", "forward"):
        return 0.0
    steps, batch, *_ = shape_of(work)
    matrices = sum(shape[0] * shape[1] for shape in _weight_shapes(work).values() if len(shape) == 2)
    return float((6 if work.kind == "step" else 2) * steps * batch * matrices)


class Tokens(NamedTuple):
    """Training data of the character model: ``x, y (chunks, T, B)`` of integers below ``vocabulary``."""

    x: np.ndarray
    y: np.ndarray
    vocabulary: int


def tokens(work: Work) -> Tokens:
    """Chunks of the standard library's own documentation, in B parallel streams; y is x one character later."""
    from pydoc_data.topics import topics

    text = np.frombuffer("\n".join(topics[key] for key in sorted(topics)).encode("ascii", "replace"), np.uint8)
    kinds, ids = np.unique(text, return_inverse=True)
    steps, batch, *_ = shape_of(work)
    per_stream = min((ids.size - 1) // batch, 60 * steps) // steps * steps
    x, y = (part[: batch * per_stream].reshape(batch, -1, steps).transpose(1, 2, 0) for part in (ids[:-1], ids[1:]))
    return Tokens(np.ascontiguousarray(x, np.int64), np.ascontiguousarray(y, np.int64), len(kinds))


def model_weights(work: Work) -> dict[str, np.ndarray]:
    """Of the character model: ``embedding.weight``, ``recurrent.*`` in the names of an LSTM, ``output.*``."""
    _, _, width, hidden, _ = shape_of(work)
    count = tokens(work).vocabulary
    rng = _generator(work, "model")
    found = {"embedding.weight": rng.standard_normal((count, width), dtype=np.float32)}
    found |= {f"recurrent.{name}": value for name, value in weights(work).items()}
    scale = np.float32(hidden**-0.5)
    for name, shape in (("output.weight", (count, hidden)), ("output.bias", (count,))):
        found[name] = (rng.random(shape, dtype=np.float32) * 2 - 1) * scale
    return {name: value.astype(work.dtype, copy=False) for name, value in found.items()}
