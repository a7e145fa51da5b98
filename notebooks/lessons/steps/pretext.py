"""An encoder learns from masked letters, or from letters that a generator replaced (DeBERTaV3, arXiv 2111.09543)."""

from __future__ import annotations

import argparse
import inspect
import io
import keyword
import tokenize
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lessons import corpora, meter
from lessons.steps.language import LENGTH, Learning
from lessons.steps.optimizers import matrices_and_rest

MASK = corpora.VOCABULARY  # the letter that stands for a hidden one
CLASSES = ("blank", "comment", "keyword", "name", "number", "operator", "string")
HIDDEN, BATCH = 48, 16
MASKED_FRAC = 0.15
DETECTOR_WEIGHT = 50.0  # of its loss, as in ELECTRA and DeBERTaV3
_KINDS = {tokenize.COMMENT: "comment", tokenize.NUMBER: "number", tokenize.OP: "operator", tokenize.STRING: "string"}
_RATE = 2e-2  # of Muon, for both pretexts: 4e-2 is quicker at first and worse later, 1e-2 slower


def letter_classes(source: str) -> list[int]:
    """What each letter of a Python program belongs to, as a position in ``CLASSES``: Python's own tokenizer says.

    >>> [CLASSES[one] for one in letter_classes("if x1: # y")]
    ['keyword', 'keyword', 'blank', 'name', 'name', 'operator', 'blank', 'comment', 'comment', 'comment']
    """
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = [CLASSES.index("blank")] * len(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = _KINDS.get(token.type)
        if token.type == tokenize.NAME:
            kind = "keyword" if keyword.iskeyword(token.string) else "name"
        elif tokenize.tok_name[token.type].startswith("FSTRING"):
            kind = "string"
        if kind is not None:
            begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
            found[begin:end] = [CLASSES.index(kind)] * (end - begin)
    return found


def _first_module() -> str:
    """What the corpus of program source begins with; it is probed with, and not learned from."""
    source = inspect.getsource(argparse)
    assert corpora.code().startswith(source)
    return source


@cache
def _probed() -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of program source that are not learned from, shape (160, 32), and the class of each letter."""
    source = _first_module()
    classes = torch.tensor(letter_classes(source))
    return corpora.windows(corpora.encode(source), 160, LENGTH), corpora.windows(classes, 160, LENGTH)


def unexplained(features: torch.Tensor, classes: torch.Tensor) -> float:
    """Share of the variance of the classes that no linear probe on the features explains, on the held-out half.

    Ridge regression of one-hot classes, in closed form, fitted to every second piece and tested on the others; the
    penalty is a hundredth of the features' mean square.

    Parameters
    ----------
    features
        Shape (pieces, letters, width).
    classes
        Shape (pieces, letters).
    """
    wanted = functional.one_hot(classes, len(CLASSES)).double()
    inputs = functional.pad(features.double(), (0, 1), value=1.0)
    (fit_x, fit_y), (test_x, test_y) = (
        (inputs[start::2].flatten(0, 1), wanted[start::2].flatten(0, 1)) for start in (0, 1)
    )
    square = fit_x.T @ fit_x
    penalty = 1e-2 * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    weights = torch.linalg.solve(square + penalty, fit_x.T @ fit_y)
    left = (test_x @ weights - test_y).square().sum()
    return float(left / (test_y - fit_y.mean(0)).square().sum())


def encoder(layers: int, seed: int) -> Any:
    """A ModernBERT encoder (transformers) over letters and the mask, width 48, without dropout."""
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(seed)
    configuration = ModernBertConfig(
        vocab_size=corpora.VOCABULARY + 1, hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * HIDDEN, max_position_embeddings=LENGTH,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0,
    )  # fmt: skip
    return ModernBertModel(configuration).train()


def mask(ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The letters with 15% of each piece hidden, and where: shapes (pieces, letters); always as many in every piece."""
    order = torch.rand(ids.shape, generator=generator).argsort(-1)
    hidden = order < round(MASKED_FRAC * ids.shape[1])
    return ids.masked_fill(hidden, MASK), hidden


class Masked(Learning):
    """Masked modelling: the encoder says which letters were hidden."""

    def __init__(self, seed: int) -> None:
        self.generator = meter.reproducible(seed)
        ids = corpora.encode(corpora.code())[len(_first_module()) :]
        held, self.classes = _probed()
        super().__init__(encoder(2, seed), [], lambda: corpora.windows(ids, BATCH, LENGTH, self.generator), held)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self._optimize(self.model, self.out)

    def _optimize(self, *modules: nn.Module) -> None:
        # Among the matrices are also the difference of Shifted, which is no nn.Embedding, and the detector's one row
        inner, rest = matrices_and_rest(nn.ModuleList(modules))
        self.updates = [torch.optim.Muon(inner, lr=_RATE), torch.optim.AdamW(rest, lr=2e-3)]

    def objective(self, batch: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the hidden letters [nats], a scalar."""
        seen, hidden = mask(batch, self.generator)
        return functional.cross_entropy(letters(self.model, self.out, seen, hidden), batch[hidden])

    @torch.no_grad()
    def loss(self) -> float:
        """What a linear probe on the encoder leaves unexplained of the classes of letters."""
        states = self.model(input_ids=self.held, output_hidden_states=True).hidden_states
        return unexplained(torch.cat(states, -1), self.classes)


def letters(model: Any, out: nn.Module, seen: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the hidden letters, shape (hidden, vocabulary); the embedding is also the output layer."""
    states = functional.gelu(out(model(input_ids=seen).last_hidden_state[hidden]))
    return functional.linear(states, model.get_input_embeddings().weight[: corpora.VOCABULARY])


class Shifted(nn.Module):
    """An embedding that reads another's weights without moving them, and adds its own (DeBERTaV3)."""

    def __init__(self, other: nn.Embedding) -> None:
        super().__init__()
        self.other = [other]  # in a list: its parameters are not ours
        self.difference = nn.Parameter(torch.zeros_like(other.weight))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., width)."""
        return functional.embedding(ids, self.other[0].weight.detach() + self.difference)


class Replaced(Masked):
    """Replaced-token detection: a generator fills the hidden letters in, the encoder says of all which are new.

    Parameters
    ----------
    seed
        Of weights and batches.
    disentangled
        Whether the detector's gradient stays out of the generator's embedding (DeBERTaV3), or both pull at one
        (ELECTRA, arXiv 2003.10555).
    """

    def __init__(self, seed: int, *, disentangled: bool = True) -> None:
        super().__init__(seed)
        self.generating = encoder(1, seed + 1000)
        self.detect = nn.Linear(HIDDEN, 1)
        shared = self.generating.get_input_embeddings()
        self.model.set_input_embeddings(Shifted(shared) if disentangled else shared)
        self._optimize(self.model, self.generating, self.out, self.detect)

    def losses(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the generator and of the detector [nats], scalars, on letters of shape (pieces, letters)."""
        seen, hidden = mask(batch, self.generator)
        logits = letters(self.generating, self.out, seen, hidden)
        filled = batch.clone()
        chances = logits.detach().softmax(-1)
        filled[hidden] = torch.multinomial(chances, 1, generator=self.generator).flatten()
        found = self.detect(self.model(input_ids=filled).last_hidden_state)[..., 0]
        detecting = functional.binary_cross_entropy_with_logits(found, (filled != batch).float())
        return functional.cross_entropy(logits, batch[hidden]), detecting

    def objective(self, batch: torch.Tensor) -> torch.Tensor:
        """Both losses, weighted."""
        generating, detecting = self.losses(batch)
        return generating + DETECTOR_WEIGHT * detecting
