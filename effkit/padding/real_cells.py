"""Which cells of a batch are real: told from its masks and lengths, and from what lies in the cells that they name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

IGNORED_LABEL = -100  # torch's CrossEntropyLoss default ignore_index, which collators pad labels with
_MASKS = ("attention_mask", "padding_mask", "mask")
_LENGTHS = ("input_lengths", "lengths", "length")
_INPUTS = ("input_features", "input_values", "input_ids", "inputs")
_ADDED_AT_LEAST = -1000.0  # what hides a cell when it is added to its score: implementations take -1e4 to -inf


def input_lengths(batch: Any) -> tuple[Any, int]:
    """Real cells of each row, and the padded width. ValueError as in :func:`real_rows`."""
    real = real_rows(batch)
    return real.sum(axis=1), real.shape[1]


def real_rows(batch: Any) -> Any:
    """Which cells of a batch are real, [B, T]. ValueError where it does not show it, or may be read two ways."""
    found = tensors(batch)
    lengths = next((found[name].astype("int64") for name in _LENGTHS if name in found and found[name].ndim == 1), None)
    names = [name for name in _MASKS if name in found] + [name for name in found if name.endswith(_MASKS[1])]
    for name in names:
        if (mask := _by_row(found[name])) is not None:
            beside = [array for other, array in found.items() if other != name and array.ndim > 1]
            return real_cells(mask, beside, lengths)
    padded = [found[name] for name in _INPUTS if name in found] + [a for a in found.values() if a.ndim > 1]
    if lengths is not None:
        return _within(lengths, padded[0].shape[_axis(padded[0], lengths)] if padded else lengths.max())
    others = [array for array in found.values() if padded and array is not padded[0]]
    if (told := next((real for array in others for real in _told(padded[0], array)), None)) is not None:
        return told
    raise ValueError(
        f"padding is not visible in this batch ({', '.join(found) or type(batch).__name__}): it holds neither "
        "attention_mask nor lengths. Let the collate function return one of them"
    )


def output_lengths(batch: Any) -> tuple[Any, int] | None:
    """Labels of each row that count, and their padded width; None where they are classes, not one for each cell."""
    labels = tensors(batch).get("labels")
    if labels is None or labels.ndim != 2 or labels.dtype.kind not in "iu" or set(np.unique(labels)) <= {0, 1}:
        return None
    return (labels != IGNORED_LABEL).sum(axis=1), labels.shape[1]


def tensors(batch: Any) -> dict[str, Any]:
    """The arrays of a batch by their names, those of mappings and tuples inside it too; in a tuple by number."""
    names = (*_MASKS, *_LENGTHS, *_INPUTS, "labels")
    if hasattr(batch, "shape"):
        items: Iterable[Any] = [("tensor", batch)]
    elif hasattr(batch, "keys"):
        items = ((name, batch[name]) for name in batch.keys())  # noqa: SIM118  (BatchEncoding iterates over rows)
    elif hasattr(batch, "_asdict"):
        items = batch._asdict().items()
    elif isinstance(batch, (tuple, list)):
        items = enumerate(batch)
    else:
        items = ((name, getattr(batch, name, None)) for name in names)
    found: dict[str, Any] = {}
    for name, value in items:
        if hasattr(value, "shape") or (name in _LENGTHS and value is not None):
            if str(getattr(value, "layout", "torch.strided")) == "torch.strided":  # a sparse one has no cells
                found[str(name)] = _array(value)
        elif isinstance(value, (Mapping, tuple)):
            found = tensors(value) | found
    return found


def real_cells(mask: Any, beside: Iterable[Any] = (), lengths: Any = None) -> Any:
    """Which cells of a mask [B, T] are real, whichever way round it is.

    An added mask has 0 at them and large negative numbers at padding. Of two values, padding is the one whose cells all
    look alike in the tensors ``beside``, or that leaves the ``lengths``, or some row, whole; numbers that are nothing
    of that are factors, 1 at real cells. ValueError where a boolean mask may be read both ways.
    """
    if (mask < 0).any():
        if ((mask != 0) & (mask > _ADDED_AT_LEAST)).any():
            raise ValueError(
                f"a mask holds two values, or 0 and large negative numbers; given: {mask.min():g} to {mask.max():g}: "
                "let the collate function return which cells are real"
            )
        return mask == 0
    marked = mask.astype(bool)
    number = mask.dtype.kind in "if"  # bytes were the booleans of old
    full, empty = marked.all(axis=1).any(), (~marked).all(axis=1).any()
    if number and full and lengths is None:
        return marked
    if lengths is not None and (fits := [real for real in (marked, ~marked) if (real.sum(axis=1) == lengths).all()]):
        return fits[0]
    spoken = {side for array in beside for side in (True, False) if _is_blank_beyond(array, marked == side)}
    if len(spoken) == 1 or full != empty:
        return marked == (spoken.pop() if len(spoken) == 1 else full)
    if number:
        return marked
    raise ValueError(
        "this boolean mask may be True at real cells or at padding: no row is whole, and the tensors beside it look "
        "alike there; give lengths, or a mask of ones and zeros"
    )


def _by_row(mask: Any) -> Any:
    """A mask as [B, T]; None where it is of another kind."""
    if mask.ndim == 4 and mask.shape[2] == mask.shape[3]:  # a block mask: a real cell sees at least itself
        seen = mask[:, 0].diagonal(axis1=1, axis2=2)
        return seen.astype("int64") if mask.dtype == bool else seen
    flat = mask.ndim > 1 and all(size == 1 for size in mask.shape[1:-1])
    return mask.reshape(len(mask), -1) if flat else None


def _told(padded: Any, array: Any) -> Iterator[Any]:
    """Readings [B, T] of a mask or of lengths without a name, that the cells left out of ``padded`` bear out."""
    if array.dtype.kind not in "iub" or array.shape[:1] != padded.shape[:1]:
        return
    if array.ndim == 1 and array.dtype != bool and array.min() >= 1:
        readings = [_within(array, width) for width in padded.shape[1:] if array.max() <= width]
        yield from (real for real in readings if _is_blank_beyond(padded, real))
    elif array.ndim == 2 and array.shape[1] in padded.shape[1:] and set(np.unique(array)) <= {0, 1}:
        readings = [real for real in (array == 1, array == 0) if _is_blank_beyond(padded, real)]
        if len(readings) == 1 and (array.any() or array.dtype == bool):
            yield readings[0]


def _axis(padded: Any, lengths: Any) -> int:
    """The dimension that the lengths count along: the one they fit in, or beyond which nothing lies."""
    fitting = [axis for axis in range(1, padded.ndim) if padded.shape[axis] >= lengths.max()]
    if not fitting:
        raise ValueError(
            f"a length of {lengths.max():,} cannot lie in a tensor of shape {tuple(padded.shape)}: let the collate "
            "function return lengths in its cells"
        )
    blank = [axis for axis in fitting if _is_blank_beyond(padded, _within(lengths, padded.shape[axis]))]
    return (blank if len(blank) == 1 else fitting)[0]


def _within(lengths: Any, width: int) -> Any:
    return np.arange(width) < lengths[:, None]


def _is_blank_beyond(array: Any, real: Any) -> bool:
    """Whether the padding that this reading [B, T] names looks like padding in a tensor, and the rest does not.

    Padding repeats one value along a row; where the rest does so too, padding is zeros.
    """
    axis = next((axis for axis in range(1, array.ndim) if array.shape[axis] == real.shape[1]), None)
    if axis is None or len(array) != len(real):
        return False
    cells = np.moveaxis(array, axis, 1).reshape(*real.shape, -1)

    def repeats(where: Any) -> bool:
        first = cells[np.arange(len(cells)), where.argmax(axis=1)][:, None]
        return bool((cells == first).all(axis=2)[where].all())

    if not repeats(~real):
        return False
    return not repeats(real) or bool(not cells[~real].any() and cells[real].any())


def _array(value: Any) -> Any:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()  # numpy knows no bfloat16
