"""The sliders, without a browser: what they show, what they measure, and how they say no."""

import contextlib
import threading
import time
from xml.etree import ElementTree

import ipywidgets as widgets
import pandas as pd
import pytest

from effkit import padding
from effkit.account import Account
from effkit.receipt import Receipt
from effkit.whatif import Choice, Slider, WhatIf

KNOBS = [
    Slider("rows", "Rows [count]", 1, 100, 1, "Rows per batch"),
    Slider("ranks", "Ranks [count]", 1, 8, 1, "Ranks that share it", rest=2),
    Choice("order", "Order", ["random", "sorted"], "How rows are chosen"),
]


def at(rows, order, *, total=None, **more) -> Account:
    return Account.of("Time", "ns", {"real": rows}, total=total or 10 * rows, source="clock",
                      setting={"rows": rows, "order": order}, **more)  # fmt: skip


BASE = at(10, "random").with_companions(Account.of("Steps", "steps", {"steps": 7}, total=7, source="loop"))


def predict(base, *, rows, order, ranks):
    if rows > 90:
        raise ValueError("<rows> must be 90 at most")
    if {"rows": rows, "order": order} == base.setting:
        return base
    return at(rows, order, low=9 * rows, high=11 * rows, in_range=rows <= 50)


def measure(progress, *, rows, order, ranks):
    progress(0, 1)
    return at(rows, order, total=8 * rows)


def panel(measure=measure) -> WhatIf:
    return WhatIf(BASE, predict, KNOBS, measure)


def inside(widget, kind):
    """Every widget of a kind in the tree, in order of display."""
    children = getattr(widget, "children", ())
    return [w for child in children for w in ([child] if isinstance(child, kind) else []) + inside(child, kind)]


def button(widget, word):
    return next(b for b in inside(widget, widgets.Button) if b.description == word)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_at_rest_it_shows_the_measured_account_itself():
    rest = panel()
    assert rest.result is BASE
    assert rest.setting == {"rows": 10, "ranks": 2, "order": "random"}
    assert rest.shown() == "Time: 100 ns, measured. Move a control to ask what if. Steps: 7 steps."
    assert '<p role="status" aria-live="polite"' in rest.screen.value
    assert '<svg role="img" fill="currentColor" aria-label="Time: 100 ns, measured.' in rest.screen.value


def test_moving_a_control_changes_setting_result_and_screen():
    moved = panel()
    moved.controls["rows"].value = 20
    assert moved.setting["rows"] == 20
    assert moved.result.total == 200
    assert moved.shown() == "Time: 200 ns (predicted; band 180 ns to 220 ns), +100% against 100 ns measured."
    moved.controls["order"].value = "sorted"
    assert moved.result.setting == {"rows": 20, "order": "sorted"}
    moved.controls["rows"].value, moved.controls["order"].value = 10, "random"
    assert moved.result is BASE


def test_outside_its_range_it_says_so():
    moved = panel()
    moved.controls["rows"].value = 60
    assert "outside the calibrated range" in moved.shown()


def test_the_number_box_and_the_slider_are_one():
    moved = panel()
    box = inside(moved, widgets.BoundedIntText)[0]
    box.value = 33
    assert moved.controls["rows"].value == moved.result.setting["rows"] == 33
    moved.controls["rows"].value = 44
    assert box.value == 44
    box.value = 1000
    assert moved.controls["rows"].value == box.value == 100, "a number beyond the slider's end stops there"


def test_a_measured_setting_beyond_the_slider_still_has_its_rest_position():
    wide = WhatIf(BASE, predict, [Slider("rows", "Rows [count]", 20, 30, 1, "")])
    assert wide.controls["rows"].value == 10


def test_a_setting_that_cannot_be_kept_is_said_on_the_screen():
    refused = panel()
    refused.controls["rows"].value = 95
    assert refused.screen.value.startswith('<p role="alert"')
    assert "&lt;rows&gt;" in refused.screen.value
    assert refused.shown() == "<rows> must be 90 at most"
    refused.controls["rows"].value = 20
    assert refused.shown().startswith("Time: 200 ns")


