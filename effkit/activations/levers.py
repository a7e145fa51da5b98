"""Levers: which of the memory savers are in force; and settings: the levers and the size of the batch, as knobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from effkit.activations.checkpointing import checkpoint
from effkit.activations.compressing import compressed
from effkit.activations.low_bit import STATES, LowBitAdamW
from effkit.activations.offloading import offloaded
from effkit.activations.sharding import Sharding
from effkit.arguments import checked_whole
from effkit.lab import asked, one_of, share, whole
from effkit.lab.knobs import checked_share
from effkit.quantisation import FORMATS
from effkit.training import MakeOptimizer

NONE = "none"
COMPRESSIONS = (NONE, *FORMATS)
KEEPS = (NONE, "matmul")
AUTOCASTS = (NONE, "bfloat16")
_OF_RANKS = tuple(field.name for field in fields(Sharding))


@dataclass(frozen=True)
class Levers(Sharding):
    """What is done to save memory in a step; the defaults are a plain step of one process.

    Attributes
    ----------
    world_size, shard, reshard_after_forward, wrap, param_dtype, num_replicas, tensor_parallel
        As in :class:`Sharding`.
    checkpoint_every
        Every so many blocks, one is recomputed in backward; 0: none is.
    keep
        ``"matmul"``: recomputed blocks keep the outputs of matrix products and attention.
    compress, group
        Format of saved activations, and how many values share a scale (see :func:`compressed`).
    offload_frac
        Share of the saved bytes that waits in host memory.
    micro_batches
        Parts of the batch that run one after another and add up their gradients.
    autocast
        Data type of matrix products in forward.
    optimizer_states
        Format of AdamW's two moments (see :class:`LowBitAdamW`).
    """

    checkpoint_every: int = whole(0, least=0)
    keep: str = one_of(NONE, words=KEEPS)
    compress: str = one_of(NONE, words=COMPRESSIONS)
    group: int = whole(128)
    offload_frac: float = share(0.0)
    micro_batches: int = whole(1)
    autocast: str = one_of(NONE, words=AUTOCASTS)
    optimizer_states: str = one_of("float32", words=STATES)

    @property
    def lossless(self) -> bool:
        """True when the gradients and the update are those of a plain step."""
        return self.compress == NONE and self.autocast == NONE and self.optimizer_states == "float32"

    @property
    def sharding(self) -> dict[str, Any]:
        """How the step is spread over ranks."""
        return {name: getattr(self, name) for name in _OF_RANKS}

    @property
    def within_a_rank(self) -> Levers:
        """Those that are left for each rank of a model that is spread, and whose optimizer is made."""
        return replace(self, **asdict(Sharding()), optimizer_states="float32")

    @property
    def changed(self) -> dict[str, Any]:
        """Those that differ from a plain step."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @contextmanager
    def applied(self, model: torch.nn.Module) -> Iterator[None]:
        """The levers on a model's forward pass, in force until the context is left; what backward needs stays."""
        with ExitStack() as stack:
            if self.checkpoint_every:
                keep = None if self.keep == NONE else self.keep
                stack.enter_context(checkpoint(model, self.checkpoint_every, keep=keep))
            if self.compress != NONE:
                stack.enter_context(compressed(self.compress, self.group))
            if self.offload_frac:
                stack.enter_context(offloaded(self.offload_frac))
            if self.autocast != NONE:
                kind = next(model.parameters()).device.type
                stack.enter_context(torch.autocast(kind, getattr(torch, self.autocast)))
            yield

    def optimizer(self, make: MakeOptimizer | None) -> MakeOptimizer | None:
        """What makes the step's optimizer."""
        if self.optimizer_states == "float32":
            return make
        if make is not None:
            raise ValueError(
                f"optimizer_states={self.optimizer_states!r} brings its own AdamW: leave out optimizer=, or float32"
            )
        return lambda parameters: LowBitAdamW(parameters, states=self.optimizer_states)


@dataclass(frozen=True)
class Size:
    """Rows of a batch, and the length of its sequences where it has any."""

    num_rows: int
    num_cells: int | None


SIZE_KNOBS = ("batch_size", "length", "keep_frac")
KNOBS = (*(field.name for field in fields(Levers) if field.name not in _OF_RANKS), *_OF_RANKS)


def complete(rest: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The setting ``rest`` with these changes, as a full setting.

    ValueError for a knob that there is not, or that this model has no use for.
    """
    changes = asked(changes, (*SIZE_KNOBS, *KNOBS))
    useless = sorted(name for name in ("length", "keep_frac") if name in changes and name not in rest)
    if useless:
        raise ValueError(f"no other length of this model's batches can be replayed: leave out {' and '.join(useless)}")
    wanted = {**rest, **changes}
    for name in ("batch_size", "length"):
        if name in wanted:
            wanted[name] = checked_whole(name, wanted[name], 1)
    if "keep_frac" in wanted:
        checked_share("keep_frac", wanted["keep_frac"], positive=True)
    _, levers = parted(wanted)  # the levers check themselves
    if wanted["micro_batches"] > wanted["batch_size"]:
        raise ValueError(
            f"a batch of {wanted['batch_size']} cannot be cut into {wanted['micro_batches']} micro-batches: use fewer"
        )
    return {**wanted, **asdict(levers)}


def parted(setting: Mapping[str, Any]) -> tuple[Size, Levers]:
    """The size of the batch, tokens that are dropped before the first layer left out, and the levers."""
    cells = setting.get("length")
    if cells is not None:
        cells = max(1, round(cells * setting["keep_frac"]))
    # of an account that was kept from before there was a knob, that rests
    return Size(setting["batch_size"], cells), Levers(**{name: setting[name] for name in KNOBS if name in setting})
