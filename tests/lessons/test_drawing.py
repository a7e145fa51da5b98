"""What lessons alone draw, read back from the axes."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

import effkit as ek
from effkit.activations.timeline import PEAK
from lessons import drawing

US, MS = 1_000, 1_000_000


def test_it_draws_into_axes_that_are_given():
    ax = Figure().add_subplot()
    assert drawing.curves(pd.DataFrame({"time_ns": [1, 2]}), "ns", ax) is ax


def test_one_line_per_column_and_from_zero_where_asked():
    times = pd.DataFrame({"cache": [3 * MS, 4 * MS, 5 * MS], "none": [3 * MS, 6 * MS, 9 * MS]}, index=[1, 2, 3])
    ax = drawing.curves(times.rename_axis("token"), "ns", title="Time", zero=True)
    assert ax.get_title(loc="left") == "Time"
    assert {line.get_label(): line.get_ydata().tolist() for line in ax.lines} == times.to_dict("list")
    assert all(line.get_xdata().tolist() == [1, 2, 3] for line in ax.lines)
    assert ax.get_xlabel() == "token"
    assert ax.get_ylim()[0] == 0
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["cache", "none"]
    assert len({line.get_color() for line in ax.lines}) == len({line.get_marker() for line in ax.lines}) == 2
    assert ax.yaxis.get_major_formatter()(2 * MS, 0) == "2.0 ms"
    assert ax.yaxis.get_major_formatter()(0, 0) == "0", "zero is the same in all units"
    assert all(tick == int(tick) for tick in ax.get_xticks()), "there is no half token"


def test_many_points_have_no_markers_and_one_line_no_legend():
    ax = drawing.curves(pd.DataFrame({"time_ns": range(40)}), "ns")
    assert ax.lines[0].get_marker() in (None, "None", "")
    assert ax.get_legend() is None


def test_contexts_that_double_are_drawn_on_logarithms():
    sizes = pd.DataFrame({"keys and values": [2**20, 2**21, 2**22], "state": 3 * [2**19]}, index=[1024, 2048, 4096])
    ax = drawing.curves(sizes.rename_axis("context"), "bytes", log=True)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1,024", "2,048", "4,096"]
    assert ax.yaxis.get_major_formatter()(2**20, 0) == "1.0 MiB"


def test_what_lies_close_together_is_told_apart_and_seeds_and_target_are_drawn():
    losses = pd.DataFrame({"plain": [3.0, 2.5], "new": [3.0, 2.4]}, index=[0, 10])
    seeds = {"new": pd.DataFrame({0: [3.1, 2.3], 1: [2.9, 2.5]}, index=[0, 10])}
    ax = drawing.curves(losses, "nats", title="Loss", target=2.45, runs=seeds)
    assert ax.get_ylim()[0] > 2, "the axis does not begin at zero"
    thin = [line for line in ax.lines if line.get_alpha()]
    assert [line.get_ydata().tolist() for line in thin] == [[3.1, 2.3], [2.9, 2.5]]
    assert {line.get_color() for line in thin} == {ax.get_legend().get_lines()[1].get_color()}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["plain", "new", "target"]
    (target,) = [line for line in ax.lines if line.get_label() == "target"]
    assert set(target.get_ydata()) == {2.45}


def test_bytes_have_ticks_at_powers_of_two():
    sizes = pd.DataFrame({"kept": [0.75 * 2**20, 9.06 * 2**20]}, index=[2, 24])
    ax = drawing.curves(sizes, "bytes", zero=True)
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()
    assert low == 0
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    assert [ax.yaxis.get_major_formatter()(tick, 0) for tick in ticks[:3]] == ["0", "2.0 MiB", "4.0 MiB"]


def test_a_unit_that_is_neither_time_nor_bytes_is_named():
    ax = drawing.curves(pd.DataFrame({"nested": [0.5, 0.25]}, index=[1, 2]), "nats per token")
    assert ax.get_ylabel() == "nats per token"
    assert ax.yaxis.get_major_formatter()(0.25, 0) == "0.25"


def test_delays_are_written_into_their_cells():
    matrix = np.array([[[np.nan, 3.0], [9.0, np.nan]], [[np.nan, 5.0], [9.0, np.nan]]])
    ax = drawing.delays(matrix)
    assert {(text.get_position(), text.get_text()) for text in ax.texts} == {((1, 0), "4 ns"), ((0, 1), "9 ns")}
    assert ax.get_ylabel() == "sender"


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
    ax = drawing.live_bytes(levels)
    assert ax.get_title(loc="left") == "Peak 12 B in forward, at relu"
    mark = next(line for line in ax.lines if line.get_marker() == "v")
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([1], [12])


def test_phases_are_set_apart_and_empty_categories_left_out(levels):
    ax = drawing.live_bytes(levels)
    assert [text.get_text().strip() for text in ax.texts] == ["forward", "backward", "optimizer"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["parameter", "saved activation", "gradient"]


@pytest.fixture
def combinations():
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


def test_the_front_is_joined_and_measurements_are_crosses(combinations):
    ax = drawing.front(combinations, [receipt(58, 21, 60)])
    joined = ax.lines[0]
    assert (list(joined.get_xdata()), list(joined.get_ydata())) == ([10, 20], [100, 60])
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert [(list(x.get_xdata()), list(x.get_ydata())) for x in crosses] == [([21], [58])]
    assert sum(len(points.get_offsets()) for points in ax.collections) == 3


def test_lossy_combinations_are_told_from_exact_ones(combinations):
    words = [text.get_text() for text in drawing.front(combinations).get_legend().get_texts()]
    assert words == ["changes gradients or updates", "exact gradients"]


@pytest.fixture
def floors():
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


def test_each_part_stands_beside_what_was_measured_apart_and_its_floor(floors):
    ax = drawing.roofline(floors)
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


@pytest.fixture
def stretches():
    return pd.DataFrame(
        [
            (0, "computing", "experts", 0, 40),
            (0, "link", "dispatch waiting", 40, 60),
            (0, "link", "dispatch moving", 60, 90),
            (1, "computing", "experts", 0, 60),
            (1, "link", "dispatch moving", 60, 90),
        ],
        columns=["rank", "lane", "what", "start_ns", "end_ns"],
    )


def test_every_rank_has_two_lanes_and_waiting_is_hatched(stretches):
    ax = drawing.timeline(stretches)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "rank 0 computing", "rank 0 link", "rank 1 computing", "rank 1 link",
    ]  # fmt: skip
    bars = {(bar.get_label(), bar.get_hatch()) for bar in ax.collections if isinstance(bar, PolyCollection)}
    assert ("dispatch waiting", "////") in bars
    assert ("dispatch moving", None) in bars
    assert ("experts", None) in bars
    shown = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(shown) == ["dispatch moving", "dispatch waiting", "experts"], "each once"


def test_bars_begin_and_end_where_the_stretches_do(stretches):
    ax = drawing.timeline(stretches)
    waiting = next(bar for bar in ax.collections if bar.get_label() == "dispatch waiting")
    corners = waiting.get_paths()[0].vertices
    assert (corners[:, 0].min(), corners[:, 0].max()) == (40, 60)
    assert corners[:, 1].min() == pytest.approx(0.42), "in the lane of the link of rank 0"


def test_policies_say_what_they_drop():
    table = pd.DataFrame({"step_ns": [100, 80], "dropped_frac": [0.0, 0.12]}, index=["now", "capacity 1.0"])
    ax = drawing.policies(table)
    assert [bar.get_width() for bar in ax.patches] == [100, 80]
    assert [text.get_text().strip() for text in ax.texts] == ["100 ns", "80 ns, drops 12%"]
