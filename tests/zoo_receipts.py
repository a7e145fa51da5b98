"""The zoo's models at sizes that nobody ran, under pairs of levers, and under levers that are called lossless."""

from __future__ import annotations

import random

import numpy as np
import torch
from zoo import ZOO

import effkit as ek
from effkit import activations
from effkit.activations.gradients import gradient_error, parts_error
from effkit.activations.levers import Levers
from effkit.training import own_loss

ROUNDING_FRAC = 1e-5  # of sums of float32 in another order
NOT_LOSSLESS_FRAC = 2**-11.5  # half of float32's digits: the lab's own line
TIMES_ROWS = 8  # small tensors are not compressed
PAIRS = (
    {"compress": "int8", "offload_frac": 0.5}, {"micro_batches": 2, "autocast": "bfloat16"},
    {"checkpoint_every": 1, "optimizer_states": "int8"},
)  # fmt: skip
LOSSLESS = (Levers(checkpoint_every=1), Levers(checkpoint_every=1, keep="matmul"), Levers(offload_frac=1.0))


def built(name):
    """The model and its batch, the same each time."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (transformers masks speech with these)
    return ZOO[name].build(), ZOO[name].batch()


def settings(base, own_optimizer, has_blocks):
    """Sizes that no calibration runs, and three pairs of levers, as far as the model admits them."""
    rows, cells = base.setting["batch_size"], base.setting.get("length")
    yield {"batch_size": rows + rows // 2 + 1}
    if cells:
        yield {"length": cells - cells // 4}
        yield {"batch_size": rows // 2, "length": cells - cells // 4}
    for pair in PAIRS:
        left_out = {"optimizer_states"} if own_optimizer else set()
        left_out |= set() if has_blocks else {"checkpoint_every"}
        yield {name: value for name, value in pair.items() if name not in left_out} or {"offload_frac": 1.0}


def receipts(name):
    """What is predicted of each setting beside what is measured; a sentence where the step cannot be forecast."""
    model, batch = built(name)
    kind = ZOO[name]
    given = {"loss": kind.loss, "optimizer": kind.optimizer, "repeats": 1}
    rows = TIMES_ROWS * activations.rows(batch)
    base = activations.measure(model, batch, batch_size=rows, **given)
    for setting in settings(base, kind.optimizer is not None, has_blocks(model)):
        try:
            predicted = activations.predict(base, **setting)
        except ValueError as error:
            yield _name(setting), str(error)
            continue
        measured = activations.measure(model, batch, base=base, **given, **setting)
        yield _name(setting), ek.Receipt(predicted, measured, setting=dict(measured.setting))


def _name(setting):
    return ", ".join(f"{knob}={value}" for knob, value in setting.items())


def has_blocks(model):
    try:
        return bool(activations.blocks(model))
    except ValueError:
        return False


def gradient_errors(name):
    """Of each lever that is called lossless, how far it moves the gradient; of micro-batches, without dropout."""
    model, batch = built(name)
    loss = ZOO[name].loss
    for levers in LOSSLESS:
        if has_blocks(model) or not levers.checkpoint_every:
            found = gradient_error(model, batch, lambda levers=levers: levers.applied(model), loss=loss)
            yield _name(levers.changed), float(found["relative_error"].max())
    yield "micro_batches=2", parts_error(model, batch, loss or own_loss)
