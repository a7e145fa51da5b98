"""Pictures of a step's memory and of the front of lever combinations, read back from the axes."""

import pandas as pd
import pytest

import effkit as ek
from effkit import view
from effkit.activations.timeline import PEAK


@pytest.fixture
def levels():
    return pd.DataFrame(
        {
            "parameter": [4, 4, 4, 4],
            "saved activation": [1, 8, 2, 0],
            "gradient": [0, 0, 3, 4],
            "buffer": [0, 0, 0, 0],
            "phase": ["forward", "forward", "backward", "optimizer"],
            "operator": ["mm", "relu", "mm", "add_"],
        }
    )


def test_the_peak_is_marked_where_it_is_and_named(levels):
    ax = view.live_bytes(levels)
    assert ax.get_title(loc="left") == "Peak 12 B in forward, at relu"
    mark = next(line for line in ax.lines if line.get_marker() == "v")
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([1], [12])


def test_phases_are_set_apart_and_empty_categories_left_out(levels):
    ax = view.live_bytes(levels)
    assert [text.get_text().strip() for text in ax.texts] == ["forward", "backward", "optimizer"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["parameter", "saved activation", "gradient"]


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "setting": ["plain", "a", "b"],
            "peak_bytes": [100, 60, 70],
            "step_ns": [10, 20, 30],
            "lossless": [True, True, False],
            "on_front": [True, True, False],
        }
    )


def receipt(peak, time, guess):
    def account(total, ns, **band):
        step = ek.Account.of("Time of one step", "ns", {"step": ns}, total=ns, source="clock")
        return ek.Account.of(PEAK, "bytes", {"x": total}, total=total, source="x", companions=(step,), **band)

    return ek.Receipt(account(guess, time, low=guess, high=guess), account(peak, time))


def test_the_front_is_joined_and_measurements_are_crosses(table):
    ax = view.front(table, [receipt(58, 21, 60)])
    joined = ax.lines[0]
    assert (list(joined.get_xdata()), list(joined.get_ydata())) == ([10, 20], [100, 60])
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert [(list(x.get_xdata()), list(x.get_ydata())) for x in crosses] == [([21], [58])]
    assert sum(len(points.get_offsets()) for points in ax.collections) == 3


def test_lossy_combinations_are_told_from_exact_ones(table):
    words = [text.get_text() for text in view.front(table).get_legend().get_texts()]
    assert words == ["changes gradients or updates", "exact gradients"]
