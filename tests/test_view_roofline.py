"""The picture of a step beside its floors, read back from the axes."""

import pandas as pd
import pytest

from effkit import view

US, MS = 1_000, 1_000_000


@pytest.fixture
def table():
    """What roofline() gives, of three parts."""
    rows = {
        "self-attention": (4 * MS, 1 * MS, "launches", 0.25, 2 * MS, 1800 * US),
        "feed-forward": (2 * MS, 1500 * US, "reading", 0.75, 1800 * US, 100 * US),
        "output layer": (1 * MS, 500 * US, "arithmetic", 0.5, 950 * US, 10 * US),
        "step": (7 * MS, 1700 * US, "reading", 0.243, 4750 * US, 1910 * US),
    }
    columns = ["time_ns", "floor_ns", "binds", "reached_frac", "operators_ns", "framework_ns"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("part")


def bars(ax):
    """Label -> (place, width) of its bars."""
    return {
        held.get_label(): [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in held]
        for held in ax.containers
    }


def test_each_part_stands_beside_what_was_measured_apart_and_its_floor(table):
    ax = view.roofline(table)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["self-attention", "feed-forward", "output layer"]
    found = bars(ax)
    assert [width for _, width in found["measured"]] == [4 * MS, 2 * MS, 1 * MS]
    assert [width for _, width in found["operators alone"]] == [2 * MS, 1800 * US, 950 * US]
    assert [width for _, width in found["framework alone"]] == [1800 * US, 100 * US, 10 * US]
    assert [bar.get_x() for bar in ax.containers[2]] == [2 * MS, 1800 * US, 950 * US], "one after the other"
    assert [segment[0][0] for segment in ax.collections[0].get_segments()] == [1 * MS, 1500 * US, 500 * US]
    colours = {held.patches[0].get_facecolor() for held in ax.containers}
    assert len(colours) == 3, "each can be told from the others"
    assert [text.get_text().strip() for text in ax.texts] == [
        "4.0 ms, floor 25% (launches)", "2.0 ms, floor 75% (reading)", "1.0 ms, floor 50% (arithmetic)",
    ]  # fmt: skip
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "floor", "measured", "operators alone", "framework alone",
    ]  # fmt: skip
    low, high = ax.get_ylim()
    assert low > high, "the first part on top"
    assert ax.get_xlim()[0] == 0
    assert ax.get_xlim()[1] > 4 * MS


def test_it_draws_into_axes_that_are_given(table):
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert view.roofline(table, ax) is ax
