"""Training loops and generations with one thing wrong with them, and what ought to be said of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

import effkit as ek


class Texts(Dataset):
    """Random tokens of given lengths; each takes ``seconds`` to fetch."""

    def __init__(self, lengths: Any, vocabulary: int = 1000, seconds: float = 0.0) -> None:
        draw = torch.Generator().manual_seed(0)
        self.items = [torch.randint(4, vocabulary, (int(n),), generator=draw) for n in lengths]
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> torch.Tensor:
        if self.seconds:
            time.sleep(self.seconds)
        return self.items[i]


def padded(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tokens padded to the longest, their mask, and labels."""
    ids = torch.nn.utils.rnn.pad_sequence(items, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(item) for item in items], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class GroupedByNothing(Sampler):
    """Sorts by a length that is not the example's: grouping without effect."""

    def __init__(self, num: int, batch_size: int) -> None:
        self.order = torch.randperm(num, generator=torch.Generator().manual_seed(1)).tolist()
        self.batch_size = batch_size

    def __iter__(self):
        for first in range(0, len(self.order), self.batch_size):
            yield self.order[first : first + self.batch_size]

    def __len__(self) -> int:
        return len(self.order) // self.batch_size


@dataclass
class Planted:
    """What :func:`effkit.study` is given, what to ask for, and the kind of lever that has to come first."""

    kind: str | None
    study: dict[str, Any]
    advise: dict[str, Any] = field(default_factory=dict)


def uneven(num: int = 96) -> Any:
    """Lengths as people write."""
    return np.clip(np.random.default_rng(0).lognormal(3.9, 0.7, num).astype(int), 8, 256)


def training(
    model: torch.nn.Module, loader: Any, *, none: bool = True, after: Callable[[Any], object] | None = None,
    cast: bool = False, optimizer: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of a study of a plain loop."""
    update = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Any) -> None:
        update.zero_grad(set_to_none=none)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            output = model(**batch)
        output.loss.backward()
        if after is not None:
            after(output)
        update.step()

    return {"step": step, "model": model, "loader": loader}


def loader(lengths: Any, batch_size: int = 8, **more: Any) -> DataLoader:
    """Shuffled batches of them."""
    seconds = more.pop("seconds", 0.0)
    torch.manual_seed(0)
    if "batch_sampler" not in more:
        more |= {"shuffle": True, "batch_size": batch_size}
    return DataLoader(Texts(lengths, seconds=seconds), collate_fn=padded, **more)


EVEN = [64] * 128


def random_padding() -> Planted:
    return Planted("padding", training(ek.models.text(), loader(uneven())))


def no_op_grouping() -> Planted:
    return Planted("padding", training(ek.models.text(), loader(uneven(), batch_sampler=GroupedByNothing(96, 8))))


def many_numbers() -> Planted:
    total = [0.0]

    def log(output: Any) -> None:
        for value in output.logits.detach()[..., :8].flatten():
            total[0] += value.item()

    model = ek.models.text(layers=2, hidden=64, ffn=128)
    return Planted("synchronisation", training(model, loader([64] * 256, batch_size=16), after=log))


def tiny_batches() -> Planted:
    return Planted("batch size", training(ek.models.text(hidden=64), loader([16] * 64, batch_size=1)))


def zeroed_gradients() -> Planted:
    model = ek.models.text(layers=2, hidden=256, ffn=1024, vocabulary=8000)
    update = torch.optim.SGD(model.parameters(), lr=1e-4)
    return Planted(
        "gradients", training(model, loader([16] * 64, batch_size=4), none=False, optimizer=update), {"goal": "memory"}
    )


def single_precision() -> Planted:
    model = ek.models.gpt(layers=2, hidden=512, vocabulary=1000)
    return Planted("precision", training(model, loader([64] * 64)))


def checkpoint_everywhere() -> Planted:
    model = ek.models.text()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return Planted("recomputation", training(model, loader(EVEN)))


def starved() -> Planted:
    return Planted("data loading", training(ek.models.text(), loader(EVEN, seconds=0.01)))


def leaking() -> Planted:
    history: list[Any] = []
    model = ek.models.text(layers=2)

    def log(output: Any) -> None:
        history.append(model(**output_batch[0]).loss)

    given = training(model, loader([32] * 64, batch_size=4), after=log)
    inner, output_batch = given["step"], [None]

    def step(batch: Any) -> None:
        output_batch[0] = batch
        inner(batch)

    return Planted("leak", {**given, "step": step}, {"goal": "memory"})


def clean() -> Planted:
    return Planted(None, training(ek.models.text(hidden=256), loader([96] * 128, batch_size=16), cast=True))


TRAINING = (
    random_padding,
    no_op_grouping,
    many_numbers,
    tiny_batches,
    zeroed_gradients,
    single_precision,
    checkpoint_everywhere,
    starved,
    leaking,
    clean,
)


def deep_decoder() -> Planted:
    model = ek.models.speech(encoder_layers=24, decoder_layers=24, hidden=64)
    frames = torch.randn(1, 320, 80, generator=torch.Generator().manual_seed(0))
    call = {"max_new_tokens": 24, "min_new_tokens": 24, "use_cache": True}
    return Planted("decoder depth", {"generate": call, "model": model, "inputs": {"input_features": frames}})


def cache_off() -> Planted:
    model = ek.models.text(layers=4)
    prompt = torch.randint(4, 1000, (2, 64), generator=torch.Generator().manual_seed(0))
    call = {"max_new_tokens": 32, "min_new_tokens": 32, "use_cache": False, "do_sample": False}
    return Planted("cache", {"generate": call, "model": model, "inputs": {"input_ids": prompt}})


def hot_expert() -> Planted:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()
    with torch.no_grad():  # tokens share a direction, and some experts answer to it more than others
        model.model.embed_tokens.weight[:, :8] += 0.02
        for layer in model.model.layers:
            layer.mlp.gate.weight[:, :8] += torch.linspace(0.06, -0.06, 8)[:, None]
    return Planted("hot expert", {**training(model, loader([64] * 128, batch_size=16)), "num_ranks": 2,
                                  "link_bytes_per_s": 50e6})  # fmt: skip


GENERATING = (deep_decoder, cache_off)
