"""The picture of a what-if for readers without a kernel, who cannot move a control."""

import base64

from test_whatif import BASE, KNOBS, at, panel

from effkit import view
from effkit.whatif import WhatIf


def mime(widget) -> dict[str, str]:
    bundle = widget._repr_mimebundle_()
    return bundle[0] if isinstance(bundle, tuple) else bundle


def test_readers_without_a_kernel_see_a_picture():
    data = mime(panel())
    assert data["text/plain"] == "WhatIf over rows, ranks, order"
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in data


def test_the_picture_for_readers_without_a_kernel_shows_no_other_settings_receipt():
    moved = panel()
    moved.measure()
    moved.controls["rows"].value = 20
    expected = view.Comparison(BASE).png(moved.result, None)
    assert base64.b64decode(mime(moved)["image/png"]) == expected


def shown_beside(widget, monkeypatch):
    """What the picture for readers without a kernel is made of: its prediction, its receipt, and the words below."""
    seen = []
    monkeypatch.setattr(widget._picture, "png", lambda *given: seen.append(given) or b"")
    mime(widget)
    return seen[0]


def test_at_rest_they_see_a_neighbouring_prediction_that_says_it_is_one(monkeypatch):
    rest = panel()
    result, receipt, note = shown_beside(rest, monkeypatch)
    assert (result.setting["rows"], result.total, receipt) == (11, 110, None), "to sort changes nothing"
    assert note == "at rows=11: predicted, not measured"
    assert rest.result is BASE, "the screen shows what was measured"
    assert rest.setting["rows"] == 10


def test_a_word_that_looks_different_comes_before_a_step_of_a_slider(monkeypatch):
    def predict_all(base, *, rows, order, ranks):
        return at(rows, order, total=50 if order == "sorted" else None, low=1, high=500)

    result, _, note = shown_beside(WhatIf(BASE, predict_all, KNOBS), monkeypatch)
    assert (result.total, note) == (50, "at order=sorted: predicted, not measured")


def test_what_is_refused_or_out_of_range_is_not_shown(monkeypatch):
    def predict_none(base, *, rows, order, ranks):
        if rows > 10:
            raise ValueError("<rows> is refused")
        return at(rows, order, total=rows, low=0, high=500, in_range=False)

    result, receipt, note = shown_beside(WhatIf(BASE, predict_none, KNOBS), monkeypatch)
    assert (result, receipt, note) == (BASE, None, "")


def test_what_was_measured_elsewhere_is_shown_with_its_receipt(monkeypatch):
    back = panel()
    back.measure()  # at rest: no other setting
    back.controls["rows"].value = 20
    there = back.measure()
    back.controls["rows"].value = 10
    result, receipt, note = shown_beside(back, monkeypatch)
    assert receipt is there
    assert result is there.predicted
    assert note == "at rows=20: predicted, and measured"


def test_the_words_below_a_picture_are_gone_from_the_next():
    picture = view.Comparison(BASE)
    before = picture.png(BASE, None)
    assert picture.png(BASE, None, "at rows=20: predicted, not measured") != before
    assert picture.png(BASE, None) == before
    assert "at rows" not in picture.svg(BASE, None, label="")
