"""The process that holds one contender: ``python -m peers.worker``.

It reads commands from its standard input, one JSON object a line, and answers each with one line.  What libraries
print goes to the standard error.  Nothing but the standard library is imported before the first command, so that a
first call can be timed.

=========== ========================================= =========================================================
``do``      more                                      answer
=========== ========================================= =========================================================
load        module                                    ``seconds`` of importing the module's libraries
make        work, options                             ``build``, ``first``: seconds of building, of the first call
facts                                                 ``facts`` that the case states, if it does
result      path                                      writes the named arrays there (npz), forgets them
batch       calls, warm                               ``seconds`` of all calls, after ``warm`` untimed ones;
                                                      ``cpu`` seconds in them; ``at``, ``until``: the process's
                                                      cpu seconds on arrival and departure
rate                                                  runs once; the best ``rates`` so far (peak only)
memory      calls                                     ``rss`` after each call and the ``peak`` in them, bytes
quit                                                  ends the process
=========== ========================================= =========================================================
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from typing import Any

__all__ = ["Worker", "main"]


class Worker:
    """State and commands."""

    def __init__(self) -> None:
        self.module: Any = None
        self.case: Any = None

    def load(self, libraries: list[str], module: str) -> dict[str, Any]:
        """The libraries are timed; our module around them is not."""
        begin = time.perf_counter()
        for name in libraries:
            importlib.import_module(name)
        seconds = time.perf_counter() - begin
        self.module = importlib.import_module(module)
        return {"seconds": seconds}

    def make(self, work: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """Build the case (dropping the one before) and run it once."""
        from .work import Work

        self.case = None
        begin = time.perf_counter()
        self.case = self.module.build(Work(*work), options)
        middle = time.perf_counter()
        self.case.call()
        return {"build": middle - begin, "first": time.perf_counter() - middle}

    def facts(self) -> dict[str, Any]:
        """What the case says about itself besides what it computes."""
        return {"facts": self.case.facts()} if self.case.facts else {}

    def result(self, path: str) -> dict[str, Any]:
        """Save what the case computes."""
        import numpy as np

        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in self.case.result().items()}
        np.savez(path, **arrays)
        return {}

    def batch(self, calls: int, warm: int) -> dict[str, Any]:
        """Time some calls as one: what a call costs on average, the collection of garbage included."""
        at, call = time.process_time(), self.case.call
        for _ in range(warm):
            call()
        cpu, begin = time.process_time(), time.perf_counter()
        for _ in range(calls):
            call()
        seconds = time.perf_counter() - begin
        until = time.process_time()
        return {"seconds": seconds, "cpu": until - cpu, "at": at, "until": until}

    def rate(self) -> dict[str, Any]:
        """One pass over the products; the best rates since the start, by size."""
        self.case.call()
        return {"rates": self.case.result()}

    def memory(self, calls: int) -> dict[str, Any]:
        """Resident memory, now and after each call (Linux)."""
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # the peak counts from here on
        series = []
        for _ in range(calls):
            self.case.call()
            series.append(_status("VmRSS"))
        return {"rss": series or [_status("VmRSS")], "peak": _status("VmHWM")}


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    """Answer commands until ``quit`` or the end of the input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "quit":
            return
        try:
            answer = getattr(worker, do)(**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
