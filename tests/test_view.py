"""The pictures: drawn without pyplot's state, told apart without colour, equal to the byte."""

import re
from xml.etree import ElementTree

import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from effkit import padding, view
from effkit.account import Account
from effkit.receipt import Receipt

SVG = "{http://www.w3.org/2000/svg}"


def epoch(rows=None, total=100, **more) -> Account:
    rows = {"real": 60, "padding": 40} if rows is None else rows
    return Account.of("Time of one epoch", "ns", rows, total=total, source="clock", **more)


PREDICTED = epoch({"real": 60, "padding": 20}, 80, low=70, high=95)
OUTSIDE = epoch({"real": 60, "padding": 20}, 80, low=70, high=95, in_range=False)


@pytest.fixture(autouse=True)
def no_figures_left():
    pyplot.close("all")
    yield
    pyplot.close("all")


def words(markup: str) -> str:
    return " | ".join(text for text in ElementTree.fromstring(markup).itertext() if text.strip())


@pytest.mark.parametrize(
    "account",
    [epoch(), epoch(total=130), epoch(total=70), epoch({"real": 0}, 0), epoch({}, 5), PREDICTED, OUTSIDE],
    ids=lambda account: account.headline(),
)
def test_an_account_is_drawn(account):
    ax = Figure().add_subplot()
    assert view.account(account, ax) is ax
    ax.figure.draw_without_rendering()
    assert ax.get_title(loc="left") == account.headline()
    labels = ax.get_legend_handles_labels()[1]
    assert [label.split(" ")[0] for label in labels if label != "band"][: len(account.frame)] == [*account.frame.index]
    assert any(label.startswith("residual") for label in labels) == (account.residual != 0)
    assert ("band" in labels) == account.predicted


def test_an_account_draws_itself_where_no_axes_are_given():
    ax = epoch().plot()
    assert ax.get_title(loc="left") == "Time of one epoch: 100 ns"
    assert pyplot.get_fignums() == [ax.figure.number]


def test_a_plan_is_drawn():
    plan = padding.plan(pd.DataFrame({"input_length": [4, 1, 3, 2]}), "sorted", batch_size=2)
    ax = Figure().add_subplot()
    assert plan.plot(ax, num_batches=1) is ax
    heights = sorted(bar.get_height() for bar in ax.patches)
    assert heights == [1, 2, 2, 2], "two real rows in front of two padded ones, of the first batch only"
    assert "17% of the cells are padding" in ax.get_title(loc="left")


def test_a_comparison_leaves_no_figure_behind():
    comparison = view.Comparison(epoch())
    comparison.svg(PREDICTED, None, label="")
    comparison.png(OUTSIDE, None)
    assert pyplot.get_fignums() == []


def test_the_picture_says_in_words_what_is_measured_and_predicted():
    receipt = Receipt(PREDICTED, epoch(total=84))
    text = words(view.Comparison(epoch()).svg(PREDICTED, receipt, label=""))
    for expected in (
        "measured | predicted",
        "100 ns",
        "80 ns",
        "measured here",
        "84 ns  error -4.8%",
        "real",
        "padding",
    ):
        assert expected in text
    assert "measured here" not in words(view.Comparison(epoch()).svg(PREDICTED, None, label=""))


def test_extrapolating_looks_different_beyond_colour():
    comparison = view.Comparison(epoch())
    inside, outside = (comparison.svg(result, None, label="") for result in (PREDICTED, OUTSIDE))
    assert "out of range" in words(outside)
    assert "out of range" not in words(inside)
    assert outside.count("stroke-dasharray") > inside.count("stroke-dasharray")
    assert outside.count("<pattern") > inside.count("<pattern"), "hatched"


def test_bars_are_as_long_as_their_totals():
    comparison = view.Comparison(epoch({"real": 30, "padding": 10}, 100))
    comparison.svg(PREDICTED, None, label="")
    low, high = comparison.figure.axes[0].get_xlim()
    ends = {
        round(bar.get_y(), 2): bar.get_x() + bar.get_width()
        for bar in comparison.figure.axes[0].patches
        if bar.get_visible() and bar.get_fill() and bar.get_width()
    }
    assert sorted(ends.values()) == pytest.approx([80, 100])
    assert low <= 0 < 100 < high


def test_equal_pictures_are_equal_bytes():
    first, second = (view.Comparison(epoch()).svg(PREDICTED, None, label="x") for _ in range(2))
    assert first == second
    assert view.Comparison(epoch()).png(PREDICTED, None) == view.Comparison(epoch()).png(PREDICTED, None)


def test_going_away_and_coming_back_gives_the_same_picture():
    comparison = view.Comparison(epoch())
    before = comparison.svg(PREDICTED, None, label="x")
    comparison.svg(OUTSIDE, Receipt(OUTSIDE, epoch(total=300)), label="y")
    assert comparison.svg(PREDICTED, None, label="x") == before


def test_the_legend_names_what_is_drawn():
    comparison = view.Comparison(epoch())
    before = comparison.svg(PREDICTED, None, label="x")
    comparison.svg(epoch({"real": 60, "waiting": 50}, 110, low=100, high=120), None, label="x")
    assert comparison.svg(PREDICTED, None, label="x") == before


def test_a_dark_page_shows_through_and_what_is_black_takes_its_text_colour():
    """A white patch with black text would stand in a dark notebook."""
    drawn = view.Comparison(epoch()).svg(PREDICTED, None, label="x")
    assert ElementTree.fromstring(drawn).get("fill") == "currentColor"
    assert "stroke: currentColor" in drawn, "the band"
    assert not re.search(r"(fill|stroke): #(ffffff|000000)", drawn)


def test_the_picture_has_a_name_that_is_escaped():
    label = "a \"quoted\" <b> & 'more' …"
    root = ElementTree.fromstring(view.Comparison(epoch()).svg(PREDICTED, None, label=label))
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.get("aria-label") == label


def test_row_names_are_escaped_in_the_picture():
    nasty = epoch({"a <b> & c": 100})
    assert "a <b> & c" in words(view.Comparison(nasty).svg(nasty, None, label=""))


def test_nothing_is_fetched_by_the_picture():
    root = ElementTree.fromstring(view.Comparison(epoch()).svg(OUTSIDE, None, label=""))
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert not tags & {"image", "script", "foreignObject"}
    links = [value for element in root.iter() for name, value in element.items() if name.endswith("href")]
    assert all(link.startswith("#") for link in links)


def test_rows_of_one_account_have_different_colours():
    rows = {"small": 3, "grown": 2, "experts": 1}  # the third has a colour of its own, which the first would have had
    account = Account.of("FLOPs", "FLOPs", rows, total=6, source="a test")
    shades = [bar.patches[0].get_facecolor() for bar in account.plot().containers]
    assert len(set(shades)) == 3


def test_a_word_has_one_colour_everywhere():
    assert view.colour("padding", 0) == view.colour("padding", 5)
    assert len({view.colour(f"row {i}", i) for i in range(8)}) == 8


def test_rows_that_add_up_to_more_than_the_total_end_inside_of_the_picture():
    over = Account.of("Time", "ns", {"a": 300, "b": 80}, total=350, source="a clock")
    ax = over.plot(Figure().add_subplot())
    assert max(patch.get_x() + patch.get_width() for patch in ax.patches) < ax.get_xlim()[1]
