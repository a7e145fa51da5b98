"""Allocator events become allocations: nothing is lost, nothing invented."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effkit import snapshot, trace


def memory(*events: tuple[int, int, int]) -> pd.DataFrame:
    """A memory frame of (time, address, signed size) events on one device."""
    times, addresses, sizes = zip(*events, strict=True) if events else ((), (), ())
    return pd.DataFrame(
        {
            "time_ns": np.array(times, dtype="int64"),
            "address": np.array(addresses, dtype="uint64"),
            "size_bytes": np.array(sizes, dtype="int64"),
            "total_bytes": np.cumsum(np.array(sizes, dtype="int64")),
            "device": pd.Series(["cpu"] * len(events), dtype="str"),
            "rank": np.zeros(len(events), dtype="int64"),
        }
    )


def paired(events: pd.DataFrame) -> pd.DataFrame:
    return snapshot.from_events(events, stacks=pd.Series(pd.NA, events.index, dtype="str"))


def live_bytes(allocations: pd.DataFrame, times: np.ndarray) -> np.ndarray:
    """Bytes alive after each time, from the allocations alone."""
    births, deaths = (allocations[name].fillna(never).to_numpy() for name, never in
                      (("alloc_ns", -1), ("free_ns", 2**62)))  # fmt: skip
    alive = (births[None, :] <= times[:, None]) & (deaths[None, :] > times[:, None])
    return alive @ allocations["size_bytes"].to_numpy()


def test_a_free_ends_the_allocation_at_its_address():
    found = paired(memory((1, 7, 100), (2, 8, 50), (3, 7, -100), (4, 7, 30), (5, 7, -30)))
    assert found["size_bytes"].tolist() == [100, 50, 30]
    assert found["alloc_ns"].tolist() == [1, 2, 4]
    assert found["free_ns"].tolist() == [3, pd.NA, 5]
    assert found.index.name == "allocation"
    assert tuple(found) == snapshot.ALLOCATION_COLUMNS
    assert str(found["alloc_ns"].dtype) == str(found["free_ns"].dtype) == "Int64"


def test_what_was_there_before_and_what_is_still_there():
    found = paired(memory((1, 7, -100), (2, 8, 50)))
    assert found["size_bytes"].tolist() == [100, 50]
    assert found["alloc_ns"].isna().tolist() == [True, False]
    assert found["free_ns"].isna().tolist() == [False, True]


def test_a_free_ends_one_allocation_only():
    found = paired(memory((1, 7, 100), (2, 7, -100), (3, 7, -30)))
    assert found["size_bytes"].tolist() == [30, 100], "what was there before comes first"
    assert found["free_ns"].tolist() == [3, 2]


def test_events_of_one_moment_keep_their_order():
    found = paired(memory((5, 7, 100), (5, 7, -100), (5, 7, 30), (9, 7, -30)))
    assert found["alloc_ns"].tolist() == [5, 7]
    assert found["free_ns"].tolist() == [6, 9]


def test_an_allocation_carries_the_stack_of_its_birth():
    events = memory((1, 7, 100), (2, 7, -100), (3, 8, -5), (4, 7, 30))
    found = snapshot.from_events(events, stacks=pd.Series(["a", "b", "c", "d"], dtype="str"))
    assert found["stack"].isna().tolist() == [True, False, False]
    assert found["stack"].tolist()[1:] == ["a", "d"]
    assert set(found["category"]) == {"unknown"}
    assert set(found["known_by"]) == {"not recorded"}
    without = paired(events)
    assert without["stack"].isna().all()
    assert without.dtypes.astype(str).to_dict() == found.dtypes.astype(str).to_dict()


def test_one_address_on_two_devices_is_two_places():
    events = memory((1, 7, 10), (2, 7, 20), (3, 7, -10))
    events["device"] = ["cpu", "device0", "cpu"]
    found = paired(events)
    assert found["free_ns"].tolist() == [3, pd.NA]
    assert found["device"].tolist() == ["cpu", "device0"]


def test_nothing_recorded_gives_an_empty_frame_of_the_same_types():
    full, empty = paired(memory((1, 7, 10))), paired(memory())
    assert empty.empty
    assert empty.dtypes.astype(str).to_dict() == full.dtypes.astype(str).to_dict()


@st.composite
def histories(draw) -> list[tuple[int, int, int]]:
    """What an allocator can do: addresses come back, some memory is older than the recording."""
    alive = dict(draw(st.dictionaries(st.integers(0, 5), st.integers(1, 1000), max_size=3)))
    events = []
    for time in range(1, draw(st.integers(1, 30))):
        address = draw(st.integers(0, 8))
        if address in alive:
            events.append((time, address, -alive.pop(address)))
        else:
            alive[address] = draw(st.integers(1, 1000))
            events.append((time, address, alive[address]))
    return events


@given(histories())
def test_replaying_gives_the_running_total(events):
    frame = memory(*events)
    found = paired(frame)
    before = int(found.loc[found["alloc_ns"].isna(), "size_bytes"].sum())
    assert live_bytes(found, frame["time_ns"].to_numpy()).tolist() == (frame["total_bytes"] + before).tolist()
    assert len(found) == (frame["size_bytes"] > 0).sum() + found["alloc_ns"].isna().sum()


def test_replaying_a_live_recording_gives_the_allocators_own_total(kineto):
    events = trace.read(kineto).memory
    # the allocator's count does not begin at zero when something was recorded before
    base = int(events["total_bytes"].iloc[0] - events["size_bytes"].iloc[0])
    last = events.drop_duplicates("time_ns", keep="last")
    found = paired(events)
    assert not found["alloc_ns"].isna().any()
    assert live_bytes(found, last["time_ns"].to_numpy()).tolist() == (last["total_bytes"] - base).tolist()
    assert found["size_bytes"].max() == pytest.approx(16 * 16 * 4)
