"""The control block that launches and workers share (see :mod:`.launch`)."""

from __future__ import annotations

# Offsets in the control block, in bytes.  What different threads write lies on different cache lines; 128
# bytes, since some CPUs fetch lines in pairs and some have lines of that size.
LIMIT, STOP, FUNCTION, ARGUMENT, BASE, PARTS = 0, 8, 16, 24, 32, 40
NEXT = 128
DONE, RESULT = 256, 264
BUSY = 384
WORKERS, SPINS = 512, 520
SLOTS = 640  # one a worker: its state, its lock, the LIMIT that it has dealt with
STATE, LOCK, SEEN = 0, 8, 16
SLOT = 128

RUNNING, PARKED = 0, 1