def test_measure_gives_a_receipt_and_keeps_it():
    measured = panel()
    measured.controls["rows"].value = 20
    receipt = measured.measure()
    assert isinstance(receipt, Receipt)
    assert (receipt.predicted.total, receipt.measured.total) == (200, 160)
    assert receipt.setting == {"rows": 20, "order": "random"}
    assert "torch" in receipt.provenance
    assert measured.receipts == [receipt]
    assert measured.shown().startswith("Receipt: predicted 200 ns, measured 160 ns, error +25.0%, outside the band.")
    # it belongs to its setting: gone elsewhere, there again on return
    measured.controls["rows"].value = 30
    assert "Receipt" not in measured.shown()
    measured.controls["rows"].value = 20
    assert "Receipt" in measured.shown()


def test_a_receipt_never_pairs_two_settings():
    refused = panel()
    refused.controls["rows"].value = 60
    refused.controls["rows"].value = 95
    with contextlib.suppress(ValueError):
        refused.measure()
    assert all(receipt.predicted.setting == receipt.measured.setting for receipt in refused.receipts)


def test_without_a_live_model_there_is_nothing_to_measure_on():
    rest = panel(measure=None)
    assert button(rest, "Measure it").disabled
    with pytest.raises(RuntimeError, match="make this what-if with the live model"):
        rest.measure()


def test_an_error_of_the_measurement_comes_through_and_can_be_repeated():
    def fails(progress, **_):
        raise MemoryError("too <large>")

    failing = panel(fails)
    for _ in range(2):
        with pytest.raises(MemoryError):
            failing.measure()
    button(failing, "Measure it").click()
    wait_for(lambda: "failed" in failing.shown())
    assert failing.shown() == "The measurement failed: too <large>"
    assert not button(failing, "Measure it").disabled
    assert failing.receipts == []


def test_the_button_measures_in_the_background_and_stop_ends_it():
    def endless(progress, **_):
        for done in range(10**6):
            progress(done, 10**6)
            time.sleep(0.001)

    busy = panel(endless)
    run, stop = button(busy, "Measure it"), button(busy, "Stop")
    (bar,) = inside(busy, widgets.IntProgress)
    assert stop.disabled
    run.click()
    wait_for(lambda: bar.value > 3)
    assert run.disabled
    assert not stop.disabled
    assert bar.layout.visibility == "visible"
    busy.controls["rows"].value = 20
    assert busy.shown().startswith("Time: 200 ns"), "sliders go on working"
    with pytest.raises(RuntimeError, match="a measurement is under way"):
        busy.measure()
    stop.click()
    wait_for(lambda: busy.shown() == "Stopped: no receipt for this setting.")
    assert (run.disabled, stop.disabled, bar.layout.visibility) == (False, True, "hidden")
    assert busy.receipts == []


def test_the_setting_may_move_on_while_it_is_measured():
    started, go_on = threading.Event(), threading.Event()

    def waits(progress, *, rows, order, ranks):
        started.set()
        go_on.wait(20)
        return at(rows, order)

    busy = panel(waits)
    button(busy, "Measure it").click()
    assert started.wait(20)
    busy.controls["rows"].value = 20
    go_on.set()
    wait_for(lambda: busy.receipts and not button(busy, "Measure it").disabled)
    (receipt,) = busy.receipts
    assert receipt.predicted.setting == receipt.measured.setting == BASE.setting


