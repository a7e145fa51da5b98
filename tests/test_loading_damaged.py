"""Damaged, foreign and hostile files: refused in one line, within ten seconds and a gibibyte, and nothing in them runs.

A byte that flips inside a name or a number cannot be noticed. Then the file loads, and the panes of what was loaded
raise nothing but a ValueError.
"""

import gzip
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from test_loading import trace_of, write

import effkit as ek

SECONDS, NUM_CUT, NUM_FLIPPED = 10, 18, 26
PANES = "overview", "operators", "kernels", "communication", "rank_pairs", "memory", "memory_timeline"

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory by what Linux tells of it")

# Opens each file of a folder in turn, and says what came of it. The limit is set when effkit is imported, not later.
OPENS = f"""
import json, resource, sys, time
from pathlib import Path
import matplotlib
matplotlib.use("agg")
from matplotlib import pyplot
import effkit as ek, effkit.view
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))

def cause(error):
    return type(error).__name__ if error.__cause__ is None else cause(error.__cause__)

def trial(function):
    try:
        return function(), None
    except BaseException as error:
        kind = type(error).__name__ if isinstance(error, (ValueError, OSError)) else "?" + type(error).__name__
        return None, [kind, str(error), cause(error)]

for path in sorted(Path(sys.argv[1]).iterdir()):
    began = time.perf_counter()
    seen, refusal = trial(lambda: ek.load(path))
    panes = dict() if seen is None else {{pane: trial(getattr(seen, pane))[1] for pane in {PANES}}}
    if seen is not None:
        panes["repr"] = trial(lambda: repr(seen))[1]
        if path.name.startswith("shape"):
            panes["out_of_memory"] = trial(seen.out_of_memory)[1]
            panes["plot"] = trial(lambda: seen.plot("communication").figure.canvas.draw())[1]
    in_list = trial(lambda: ek.load([path]).overview())[1] if path.name.startswith("shape") else None
    took = time.perf_counter() - began
    print(json.dumps([path.name, dict(refusal=refusal, panes=panes, in_list=in_list, took=took)]), flush=True)
"""


def snapshot(alloc_size=100) -> dict:
    frames = [{"filename": "train.py", "line": line, "name": f"step{line}"} for line in range(3)]
    blocks, events = [], [{"action": "segment_alloc", "addr": 4096, "size": 512 * 20}]
    for i in range(20):
        place = {"addr": 4096 + 512 * i, "size": alloc_size + i, "frames": frames[i % 3 :]}
        events += [{"action": "alloc", **place}, {"action": "free_completed", **place}][: 1 + i % 2]
        state = "inactive" if i % 2 else "active_allocated"
        blocks.append({"address": 4096 + 512 * i, "size": 512, "requested_size": 100 + i, "state": state, "frames": []})
    events = [{"stream": 0, "time_us": 10**15 + i, **event} for i, event in enumerate(events)]
    segment = {"device": 0, "address": 4096, "total_size": 512 * 20, "stream": 0, "blocks": blocks}
    return {"segments": [segment], "device_traces": [events]}


