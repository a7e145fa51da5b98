"""DeepEP's published latencies beside those that two of its sizes predict."""

import pytest

from lessons import deepep


def test_deepep_dispatch_within_five_percent_from_two_sizes():
    table = deepep.low_latency_table()
    unseen = table[(table["kind"] == "dispatch") & table["in_range"] & ~table["calibrated"]]
    assert unseen["ep"].tolist() == [64, 128, 256]
    assert (unseen["published_ns"] / 1e3).tolist() == [173, 192, 194]
    assert unseen["error"].abs().mean() <= 0.05
    assert table.attrs["mean_error"]["dispatch"] == pytest.approx(unseen["error"].abs().mean())


def test_deepep_combine_within_twelve_percent_from_two_sizes():
    table = deepep.low_latency_table()
    unseen = table[(table["kind"] == "combine") & table["in_range"] & ~table["calibrated"]]
    assert (unseen["published_ns"] / 1e3).tolist() == [314, 369, 360]
    assert unseen["error"].abs().mean() <= 0.12
    assert table.attrs["mean_error"]["combine"] == pytest.approx(unseen["error"].abs().mean())


def test_deepep_calibration_passes_through_its_two_sizes_and_sees_no_other(monkeypatch):
    table = deepep.low_latency_table()
    assert table.loc[table["calibrated"], "error"].abs().max() < 1e-9
    assert set(table.loc[table["calibrated"], "ep"]) == {16, 32}
    nonsense = {kind: {ep: us if ep in (16, 32) else 1.0 for ep, us in cells.items()}
                for kind, cells in deepep.PUBLISHED_US.items()}  # fmt: skip
    monkeypatch.setattr(deepep, "PUBLISHED_US", nonsense)
    assert deepep.low_latency_table()["predicted_ns"].tolist() == table["predicted_ns"].tolist()


def test_deepep_bytes_and_bandwidth_are_those_of_the_hardware():
    assert deepep.size_bytes("dispatch") / 1e6 == pytest.approx(7.57, abs=0.005)
    assert deepep.size_bytes("combine") / 1e6 == pytest.approx(14.68, abs=0.005)
    table = deepep.low_latency_table()
    assert (table["nvlink_bytes"] + table["nic_bytes"] == table["kind"].map(deepep.size_bytes)).all()
    for kind in deepep.MESSAGE_BYTES:
        fitted, _ = table.attrs["links"][kind]["nic_bytes_per_s"]
        assert fitted == pytest.approx(deepep.NIC_BYTES_PER_S, rel=0.1)
        assert 0 < table.attrs["links"][kind]["alpha_ns"][0] < 77_000  # less than a whole exchange within a node
    assert table.loc[table["ep"] > 8, "binds"].eq("nic").all()
    assert table.loc[table["ep"] == 8, "binds"].eq("nvlink").all()
    assert not table.loc[table["ep"] == 8, "in_range"].any()


def test_deepep_link_takes_the_slower_of_two():
    link = deepep.Link(alpha_ns=10.0, nic_bytes_per_s=1e9, nvlink_bytes_per_s=2e9)
    assert link.dur_ns(1000, 16) == pytest.approx(10 + 500)  # 500 bytes leave, 500 stay
    assert link.dur_ns(1000, 4) == pytest.approx(10 + 500)  # all stay
    narrow = deepep.Link(alpha_ns=10.0, nic_bytes_per_s=1e9, nvlink_bytes_per_s=1e8)
    assert narrow.dur_ns(1000, 16) == pytest.approx(10 + 5000)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: deepep.size_bytes("gather"), "kind is 'gather', expected one of"),
        (lambda: deepep.split(100, 12), "ep is 12, expected at most 8 ranks or a multiple"),
        (lambda: deepep.calibrate("dispatch", (16, 16)), "sizes is \\(16, 16\\), expected two different"),
        (lambda: deepep.low_latency_table((8, 16)), "sizes is \\(8, 16\\)"),
    ],
)
def test_wrong_questions_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
