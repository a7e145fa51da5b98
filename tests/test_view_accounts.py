"""Accounts under one another: every row to be told from the others, no legend on another account."""

from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from effkit import view
from effkit.account import Account

TIME = Account.of(
    "Time of one step", "ns",
    {"waiting for data": 3_100_000, "padding": 21_500_000, "matrix products": 28_400_000, "attention": 6_700_000,
     "norms and softmax": 5_100_000, "elementwise and other": 7_900_000, "recomputation": 4_000_000,
     "optimizer": 9_300_000, "clearing gradients": 300_000, "asking for numbers": 1_700_000,
     "exposed communication": 2_100_000, "host between operators": 5_200_000},
    total=97_000_000, source="the wall clock",
)  # fmt: skip
MEMORY = Account.of(
    "Peak memory of one step", "bytes",
    {"parameter": 48 << 20, "optimizer state": 96 << 20, "buffer": 1 << 20, "input": 1 << 18, "gradient": 31 << 20,
     "saved activation": 210 << 20, "workspace": 14 << 20}, total=401 << 20, source="the allocator",
)  # fmt: skip
ONE_ROW = Account.of("Time of a loop", "ns", {"everything": 7}, total=7, source="the wall clock")
CELLS = Account.of("Cells", "cells", {"real": 3, "padding": 1}, total=4, source="masks")


@pytest.fixture
def axes():
    from matplotlib import pyplot

    yield view.page((TIME, MEMORY, ONE_ROW, CELLS))
    pyplot.close("all")


def drawn(axes):
    """Where things are, once the layout is found: of each axes its title, bars, numbers, and legend."""
    figure = axes[0].get_figure(root=True)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    return [part for ax in axes
            for part in (ax._left_title.get_window_extent(renderer), ax.get_window_extent(renderer),
                         ax.xaxis.get_tightbbox(renderer), ax.get_legend().get_window_extent(renderer))]  # fmt: skip


def test_accounts_of_several_rows_in_ns_and_bytes_are_drawn(axes):
    assert [ax.get_title(loc="left") for ax in axes] == [TIME.headline(), MEMORY.headline()]


def test_nothing_lies_on_anything_else_or_beyond_the_edge(axes):
    boxes = drawn(axes)
    for above, below in pairwise(boxes):
        assert below.y1 <= above.y0 + 1
    width, height = axes[0].get_figure(root=True).canvas.get_width_height()
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)


def test_bars_are_as_high_as_one_another(axes):
    heights = [box.height for box in drawn(axes)[1::4]]
    assert heights[0] == pytest.approx(heights[1], rel=0.01)
    assert heights[0] > 30


@pytest.mark.parametrize("number", [0, 1])
def test_each_row_has_a_colour_of_its_own_and_its_share_in_the_legend(axes, number):
    ax, account = axes[number], (TIME, MEMORY)[number]
    bars = [bars[0] for bars in ax.containers]
    faces = [tuple(bar.get_facecolor()) for bar in bars[: len(account.frame)]]
    assert len(set(faces)) == len(account.frame)
    said = [text.get_text() for text in ax.get_legend().get_texts()]
    assert said[:-1] == [f"{item} {share:.1%}" for item, share in account.share.items()]
    assert said[-1].startswith("residual")
    assert [bar.get_width() for bar in bars[: len(account.frame)]] == list(account.frame["value"])


def test_rows_of_names_that_nobody_knows_are_told_apart_too():
    account = Account.of("T", "ns", {"padding": 5, "a": 1, "b": 2, "c": 3}, total=11, source="s")
    (ax,) = view.page([account])
    assert len({tuple(bars[0].get_facecolor()) for bars in ax.containers}) == 4


def test_wide_bars_bear_their_share(axes):
    assert {text.get_text() for text in axes[1].texts} == {"12%", "24%", "8%", "52%"}


def test_a_single_row_is_drawn_where_there_is_nothing_else():
    (ax,) = view.page([ONE_ROW, CELLS])
    assert ax.get_title(loc="left") == ONE_ROW.headline()


def test_on_axes_that_are_there(axes):
    places = Figure().subplots(3)
    assert view.page((TIME, MEMORY), places) == list(places[:2])
    with pytest.raises(ValueError, match=r"an axes for each of the 2 accounts; given: 1"):
        view.page((TIME, MEMORY), places[:1])


@pytest.mark.parametrize("given", [(), (CELLS,)])
def test_nothing_to_draw_is_said(given):
    with pytest.raises(ValueError, match="draws accounts in ns or bytes; given: none of these"):
        view.page(given)
