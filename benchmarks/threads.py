"""What it costs to run native code on two threads: the pool, hot and asleep, against concurrent.futures.

    python benchmarks/threads.py [--smoke] [--json FILE] [--spin MICROSECONDS ...]

A launch has as many parts as threads (default 2), each a spin loop of about 25 us.  Between launches Python
works, or the process sleeps, for the time in the first column.  What is printed is the time of a launch less
that of one part alone, so 0 is perfect and the length of a part (or more) means that the second thread came
too late to help.  Contenders take turns in each round; medians, and in brackets the lower quartile.

- ours: `kernels.threads.run`;
- futures: all parts but one submitted to a `ThreadPoolExecutor`, the last run by the caller (ctypes, no GIL);
- one thread: the parts one after another.

`--spin` repeats the table for other times that idle workers stay awake.  Each thread needs a CPU that nothing
else uses; a lower quartile far below the median says that others were at work.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import tinygrad_lstm as tg
from tinygrad_lstm.kernels import codecache, threads

SOURCE = '''
from tinygrad_lstm.kernels.atomics import load_relaxed, pause
from tinygrad_lstm.kernels.dialect import exported

@exported
def spin(argument, part):
    """As many pauses as the word at ``argument`` says."""
    for _ in range(load_relaxed(argument)):
        pause()
    return 0
'''
GAPS = (0.0, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 2e-3)
PART = 25e-6


def busy(seconds: float) -> None:
    """Python at work, with the GIL."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def timed(call: Callable[[], Any], before: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each call."""
    found = []
    for _ in range(times):
        before()
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return found


def table(number: int, rounds: int, spin: float) -> dict[str, Any]:
    """The costs in microseconds, by gap and contender."""
    threads.SPIN = spin
    tg.set_num_threads(1)  # a new team
    tg.set_num_threads(number)
    function = codecache.load(SOURCE, stem="benchmark").address("spin")
    length = np.array([0], np.int64)
    address = length.ctypes.data
    threads.run(function, address, number)
    length[0] = int(PART / threads._pause_seconds())
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(function)
    result: dict[str, Any] = {}
    with ThreadPoolExecutor(number - 1) as executor:

        def futures() -> None:
            others = [executor.submit(prototype, address, part) for part in range(1, number)]
            prototype(address, 0)
            for other in others:
                other.result()

        contenders: dict[str, Callable[[], Any]] = {
            "one part": lambda: threads.run(function, address, 1),
            "ours": lambda: threads.run(function, address, number),
            "futures": futures,
            "one thread": lambda: [threads.run(function, address, 1) for _ in range(number)],
        }
        pauses: dict[str, Callable[[], Any]] = {f"{1e6 * gap:.0f} us": lambda gap=gap: busy(gap) for gap in GAPS}
        pauses["5 ms asleep"] = lambda: time.sleep(5e-3)
        for name, before in pauses.items():
            samples: dict[str, list[float]] = {key: [] for key in contenders}
            for _ in range(rounds):
                for key, call in contenders.items():
                    # The first few calls of a turn get the threads of this contender used to its rhythm.
                    samples[key] += timed(call, before, 6)[2:]
            alone = float(np.median(samples.pop("one part")))
            result[name] = {key: [1e6 * (q - alone) for q in quartiles(times)] for key, times in samples.items()}
            cells = "".join(f"{median:10.1f} ({low:6.1f})" for low, median in result[name].values())
            print(f"{name:>12s}{cells}", flush=True)
        empty = np.zeros(1, np.int64)
        place = empty.ctypes.data
        for parts in (1, number):
            times = timed(lambda parts=parts: threads.run(function, place, parts), lambda: None, 300 * rounds)
            result[f"empty, {parts}"] = 1e6 * float(np.median(times))
            print(f"{parts} empty part{'s' * (parts > 1)}, back to back: {result[f'empty, {parts}']:.2f} us")
    return result


def quartiles(times: list[float]) -> list[float]:
    """The lower quartile and the median."""
    return [float(np.quantile(times, q)) for q in (0.25, 0.5)]


def main() -> int:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="very short: shows that it runs, measures nothing well")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--threads", type=int, default=2, help="the caller's included (default 2)")
    parser.add_argument("--spin", type=float, nargs="+", help="microseconds (default: the pool's own)")
    options = parser.parse_args()
    if options.threads < 2:
        parser.error("--threads: at least 2")
    rounds = 2 if options.smoke else 60
    figures = {}
    for spin in options.spin or [1e6 * threads.SPIN]:
        print(f"{options.threads} threads, workers stay awake for {spin:.0f} us; microseconds beyond one part")
        print(f"{'between':>12s}{'ours':>10s}{'futures':>19s}{'one thread':>19s}")
        figures[f"{spin:.0f}"] = table(options.threads, rounds, 1e-6 * spin)
    if options.json:
        environment = {"python": platform.python_version(), "machine": platform.machine(), "threads": options.threads}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"environment": environment, "microseconds": figures}, file)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
