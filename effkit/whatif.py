"""WhatIf: the sliders, the picture, the “Measure it” button. No arithmetic."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets

from effkit import view
from effkit.account import Account
from effkit.device import provenance
from effkit.receipt import Receipt
from effkit.screen import Screen
from effkit.units import readable

# A browser holds moves back while the kernel is busy, and sends a click at once: those moves come just after it.
_ARRIVING_S = 0.3


@dataclass(frozen=True)
class Slider:
    """A number to drag, with a box to type it into.

    ``label`` names the unit in brackets. ``rest`` is where the slider stands when the measured setting has no such
    knob. A knob may be dragged in other units (MiB, tenths): its setting is the slider's value times ``scale``.
    """

    name: str
    label: str
    low: int
    high: int
    step: int
    tooltip: str
    rest: int | None = None
    readout_format: str = ",d"
    scale: int | float = 1


@dataclass(frozen=True)
class Choice:
    """One of several words."""

    name: str
    label: str
    options: Sequence[str]
    tooltip: str


class Stopped(Exception):
    """Raised inside a measurement whose Stop button was pressed."""


class WhatIf(Screen):
    """Sliders over a prediction, and a button that measures it.

    Parameters
    ----------
    base
        The measured Account: where every control rests.
    predict
        ``predict(base, **setting) -> Account``: pure and quick.
    knobs
        What can be changed, in order.
    measure
        ``measure(progress, **setting) -> Account``: runs the setting; ``progress(done, total)`` may raise to stop
        it. Without it the button is disabled.

    Attributes
    ----------
    controls
        Knob name -> the widget whose ``value`` is the setting.
    result
        The predicted Account on the screen (the measured one while everything rests).
    receipts
        Every Receipt of this session, oldest first.

    Examples
    --------
    >>> panel = padding.whatif(base, model)             # doctest: +SKIP
    >>> panel.controls["strategy"].value = "bucket"     # doctest: +SKIP
    >>> panel.result.total, panel.measure().error       # doctest: +SKIP
    """

    def __init__(
        self, base: Account, predict: Callable[..., Account], knobs: Sequence[Slider | Choice],
        measure: Callable[..., Account] | None = None,
    ) -> None:  # fmt: skip
        self.base = base
        self.result = base
        self.receipts: list[Receipt] = []
        self._refusal = ""  # why the controls' setting has no prediction
        self._predict, self._run = predict, measure
        self._picture = view.Comparison(base)
        self._latest: Receipt | None = None  # of the last measurement, until a control moves after it
        self._settled = threading.Event()  # no prediction is being computed
        self._settled.set()
        self._stop = threading.Event()
        self._running = threading.Lock()
        self._drawing = threading.RLock()
        self.controls: dict[str, Any] = {}
        self._scales = {knob.name: knob.scale for knob in knobs if isinstance(knob, Slider) and knob.scale != 1}
        rows = [self._row(knob) for knob in knobs]
        self._button = widgets.Button(
            description="Measure it", button_style="primary", disabled=measure is None,
            tooltip="Run this setting on the live model" if measure else "No live model was given",
        ).add_class("effkit-measure")  # fmt: skip
        self._stopper = widgets.Button(description="Stop", disabled=True, tooltip="End the measurement")
        self._bar = widgets.IntProgress(min=0, max=1, layout=widgets.Layout(visibility="hidden"))
        self._button.on_click(self._measure_in_background)
        self._stopper.on_click(lambda _: self._stop.set())
        buttons = [self._button, self._stopper.add_class("effkit-stop"), self._bar.add_class("effkit-progress")]
        super().__init__(rows, "whatif", [widgets.HBox(buttons)])
        for control in self.controls.values():
            control.observe(self._changed, names="value")
        self._show()

    @property
    def setting(self) -> dict[str, Any]:
        """Knob name -> where its control stands."""
        return {name: _scaled(control.value, self._scales.get(name, 1)) for name, control in self.controls.items()}

    def measure(self) -> Receipt:
        """Run the setting on the screen and return the Receipt. What the button calls; blocks until done.

        Raises
        ------
        ValueError
            When the setting on the controls was refused.
        RuntimeError
            When there is nothing to run it on, or a measurement is under way.
        """
        if self._run is None:
            raise RuntimeError("nothing to measure on: make this what-if with the live model")
        if self._refusal:
            raise ValueError(self._refusal)
        if not self._running.acquire(blocking=False):
            raise RuntimeError("a measurement is under way; wait for it or press Stop")
        try:
            setting = self.setting  # sliders may move while it runs
            predicted = self._predict(self.base, **setting)
            self._stop.clear()
            self._button.disabled, self._stopper.disabled = True, False
            self._bar.layout.visibility = "visible"
            measured = self._run(self._progress, **setting)
            receipt = Receipt(predicted, measured, setting=predicted.setting, provenance=provenance())
            self.receipts.append(receipt)
            self._latest = receipt
        finally:
            self._button.disabled, self._stopper.disabled = False, True
            self._bar.layout.visibility = "hidden"
            self._running.release()
        self._show()
        return receipt

    def _row(self, knob: Slider | Choice) -> widgets.HBox:
        rest = self.base.setting.get(knob.name)
        if rest is not None and isinstance(knob, Slider):
            rest = round(rest / knob.scale)
        wide, label = widgets.Layout(width="430px", flex="0 0 auto"), {"description_width": "170px"}
        if isinstance(knob, Choice):
            control = widgets.Dropdown(options=list(knob.options), value=rest, description=knob.label,
                                       tooltip=knob.tooltip, layout=wide, style=label)  # fmt: skip
            parts = [control]
        else:
            start = rest if rest is not None else knob.rest if knob.rest is not None else knob.low
            bounds = {"min": min(knob.low, start), "max": max(knob.high, start), "step": knob.step, "value": start}
            control = widgets.IntSlider(**bounds, description=knob.label, tooltip=knob.tooltip, layout=wide,
                                        style=label, readout_format=knob.readout_format)  # fmt: skip
            # a slider has no accessible name; a box with a description has one, and takes any number
            box = widgets.BoundedIntText(**bounds, description=f"type {knob.label.partition(' [')[0].lower()}",
                                         tooltip=f"{knob.label}: {knob.tooltip}")  # fmt: skip
            box.layout.width, box.style.description_width = "250px", "155px"
            widgets.link((control, "value"), (box, "value"))
            parts = [control, box]
        self.controls[knob.name] = control
        mark = f"● measured at {rest}" if rest is not None else "not in use when measured"
        parts.append(widgets.HTML(f'<span style="color:#555;white-space:nowrap">{html.escape(mark)}</span>'))
        return widgets.HBox(parts).add_class("effkit-control").add_class(f"effkit-control-{knob.name}")

    def _changed(self, _: Mapping[str, Any]) -> None:
        self._latest = None
        self._settled.clear()
        try:
            self.result = self._predict(self.base, **self.setting)
        except ValueError as error:  # a setting that cannot be kept is said on the screen, where it was made
            self._refusal = str(error)
            self._tell(self._refusal, alert=True)
            return
        finally:
            self._settled.set()
        self._refusal = ""
        self._show()

    def _show(self) -> None:
        with self._drawing:  # one figure, and two threads while something is measured
            receipt = self._receipt()
            sentence = self._sentence(receipt)
            self._tell(
                sentence, self._picture.svg(self.result, receipt, label=sentence), style=' style="line-height:1.5"'
            )

    def _receipt(self) -> Receipt | None:
        """The latest receipt of the setting on the screen."""
        return next((r for r in reversed(self.receipts) if r.setting == self.result.setting), None)

    def _sentence(self, receipt: Receipt | None) -> str:
        result, base = self.result, self.base
        if not result.predicted:
            parts = [f"{result.title}: {readable(result.total, result.unit)}, measured. Move a control to ask what if."]
        else:
            change = result.total / base.total - 1 if base.total else 0.0
            parts = [f"{result.headline()}, {change:+.0%} against {readable(base.total, base.unit)} measured."]
        parts += [_companion(account) for account in result.companions]
        if receipt is not None:
            parts.insert(0, receipt.sentence())
        elif self._latest is not None:  # the controls moved while it was measured
            parts.insert(0, f"Measured at {self._change(self._latest)}: {self._latest.sentence()} On the controls now:")
        return " ".join(parts)

    def _change(self, receipt: Receipt) -> str:
        """What its setting changes of the measured one."""
        rest = self.base.setting
        changes = [f"{name}={value}" for name, value in receipt.setting.items() if rest.get(name) != value]
        return ", ".join(changes) or "the rest position"

    def _progress(self, done: int, total: int) -> None:
        self._bar.max, self._bar.value = total, done
        if self._stop.is_set():
            raise Stopped

    def _measure_in_background(self, _: Any) -> None:
        """A click runs in a thread, so that sliders and Stop go on working meanwhile."""
        threading.Thread(target=self._measure_and_tell, daemon=True).start()

    def _measure_and_tell(self) -> None:
        try:
            time.sleep(_ARRIVING_S)
            self._settled.wait()
            self.measure()
        except Stopped:
            self._tell("Stopped: no receipt for this setting.", self.screen.value, alert=True)
        except Exception as error:  # in a thread nobody else would show it
            self._tell(f"The measurement failed: {error}", self.screen.value, alert=True)

    def __repr__(self) -> str:
        return f"WhatIf over {', '.join(self.controls)}"

    def _png(self) -> bytes:
        return self._picture.png(self.result, self._receipt())


def _scaled(value: Any, scale: int | float) -> Any:
    """Three times a tenth is 0.3."""
    return round(value * scale, 9) if isinstance(scale, float) else value * scale


def _companion(account: Account) -> str:
    text = f"{account.title}: {readable(account.total, account.unit)}"
    if account.low is not None and account.high is not None and account.low < account.high:
        text += f", band {readable(account.low, account.unit)} to {readable(account.high, account.unit)}"
    if len(account.frame) > 1:
        text += " (" + ", ".join(f"{share:.1%} {item}" for item, share in account.share.items()) + ")"
    return text + "."
