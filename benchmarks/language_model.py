"""Whole training of the character language model, side by side with torch.

Both start from the same weights, read the same chunks in the same order, and do the same maths: truncated
BPTT with carried state, cross-entropy, clipping by norm, Adam, the same schedule, no dropout.  They take turns
step by step, so that a noisy machine disturbs both alike.

    python benchmarks/language_model.py                # about six minutes
    python benchmarks/language_model.py --steps 300
    python benchmarks/language_model.py --smoke        # a few steps, to see that it works

Reported: tokens/s of both (medians of single steps), their ratio, the held-out bits per character of both after
the same number of steps, and the largest difference of the two loss curves.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from typing import Any

import numpy as np
import torch

import tinygrad_lstm as tg
from tinygrad_lstm import nn, optim
from tinygrad_lstm.data import TextCorpus, TextStreams
from tinygrad_lstm.training import WarmupCosine
from tinygrad_lstm.training.language_model import CharLM, bits_per_character


class TorchLM(torch.nn.Module):
    """The same network in torch."""

    def __init__(self, vocabulary: int, hidden: int, layers: int, embedding: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, embedding)
        self.recurrent = torch.nn.LSTM(embedding, hidden, layers)
        self.output = torch.nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Any, state: Any = None) -> Any:
        y, state = self.recurrent(self.embedding(tokens), state)
        return self.output(y), state


class Ours:
    """One training step with this library."""

    def __init__(self, model: CharLM, lr: float) -> None:
        self.model, self.state = model, None
        self.optimizer = optim.Adam(model.parameters(), lr=lr)

    def step(self, x: np.ndarray, y: np.ndarray, lr: float) -> float:
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        logits, state = self.model(x, self.state)
        self.state = tuple(part.detach() for part in state)
        loss = nn.cross_entropy(logits, y)
        loss.backward()
        optim.clip_grad_norm(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


class Theirs:
    """The same step with torch."""

    def __init__(self, model: TorchLM, lr: float) -> None:
        self.model, self.state = model, None
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def step(self, x: np.ndarray, y: np.ndarray, lr: float) -> float:
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        logits, state = self.model(torch.from_numpy(x), self.state)
        self.state = tuple(part.detach() for part in state)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def bits(self, ids: np.ndarray, batch: int = 1, length: int = 100) -> float:
        """As bits_per_character."""
        streams = TextStreams(ids, batch, length, drop_last=False)
        total, state = 0.0, None
        with torch.no_grad():
            for x, y in streams:
                logits, state = self.model(torch.from_numpy(x), state)
                flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten())
                total += flat.item() * y.size
        return total / streams.tokens / math.log(2)


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.hidden = 8, 32
    torch.set_num_threads(args.threads)
    tg.seed(0)
    corpus = TextCorpus.python_topics()
    size = len(corpus.vocabulary)
    model = CharLM(size, hidden=args.hidden, layers=2, embedding=64)
    peer = TorchLM(size, args.hidden, 2, 64)
    peer.load_state_dict({name: torch.tensor(value) for name, value in model.state_dict().items()})
    lr, schedule = 4e-3, WarmupCosine(warmup=100, floor=0.02)
    runs = {"ours": Ours(model, lr), "torch": Theirs(peer, lr)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    streams = TextStreams(corpus.train, 32, 100)
    step = 0
    while step < args.steps:
        for run in runs.values():
            run.state = None
        for x, y in streams:
            for name in sorted(runs, reverse=step % 2 == 1):
                started = time.perf_counter()
                losses[name].append(runs[name].step(x, y, lr * schedule(step, args.steps)))
                seconds[name].append(time.perf_counter() - started)
            step += 1
            if step % 250 == 0:
                print(f"step {step}: " + ", ".join(f"{n} {v[-1] / math.log(2):.3f} bits" for n, v in losses.items()))
            if step == args.steps:
                break
    tokens = 100 * 32
    skip = min(5, args.steps // 2)
    speed = {name: tokens / float(np.median(values[skip:])) for name, values in seconds.items()}
    held_out = {"ours": bits_per_character(model, corpus.held_out), "torch": runs["torch"].bits(corpus.held_out)}
    apart = float(np.max(np.abs(np.subtract(losses["ours"], losses["torch"]))))
    report = {
        "steps": args.steps, "tokens_per_second": speed, "ratio": speed["ours"] / speed["torch"],
        "held_out_bits": held_out, "largest_difference_of_losses": apart, "torch": torch.__version__,
        "numpy": np.__version__, "torch_threads": args.threads, "machine": platform.machine(),
    }  # fmt: skip
    for name in runs:
        print(f"{name:>6}: {speed[name]:10,.0f} tokens/s   held out {held_out[name]:.3f} bits per character")
    apart = held_out["ours"] - held_out["torch"]
    print(f"ours / torch in tokens/s: {report['ratio']:.2f}; held-out difference {apart:+.3f} bits")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
