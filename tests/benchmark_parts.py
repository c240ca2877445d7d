"""What the tests of the comparison with the peers share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from peers import numpy_peer
from peers.run import Settings
from peers.work import Work

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = Work("step", "lstm", "tiny")
MINIMAL = Settings(("tiny",), ("tiny",), ("tiny",), ("tiny",), rounds=2, budget=1e-4, memory="tiny", memory_steps=2)


def reference_of(item: Work) -> dict[str, np.ndarray]:
    """By NumPy in float64."""
    return numpy_peer.build(item._replace(dtype="float64"), {}).result()
