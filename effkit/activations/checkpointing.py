"""checkpoint(): recompute blocks of a model in backward instead of keeping what they save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as recompute

from effkit.arguments import checked_model, checked_whole, checked_word

_aten = torch.ops.aten
# What costs most of the arithmetic. Attention has one operation per backend, on a CPU and on GPUs.
_PRODUCTS = {
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.convolution.default,
}  # fmt: skip
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default, _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default, _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}  # fmt: skip


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model, in the order in which it holds them: what :func:`checkpoint` can recompute.

    They are the members with parameters of the outermost ``ModuleList`` and ``Sequential`` that hold two or more of one
    class. Lists of compound layers come before lists of plain ones: the two convolutions in front of a speech encoder
    are not blocks beside its layers, yet those of a plain ``Sequential`` are. ValueError if the model has none.
    """
    lists = list(_lists(model))
    compound = [members for members in lists if all(any(member.children()) for member in members)]
    layers = dict.fromkeys(member for members in compound or lists for member in members)  # one used again is one
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no ModuleList or Sequential with two layers of one class: put its repeated "
            "layers into one"
        )
    return list(layers)


def _lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    members = [child for child in module.children() if next(child.parameters(), None) is not None]
    if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(member) for member in members}) < len(members):
        yield members
    else:
        for child in module.children():
            yield from _lists(child)


@contextmanager
def checkpoint(model: nn.Module, every: int = 1, *, keep: str | None = None) -> Iterator[None]:
    """Let every ``every``-th block of the model, from the first, be recomputed in backward in this context.

    Gradients are the same to the last bit: dropout draws the same numbers again, and running statistics of batch norms
    are updated once (recomputing runs on copies of them). Blocks in evaluation mode, those that the model itself
    recomputes, and all under ``no_grad``, run as they are. A key-value cache is kept from recomputed blocks, which
    would fill it twice; a model that makes one when it trains (``use_cache=True``) then multiplies keys in another
    memory order, and its gradients differ in rounding. ValueError if there are no blocks; and in the forward pass, if a
    block is given a key-value cache that holds positions.

    Parameters
    ----------
    model
        Its blocks are found by :func:`blocks`.
    every
        1 recomputes all blocks, 2 the first, third, ...
    keep
        ``"matmul"`` keeps the outputs of matrix products, convolutions and attention, and recomputes all else
        (``torch.utils.checkpoint.create_selective_checkpoint_contexts``). They do not pass through the hooks of saved
        tensors, so :func:`compressed` and :func:`offloaded` leave them as they are. Under autocast each block then
        casts its weights anew, and gradients of a weight that blocks share differ in rounding.
    """
    checked_model(model, runs=False, shards=True)
    every, keep = checked_whole("every", every, 1), checked_word("keep", keep, (None, "matmul"))
    with ExitStack() as stack:
        for block in blocks(model)[::every]:
            stack.enter_context(_recomputed(block, keep))
        yield


@contextmanager
def _recomputed(block: nn.Module, keep: str | None) -> Iterator[None]:
    forward = block.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # what the model recomputes runs again in backward, when this context may be over: the same way both times
        if not (block.training and torch.is_grad_enabled()) or _within_recomputing():
            return forward(*args, **kwargs)
        # all tensors in one row: of keyword arguments torch keeps references, which no hook sees
        leaves, spec = tree_flatten((tuple(map(_uncached, args)), {name: _uncached(kwargs[name]) for name in kwargs}))

        # torch keeps the random state in a tensor per call, which nobody can follow; here it takes no tensor's memory
        cuda = any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in leaves)
        kind = "cuda" if cuda else "cpu"

        def call(*leaves: Any) -> Any:
            args, kwargs = tree_unflatten(leaves, spec)
            # a weight that an earlier block has cast is not cast here, and would be when this block runs again
            cast = torch.is_autocast_enabled(kind) and keep is not None
            with torch.autocast(kind, cache_enabled=False) if cast else nullcontext():
                return forward(*args, **kwargs)

        contexts = partial(_contexts, block, keep, None if cuda else _random_state())
        return recompute(call, *leaves, use_reentrant=False, context_fn=contexts, preserve_rng_state=cuda)

    with mock.patch.object(block, "forward", run):
        yield


def _within_recomputing() -> bool:
    """Whether torch's own hooks of saved tensors, in force in the first run and the second, are the latest."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == recompute.__module__


def _contexts(block: nn.Module, keep: str | None, random_state: bytes | None) -> tuple[Any, Any]:
    """Contexts of the first run and of the second."""
    plain = nullcontext(), nullcontext()
    first, second = plain if keep is None else create_selective_checkpoint_contexts(_policy)
    return first, _Recomputing(block, random_state, second)


def _random_state() -> bytes:
    with no_dispatch():
        return torch.get_rng_state().numpy().tobytes()


def _set_random_state(state: bytes) -> None:
    with no_dispatch():
        torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


class _Recomputing:
    """The second run: on copies of the running statistics, which the first run has updated, with the random state that
    it began with (``None``: torch sees to that), and with what it kept."""

    def __init__(self, block: nn.Module, random_state: bytes | None, kept: Any) -> None:
        self.block, self.random_state, self.kept = block, random_state, kept

    def __enter__(self) -> None:
        with ExitStack() as stack:
            if self.random_state is not None:
                stack.callback(_set_random_state, _random_state())
                _set_random_state(self.random_state)
            # not under the mode that hands out what was kept, which would count these copies among the operations
            for norm in (module for module in self.block.modules() if isinstance(module, _NormBase)):
                stack.callback(setattr, norm, "_buffers", norm._buffers)
                norm._buffers = {name: one if one is None else one.clone() for name, one in norm._buffers.items()}
            stack.enter_context(self.kept)
            self.before = stack.pop_all()

    def __exit__(self, *raised: Any) -> None:
        self.before.__exit__(*raised)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in _PRODUCTS or (operation in _ATTENTION and not _drops_out(operation, args, kwargs))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _drops_out(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether attention draws random numbers: left out of the second run, the block's later draws would be others."""
    names = [argument.name for argument in operation._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0))


def _uncached(value: Any) -> Any:
    """The argument, or ``None`` for a key-value cache of transformers that is still empty."""
    if not hasattr(value, "get_seq_length"):
        return value
    if num := value.get_seq_length():
        raise ValueError(
            f"a block to recompute was given a key-value cache that holds {num} positions and would be filled twice: "
            "call the model with use_cache=False"
        )
    return None
