"""WhatIf: the sliders, the picture, the “Measure it” button. No arithmetic."""

from __future__ import annotations

import html
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import ipywidgets as widgets

from effkit import view
from effkit.account import Account
from effkit.device import provenance
from effkit.idle import work_when_idle
from effkit.progress_bar import quiet
from effkit.receipt import Receipt, figures
from effkit.screen import Screen
from effkit.units import readable

# A browser holds moves back while the kernel is busy, and sends a click at once. When the kernel had just dealt with a
# move, others may come just after the click, though they were made before it.
_JUST_S, _ARRIVING_S = 0.1, 0.3
_VISIBLE_FRAC = 0.02  # of a bar, by which another has to differ
_PATIENCE_S = 0.04  # of a reader: a prediction that takes longer is announced
# Beside a sentence about a setting beyond the calibrated range: hatched, as the picture's bar is.
_HATCHED = (
    "padding-left:20px;background:repeating-linear-gradient(135deg,#D55E00 0 2px,transparent 2px 6px)"
    " left/12px 100% no-repeat"
)


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

    # of all what-ifs together, which may share a model
    _running: ClassVar[threading.Lock] = threading.Lock()  # a measurement
    _computing: ClassVar[threading.RLock] = threading.RLock()  # a prediction
    # those that a move is predicted of: in JupyterLab, in another thread than cells
    _moving: ClassVar[list[WhatIf]] = []

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
        self._drawn = ""  # table and picture of the result
        self._latest: Receipt | None = None  # of the last measurement, until a control moves after it
        self._ahead: dict[tuple[Any, ...], Account] = {}  # predictions of first moves, by their setting
        self._moved_s = float("-inf")  # when the last move was dealt with
        self._settled = threading.Event()  # no prediction is being computed
        self._settled.set()
        self._stop = threading.Event()
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
        moves = [partial(self._work_ahead, setting) for setting in self._first_moves()]
        work_when_idle(moves, lambda: self._running.locked() or bool(self._moving))

    @property
    def setting(self) -> dict[str, Any]:
        """Knob name -> where its control stands."""
        return {name: _scaled(control.value, self._scales.get(name, 1)) for name, control in self.controls.items()}

    def measure(self) -> Receipt:
        """Run the setting on the screen and return the Receipt. What the button calls; blocks until done.

        ValueError when the setting on the controls was refused. RuntimeError when there is nothing to run it on, or a
        measurement is under way.
        """
        return self._measure(None)

    def shown(self) -> str:
        """The sentence, and the table's other quantities in words, read back from the trait that the browser draws."""
        rows = re.findall(r"<tr><th[^>]*>((?:(?!</th>|<b>).)+)</th>(<td.*?)</tr>", self.screen.value)
        alone = 'role="alert"' in self.screen.value
        return " ".join([super().shown(), *(_in_words(*row) for row in rows if not alone)])

    def _measure(self, setting: Mapping[str, Any] | None) -> Receipt:
        """Run this setting; unless given, that on the screen when no prediction is being computed."""
        if self._run is None:
            raise RuntimeError("nothing to measure on: make this what-if with the live model")
        if not self._running.acquire(blocking=False):
            raise RuntimeError("a measurement is under way; wait for it or press Stop")
        try:
            with self._computing:
                setting = setting or self.setting  # sliders may move while it runs
                predicted = self._predicted(setting)
            self._stop.clear()
            self._button.disabled, self._stopper.disabled = True, False
            self._bar.layout.visibility = "visible"
            with quiet():  # the panel has a bar of its own
                measured = self._run(self._progress, **setting)
            receipt = Receipt(predicted, measured, setting=predicted.setting, provenance=provenance())
            self.receipts.append(receipt)
            self._latest = receipt
        finally:
            self._running.release()
            self._button.disabled, self._stopper.disabled = False, True
            self._bar.layout.visibility = "hidden"
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
                                        style=label, readout_format=",d")  # fmt: skip
            # a slider has no accessible name; a box with a description has one, and takes any number
            box = widgets.BoundedIntText(**bounds, description=f"type {knob.label.partition(' [')[0].lower()}",
                                         tooltip=f"{knob.label}: {knob.tooltip}")  # fmt: skip
            box.layout.width, box.style.description_width = "250px", "155px"
            widgets.link((control, "value"), (box, "value"))
            parts = [control, box]
        self.controls[knob.name] = control
        mark = f"● measured at {rest}" if rest is not None else "not in use when measured"
        parts.append(widgets.HTML(f'<span style="opacity:0.8;white-space:nowrap">{html.escape(mark)}</span>'))
        wraps = widgets.Layout(flex_flow="row wrap")  # on a narrow page the mark comes below, and is not cut off
        return widgets.HBox(parts, layout=wraps).add_class("effkit-control").add_class(f"effkit-control-{knob.name}")

    def _predicted(self, setting: Mapping[str, Any]) -> Account:
        key = tuple(setting.values())
        with quiet():
            return self._ahead[key] if key in self._ahead else self._predict(self.base, **setting)

    def _first_moves(self) -> Iterator[dict[str, Any]]:
        """The settings to which one move leads from where the controls stand: a step of a slider, any word."""
        rest = self.setting
        for name, control in self.controls.items():
            if isinstance(control, widgets.Dropdown):
                values = list(control.options)
            else:
                steps = (control.value + control.step, control.value - control.step)
                values = [value for value in steps if control.min <= value <= control.max]
            for value in values:
                yield rest | {name: _scaled(value, self._scales.get(name, 1))}

    def _work_ahead(self, setting: Mapping[str, Any]) -> Account:
        with self._computing:
            return self._ahead.setdefault(tuple(setting.values()), self._predicted(setting))

    def _changed(self, _: Mapping[str, Any]) -> None:
        self._latest = None
        self._settled.clear()
        announcement = threading.Timer(_PATIENCE_S, self._show)
        announcement.daemon = True
        announcement.start()
        self._moving.append(self)
        try:
            with self._computing:
                self.result = self._predicted(self.setting)
            self._refusal = ""
        except ValueError as error:  # a setting that cannot be kept is said on the screen, where it was made
            self._refusal = str(error)
        except BaseException as error:
            self._refusal = f"This setting has no prediction: {error or type(error).__name__}"
            raise
        finally:
            self._moving.remove(self)
            announcement.cancel()
            self._settled.set()
            self._show()
            self._moved_s = time.monotonic()

    def _show(self) -> None:
        with self._drawing:  # one figure, and several threads
            computing, latest = not self._settled.is_set(), self._latest
            known = not (computing or self._refusal)
            receipt = self._receipt() if known else None
            parts, rest, style = [], "", "line-height:1.5"
            if latest is not None and receipt is not latest:  # the controls moved while it was measured
                at = f"Measured at {self._change(latest.setting)}"
                parts = [f"{at}: {latest.sentence()} On the controls now:"]
                rest = figures(latest.predicted, latest.measured, caption=at)
            if computing:
                parts.append("computing the prediction …" if parts else "Computing the prediction …")
                rest += f'<div style="opacity:0.35" aria-hidden="true">{self._drawn}</div>'
            elif self._refusal:
                parts.append(self._refusal)
            else:
                sentence = self._sentence(receipt)
                picture = self._picture.svg(self.result, receipt, label=sentence)
                self._drawn = figures(self.result, receipt.measured if receipt else None) + picture
                parts.append(sentence)
                rest += self._drawn
                if not all(account.in_range for account in (self.result, *self.result.companions)):
                    style += f";{_HATCHED}"
            self._tell(" ".join(parts), rest, alert=bool(self._refusal) and not computing, style=f' style="{style}"')

    def _receipt(self) -> Receipt | None:
        return next((r for r in reversed(self.receipts) if r.setting == self.result.setting), None)

    def _sentence(self, receipt: Receipt | None) -> str:
        result, base = self.result, self.base
        parts = [] if receipt is None else [receipt.sentence()]
        if not result.predicted:
            parts.append(
                f"{result.title}: {readable(result.total, result.unit)}, measured. Move a control to ask what if."
            )
        else:
            change = result.total / base.total - 1 if base.total else 0.0
            parts.append(f"{result.headline()}, {change:+.0%} against {readable(base.total, base.unit)} measured.")
        if beyond := [account.title for account in result.companions if not account.in_range]:
            parts.append(f"{' and '.join(beyond)}: outside the calibrated range.")
        return " ".join(parts)

    def _change(self, setting: Mapping[str, Any]) -> str:
        rest = self.base.setting
        changes = [f"{name}={value}" for name, value in setting.items() if rest.get(name) != value]
        return ", ".join(changes) or "the rest position"

    def _progress(self, done: int, total: int) -> None:
        self._bar.max, self._bar.value = total, done
        if self._stop.is_set():
            raise Stopped

    def _measure_in_background(self, _: Any) -> None:
        """A click runs in a thread, so that sliders and Stop go on working meanwhile."""
        if self._button.disabled:
            return
        self._button.disabled = True
        setting = None if time.monotonic() - self._moved_s < _JUST_S else self.setting
        threading.Thread(target=self._measure_and_tell, args=(setting,), daemon=True).start()

    def _measure_and_tell(self, setting: Mapping[str, Any] | None) -> None:
        try:
            if setting is None:
                self._let_moves_arrive()
            self._measure(setting)
        except Stopped:
            self._tell("Stopped: no receipt for this setting.", self._drawn, alert=True)
        except Exception as error:  # in a thread nobody else would show it
            self._tell(f"The measurement failed: {error}", self._drawn, alert=True)
        finally:
            self._button.disabled = False

    def _let_moves_arrive(self) -> None:
        """Until none has come for a while; one whose prediction takes longer than that holds others back."""
        time.sleep(_ARRIVING_S)
        while not self._settled.is_set():
            self._settled.wait()
            time.sleep(_ARRIVING_S)

    def __repr__(self) -> str:
        return f"WhatIf over {', '.join(self.controls)}"

    def _png(self) -> bytes:
        """For readers who cannot move a control. Where all rest, a receipt of another setting, or else a prediction."""
        result, receipt, note = self.result, self._receipt(), ""
        if not result.predicted:
            receipt = next((each for each in reversed(self.receipts) if each.predicted.predicted), None)
            result = self._neighbour() if receipt is None else receipt.predicted
            known = "predicted, and measured" if receipt else "predicted, not measured"
            note = f"at {self._change(result.setting)}: {known}" if result.predicted else ""
        with self._drawing:
            return self._picture.png(result, receipt, note)

    def _neighbour(self) -> Account:
        """What one move leads to, the first that is in range and looks different; words first, for they change more."""
        rest = self.setting

        def of_slider(move: Mapping[str, Any]) -> bool:
            return all(value == rest[name] for name, value in move.items() if isinstance(value, str))

        for move in sorted(self._first_moves(), key=of_slider):
            with suppress(Exception):  # a move that is refused is no reason to show nothing
                near = self._work_ahead(move)
                if near.in_range and abs(near.total - self.base.total) > _VISIBLE_FRAC * self.base.total:
                    return near
        return self.result


def _scaled(value: Any, scale: int | float) -> Any:
    """Three times a tenth is 0.3."""
    return round(value * scale, 9) if isinstance(scale, float) else value * scale


def _in_words(quantity: str, cells: str) -> str:
    parts = (part.replace("</td>", "\n").replace("<small", "\n<small") for part in (quantity, cells))
    (title, *shares), (predicted, band, measured, error, *_) = (
        html.unescape(re.sub(r"<[^>]+>", "", part)).split("\n") for part in parts
    )
    text = f"{title}: {measured if predicted == '–' else predicted}"
    text += f", band {band}" if " to " in band else ""
    text += f", measured {measured}, error {error}" if error != "–" else ""
    return text + "".join(f" ({share})" for share in shares) + "."
