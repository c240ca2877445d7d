"""Writes names.md: every public name with its signature's arguments and the first sentence about it.

python docs/names.py            # writes the file
python docs/names.py --check    # fails where the file is not what would be written
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("names.md")
MODULES = {
    "tinygrad_lstm": "Tensors, the tape, transforms of functions, settings (`import tinygrad_lstm as tg`).",
    "tinygrad_lstm.ops": "Operations; most are methods and NumPy functions on tensors, too.",
    "tinygrad_lstm.nn": "Modules, cells, layers, losses.",
    "tinygrad_lstm.nn.init": "Initialisers; they return a Parameter.",
    "tinygrad_lstm.optim": "Optimizers, schedules, clipping.",
    "tinygrad_lstm.data": "Text corpora, datasets of sequences, batches.",
    "tinygrad_lstm.training": "The training loop and its checkpoints; see [training.md](training.md).",
    "tinygrad_lstm.interop": "To and from PyTorch, safetensors and ONNX.",
    "tinygrad_lstm.inspect": "Equations, drawings, gradients over time, the time player; see [inspect.md](inspect.md).",
}
HEAD = """# Names

What `from tinygrad_lstm import ...` gives, with the first sentence about each; `help(name)` says more, with shapes,
errors and an example. Written by `docs/names.py`.

Coming from PyTorch:

* As in NumPy, `dim` and `keepdim` are `axis` and `keepdims`, and `ops.concatenate`, `reshape`, `expand_dims` stand for
  `cat`, `view`, `unsqueeze`. `x.max(axis=1)` gives the values alone; indices come from `x.argmax(axis=1)`.
* Losses are plain functions, `nn.mse_loss(output, target)`, with no modules such as `MSELoss()`; so are activations.
* There are no methods that write in place (`add_`, `zero_`); `t -= step` makes another tensor, and is refused of a
  Parameter. An update by hand is `p.data -= lr * p.grad`: `data` and `grad` are arrays, and nothing of it is recorded.
* `optim.clip_grad_norm` has no underscore; `loss.backward(grad)` takes the cotangent by that name; `x.numpy()` needs no
  `detach`.
* `transpose` takes a permutation of all axes, as in NumPy, where `swapaxes(0, 1)` exchanges two; `ops.chunk` splits the
  last axis unless told otherwise; `t.shape`, in place of `t.size()`.
* There is no `create_graph`: gradients to differentiate again are those of functions, `tg.grad(f)(module)` or
  `tg.hvp(f, (module,), (vector,))`, a Module's as a dict by parameter name. `f` gets the Module as its argument: a
  parameter that it closes over is a constant to it, and has no part in the result.
* The layout of weights, gates and arguments of `nn.LSTM`, `nn.GRU` and `nn.RNN` is PyTorch's.

How to train with it all is told in [training.md](training.md).
"""


def names_of(module: Any) -> Iterator[tuple[str, Any]]:
    """The public names of a module that stand for something of this package."""
    for name in sorted(getattr(module, "__all__", dir(module)), key=str.lower):
        value = getattr(module, name)
        ours = getattr(value, "__module__", "").startswith("tinygrad_lstm")
        if not name.startswith("_") and ours and (callable(value) or inspect.isclass(value)):
            yield name, value


def sentence(value: Any) -> str:
    """The first sentence of its documentation, on one line."""
    text = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    text = re.sub(r":\w+:`~?(?:[^`]*\.)?([^`]+)`", r"`\1`", text).replace("``", "`")
    return re.split(r"(?<!\bal)(?<=\.) (?=[A-Z])", text)[0]


def arguments(value: Any) -> str:
    """Its arguments, without defaults and annotations."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return ""
    prefix = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return f"({', '.join(prefix.get(p.kind, '') + p.name for p in parameters)})"


def document() -> str:
    """The whole text."""
    parts = [HEAD]
    for name, about in MODULES.items():
        parts.append(f"## {name}\n\n{about}\n\n| name | |\n|---|---|")
        rows = [
            f"| `{key}{arguments(value)}` | {sentence(value)} |"
            for key, value in names_of(importlib.import_module(name))
        ]
        parts[-1] = "\n".join([parts[-1], *rows]) + "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    text = document()
    if "--check" in sys.argv:
        sys.exit(FILE.read_text(encoding="utf-8") != text and f"{FILE} is not up to date: run python docs/names.py")
    FILE.write_text(text, encoding="utf-8")
