"""A character-level language model, trained with the library's own parts and a plain loop.

    python examples/char_lm.py            # about a minute
    python examples/char_lm.py --quick    # a few seconds, for a look

It learns to predict the next character of the English text that ships inside Python.  What can be
judged: the held-out bits per character fall from log2 of the vocabulary (6.7) to below those of
a table of character triples, which the script computes too, and the sample at the end reads like words.
"""

import argparse
import math

import numpy as np

import tinygrad_lstm as tg
from tinygrad_lstm import nn, optim
from tinygrad_lstm.data import TextCorpus, TextStreams


class CharModel(nn.Module):
    """Embedding, one LSTM layer, logits."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)
        self.lstm = nn.LSTM(32, hidden)
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, tokens, state=None):
        y, state = self.lstm(self.embedding(tokens), state)
        return self.output(y), state


def held_out_bits(model, corpus):
    """-log2 p(next character), the mean over the held-out part."""
    total, state = 0.0, None
    streams = TextStreams(corpus.held_out, batch_size=16, seq_len=100, drop_last=False)
    with tg.no_grad():
        for inputs, targets in streams:
            logits, state = model(inputs, state)
            total += nn.cross_entropy(logits, targets).item() * targets.size
    return total / streams.tokens / math.log(2)


def trigram_bits(corpus):
    """The same for counts of character triples, each mixed with the pairs', theirs with the single characters'."""
    size = len(corpus.vocabulary)
    p = np.full((size, size, size), 1 / size)
    for order in (0, 1, 2):
        # counts[a, b, c]: how often c followed the last `order` characters of (a, b); Witten & Bell (1991) smoothing.
        key = [corpus.train[2 - k : len(corpus.train) - k] if k <= order else 0 for k in (2, 1, 0)]
        counts = np.zeros((size if order == 2 else 1, size if order >= 1 else 1, size))
        np.add.at(counts, tuple(np.broadcast_arrays(*key)), 1)
        kinds = (counts > 0).sum(-1, keepdims=True)
        n = counts.sum(-1, keepdims=True)
        p = np.where(n > 0, (counts + kinds * p) / np.maximum(n + kinds, 1), p)
    a, b, c = corpus.held_out[:-2], corpus.held_out[1:-1], corpus.held_out[2:]
    return float(-np.log2(p[a, b, c]).mean())


def sample(model, corpus, prompt, length, temperature, generator):
    """Text that the model writes after the prompt."""
    text, state = prompt, None
    tokens = corpus.encode(prompt)[:, None]
    with tg.no_grad():
        for _ in range(length):
            logits, state = model(tokens, state)
            # Gumbel (1954): the argmax of logits plus this noise is a draw from the softmax.
            noise = -np.log(-np.log(generator.uniform(1e-12, 1.0, size=len(corpus.vocabulary))))
            tokens = (logits.numpy()[-1, 0] / temperature + noise).argmax().reshape(1, 1)
            text += corpus.decode(tokens[0])
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few steps")
    quick = parser.parse_args().quick
    hidden, steps, batch, seq_len = (48, 150, 16, 32) if quick else (128, 800, 32, 64)

    tg.seed(0)
    corpus = TextCorpus.python_topics()
    print(corpus)
    model = CharModel(len(corpus.vocabulary), hidden)
    optimizer = optim.Adam(model.parameters(), lr=1e-2 if quick else 5e-3)

    step, state, smooth = 0, None, math.log(len(corpus.vocabulary))
    while step < steps:
        state = None  # an epoch starts at the beginning of each stream
        for inputs, targets in TextStreams(corpus.train, batch, seq_len):
            optimizer.zero_grad()
            logits, state = model(inputs, state)
            loss = nn.cross_entropy(logits, targets)
            loss.backward()
            optim.clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
            # Truncated backpropagation through time: the values go on, the gradient stops here.
            state = tuple(s.detach() for s in state)
            smooth += 0.05 * (loss.item() - smooth)
            step += 1
            if step % (steps // 6) == 0:
                print(f"step {step:4d}: {smooth / math.log(2):.2f} bits per character")
            if step == steps:
                break

    bits, reference = held_out_bits(model, corpus), trigram_bits(corpus)
    print(f"held out: {bits:.2f} bits per character; a table of triples {reference:.2f}; guessing "
          f"{math.log2(len(corpus.vocabulary)):.2f}")  # fmt: skip
    print(sample(model, corpus, "The ", 300, 0.7, tg.Generator(0)))


if __name__ == "__main__":
    main()
