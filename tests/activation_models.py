"""What the tests of the activation lab share: a tiny model of every architecture, and timelines that are made up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from effkit import models
from effkit.activations import stepping
from effkit.activations.levers import Levers
from effkit.activations.stepping import BACKWARD, FORWARD, OPTIMIZER
from effkit.activations.timeline import CATEGORIES, FEATURES, MOVED, Segment, Signature, Timeline
from effkit.models.building import random_tokens
from effkit.recording import peak_memory
from effkit.restoring import unchanged
from effkit.training import own_loss, residents, size_bytes, still
from lessons import small_models, spiking

SMALL = {"hidden": 32, "heads": 2, "vocabulary": 100, "device": "cpu"}
SPIKING = {"hidden": 32, "features": 40, "device": "cpu"}


def mixture_of_experts(implementation: str = "batched_mm") -> Any:
    """A Mixtral that computes every expert for every token, or, with ``"eager"``, only those that were chosen."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    configuration = MixtralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, bos_token_id=0, eos_token_id=0,
        use_cache=False, experts_implementation=implementation,
    )  # fmt: skip
    return MixtralForCausalLM(configuration).train()


class Tiny(NamedTuple):
    """How to build a model, and three sizes of its batches: rows, and cells where it has a sequence dimension."""

    build: Callable[[], Any]
    sizes: tuple[tuple[int, int | None], ...]


TINY = {
    "gpt": Tiny(lambda: models.gpt(layers=2, **SMALL), ((4, 64), (2, 36), (7, 50))),
    "text": Tiny(lambda: models.text(layers=2, **SMALL), ((4, 64), (2, 36), (7, 50))),
    "speech": Tiny(lambda: models.speech(encoder_layers=1, decoder_layers=1, **SMALL), ((4, 96), (2, 64), (6, 128))),
    "vision": Tiny(
        lambda: models.vision(layers=2, hidden=32, heads=2, image=16, device="cpu"), ((4, None), (2, None), (7, None))
    ),
    "convolutional": Tiny(
        lambda: small_models.convolutional(width=8, stages=2, image=16, device="cpu"), ((5, None), (3, None), (8, None))
    ),
    "recurrent": Tiny(
        lambda: small_models.recurrent(hidden=32, vocabulary=100, device="cpu"), ((4, 32), (3, 16), (6, 24))
    ),
    "spiking through time": Tiny(
        lambda: spiking.build(steps=4, learning="bptt", **SPIKING), ((8, None), (4, None), (32, None))
    ),
    "spiking through space": Tiny(
        lambda: spiking.build(steps=4, learning="sltt", **SPIKING), ((8, None), (4, None), (32, None))
    ),
    "mixture of experts": Tiny(mixture_of_experts, ((3, 48), (2, 32), (4, 64))),
}


def batch_of(model: Any, rows: int, cells: int | None = None) -> dict[str, torch.Tensor]:
    """A random batch of this size."""
    if not hasattr(model, "random_batch"):
        return random_tokens(model.config.vocab_size, rows, cells or 1, 0, "cpu")
    return model.random_batch(rows, cells) if cells else model.random_batch(rows)


def recorded_peak(model: Any, batch: Any, levers: Levers | None = None, *, loss=own_loss, optimizer=None) -> int:
    """The peak of a steady step [bytes] as effkit.recording sees it, which follows no operator."""
    levers = levers or Levers()
    with unchanged(model):
        update = still(model.parameters(), levers.optimizer(optimizer))
        stepping.run(model, batch, loss, update, levers)
        held = sum(map(size_bytes, residents(model, update, batch).values()))
        run = partial(stepping.run, model, batch, loss, update, levers)
        replaces = levers.optimizer_states != "float32"  # states of which a recording must see the end
        return peak_memory(run, resident_bytes=held, again=replaces)[0]


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """All of a model that a measurement must give back, and the random state."""
    found: dict[str, torch.Tensor | None] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found[f"{name}.grad"] = None if parameter.grad is None else parameter.grad.clone()
    for name, module in model.named_modules():
        found[f"{name}.training"] = torch.tensor(module.training)
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
        found[f"{name}.hooks"] = torch.tensor(hooks)
    return found | {"random state": torch.get_rng_state()}


def assert_same(one: dict[str, torch.Tensor | None], two: dict[str, torch.Tensor | None]) -> None:
    """Bit for bit."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        other = two[name]
        assert (value is None) == (other is None), name
        assert value is None or torch.equal(value, other), name


def made_timeline(
    ops: Any, allocations: Any = (), *, firsts: Any = None, moved: Any = None, flops: Any = None, half: Any = None,
    aside: Any = None, inside: Any = None, shapes: Any = None, resident: Any = None,
) -> Timeline:  # fmt: skip
    """A step of these operators. ``allocations`` are (bytes, birth, death, category); ``firsts`` the first operators of
    forward, backward (of more micro-batches, if there are more) and the optimizer."""
    count = len(ops)
    firsts = firsts or (0, count // 3, 2 * count // 3)
    phases = [*(FORWARD, BACKWARD) * ((len(firsts) - 1) // 2), OPTIMIZER]
    frame = pd.DataFrame(allocations, columns=["size_bytes", "birth", "death", "category"])
    frame = frame.astype({"size_bytes": "int64", "birth": "int64", "death": "int64"})
    frame["category"] = pd.Categorical(frame["category"], categories=CATEGORIES)
    frame["module"], frame["operator"] = "layer", [ops[birth] for birth in frame["birth"]]
    work = np.zeros((count, len(FEATURES)), dtype="int64")
    work[:, FEATURES.index("num_operators")] = 1
    work[:, MOVED] = 0 if moved is None else moved
    work[:, FEATURES.index("flops")] = 0 if flops is None else flops
    signatures = tuple(
        Signature(name, shapes[i] if shapes else (), half=bool(half and half[i])) for i, name in enumerate(ops)
    )
    return Timeline(
        tuple(ops), frame, resident or {}, tuple(map(Segment, phases, firsts)), work, signatures,
        np.array(aside if aside is not None else [False] * count, dtype=bool),
        np.array(inside if inside is not None else [0] * count, dtype="int64"),
    )  # fmt: skip
