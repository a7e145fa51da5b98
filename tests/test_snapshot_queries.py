"""Timelines, what is alive at a moment, and the account of a peak."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effkit import snapshot


def allocations(*rows: tuple, device: str = "device0") -> pd.DataFrame:
    """Rows of (size, birth, end), each with a category and a stack of its own."""
    size, birth, end = zip(*rows, strict=True) if rows else ((), (), ())
    return pd.DataFrame(
        {
            "size_bytes": np.array(size, dtype="int64"),
            "alloc_ns": pd.array(birth, dtype="Int64"),
            "free_ns": pd.array(end, dtype="Int64"),
            "device": pd.Series([device] * len(rows), dtype="str"),
            "rank": np.zeros(len(rows), dtype="int64"),
            "stack": pd.Series([f"a.py:{i} f" for i in range(len(rows))], dtype="str"),
            "category": pd.Series([("gradient", "input", "workspace")[i % 3] for i in range(len(rows))], dtype="str"),
            "known_by": pd.Series(["stack"] * len(rows), dtype="str"),
        }
    ).rename_axis("allocation")


SOME = allocations((100, None, None), (10, 5, 9), (20, 7, 8), (40, 20, None), (7, None, 30))

lives = st.tuples(
    st.integers(1, 1000),
    st.one_of(st.none(), st.integers(0, 10**18)),
    st.one_of(st.none(), st.integers(1, 10**18)),
).map(lambda row: row if row[1] is None or row[2] is None or row[1] < row[2] else (row[0], row[1], None))


def running(frame: pd.DataFrame) -> dict[int, int]:
    """Bytes after each moment, the slow way; before all of them under -1."""
    moments = sorted({*frame["alloc_ns"].dropna(), *frame["free_ns"].dropna()})
    return {-1: int(frame["size_bytes"][frame["alloc_ns"].isna()].sum())} | {
        moment: sum(
            size
            for size, birth, end in zip(frame["size_bytes"], frame["alloc_ns"], frame["free_ns"], strict=True)
            if (birth is pd.NA or birth <= moment) and (end is pd.NA or end > moment)
        )
        for moment in moments
    }


def test_what_is_alive_from_birth_until_just_before_the_end():
    assert snapshot.at(SOME, 4)["size_bytes"].tolist() == [100, 7]
    assert snapshot.at(SOME, 5)["size_bytes"].tolist() == [100, 10, 7]
    assert snapshot.at(SOME, 8)["size_bytes"].tolist() == [100, 10, 7]
    assert snapshot.at(SOME, 30).index.tolist() == [0, 3]
    assert snapshot.at(allocations(), 3).empty


def stacks_at_the_peak(frame):
    return [*snapshot.account(frame, peak_bytes=147, source="x", device="device0", by="stack").frame.index]


def test_the_first_of_equal_peaks():
    assert set(stacks_at_the_peak(SOME)) == set(snapshot.at(SOME, 20)["stack"])
    assert stacks_at_the_peak(allocations((5, 3, 4), (5, 8, 9))) == ["a.py:0 f"]
    assert stacks_at_the_peak(allocations((5, None, 4), (5, 8, 9))) == ["a.py:0 f"], "just before the first event"


@given(st.lists(lives, min_size=1, max_size=30), st.integers(1, 50))
def test_a_timeline_keeps_the_peak_in_however_few_points(rows, num_points):
    frame = allocations(*rows)
    truth = running(frame)
    line = snapshot.timeline(frame, num_points=num_points)
    assert len(line) <= num_points
    assert line["time_ns"].is_monotonic_increasing
    assert line["reserved_bytes"].isna().all()
    if len(truth) == 1:
        assert line.empty, "nothing came or went"
        return
    assert line["allocated_bytes"].max() == max(truth.values())
    peak = snapshot.account(frame, peak_bytes=max(truth.values()), source="x", device="device0")
    assert peak.residual == 0
    before, *after = zip(line["time_ns"], line["allocated_bytes"], strict=True)
    assert before[1] in (truth[-1], truth.get(before[0]))
    assert all(truth[time] == level for time, level in after)
    if num_points > 1:
        assert line["allocated_bytes"].iloc[-1] == list(truth.values())[-1]


def test_a_timeline_of_two_devices_with_what_was_reserved():
    both = pd.concat([SOME, allocations((3, 1, 2), device="device1")])
    segments = allocations((300, None, None), (50, 6, 20))[list(snapshot.SEGMENT_COLUMNS)]
    line = snapshot.timeline(both, segments)
    assert list(line) == ["time_ns", "device", "allocated_bytes", "reserved_bytes"]
    first = line[line["device"] == "device0"]
    assert first["time_ns"].tolist() == [4, 5, 7, 8, 9, 20, 30]
    assert first["allocated_bytes"].tolist() == [107, 117, 137, 117, 107, 147, 140]
    assert first["reserved_bytes"].tolist() == [300, 350, 350, 350, 350, 300, 300], "the most until the next row"
    second = line[line["device"] == "device1"]
    assert second["allocated_bytes"].tolist() == [0, 3, 0]
    assert second["reserved_bytes"].isna().all(), "not recorded, so not visible"
    assert line.dtypes.astype(str).to_dict() == snapshot.timeline(allocations()).dtypes.astype(str).to_dict()
    with pytest.raises(ValueError, match="at least one point"):
        snapshot.timeline(SOME, num_points=0)


def test_the_account_of_a_peak_by_category():
    found = snapshot.account(SOME, peak_bytes=147, source="the allocator", device="device0")
    assert found.frame["value"].to_dict() == {"gradient": 140, "input": 7}
    assert (found.total, found.residual, found.unit, found.source) == (147, 0, "bytes", "the allocator")
    assert set(found.frame["basis"]) == {"measured"}
    assert found.companions == ()
    assert snapshot.account(SOME, peak_bytes=200, source="x", device="device0").residual == 53, "shown, not folded in"


def test_the_account_of_another_moment():
    found = snapshot.account(SOME, peak_bytes=137, source="x", device="device0", at_ns=7)
    assert found.frame["value"].to_dict() == {"gradient": 100, "workspace": 20, "input": 17}
    assert "7 ns" in found.title


def test_the_account_by_stack_says_how_many_others():
    frame = allocations(*((i + 1, None, None) for i in range(20)))
    frame.loc[19, "stack"] = np.nan
    found = snapshot.account(frame, peak_bytes=210, source="x", device="device0", by="stack", num_rows=3)
    assert found.frame["value"].to_dict() == {
        "not recorded": 20,
        "a.py:18 f": 19,
        "a.py:17 f": 18,
        "17 other stacks": 153,
    }
    assert found.residual == 0
    whole = snapshot.account(frame, peak_bytes=210, source="x", device="device0", by="stack", num_rows=20)
    assert len(whole.frame) == 20


def test_a_library_says_how_memory_was_asked_for_and_ones_own_code_for_what():
    frame = allocations((1, None, None), (2, None, None))
    frame["stack"] = [
        "torch/functional.py:7 einsum < code/model.py:12 forward < code/train.py:3 step",
        "torch/functional.py:7 einsum < site-packages/accelerate/hooks.py:165 hook < code/train.py:3 step",
    ]
    stacks, places = (
        snapshot.account(frame, peak_bytes=3, source="x", device="device0", by=by).frame.index.tolist()
        for by in ("stack", "place")
    )
    assert stacks == ["code/train.py:3 step", "code/model.py:12 forward < code/train.py:3 step"]
    assert places == [
        "code/train.py:3 step, in torch/functional.py:7 einsum",
        "code/model.py:12 forward, in torch/functional.py:7 einsum",
    ]


def test_what_was_reserved_stands_beside_it():
    segments = allocations((300, None, None), (50, 6, 20), (60, 25, None))[list(snapshot.SEGMENT_COLUMNS)]
    found = snapshot.account(SOME, peak_bytes=147, source="x", device="device0", segments=segments)
    (reserved,) = found.companions
    assert reserved.frame["value"].to_dict() == {"allocated": 147, "reserved but not allocated": 153}
    assert (reserved.total, reserved.residual) == (300, 0)
    elsewhere = segments.assign(device="device3")
    assert not snapshot.account(SOME, peak_bytes=147, source="x", device="device0", segments=elsewhere).companions


def test_an_account_asks_for_what_it_can_answer():
    with pytest.raises(ValueError, match="by category or by stack or by place; given: 'size'"):
        snapshot.account(SOME, peak_bytes=1, source="x", device="device0", by="size")
    with pytest.raises(ValueError, match=r"'cuda'; devices with allocations: device0"):
        snapshot.account(SOME, peak_bytes=1, source="x", device="cuda")
