"""The output folder of a training run: checkpoints, metrics as CSV, the loss curve as PNG."""

from __future__ import annotations

import csv
import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygrad_lstm.cli.options import BEST, LAST
from tinygrad_lstm.errors import FileError
from tinygrad_lstm.hints import how_to_install
from tinygrad_lstm.serialization import replacing

if TYPE_CHECKING:
    from tinygrad_lstm.training import Trainer

__all__ = ["RunFolder", "new_folder", "newest_run"]

METRICS, CURVE = "metrics.csv", "loss.png"
RUNS = Path("runs")


class RunFolder:
    """Writes a run's files; each one is replaced as a whole, so that a stop at any moment loses none.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    config, about : dict
        What the model was built from, and what else every checkpoint tells (options, corpus).
    vocabulary : str
    """

    def __init__(self, folder: Path, config: dict[str, Any], about: dict[str, Any], vocabulary: str) -> None:
        self.folder, self.config, self.about, self.vocabulary = folder, config, about, vocabulary
        self._best_step = -1

    def write(self, trainer: Trainer) -> None:
        """Both checkpoints and the metrics, as of now."""
        from tinygrad_lstm.training.language_model import save_model

        best = trainer.best
        if best is not None and best["step"] != self._best_step:
            note = {"step": best["step"], "held_out_bits_per_character": best["loss"] / math.log(2)}
            save_model(self.folder / BEST, self.config, self.vocabulary, best["model"], {**self.about, "result": note})
            self._best_step = best["step"]
        self.write_metrics(trainer)
        # Last: whatever this checkpoint counts as done is on the disk already.
        state = trainer.state_dict()
        parameters = state.pop("model")
        save_model(self.folder / LAST, self.config, self.vocabulary, parameters, {**self.about, "trainer": state})

    def write_metrics(self, trainer: Trainer) -> None:
        """The history as CSV, one row a step; ``seconds`` is the only column that differs between equal runs."""
        held_out = dict(zip(trainer.validations["step"], trainer.validations["loss"], strict=True))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["step", "epoch", "loss", "bits_per_character", "held_out_bits_per_character", "lr", "grad_norm", "seconds"]
        )
        columns = trainer.history
        for n, step in enumerate(columns["step"]):
            loss = columns["loss"][n]
            held = repr(held_out[step] / math.log(2)) if step in held_out else ""
            rates = [columns["lr"][n], columns["grad_norm"][n], round(columns["seconds"][n], 3)]
            writer.writerow([int(step), int(columns["epoch"][n]), loss, loss / math.log(2), held, *rates])
        with replacing(self.folder / METRICS) as file:
            file.write(text.getvalue().encode())

    def write_curve(self, trainer: Trainer) -> str | None:
        """The loss curve as PNG; what to tell the user when matplotlib is missing, else None."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return f"no {CURVE}: it needs matplotlib; {how_to_install('plots')}"
        bits = [loss / math.log(2) for loss in trainer.history["loss"]]
        held_out = [loss / math.log(2) for loss in trainer.validations["loss"]]
        # A Figure with its own canvas: no window system, no global state of pyplot.
        figure = Figure(figsize=(8, 5), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="step", ylabel="bits per character", title=self.folder.name)
        axes.plot(trainer.history["step"], bits, color="0.8", linewidth=0.7, label="training, each step")
        axes.plot(trainer.history["step"], smoothed(bits), color="C0", label="training, smoothed")
        if held_out:
            axes.plot(trainer.validations["step"], held_out, color="C1", marker="o", label="held out")
        axes.grid(alpha=0.3)
        axes.legend()
        picture = io.BytesIO()
        canvas.print_png(picture)
        with replacing(self.folder / CURVE) as file:
            file.write(picture.getvalue())
        return None


def smoothed(values: list[float], weight: float = 0.95) -> list[float]:
    """The running mean with exponentially falling weights, without the bias of its start."""
    out, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def new_folder(wanted: str | None) -> Path:
    """Make the folder of a new run; it holds no other run, so nothing is overwritten.

    Without a name: ``runs/char-lm-1``, or the first number that is free.

    Raises
    ------
    FileError
        The folder cannot be made or written, or holds a run already.
    """
    if wanted is None:
        number = 1
        while not _made(RUNS / f"char-lm-{number}"):
            number += 1
        folder = RUNS / f"char-lm-{number}"
    else:
        folder = Path(wanted)
        _made(folder)
        for name in (LAST, BEST, METRICS, CURVE):
            if (folder / name).exists():
                raise FileError(
                    f"{folder} holds a run already ({name}); give another folder with --out, "
                    f"or go on with that run with --resume {folder}"
                )
    check_writable(folder)
    return folder


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written before an hour of training, not after it."""
    trial = folder / f".tg-{os.urandom(6).hex()}.tmp"
    try:
        with open(trial, "xb"):
            pass
        trial.unlink()
    except OSError as error:
        raise FileError(f"cannot write into the folder {folder}: {error.strerror}") from None


def newest_run() -> Path:
    """The last checkpoint below ``runs/`` that was written."""
    found = sorted(RUNS.glob(f"*/{LAST}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(2, f"no run to resume (no */{LAST})", str(RUNS))
    return found[-1]


def _made(folder: Path) -> bool:
    """Make a folder; False if it exists."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise FileError(f"cannot write into {folder}: it is no folder") from None
        return False
    except OSError as error:
        raise FileError(f"cannot make the folder {folder}: {error.strerror}") from None
    return True
