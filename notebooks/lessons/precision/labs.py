"""The mini-labs of 06d, which begin with language models of letters trained by AdamW or by Muon; and SortedNet's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from effkit.activations import gradient_error
from lessons import corpora, nested_exits
from lessons.minilabs import Arm, Interval, MiniLab, ratio
from lessons.precision import continual, formats, outliers, pruning, rotary, sparse_layers
from lessons.precision.small_language import adamw, held_out_loss, train, untrained

RATES = {"AdamW": (adamw, 8e-3), "Muon": (outliers.muon, 1.6e-2)}
NUM_STEPS, MORE_STEPS = 120, 60


@cache
def english() -> tuple[torch.Tensor, torch.Tensor]:
    """Letters of English to train on, and held out."""
    return corpora.split(corpora.encode(corpora.english()))


@cache
def code() -> tuple[torch.Tensor, torch.Tensor]:
    """Letters of program source to train on, and held out."""
    return corpora.split(corpora.encode(corpora.code()))


@cache
def trained(name: str, seed: int) -> tuple[nn.Module, int]:
    """A language model of English by one optimizer, and its median step [ns]."""
    make, rate = RATES[name]
    model = untrained(seed)
    return model, train(model, english()[0], NUM_STEPS, make(model, rate), seed=seed)


def _readings(seed: int) -> pd.DataFrame:
    """What each optimizer left behind (:func:`lessons.precision.outliers.readings`), and ``ms`` of a step."""
    rows = {}
    for name in RATES:
        model, dur_ns = trained(name, seed)
        rows[name] = {**outliers.readings(model, english()[1]), "ms": dur_ns / 1e6}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("optimizer")


READ = ("loss", "4 bits add")
OUTLIERS = MiniLab(
    "Outlier-Safe Pre-Training", "held-out loss, and what 4 bits add to it [nats]", "", _readings,
    lambda table: {f"{name}, {what}": Arm(table.loc[name, what], NUM_STEPS) for name in RATES for what in READ},
    {},
)  # fmt: skip


def batches() -> list[dict[str, torch.Tensor]]:
    """Four batches of English, for errors of gradients."""
    return [{"input_ids": piece, "labels": piece} for piece in corpora.windows(english()[0], 64, 32).split(16)]


def _errors(seed: int) -> pd.DataFrame:
    """Relative error of the gradient, a row per format and a column per role."""
    model, first = trained("Muon", seed)[0], batches()[0]
    rows: dict[str, dict[str, float]] = {name: {} for name in formats.FORMATS}
    for name in formats.FORMATS:
        for role in formats.ROLES:
            error = gradient_error(model, first, partial(formats.low_precision, model, name, [role]))
            rows[name][role] = error["relative_error"].iloc[-1]
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("format")


SURVEY = MiniLab(
    "Low-precision survey", "relative error of the gradient with weights in a format", "frac", _errors,
    lambda table: {str(name): Arm(value, NUM_STEPS) for name, value in table["weights"].items()},
    {"Low-precision survey": ratio("fp8_e5m2", "fp8_e4m3")},
)  # fmt: skip


COARSER = (("fp8_e4m3", "bfloat16"), ("fp8_e5m2", "fp8_e4m3"), ("int4", "int8"))


def coarser(errors: pd.DataFrame) -> pd.DataFrame:
    """Error of the gradient with weights in one format over that in another: by the bits, and as it came out.

    ``errors`` as of ``SURVEY.live()``. Indexed by ``weights in``; columns ``by the bits``, ``stored`` (geometric mean
    of the seeds) and ``live``, all in times.
    """
    stored, live = SURVEY.stored(), errors["weights"]
    rows = {
        f"{more} over {less}": {
            "by the bits": formats.times_coarser(more, less),
            "stored": Interval.of(ratio(more, less)(stored), ratios=True).mean,
            "live": live[more] / live[less],
        }
        for more, less in COARSER
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("weights in")


def _pruned(seed: int) -> dict[str, float]:
    """Held-out loss above that of a dense model that trains on as well, by way to 2:4."""
    (learn, held_out), model = english(), trained("Muon", seed)[0]
    ways = pruning.ways_to_two_of_four(model, learn, MORE_STEPS, lr=8e-3, strength=16.0, seed=100 + seed)
    assert pruning.tail_share(ways["decayed"]) == 0, "the pattern is not exact"
    losses = {name: held_out_loss(model, held_out) for name, model in ways.items()}
    dense = losses.pop("dense, trained on")
    return {name: loss - dense for name, loss in losses.items()}


CAST = MiniLab(
    "CAST", "held-out loss added by 2:4 [nats]", "", _pruned,
    lambda added: {name: Arm(value, MORE_STEPS) for name, value in added.items()},
    {"CAST": ratio("one shot, trained on", "decayed")},
)  # fmt: skip

SPARSITIES = (0.0, 0.5, 0.75, 0.9)


def _widened(seed: int) -> dict[str, float]:
    """Accuracy of a perceptron with this share of zeros and as many FLOPs."""
    x, y, test_x, test_y = continual.at_once()
    right = {}
    for sparsity in SPARSITIES:
        network, masks = sparse_layers.perceptron([64, 64, 64, 8], sparsity, seed)
        sparse_layers.fit(network, masks, x, y)
        right[f"{sparsity:.0%} zeros"] = float((network(test_x).argmax(-1) == test_y).float().mean())
    return right


WIDENED = MiniLab(
    "Sparse-IFT", "accuracy at equal FLOPs", "frac", _widened,
    lambda right: {name: Arm(value, 8) for name, value in right.items()}, {},
)  # fmt: skip


def _sparse_then_dense(seed: int) -> dict[str, Any]:
    """Held-out losses before and after fine-tuning on code, dense and with 75% zeros; and ``time`` of a masked step."""
    sparse, masks = sparse_layers.sparse_language(seed, 0.75)
    masked_ns = sparse_layers.train_masked(sparse, masks, english()[0], NUM_STEPS, 1.6e-2, seed)
    row: dict[str, Any] = {}
    for name, model in {"dense": copy.deepcopy(trained("AdamW", seed)[0]), "75% zeros": sparse}.items():
        row[f"{name}, English"] = held_out_loss(model, english()[1])
        dense_ns = train(model, code()[0], MORE_STEPS, adamw(model, 4e-3), seed=100 + seed)
        row[f"{name}, then code"] = held_out_loss(model, code()[1])
    return row | {"time": masked_ns / dense_ns}


SPDF = MiniLab(
    "SPDF", "held-out loss [nats]", "", _sparse_then_dense,
    lambda row: {name: Arm(value, NUM_STEPS + MORE_STEPS) for name, value in row.items() if name != "time"}, {},
)  # fmt: skip

SETTINGS: Mapping[str, tuple[continual.Saving, int, float]] = {
    "dense": (continual.Saving(), 4, 0.05),
    "dense, one epoch": (continual.Saving(), 1, 0.1),
    "75% zeros": (continual.Saving(0.25, 0.2, 0.5), 4, 0.1),
    "90% zeros": (continual.Saving(0.1, 0.08, 0.5), 4, 0.1),
}
SPARCL = MiniLab(
    "SparCL", "accuracy over four tasks, learned in turn", "frac",
    lambda seed: {
        name: continual.learn(saving, seed, num_epochs=num, lr=lr) for name, (saving, num, lr) in SETTINGS.items()
    },
    lambda runs: {name: Arm(run.accuracy_frac, SETTINGS[name][1]) for name, run in runs.items()}, {},
)  # fmt: skip

SORTED_NET = MiniLab(
    "SortedNet", "loss of a model of four layers that is cut off after some", "nats",
    lambda seed: nested_exits.train_nested(seed=seed),
    lambda table: {
        f"{depth} layers, trained {'at all depths' if way == 'nested_loss' else 'whole'}": Arm(loss, 80)
        for way in ("nested_loss", "full_only_loss")
        for depth, loss in table[way].items()
    },
    {"SortedNet": ratio("4 layers, trained at all depths", "1 layers, trained at all depths")},
)  # fmt: skip

ANCHOR = MiniLab(
    "AnchorAttention", "attention over 4,096 tokens of documents, forward and backward", "ns",
    lambda seed: rotary.attention_ns(rotary.document_lengths(4096, median=300, seed=seed)),
    lambda times: {name: Arm(float(dur_ns), 3) for name, dur_ns in times.items()},
    {"AnchorAttention": lambda arms: 1 - arms["anchored"] / arms["full"]}, clocked=True,
)  # fmt: skip

LABS = (OUTLIERS, SURVEY, CAST, WIDENED, SPDF, SPARCL, SORTED_NET, ANCHOR)