def repacked(saved: bytes, events: bytes | None = None, **changes) -> bytes:
    """A saved capture with some of its header's fields replaced."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        header = json.loads(old.read("capture.json"))
        new.writestr("capture.json", json.dumps(header | changes))
        for name in ("events.csv", "allocations.csv"):
            new.writestr(name, events if events is not None and name == "events.csv" else old.read(name))
    return out.getvalue()


def retyped(saved: bytes, column: str, kind: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(saved)) as old:
        columns = json.loads(old.read("capture.json"))["columns"]
    columns["events"][column] = kind
    return repacked(saved, columns=columns)


def damaged_copies(files: dict[str, bytes]) -> dict[str, bytes]:
    draw, made = random.Random(7), {}
    for suffix, content in files.items():
        for number in range(NUM_CUT):
            made[f"cut{number}{suffix}"] = content[: draw.randrange(1, len(content.rstrip()))]
        for number in range(NUM_FLIPPED):
            damaged = bytearray(content)
            for _ in range(draw.choice([1, 1, 3, 20])):
                damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            made[f"flip{number}{suffix}"] = bytes(damaged)
        made[f"empty{suffix}"] = b""
        made[f"picture{suffix}"] = b"\x89PNG\r\n\x1a\n" + bytes(500)
    return made


class Runs:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch '{self.sentinel}'",)


def hostile(sentinel: Path) -> dict[str, bytes]:
    """Pickles that run a command where they are unpickled without looking."""
    made = {
        f"hostile{protocol}.pickle": pickle.dumps(snapshot() | {"x": Runs(sentinel)}, protocol)
        for protocol in (0, 2, 4)
    }
    made["hostile.json"] = made["hostile4.pickle"]
    assert b"\x93" in made["hostile4.pickle"], "STACK_GLOBAL"
    assert b"cposix\nsystem\n" in made["hostile2.pickle"], "GLOBAL"
    return made


def bomb(start: bytes, unit: bytes, end: bytes, num_bytes: int = 2**31) -> bytes:
    """Gigabytes in a small gzip file: one compressed member again and again."""
    block = unit * (2**24 // len(unit))
    return gzip.compress(start) + gzip.compress(block) * (num_bytes // len(block)) + gzip.compress(end)


def bombs(saved: bytes) -> dict[str, bytes]:
    open_, close = b'{"traceEvents": [{"ph": "X"}', b"]}"
    return {
        "bomb of zeros.json.gz": bomb(b"", b"\0", b""),
        "bomb of spaces.json.gz": bomb(open_, b" ", close),
        "bomb of tiny events.json.gz": bomb(open_, b',{"ph":"X"}', close),
        "bomb of no events.json.gz": bomb(open_, b",{}", close),
        "bomb of one name.json.gz": bomb(b'{"traceEvents": [{"ph": "X", "name": "', b"a", b'"}]}'),
        "bomb of brackets.json": b'{"traceEvents": [' + b"[" * 10**7,
        "bomb of bad names.json": b'{"traceEvents": [' + b'{"name": "a"b ' * 10**6,
        "bomb of names.json": b'{"traceEvents": [' + b'{"name": "a", "ph": "X", "x": NaN},' * 4 * 10**5,
        "bomb of zeros.zip": repacked(saved, bytes(2**30 + 2**28)),
        "bomb of lines.zip": repacked(saved, b"1,2\n" * 2**26),
    }


def event(**more) -> dict:
    return {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 1, "dur": 2} | more


def gloo(**args) -> dict:
    moved = {"Input Dims": [[4, 2]], "Input type": ["float"]}
    return event(name="gloo:all_to_all", cat="user_annotation", args=moved | args)


def nest(depth: int, make=lambda number: event(name=f"f{number}")) -> list[dict]:
    """Each event within the one before it."""
    return [make(number) | {"ts": number, "dur": 3 * depth - 2 * number} for number in range(depth)]


def kernels(number: int) -> list[dict]:
    """Each launched within a nest of so many events, at its innermost."""
    launches = [
        event(name="cudaLaunchKernel", cat="cuda_runtime", ts=number + i / number, dur=0) for i in range(number)
    ]
    works = [event(name="k", cat="kernel", tid=7, ts=2 * i, dur=1) for i in range(number)]
    return [one | {"args": {"correlation": i + 1}} for all_ in (launches, works) for i, one in enumerate(all_)]


def moments(number: int) -> list[dict]:
    """Allocations after the inner ones of such a nest have ended."""
    args = {"Addr": 64, "Bytes": 64, "Total Allocated": 64, "Device Type": 0}
    return [event(ph="i", name="[memory]", ts=2 * number + i, args=args) for i in range(number)]


def traces_of_another_shape() -> dict[str, bytes]:
    """Lists for dicts, texts for numbers, what is nested too deeply or too large, values that contradict each other."""
    deep = "[" * 30_000
    events = {
        "events": {"a": 1}, "list": [[]], "number": [3], "text": ["x"], "time": [event(ts="1")],
        "name": [event(name=3)], "args": [event(args=[1])], "category": [event(cat=None)],
        "long": [event(ts=9.2e15, dur=9.2e15)] * 2, "backwards": [event(dur=-5), event(ts=-9e15), event(ts=9e15)],
        "deep text": [gloo(**{"Input Dims": deep})], "deep types": [gloo(**{"Input type": deep})],
        "huge": [gloo(**{"Input Dims": [[2**62, 2**62]]})],
        "huge count": [gloo(**{"In msg nelems": 2**62, "dtype": "Float"})], "no group": [gloo(**{"Group size": 0})],
        "less than a group": [gloo(**{"Group size": -2})], "vast group": [gloo(**{"Group size": 2**40})],
        "texts": [gloo(**{"In split size": ["a"], "Process Group Ranks": {"a": 1}})],
        "splits": [gloo(**{"In split size": [0, 0], "Process Group Ranks": [[1], {}]})],
        "minus": [gloo(**{"In split size": [-3, 3], "Input Dims": [[-1]]})],
        "deep splits": [gloo(**{"In split size": deep, "Process Group Ranks": deep})],
        "device alone": [event(cat="kernel", args={"est. achieved occupancy %": 1e308, "correlation": -1})] * 2,
        "memory": [event(ph="i", name="[memory]", args={"Addr": 2**64 - 1, "Bytes": size, "Total Allocated": -size,
                                                        "Device Type": kind})
                   for size in (2**62, -(2**63)) for kind in (0, 1)],
    }  # fmt: skip
    beside = [
        {"distributedInfo": []}, {"deviceProperties": [3]}, {"baseTimeNanoseconds": "x"}, {"host_name": {}},
        {"distributedInfo": {"rank": [1], "world_size": "4", "backend": {}}}, {"deviceProperties": [{"name": {}}]},
    ]  # fmt: skip
    events |= {"nest": nest(40_000), "nest of collectives": nest(8_000, lambda _: gloo()),
               "nest and kernels": nest(20_000) + kernels(20_000), "nest and moments": nest(20_000) + moments(20_000),
               "collectives over kernels": [gloo(dur=1e6, tid=2, ts=0)] * 4_000 + kernels(4_000),
               "long collective": [gloo() | {"name": "gloo:" + "x" * 100_000}]}  # fmt: skip
    nested = deep + "]" * len(deep)
    made = {name: json.dumps({"traceEvents": listed}) for name, listed in events.items()}
    made |= {f"beside {n}": json.dumps({"traceEvents": [event()]} | more) for n, more in enumerate(beside)}
    made |= {f"deep {key}": json.dumps({"traceEvents": [event(args={key: 77})]}).replace("77", nested)
             for key in ("x", "Input Dims", "bytes")}  # fmt: skip
    made |= {"a number": "3", "a text": '"traceEvents"', "no key": "{}", "no event": "[]"}
    return {f"shape {name}.json": text.encode() for name, text in made.items()}


def others_of_another_shape(saved: bytes) -> dict[str, bytes]:
    memory = {"rank": 0, "device": "cpu", "peak_bytes": 1, "peak_source": "x"}
    provenances = [{"memory": 3}, {"memory": [{"rank": 0, "device": "cpu"}]}, {"missing_ranks": "all"},
                   {"world_size": "four"}, {"left_out": [3]}, {"notes": 3}, {"notes": [None]}, {"settings": 3},
                   {"memory": [memory | {"oom": {"asked_bytes": 3}}]}, {"memory": [memory | {"oom": 3}]},
                   {"memory": [memory | {"peak_bytes": 10**30}]}, {"world_size": 10**30}]  # fmt: skip
    retype = {"start_ns": "str", "dur_ns": "float64", "name": "int64", "category": "Int64", "rank": "object"}
    zips = {f"provenance {n}": repacked(saved, provenance=damaged) for n, damaged in enumerate(provenances)}
    zips |= {f"list of {key}": repacked(saved, **{key: [1]}) for key in ("columns", "provenance", "version", "format")}
    zips |= {f"{column} of {kind}": retyped(saved, column, kind) for column, kind in retype.items()}
    columns = {"events": dict.fromkeys(["name", *map(str, range(100_000))], "str")}
    zips |= {"many columns": repacked(saved, ",".join(columns["events"]).encode() + b"\n", columns=columns)}
    zips |= {"no numbers": repacked(saved, b"name,category\na,b\n")}
    pickles = {"list": [], "segments": {"segments": 3}, "texts": {"segments": [], "device_traces": [["x"]]},
               "sum": snapshot(alloc_size=101), "keys": {"segments": [{}], "device_traces": [[{}]]}}  # fmt: skip
    made = {f"shape {name}.zip": content for name, content in zips.items()}
    return made | {f"shape {name}.pickle": pickle.dumps(content) for name, content in pickles.items()}


def outcomes_of(folder: Path, sentinel: Path) -> dict[str, dict]:
    """What came of each of the files, which a process of its own opens in this folder."""
    content = json.dumps(trace_of(1), indent=1).encode()
    saved = ek.load(write(folder / "trace.json", content)).save(folder / "saved.zip").read_bytes()
    packed = gzip.compress(content, mtime=0)
    healthy = {".json": content, ".json.gz": packed, ".zip": saved, ".pickle": pickle.dumps(snapshot())}
    files = damaged_copies(healthy) | hostile(sentinel) | bombs(saved)
    files |= traces_of_another_shape() | others_of_another_shape(saved)
    (folder / "files").mkdir()
    for name, content in (files | {f"healthy{suffix}": content for suffix, content in healthy.items()}).items():
        (folder / "files" / name).write_bytes(content)
    command = [sys.executable, "-W", "ignore", "-c", OPENS, str(folder / "files")]
    # pyarrow's own pool would reserve a gibibyte of addresses at once: that is not memory, and the limit counts it
    env = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert done.returncode == 0, f"it ended at the file after {list(found)[-1:]}: {done.stderr[-2000:]}"
    return found


def starting(outcomes: dict[str, dict], *words: str) -> dict[str, dict]:
    return {name: outcome for name, outcome in outcomes.items() if name.startswith(words)}


def the_undamaged_ones_load_and_show(outcomes):
    for name, outcome in starting(outcomes, "healthy").items():
        assert outcome["refusal"] is None, name
        assert not any(outcome["panes"].values()), outcome


def there_are_two_hundred_and_each_is_quick(outcomes):
    assert len(outcomes) >= 200 + 4
    assert {name: o["took"] for name, o in outcomes.items() if o["took"] > SECONDS} == {}


def nothing_is_raised_but_one_line_that_names_the_file(outcomes):
    for name, outcome in outcomes.items():
        for refusal in filter(None, (outcome["refusal"], outcome["in_list"])):
            kind, message, _ = refusal
            assert not kind.startswith("?"), (name, refusal)
            assert name in message, (name, refusal)
            assert "\n" not in message, (name, refusal)
            assert len(message) < 500, (name, refusal)
            assert not message.endswith(": "), "a reason must be given"


def nothing_was_executed(outcomes, sentinel):
    assert all(outcome["refusal"] for outcome in starting(outcomes, "hostile").values())
    assert not sentinel.exists()
    pickle.loads(hostile(sentinel)["hostile4.pickle"])
    assert sentinel.exists(), "the attack must work on an unpickler that does not look"


def what_is_cut_off_or_something_else_is_always_refused(outcomes):
    accepted = [
        name for name, outcome in starting(outcomes, "cut", "empty", "picture").items() if not outcome["refusal"]
    ]
    assert accepted == []


def bombs_are_refused_because_they_were_looked_at(outcomes):
    for name, outcome in starting(outcomes, "bomb").items():
        assert outcome["refusal"], name
        # many short lines that fit their file's size: that they do not fit into memory is seen only there
        assert outcome["refusal"][2] != "MemoryError" or "lines" in name, (name, outcome)


def compressed_and_counted_files_notice_a_flipped_byte(outcomes):
    flips = starting(outcomes, "flip").items()
    noticed = Counter(name[name.index(".") :] for name, outcome in flips if outcome["refusal"])
    assert noticed[".json.gz"] >= NUM_FLIPPED - 2, "its checksum; a flip in its time stamp is none of ours"
    assert noticed[".zip"] >= NUM_FLIPPED - 4, "likewise"
    assert noticed[".pickle"] > NUM_FLIPPED / 4
    assert 0 < noticed[".json"] < NUM_FLIPPED, "plain text has no checksum"


def the_panes_of_what_was_loaded_raise_nothing_but_value_errors(outcomes):
    broken = {
        (name, pane): error
        for name, outcome in outcomes.items()
        for pane, error in outcome["panes"].items()
        if error is not None and error[0] != "ValueError"
    }
    assert broken == {}


def test_damaged_foreign_and_hostile_files(tmp_path):
    """One test of all: the files are opened once, which takes half a minute."""
    sentinel = tmp_path / "ran"
    outcomes = outcomes_of(tmp_path, sentinel)
    the_undamaged_ones_load_and_show(outcomes)
    there_are_two_hundred_and_each_is_quick(outcomes)
    nothing_is_raised_but_one_line_that_names_the_file(outcomes)
    what_is_cut_off_or_something_else_is_always_refused(outcomes)
    bombs_are_refused_because_they_were_looked_at(outcomes)
    compressed_and_counted_files_notice_a_flipped_byte(outcomes)
    the_panes_of_what_was_loaded_raise_nothing_but_value_errors(outcomes)
    nothing_was_executed(outcomes, sentinel)
