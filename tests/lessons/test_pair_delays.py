"""Delays between all pairs of ranks: what is made slow is found while the ranks go on."""

import time

import numpy as np
import pytest
import torch

from effkit.ranks import launching
from lessons import pair_delays
from lessons.pair_delays import delays
from lessons.slow_ranks import find_slow

needs_links = pytest.mark.skipif(bool(launching.why_no_links()), reason=launching.why_no_links())


@needs_links
def test_what_is_made_slow_is_found_while_the_ranks_go_on():
    slow = [
        None,
        {"sender": 1, "receiver": 2, "bytes_per_s": 20e6},
        {"sender": 3, "bytes_per_s": 20e6},
        {"receiver": 0, "bytes_per_s": 20e6},
        {"rank": 2, "bytes_per_s": 20e6},
        None,
    ]
    seen = delays(4, num_rounds=8, slow=slow, link_bytes_per_s=100e6)
    assert seen.shape == (6, 8, 4, 4)
    assert np.isnan(seen[:, :, np.eye(4, dtype=bool)]).all()
    assert (seen[:, :, ~np.eye(4, dtype=bool)] > 0).all()
    found = [find_slow(window) for window in seen]
    assert [(one.kind, one.rank, one.peer) if one else None for one in found] == [
        None, ("link", 1, 2), ("sender", 3, None), ("receiver", 0, None), ("rank", 2, None), None,
    ]  # fmt: skip


class Wire:
    """Two ranks of NCCL, of which this process is the second: calls return at once, and a message has arrived when the
    device has been waited for."""

    def __init__(self):
        self.arrivals = []

    def get_rank(self):
        return 1

    def get_world_size(self):
        return 2

    def barrier(self):
        pass

    def send(self, message, receiver):
        pass

    def recv(self, message, sender):
        self.arrivals.append((message, time.perf_counter_ns()))

    def synchronize(self):
        for message, sent_ns in self.arrivals:
            time.sleep(0.02)
            message[0] = sent_ns
        self.arrivals.clear()


def test_a_delay_lasts_until_the_message_is_there(monkeypatch):
    wire = Wire()
    monkeypatch.setattr(pair_delays, "dist", wire)
    monkeypatch.setattr(pair_delays, "synchronize", wire.synchronize)
    seen = pair_delays.between_pairs(2, torch.zeros(1, dtype=torch.int64))
    assert [(around, sender) for around, sender, _ in seen] == [(0, 0), (1, 0)]
    assert all(dur_ns >= 20_000_000 for _, _, dur_ns in seen)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_rounds": 0}, "num_rounds is at least 1"),
        ({"quickest_of": 0}, "quickest_of is at least 1"),
        ({"size_bytes": 4}, "size_bytes is at least 8"),
        ({"slow": []}, "given: an empty one"),
        ({"slow": {"sender": 7, "bytes_per_s": 1e6}}, "slow names ranks 0 to 3"),
        ({"slow": {"sender": 0}}, "slow has bytes_per_s"),
        ({"slow": {}}, "slow has bytes_per_s"),
        ({"slow": {"rank": 0, "sender": 1, "bytes_per_s": 1e6}}, "slow has bytes_per_s"),
        ({"slow": {"sender": 0, "receiver": 0, "bytes_per_s": 1e6}}, "two different ones for a link"),
        ({"slow": [None, {"rank": 4, "bytes_per_s": 1e6}]}, "slow names ranks 0 to 3"),
        ({"slow": {"rank": 1, "bytes_per_s": 0}}, "a rate above 0"),
        ({"slow": {"rank": 1, "bytes_per_s": 1e6}, "link_bytes_per_s": 0}, "is slower than a link"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ValueError, match=said) as error:
        delays(4, **given)
    assert "\n" not in str(error.value)


def test_a_link_that_cannot_be_made_is_refused(monkeypatch):
    monkeypatch.setattr(launching, "why_no_links", lambda: "not permitted")
    with pytest.raises(ValueError, match="no slower link can be made here: not permitted"):
        delays(2, slow={"rank": 1, "bytes_per_s": 1e6})
