"""Pictures of several ranks, read back from the axes."""

import pandas as pd
import pytest
from matplotlib.collections import PolyCollection

from effkit import view


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
    ax = view.timeline(stretches)
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
    ax = view.timeline(stretches)
    waiting = next(bar for bar in ax.collections if bar.get_label() == "dispatch waiting")
    corners = waiting.get_paths()[0].vertices
    assert (corners[:, 0].min(), corners[:, 0].max()) == (40, 60)
    assert corners[:, 1].min() == pytest.approx(0.42), "in the lane of the link of rank 0"


def test_policies_say_what_they_drop():
    table = pd.DataFrame({"step_ns": [100, 80], "dropped_frac": [0.0, 0.12]}, index=["now", "capacity 1.0"])
    ax = view.policies(table)
    assert [bar.get_width() for bar in ax.patches] == [100, 80]
    assert [text.get_text().strip() for text in ax.texts] == ["100 ns", "80 ns, drops 12%"]
