"""Fake tensors of which indices and masks have values; how an operator's results look is asked once for equal looks."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch._prims_common import suggest_memory_format
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

from effkit.activations.storage_tracker import DEVICE, call_of, of_shards, taken_as_it_is

DYNAMIC = fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException
_aten = torch.ops.aten
# Their first result lies in rows, or in the memory format that the argument of this number suggests; a fake of it lies
# as the input does.
_LAID_OUT = {
    _aten.native_batch_norm.default: 0, _aten.native_batch_norm_backward.default: 1,
    _aten.reflection_pad2d_backward.default: 1, _aten.mse_loss_backward.default: None,
    _aten.smooth_l1_loss_backward.default: None, _aten.huber_loss_backward.default: None,
    _aten.log_sigmoid_forward.default: None, _aten.log_sigmoid_backward.default: None,
}  # fmt: skip
_REPLACED = (_aten.clone.default, _aten._embedding_bag_backward.default)
_MOST_VALUES = 2**24  # of a mask or of indices whose values are kept
_MOST_NUMBERS = 2**20  # the same of other numbers, if they were made from nothing


class Valued(fake_tensor.FakeTensorMode):
    """Fake tensors of which indices and masks have values: models branch on these.

    A random number alone, the coin of a layer that is dropped now and then, is 0.5; so is any number that a step reads
    from activations, to scale by, as a rule; and while an optimizer ``updates``, no shape depends on what it reads.
    ``by_chance`` is whether a step has asked such a coin what to do.
    """

    updates = tossed = by_chance = False

    def __init__(self) -> None:
        super().__init__()
        self._results: dict[Any, Results | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].device
        if of_shards(types):
            return NotImplemented
        if func is torch.ops._c10d_functional.wait_tensor.default:  # torch's fake of it is another tensor
            return args[0]
        kwargs = kwargs or {}
        leaves, looks = call_of(func, args, kwargs)
        given = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        known = [(one, one.constant) for one in given if one.constant is not None]
        if func is _aten._local_scalar_dense.default and given:
            read = given[0]
            if known:
                self.by_chance |= self.tossed and read.dtype == torch.bool
                with no_dispatch():
                    return known[0][1].item()
            if read.is_floating_point() or self.updates:
                return 0.5 if read.is_floating_point() else False if read.dtype == torch.bool else 1
        stored = any(isinstance(leaf, torch.UntypedStorage) for leaf in leaves)  # without values
        follows = len(known) == len(given) and not _random(func) and not stored
        if follows:  # torch would return values without the storages that they share
            for one, _ in known:
                one.constant = None
        try:
            out: Any = self._faked(func, types, args, kwargs, leaves, looks)
        except RuntimeError as error:
            for one, constant in known:
                one.constant = constant
            if isinstance(error, DYNAMIC) and any(
                one.constant is None and (len(given) == 1 or not one.is_floating_point()) for one in given
            ):
                raise
            return self._really(func, args, kwargs, error)
        finally:
            for one, constant in known if follows else ():
                one.constant = constant
        self._value(func, args, kwargs, given, out, follows)
        return out

    def _faked(self, func: Any, types: Any, args: Any, kwargs: Any, leaves: list[Any], looks: tuple[Any, ...]) -> Any:
        """What torch's fake of an operator returns; where looks decide it, that is asked once."""
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        usual = bool(given) and _by_looks(func) and all(map(_without_values, given))
        if usual:
            looks += tuple(torch._C._dispatch_keys(one).raw_repr() for one in given)
            if func is _aten.as_strided.default:  # alone counts from the storage's begin
                looks += (args[0].storage_offset(),)
            if (results := self._results.get(looks)) is not None:
                return results.again(self, leaves)
        if func in _REPLACED and (other := self._replaced(func, args)) is not None:
            return other
        out: Any = super().__torch_dispatch__(func, types, args, kwargs)
        sparse = [one for one in given if one.is_sparse]
        grows = isinstance(out, torch.Tensor) and out.is_sparse and (len(sparse) > 1 or not _num_cells(out))
        if grows and any(map(_num_cells, sparse)):  # torch's own fakes of sparse results have no cells, or too few
            raise fake_tensor.UnsupportedOperatorException(func)
        out = self._laid_out(out, args, _LAID_OUT[func]) if func in _LAID_OUT else out
        if usual and looks not in self._results:
            self._results[looks] = Results.of(self, out, leaves)
        return out

    def _replaced(self, func: Any, args: Any) -> torch.Tensor | None:
        """What another operator returns in the place of this one."""
        with self:
            if func is _aten.clone.default:
                return taken_as_it_is(func, args)
            if not args[9]:
                return None
            rows = args[0].new_empty((args[1].numel(), args[0].shape[1]))  # torch's fake of it has no rows
            padding = args[11] if len(args) > 11 else -1
            found: torch.Tensor = _aten.embedding_sparse_backward(rows, args[1], args[6], padding, False)
            return found

    def _laid_out(self, out: Any, args: Any, like: int | None) -> Any:
        first, *others = out if isinstance(out, tuple) else (out,)
        form = torch.contiguous_format if like is None else suggest_memory_format(args[like])
        if first is None or first.is_contiguous(memory_format=form):
            return out
        with self:
            first = torch.empty_like(first, memory_format=form)
        return (first, *others) if others else first

    def _value(self, func: Any, args: Any, kwargs: Any, given: list[FakeTensor], out: Any, follows: bool) -> None:
        """Give values to what an operator returned, if they are known."""
        if given and not follows and not _shaped(func):
            return
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, FakeTensor)]
        coin = not given and len(made) == 1 and made[0].numel() == 1 and _random(func)
        # of others what was made from nothing, such as a mask of ones
        small = bool(made) and all(_small(one) or one.numel() <= (1 if given else _MOST_NUMBERS) for one in made)
        same = "empty" not in func._schema.name and not _random(func) and (follows or _shaped(func))
        self.tossed |= coin
        if not coin and not (same and (small or func._schema.is_mutable)):
            return
        with no_dispatch():
            values = [leaf for leaf in tree_leaves(_run(func, args, kwargs)) if isinstance(leaf, torch.Tensor)]
            values = [value.fill_(0.5) if coin and value.is_floating_point() else value for value in values]
        for fake, value in zip(made, values, strict=True):
            self._with_values(fake, value)

    def _really(self, func: Any, args: Any, kwargs: Any, error: RuntimeError) -> Any:
        """What an operator returns that has no fake form for these: it is run, on its values or zeros."""
        try:
            with no_dispatch():
                out = _run(func, args, kwargs)
        except Exception:
            raise error from None
        return tree_map_only(torch.Tensor, self.valued, out)

    def valued(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake of a real tensor, with its values if these are indices or a mask."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.is_sparse:
            with no_dispatch():
                parts = tensor._indices(), tensor._values()
            with self:
                return torch.ops.aten._sparse_coo_tensor_unsafe(*map(self.valued, parts), tensor.shape)
        fake = self.fake_tensor_converter.from_real_tensor(self, tensor)
        if not _small(tensor):
            return fake
        with no_dispatch():
            return self._with_values(fake, tensor.clone())  # a step may write into it

    def _with_values(self, fake: FakeTensor, values: torch.Tensor) -> FakeTensor:
        fake.constant = values
        self.fake_tensor_converter.add_constant_storage_mapping(fake)
        return fake


class Results(NamedTuple):
    """How an operator's results lie: for each the number of the argument that it is, or looks and the number of the
    argument whose storage it has, if it has one; or nothing."""

    kind: type | None
    looks: list[Any]

    @classmethod
    def of(cls, mode: Valued, out: Any, leaves: list[Any]) -> Results | None:
        """None where another call of the operator may give something else."""
        results = cls(type(out), []) if type(out) in (tuple, list) else cls(None, [])
        seen = {leaf.untyped_storage()._cdata: i for i, leaf in enumerate(leaves) if isinstance(leaf, FakeTensor)}
        for one in out if results.kind else [out]:
            same = next((i for i, leaf in enumerate(leaves) if leaf is one), None)
            if one is None or same is not None:
                results.looks.append(same)
                continue
            if not isinstance(one, FakeTensor) or not _without_values(one):
                return None
            storage = one.untyped_storage()
            if (base := seen.get(storage._cdata)) == len(leaves):  # of an earlier result
                return None
            seen.setdefault(storage._cdata, len(leaves))
            offset = one.storage_offset() - (0 if base is None else leaves[base].storage_offset())
            results.looks.append((one.shape, one.stride(), offset, one.dtype, one.fake_device, base))
            other = results.made(mode, results.looks[-1], leaves)
            lie = [(t.untyped_storage().nbytes(), t.storage_offset(), torch._C._dispatch_keys(t)) for t in (one, other)]
            if lie[0] != lie[1]:
                return None
        return results

    def again(self, mode: Valued, leaves: list[Any]) -> Any:
        """The same of these arguments."""
        made = [one if one is None else leaves[one] if isinstance(one, int) else self.made(mode, one, leaves)
                for one in self.looks]  # fmt: skip
        return self.kind(made) if self.kind else made[0]

    @staticmethod
    def made(mode: Valued, looks: Any, leaves: list[Any]) -> FakeTensor:
        """A fake tensor of these looks."""
        shape, stride, offset, dtype, device, base = looks
        with fake_tensor.in_kernel_invocation_manager(mode):
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            if base is not None:
                tensor.set_(leaves[base].untyped_storage(), leaves[base].storage_offset() + offset, shape, stride)
        return FakeTensor(mode, tensor, device)


@cache
def _by_looks(func: Any) -> bool:
    """Whether the looks of tensors decide what this returns, and what it returns is all that it does."""
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
    return func.namespace == "aten" and tags.isdisjoint(func.tags) and "set_" not in func.name()


def _without_values(one: torch.Tensor) -> bool:
    return isinstance(one, FakeTensor) and one.constant is None and one.layout == torch.strided


def _small(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= _MOST_VALUES


def _num_cells(tensor: torch.Tensor) -> int:
    with no_dispatch():
        return tensor._nnz() if tensor.is_sparse else 0


def _real(fake: FakeTensor) -> torch.Tensor:
    """Its values, or zeros."""
    if fake.constant is not None:
        return fake.constant
    span = 1 + sum((size - 1) * step for size, step in zip(fake.shape, fake.stride(), strict=True))
    return torch.zeros(span if fake.numel() else 0, dtype=fake.dtype).as_strided(fake.shape, fake.stride())


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator returns for the values of these, or for zeros."""
    args, kwargs = tree_map_only(FakeTensor, _real, (args, kwargs))
    return func(*args, **kwargs)


def _random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _shaped(func: Any) -> bool:
    """Whether this takes from tensors their shapes only."""
    return func._schema.name.startswith("aten::new_") or func._schema.name.endswith("_like")
