"""What lessons alone draw, read back from the axes."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lessons import drawing

MS = 1_000_000


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
