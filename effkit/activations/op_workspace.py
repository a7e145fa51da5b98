"""What a replay cannot see: memory that one operator allocates inside itself, found by two small real steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from effkit.activations.op_costs import HALF_FLOPS, MOVED
from effkit.activations.timeline import Signature, Timeline
from effkit.operators import CONVOLUTION, RECURRENT, family_of_operator

# of operators that leave their work to a library with memory of its own
OPAQUE = (CONVOLUTION, RECURRENT)
Line = tuple[float, float]


def opaque(timeline: Timeline) -> bool:
    """Whether a step has operators whose memory a replay is known to be blind to.

    Convolutions, recurrent layers, and on a CPU products in half precision.
    """
    halved = bool(timeline.work[:, HALF_FLOPS].any())
    return halved or any(family_of_operator(name) in OPAQUE for name in set(timeline.ops))


@dataclass(frozen=True, eq=False)
class Workspace:
    """Bytes inside an operator, and of what it returns, each as ``a + b x`` of the bytes that it reads and writes.

    The lines go by the operator's shapes but for the batch size; at another sequence length, by its weights.
    """

    inside: dict[Any, Line]
    outputs: dict[Any, Line]

    def applied(self, timeline: Timeline) -> Timeline:
        """A replayed timeline with what the replay did not see."""
        moved = timeline.work[:, MOVED]
        inside = [_at(self.inside, signature, (), x) or 0
                  for signature, x in zip(timeline.signatures, moved, strict=True)]  # fmt: skip
        births = timeline.allocations["birth"].to_numpy()
        sizes = timeline.allocations["size_bytes"].to_numpy().copy()
        for row, (op, place) in enumerate(zip(births, places(births), strict=True)):
            size = _at(self.outputs, timeline.signatures[op], (place,), moved[op])
            sizes[row] = sizes[row] if size is None else size
        return replace(timeline, allocations=timeline.allocations.assign(size_bytes=sizes),
                       inside_bytes=timeline.inside_bytes + np.array(inside, dtype="int64"))  # fmt: skip


def fit(observed: Sequence[Timeline], replayed: Sequence[Timeline]) -> Workspace:
    """From real steps at two batch sizes or more, and the replays of the same steps."""
    inside: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    outputs: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for real, fake in zip(observed, replayed, strict=True):
        # as the replay will see it: what a library returns may be empty there
        moved = dict(zip(fake.signatures, fake.work[:, MOVED].tolist(), strict=True))
        for signature, amount in zip(real.signatures, real.inside_bytes.tolist(), strict=True):
            for key in _keys(signature, ()):
                inside[key].append((moved.get(signature, 0), amount))
        expected = _sizes(fake, moved)
        for key, points in _sizes(real, moved).items():
            if expected.get(key, points) != points:
                outputs[key] += points
    # of one size alone nobody can tell a constant from a rate: then the operators with the same weights tell
    inside_lines, output_lines = (
        {key: _line(points) for key, points in samples.items()
         if not isinstance(key[0], Signature) or len(set(points)) > 1}
        for samples in (inside, outputs)
    )  # fmt: skip
    return Workspace({key: line for key, line in inside_lines.items() if any(y for _, y in inside[key])}, output_lines)


def places(births: Any) -> Any:
    """Of each allocation, in order of birth: how many the same operator made before it."""
    return np.arange(len(births)) - np.searchsorted(births, births, "left")


def _sizes(timeline: Timeline, moved: dict[Signature, int]) -> dict[Any, list[tuple[int, int]]]:
    """Bytes read and written, and size of each thing returned, by what returned it."""
    samples: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    births = timeline.allocations["birth"].to_numpy()
    for op, place, size in zip(births, places(births), timeline.allocations["size_bytes"], strict=True):
        signature = timeline.signatures[op]
        for key in _keys(signature, (place,)):
            samples[key].append((moved.get(signature, 0), int(size)))
    return samples


def _keys(signature: Signature, place: tuple[int, ...]) -> tuple[Any, Any]:
    return (signature, *place), (signature.name, signature.weights, *place)


def _at(lines: dict[Any, Line], signature: Signature, place: tuple[int, ...], x: int) -> int | None:
    line = next((lines[key] for key in _keys(signature, place) if key in lines), None)
    return None if line is None else max(0, round(line[0] + line[1] * int(x)))


def _line(points: Sequence[tuple[int, int]]) -> Line:
    x, y = np.array(points, dtype="float64").T
    spread = x - x.mean()
    slope = float(spread @ y / (spread @ spread)) if spread.any() else 0.0
    return float(y.mean()) - slope * float(x.mean()), slope