@pytest.mark.parametrize("late", [False, True], ids=["pressed at rest", "pressed while moves are on their way"])
def test_every_press_shows_the_receipt_of_the_setting_that_was_on_the_screen(late):
    def slow(base, **setting):
        time.sleep(0.02)
        return predict(base, **setting)

    def takes_a_while(progress, **setting):
        time.sleep(0.05)
        return measure(progress, **setting)

    for race in range(10):
        busy = WhatIf(BASE, slow, KNOBS, takes_a_while)
        pressed, meanwhile = 20 + race, 50 + race
        busy.controls["rows"].value = 15
        if not late:
            busy.controls["rows"].value = pressed
        button(busy, "Measure it").click()
        busy.controls["rows"].value = pressed  # held back by the browser until the click was sent
        wait_for(lambda panel=busy: not button(panel, "Stop").disabled)
        busy.controls["rows"].value = meanwhile
        wait_for(lambda panel=busy: panel.receipts and not button(panel, "Measure it").disabled)
        wait_for(lambda panel=busy: "Receipt" in panel.shown())
        assert busy.receipts[0].setting["rows"] == pressed
        assert busy.shown().startswith(f"Measured at rows={pressed}: Receipt: predicted {10 * pressed} ns")
        assert f"Time: {10 * meanwhile} ns" in busy.shown()
        busy.controls["rows"].value = meanwhile + 1
        assert "Receipt" not in busy.shown(), "the next move is a new question"


@pytest.fixture(scope="module")
def padding_panel() -> WhatIf:
    from effkit import models

    model = models.text(layers=1, hidden=16, heads=2, vocabulary=50)
    plan = padding.plan(pd.DataFrame({"input_length": range(4, 36, 4)}), "random", batch_size=2)
    return padding.whatif(padding.measure(plan, model, repeats=1), model, repeats=1)


@pytest.mark.parametrize("own", [True, False])
def test_every_slider_names_its_unit_and_explains_itself(own, padding_panel):
    for slider in inside(panel() if own else padding_panel, widgets.IntSlider):
        assert slider.description.endswith("]")
        assert "[" in slider.description
        assert slider.tooltip
        assert slider.readout_format == ",d"


def test_every_slider_says_where_it_rests():
    marks = [mark.value for mark in inside(panel(), widgets.HTML)]
    assert "● measured at 10" in marks[0]
    assert "not in use when measured" in marks[1]


def test_the_padding_panel_predicts_and_measures_on_its_live_model(padding_panel):
    padding_panel.controls["strategy"].value = "sorted"
    receipt = padding_panel.measure()
    assert receipt.setting["strategy"] == "sorted"
    assert receipt.predicted.setting == receipt.measured.setting
    assert padding_panel.shown().startswith("Receipt: predicted")


def test_a_press_without_a_move_just_before_measures_the_setting_that_it_met():
    at_rest = panel()
    button(at_rest, "Measure it").click()
    at_rest.controls["rows"].value = 50  # while the click is dealt with
    wait_for(lambda: at_rest.receipts)
    assert at_rest.receipts[0].setting["rows"] == 10


def test_a_press_waits_for_moves_that_slow_predictions_hold_back(monkeypatch):
    """Two moves wait behind the click, and the first takes longer than anybody waits for the second."""
    monkeypatch.setattr("effkit.whatif._ARRIVING_S", 0.1)
    go_on = threading.Event()

    def slow(base, **setting):
        if setting["rows"] == 30:
            assert go_on.wait(20)
        return predict(base, **setting)

    busy = WhatIf(BASE, slow, KNOBS, measure)
    busy.controls["rows"].value = 20
    button(busy, "Measure it").click()

    def held_back():
        busy.controls["rows"].value = 30
        busy.controls["order"].value = "sorted"

    moves = threading.Thread(target=held_back)
    moves.start()
    wait_for(lambda: "Computing" in busy.shown())
    assert busy.receipts == []
    go_on.set()
    moves.join(20)
    wait_for(lambda: busy.receipts)
    assert busy.receipts[0].setting == {"rows": 30, "order": "sorted"}


def test_a_second_press_before_the_first_is_dealt_with_is_the_same_press():
    pressed = panel()
    pressed.controls["rows"].value = 20
    for _ in range(3):
        button(pressed, "Measure it").click()
    wait_for(lambda: pressed.shown().startswith("Receipt: ") and not button(pressed, "Measure it").disabled)
    assert len(pressed.receipts) == 1


