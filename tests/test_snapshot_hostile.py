"""Memory snapshots are pickles that others made: plain data is read, anything else is refused before it can do harm."""

import os
import pickle
import random
import struct
import subprocess
import sys
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import pytest

from effkit import snapshot


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch '{self.sentinel}'",)


def plain(num_events: int = 60) -> dict:
    """A small honest snapshot."""
    frames = [{"filename": "/home/me/code/train.py", "line": line, "name": f"step{line}"} for line in range(4)]
    trace, blocks = [], []
    for i in range(num_events // 3):
        place = {"addr": 4096 + 512 * i, "size": 100 + i, "stream": 0, "frames": frames[i % 3 :]}
        actions = ("segment_alloc", "alloc", "free_requested", "free_completed")[1 if i else 0 : 2 if i % 2 else 4]
        for action in actions:
            size = 512 * (num_events // 3) if action == "segment_alloc" else place["size"]
            trace.append({"action": action, "time_us": 10**15 + len(trace) // 2, **place, "size": size})
        state = "active_allocated" if i % 2 else "inactive"
        blocks.append({"address": place["addr"], "size": 512, "requested_size": 100 + i, "state": state, "frames": []})
    segment = {"device": 0, "address": 4096, "total_size": 512 * len(blocks), "stream": 0, "blocks": blocks}
    segment |= {"segment_pool_id": (0, 0), "is_expandable": False}
    return {"segments": [segment], "device_traces": [trace], "allocator_settings": {"ratio": 0.5, "conf": None}}


def refusal(content: bytes) -> str:
    with pytest.raises(ValueError, match=r"^not a memory snapshot") as caught:
        snapshot.read(content)
    message = str(caught.value)
    assert message.count("; ") >= 1, "what was given; what was expected; what to do"
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_of_every_protocol_is_read_as_it_is(protocol):
    data = plain() | {
        "long": "é" * 300,
        "numbers": [0, 255, 256, -1, 2**31, 2**62, -(2**63), 1.5],
        "ids": [(7,), (1, 2, 3)],
    }
    assert snapshot.unpickle(pickle.dumps(data, protocol)) == data


def test_a_snapshot_that_many_objects_are_shared_in_is_read():
    shared = [{"filename": "a.py", "line": i, "name": "f"} for i in range(400)]
    data = {"segments": [], "device_traces": [[{"action": "other", "frames": shared[i:]} for i in range(400)]]}
    for protocol in (2, 4):
        assert snapshot.unpickle(pickle.dumps(data, protocol)) == data


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_in_a_pickle_is_named_and_not_run(protocol, tmp_path):
    sentinel = tmp_path / "ran"
    content = pickle.dumps({"segments": [], "x": Runs(sentinel)}, protocol)
    assert "system" in refusal(content)
    assert not sentinel.exists()
    pickle.loads(content)
    assert sentinel.exists(), "the attack must work on an unpickler that does not look"


@pytest.mark.parametrize("protocol", [2, 4])
def test_harmless_classes_are_refused_just_the_same(protocol):
    assert "collections.OrderedDict" in refusal(pickle.dumps(OrderedDict(a=1), protocol))


@pytest.mark.parametrize("code", [b"R", b"b", b"i", b"o", b"Q", b"P", b"\x81", b"\x82", b"\x83", b"\x84", b"\x92"])
def test_instructions_that_build_objects_are_refused(code):
    assert "builds objects" in refusal(b"\x80\x04}" + code + b"__main__\nx\n.")


def test_the_unpickler_itself_finds_no_global():
    from effkit.snapshot.unpickling import _Plain

    with pytest.raises(ValueError, match=r"os\.system"):
        _Plain(BytesIO(b"cos\nsystem\n.")).load()
    with pytest.raises(ValueError, match="outside the file"):
        _Plain(BytesIO(b"Pname\n.")).load()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"{}", b"PK\x03\x04", b"\x80", b"\x80\x04.", b"\x80\x04K\x01.",
     b"\x80\x04].", b"\x80\x04}.", b"(lp0\n.", pickle.dumps({"segments": 3}), pickle.dumps({"segments": [{}]}),
     pickle.dumps([[]]),
     pickle.dumps({"device_traces": [[]]}), pickle.dumps({"segments": [], "device_traces": [[{"addr": 3}]]})],
)  # fmt: skip
def test_what_is_no_snapshot_is_refused_in_one_sentence(content):
    refusal(content)


def keys_in_keys(depth: int = 40) -> bytes:
    """t = (t, t), so many times over, as a key: hashing it visits 2**depth tuples."""
    pairs = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth))
    return b"\x80\x02K\x01K\x01\x86q\x00" + pairs + b"}h%cK\x01s." % depth


def test_the_bomb_of_keys_is_one():
    assert pickle.loads(keys_in_keys(2)) == {(((1, 1), (1, 1)), ((1, 1), (1, 1))): 1}


BOMBS = {
    "a memo of 2**32 places": b"\x80\x02}r\xff\xff\xff\xff.",
    "a text of 2**62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "a bytearray of 2**40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
    "a frame of 2**62 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "tuples in tuples as keys": keys_in_keys(),
    "many empty dicts": b"\x80\x04](" + b"}" * 40_000_000 + b"e.",
    "deep nesting": b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a list within itself": b"\x80\x04}\x8c\x08segments]\x94h\x00as.",
    "one long name many times": pickle.dumps({"segments": [], "device_traces": [[
        {"action": "alloc", "addr": 1, "size": 1, "frames": [{"filename": "?", "line": 1, "name": "x" * 10**6}] * 10**5}
    ]]}),
}  # fmt: skip

UNDER_LIMITS = """
import resource, sys, time
from pathlib import Path
from effkit import snapshot
import effkit.snapshot.replaying  # what it needs is loaded before the limit is set
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
content, began = Path(sys.argv[1]).read_bytes(), time.perf_counter()
try:
    snapshot.read(content)
except ValueError as error:
    assert time.perf_counter() - began < 10
    # refused because it was looked at, not because the memory ran out in time
    sys.exit(0 if str(error).startswith("not a memory snapshot") and "MemoryError" not in str(error) else str(error))
sys.exit(2)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory by what Linux tells of it")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_in_ten_seconds_and_one_gigabyte(bomb, tmp_path):
    (tmp_path / "bomb.pickle").write_bytes(BOMBS[bomb])
    command = [sys.executable, "-c", UNDER_LIMITS, str(tmp_path / "bomb.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_snapshot_cut_off_anywhere_is_refused():
    content = pickle.dumps(plain())
    for twelfth in range(12):
        refusal(content[: len(content) * twelfth // 12])
    refusal(content[:-1])


@pytest.mark.parametrize("protocol", [2, 4])
def test_flipped_bytes_are_refused_or_change_nothing_that_must_add_up(protocol):
    content = pickle.dumps(plain(), protocol)
    whole, draw, refused = snapshot.read(content), random.Random(7), []
    for _ in range(1500):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        try:
            found = snapshot.read(bytes(damaged))
        except ValueError as error:
            refused.append(str(error))
            continue
        for facts in found.facts["devices"].values():
            assert facts["peak_bytes"] <= facts["peak_reserved_bytes"]
        assert set(found.allocations) == set(whole.allocations)
    assert 500 < len(refused) < 1500
    assert all(message.startswith("not a memory snapshot") for message in refused)
