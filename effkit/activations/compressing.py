"""compressed(): keep what autograd saves in eight bits per value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from effkit.activations.saved_tensor_hooks import Place, stage, stays
from effkit.activations.storage_views import Kept, Once, PerStorage, Region
from effkit.arguments import checked_whole
from effkit.quantisation import Quantised, check_options, dequantise, quantise

# Quantising and restoring take 0.1 ms whatever the size (one CPU core): below this they would save less than 12 KiB.
_MIN_ELEMENTS = 4096


class Compressed(NamedTuple):
    """What is kept in place of a saved tensor: how it lies in its region of the storage, and the region's values.

    ``values``, shared by the region's views, holds a :class:`Quantised`, or that in host memory.
    """

    region: Region
    values: Once


@contextmanager
def compressed(
    dtype: str = "int8", group: int | str = 128, *, num_heads: int | None = None, min_elements: int = _MIN_ELEMENTS
) -> Iterator[None]:
    """Keep what autograd saves in this context in eight bits per value, until backward.

    The forward pass is exact: it is a copy that is quantised (Mesa, arXiv 2111.11124; COAT, arXiv 2410.19313). Backward
    computes with the restored values, so gradients are approximate; :func:`gradient_error` says how far. Each region of
    a storage is quantised once, however many operations save it or views of it. Weights, integers and small tensors
    stay as they are, and so does what lies inside of a region that ``torch.utils.checkpoint`` recomputes.

    Parameters
    ----------
    dtype, group, num_heads
        As for :func:`~effkit.quantisation.quantise`. With ``group="head"`` a tensor whose last dimension
        ``num_heads`` does not divide has one scale.
    min_elements
        Tensors with fewer stay as they are.
    """
    check_options(dtype, group, num_heads)
    min_elements = checked_whole("min_elements", min_elements, 0)
    cache = PerStorage()

    def in_region(original: Tensor, region: Region) -> Quantised:
        flat = region.cut(original)
        if num_heads is None:
            return quantise(flat, dtype, group)
        if original.ndim == 0 or original.shape[-1] % num_heads:
            return quantise(flat, dtype, "tensor")
        return quantise(flat.view(-1, original.shape[-1]), dtype, group, num_heads)

    def pack(original: Tensor, kept: Kept) -> Kept:
        if stays(original, min_elements) or not original.is_floating_point() or original.element_size() == 1:
            return kept
        region = Region.of(original, in_order=group == "head")
        return Compressed(region, cache.once(region, lambda: in_region(original, region)))

    with stage(Place.COMPRESS, pack, _restore):
        yield


def _restore(kept: Kept) -> Kept:
    if not isinstance(kept, Compressed):
        return kept
    return kept.region.place(kept.values.restored(lambda values: dequantise(values).view(-1)))
