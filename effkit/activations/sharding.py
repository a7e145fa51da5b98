"""A step spread over ranks: the wrappers that torch has for it, and a world of one rank for its replays."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from effkit.activations.checkpointing import blocks
from effkit.lab import check, flag, one_of, whole
from effkit.training import MakeOptimizer

FSDP2, DDP, ZERO1, ZERO2, ZERO3 = SHARDS = ("fsdp2", "ddp", "zero1", "zero2", "zero3")
# DistributedDataParallel's own
_FIRST_BUCKET_BYTES, _BUCKET_BYTES, _BROADCAST_BYTES = 2**20, 25 * 2**20, 250 * 2**20
BLOCKS, MODEL = WRAPS = ("blocks", "model")
SAME, HALF = DTYPES = ("same", "bfloat16")


@dataclass(frozen=True)
class Sharding:
    """How a step is spread over ranks; the defaults are a step of one process.

    Attributes
    ----------
    world_size
        Ranks in all. A batch is that of one rank; ranks of one group of ``tensor_parallel`` run the same batch.
    shard
        What the ranks share. ``"fsdp2"``: parameters, gradients and optimizer states are sharded
        (``torch.distributed.fsdp.fully_shard``), and parameters gathered where they are used. ``"zero3"`` is fsdp2 that
        frees gathered parameters after forward, ``"zero2"`` one that keeps them. ``"ddp"``: every rank holds the model,
        and gradients are averaged. ``"zero1"``: that, and each rank holds the optimizer states of some parameters
        (``torch.distributed.optim.ZeroRedundancyOptimizer``). Of one rank it says nothing.
    reshard_after_forward
        Of ``"fsdp2"``: whether gathered parameters are freed after forward and gathered again in backward.
    wrap
        What is gathered at once: each of the model's :func:`blocks`, or the whole ``"model"``, as of one that has none.
    param_dtype
        In which parameters are gathered and used (``fully_shard``'s mixed precision): ``"same"`` as they are kept, or
        ``"bfloat16"``, with gradients reduced in float32. Not of ddp and zero1, which gather nothing.
    num_replicas
        Groups of ranks that each hold the whole model, sharded among them; between groups gradients are averaged
        (hybrid sharding, which gathers within a node). 1: all ranks share one. Not of ddp and zero1.
    tensor_parallel
        Ranks that share each layer's matrix products; the rest of the world is for ``shard``. Without that, torch's own
        optimizers need ``foreach=False`` on a GPU.
    """

    world_size: int = whole(1)
    shard: str = one_of(FSDP2, words=SHARDS)
    reshard_after_forward: bool = flag(True)
    wrap: str = one_of(BLOCKS, words=WRAPS)
    param_dtype: str = one_of(SAME, words=DTYPES)
    num_replicas: int = whole(1)
    tensor_parallel: int = whole(1)

    def __post_init__(self) -> None:
        check(self)
        if self.world_size % self.tensor_parallel:
            raise ValueError(f"tensor_parallel divides world_size; given: {self.tensor_parallel} and {self.world_size}")
        if self.num_shards % self.num_replicas:
            raise ValueError(f"num_replicas divides the ranks; given: {self.num_replicas} and {self.num_shards}")
        if self.replicates and (self.param_dtype != SAME or self.num_replicas > 1):
            raise ValueError(f"{self.shard} gathers no parameters: leave out param_dtype and num_replicas")
        if self.num_shards == 1 and self.param_dtype != SAME:
            raise ValueError("param_dtype is that in which ranks gather parameters: give a larger world_size")

    @property
    def num_shards(self) -> int:
        """Ranks over which batches, and what ``shard`` says, are spread."""
        return self.world_size // self.tensor_parallel

    @property
    def replicates(self) -> bool:
        """Whether each rank holds all parameters and gradients."""
        return self.num_shards > 1 and self.shard in (DDP, ZERO1)


@contextmanager
def world(world_size: int) -> Iterator[None]:
    """Rank 0 of so many, in which collectives return at once and send nothing: for replays, which have no values.

    ValueError in a process that is a rank already.
    """
    if dist.is_initialized():
        raise ValueError("ranks are forecast in a process that is no rank itself: leave torchrun, or end its group "
                         "with torch.distributed.destroy_process_group()")  # fmt: skip
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def spread(
    model: nn.Module, how: Sharding, optimizer: MakeOptimizer | None = None, *, plan: Mapping[str, str] | None = None,
    in_cpp: bool = True,
) -> tuple[nn.Module, MakeOptimizer | None]:  # fmt: skip
    """The model as each rank of this process group trains it, and what makes its optimizer.

    Call it on every rank, on equal models; the model itself is changed (fsdp2 and tensor parallel) or wrapped.

    Parameters
    ----------
    model
        On the device where it trains.
    how
        Its ``world_size`` is that of the process group.
    optimizer
        Parameters -> optimizer, as everywhere in this module.
    plan
        For ``tensor_parallel``: ``"colwise"`` or ``"rowwise"`` by names of linear layers, in which ``*`` stands for any
        text; the model's own ``tp_plan``, as those of transformers have it, unless given.
    in_cpp
        False: leave out what torch does in C++ for ddp and zero1, which needs values (see :func:`buckets`).
    """
    if how.world_size != dist.get_world_size():
        raise ValueError(f"the setting is of {how.world_size} ranks; this process group has {dist.get_world_size()}")
    kind = next(model.parameters()).device.type
    sizes = (how.num_replicas, how.num_shards // how.num_replicas, how.tensor_parallel)
    mesh = init_device_mesh(kind, sizes, mesh_dim_names=("replica", "shard", "tensor"))
    if how.tensor_parallel > 1:
        _split(model, mesh["tensor"], plan)
    if how.replicates:
        if in_cpp:
            model = nn.parallel.DistributedDataParallel(model, process_group=mesh["shard"].get_group())
        if how.shard == ZERO1:
            from torch.distributed.optim import ZeroRedundancyOptimizer

            return model, partial(ZeroRedundancyOptimizer, optimizer_class=optimizer or torch.optim.AdamW)  # type: ignore[arg-type]
        return model, optimizer
    if how.num_shards > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(*(torch.bfloat16, torch.float32) if how.param_dtype == HALF else ())
        among = mesh["replica", "shard"] if how.num_replicas > 1 else mesh["shard"]
        units: list[nn.Module] = []
        reshard = how.shard == ZERO3 or (how.shard == FSDP2 and how.reshard_after_forward)
        with suppress(ValueError):
            units = blocks(model) if how.wrap == BLOCKS else []
        for unit in (*units, model):
            fully_shard(unit, mesh=among, reshard_after_forward=reshard, mp_policy=policy)
    return model, optimizer


def buckets(model: nn.Module) -> list[torch.Tensor]:
    """Like the buckets in which DistributedDataParallel averages gradients, the one that is ready first first."""
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad][::-1]
    groups, _ = dist._compute_bucket_assignment_by_size(  # type: ignore[attr-defined]
        trained, [_FIRST_BUCKET_BYTES, _BUCKET_BYTES]
    )
    return [trained[group[0]].new_empty(sum(trained[i].numel() for i in group)) for group in groups]


def same_buffers(model: nn.Module) -> None:
    """What DistributedDataParallel sends when a forward pass begins."""
    from torch._C._distributed_c10d import _broadcast_coalesced

    if held := list(model.buffers()):  # all in one flat copy
        _broadcast_coalesced(dist.group.WORLD, held, _BROADCAST_BYTES, 0)  # type: ignore[arg-type]


def _split(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str] | None) -> None:
    """Spread the matrix products of layers over the ranks of a mesh."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles: dict[str, Any] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel,
                              "colwise_gather_output": partial(ColwiseParallel, output_layouts=Replicate()),
                              "embedding_rowwise": partial(RowwiseParallel, input_layouts=Replicate())}  # fmt: skip
    plan = plan or getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None) or {}
    if not plan:
        raise ValueError(f"{type(model).__name__} has no tp_plan that says how its layers are split: give plan=, such "
                         "as {'layers.*.up': 'colwise', 'layers.*.down': 'rowwise'}")  # fmt: skip
    unknown = sorted(set(plan.values()) - set(styles))
    if unknown:
        raise ValueError(f"a plan splits a layer in one of the ways {', '.join(styles)}; given: {', '.join(unknown)}")
    matched = {name: styles[style]() for name, module in model.named_modules()
               for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)}  # fmt: skip
    parallelize_module(model, mesh, matched)
