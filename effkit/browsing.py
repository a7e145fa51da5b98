"""Who holds the memory at a moment that one picks with a slider."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from effkit import view
from effkit.captured import Capture
from effkit.screen import Screen
from effkit.units import readable


class MemoryBrowser(Screen):
    """A slider over the moments of a recorded memory, and what is alive at each.

    ValueError when the capture holds no memory.

    ``controls`` are ``moment`` (a number of the timeline's rows) and ``by`` (``category`` or ``stack``); ``result`` is
    the Account of the moment on the screen.
    """

    def __init__(self, capture: Capture, *, device: str | None = None, rank: int | None = None) -> None:
        self._capture, self._device, self._rank = capture, device, rank
        self._timeline = capture.memory_timeline(device=device, rank=rank)
        if self._timeline.empty:
            raise ValueError("nothing came or went while this memory was recorded: there are no moments to choose from")
        self._picture = view.MemoryPicture(self._timeline)
        peak = int(self._timeline["allocated_bytes"].to_numpy().argmax())
        wide, label = widgets.Layout(width="430px", flex="0 0 auto"), {"description_width": "110px"}
        bounds = {"min": 0, "max": len(self._timeline) - 1, "value": peak}
        moment = widgets.IntSlider(**bounds, description="Moment [row]", tooltip="Rests at the peak", layout=wide,
                                   style=label)  # fmt: skip
        box = widgets.BoundedIntText(**bounds, description="type moment", layout=widgets.Layout(width="230px"))
        box.style.description_width = "100px"
        widgets.link((moment, "value"), (box, "value"))
        by = widgets.Dropdown(options=["category", "stack"], description="Rows by", layout=wide, style=label,
                              tooltip="What the memory is, or where it was allocated")  # fmt: skip
        self.controls = {"moment": moment, "by": by}
        super().__init__([widgets.HBox([moment, box, widgets.HTML(f"● peak at {peak}")]), by], "memory")
        for control in self.controls.values():
            control.observe(self._show, names="value")
        self._show()

    @property
    def time_ns(self) -> int:
        """The moment on the screen [ns]."""
        return int(self._timeline["time_ns"].iloc[self.controls["moment"].value])

    def _show(self, _: Any = None) -> None:
        self.result = self._capture.memory(
            by=self.controls["by"].value, at_ns=self.time_ns, device=self._device, rank=self._rank
        )
        after = self.time_ns - int(self._timeline["time_ns"].min())
        word, unit = self._timeline.attrs["axis"]
        rows = self.result.frame["value"].head(3)
        largest = [f"{item} {readable(int(size), 'bytes')}" for item, size in rows.items()]
        sentence = f"{readable(self.result.total, 'bytes')} allocated after {after / unit:,.1f} {word}"
        sentence += f": {'; '.join(largest)}." if largest else "."
        self._tell(sentence, self._picture.svg(self.result, self.time_ns, label=sentence))

    def __repr__(self) -> str:
        return f"MemoryBrowser of {self._timeline['device'].iloc[0]}"

    def _png(self) -> bytes:
        return self._picture.png(self.result, self.time_ns)