def test_a_slow_prediction_is_announced_and_the_old_figures_are_set_back():
    go_on = threading.Event()

    def slow(base, **setting):
        assert go_on.wait(20)
        return predict(base, **setting)

    moved = WhatIf(BASE, slow, KNOBS)
    move = threading.Thread(target=lambda: setattr(moved.controls["rows"], "value", 20))
    move.start()
    wait_for(lambda: "Computing" in moved.shown())
    assert '<p role="status"' in moved.screen.value
    assert 'aria-hidden="true"' in moved.screen.value
    go_on.set()
    move.join(20)
    assert moved.shown().startswith("Time: 200 ns (predicted")
    assert "aria-hidden" not in moved.screen.value


def test_a_receipt_that_comes_while_a_prediction_is_computed_claims_nothing_of_the_controls():
    go_on, began, measured = threading.Event(), threading.Event(), threading.Event()

    def slow(base, **setting):
        if setting["rows"] == 30:
            began.set()
            assert go_on.wait(20)
        return predict(base, **setting)

    def waits(progress, **setting):
        assert began.wait(20)
        measured.set()
        return measure(progress, **setting)

    busy = WhatIf(BASE, slow, KNOBS, waits)
    busy.controls["rows"].value = 20
    run = threading.Thread(target=busy.measure)
    run.start()
    wait_for(lambda: not button(busy, "Stop").disabled)
    move = threading.Thread(target=lambda: setattr(busy.controls["rows"], "value", 30))
    move.start()
    run.join(20)
    assert measured.is_set()
    assert busy.shown().startswith("Measured at rows=20: Receipt: predicted 200 ns, measured 160 ns")
    assert "On the controls now: computing" in busy.shown()
    go_on.set()
    move.join(20)
    assert "On the controls now: Time: 300 ns" in busy.shown()
    assert "<caption>Measured at rows=20</caption>" in busy.screen.value


def test_a_prediction_that_breaks_leaves_no_figures_of_another_setting():
    def breaks(base, **setting):
        raise KeyError("no such row")

    broken = WhatIf(BASE, breaks, KNOBS)
    with pytest.raises(KeyError):
        broken.controls["rows"].value = 20
    assert broken.shown() == "This setting has no prediction: 'no such row'"
    assert broken.screen.value.startswith('<p role="alert"')


def table(panel) -> list[list[str]]:
    """What the rows on the screen say, the heads first."""
    text = panel.screen.value
    root = ElementTree.fromstring(text[text.index("<table") : text.index("</table>") + len("</table>")])
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


def test_the_table_has_every_quantity_with_what_is_known_of_it():
    def two(base, *, rows, order, ranks):
        cells = Account.of("Cells <1>", "cells", {"real": 3, "padding": 1}, total=4, source="shapes", low=3, high=5,
                           in_range=rows <= 50)  # fmt: skip
        return predict(base, rows=rows, order=order, ranks=ranks).with_companions(cells)

    def count(progress, **setting):
        counted = Account.of("Cells <1>", "cells", {"real": 4}, total=4, source="shapes")
        return measure(progress, **setting).with_companions(counted)

    both = WhatIf(BASE, two, KNOBS, count)
    both.controls["rows"].value = 20
    heads, main, cells = table(both)
    assert heads == ["quantity", "predicted", "band", "measured", "error"]
    assert main == ["Time", "200 ns", "180 ns to 220 ns", "–", "–"]
    assert cells == ["Cells <1>75.0% real, 25.0% padding", "4 cells", "3 cells to 5 cells", "–", "–"]
    assert "Cells <1>: 4 cells, band 3 cells to 5 cells (75.0% real, 25.0% padding)." in both.shown()
    both.measure()
    heads, main, cells = table(both)
    assert heads[3:] == ["measured", "error", "within band"]
    assert main[3:] == ["160 ns", "+25.0%", "no"]
    assert cells[3:] == ["4 cells", "+0.0%", "yes"]
    assert "Cells" not in both.screen.value.partition("</p>")[0], "one sentence is spoken, of the main quantity"
    both.controls["rows"].value = 60
    assert "Cells <1>: outside the calibrated range." in both.shown()
    assert "repeating-linear-gradient" in both.screen.value
    both.controls["rows"].value = 30
    assert "repeating-linear-gradient" not in both.screen.value
