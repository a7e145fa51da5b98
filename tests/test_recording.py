"""capture() sees what ran and disturbs nothing; a saved Capture comes back as it was, and nothing else comes in."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import accelerators
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import effkit as ek
from effkit import recording, storage


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter: for what would take this one down, or what happens only once."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_step_runs_as_often_as_the_docstring_says(step):
    calls = []
    seen = ek.capture(lambda: (calls.append(1), step()), warmup=2, steps=4)
    assert len(calls) == 2 + 4 + 1 + 4 + 4
    assert len(seen.steps) == 4
    assert seen.steps.index.name == "step"
    assert (seen.steps["dur_ns"] > 0).all()
    assert len(ek.capture(step, warmup=0, steps=1).steps) == 1


def test_events_of_the_step_are_in_it(seen):
    assert {"aten::mm", "aten::relu"} <= set(seen.events["name"])
    assert (seen.events["name"] == "aten::relu").sum() == 3
    assert "3 steps" in repr(seen)
    assert "a small step" in repr(seen)


# warm-up, plain, the profiler's own warm-up, recorded, plain again
@pytest.mark.parametrize("failing_call", [1, 2, 4, 5, 6, 7])
def test_an_error_of_the_step_comes_through_and_the_next_capture_works(step, failing_call):
    calls = []

    def fails():
        calls.append(1)
        step()
        if len(calls) == failing_call:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ek.capture(fails, warmup=1, steps=2, memory=True)
    assert len(calls) == failing_call
    assert len(ek.capture(step, warmup=0, steps=1).steps) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"step": 3}, TypeError, "step is a function without arguments; given: 3"),
        ({"steps": 0}, ValueError, "steps is a whole number from 1 on; given: 0"),
        ({"warmup": -1}, ValueError, "warmup is a whole number from 0 on; given: -1"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        ek.capture(**{"step": lambda: None} | arguments)


def test_memory_that_was_not_recorded_is_absent_not_zero(step):
    seen = ek.capture(step)
    assert seen.allocations is None
    assert seen.provenance["peak_source"] == "not recorded" or seen.provenance["kind"] == "cuda"
    assert seen.provenance["peak_bytes"] is None or seen.provenance["kind"] == "cuda"
    assert "memory not recorded" in repr(seen)


def test_provenance(seen):
    expected = {"device", "kind", "num_threads", "torch", "python", "date", "what", "settings", "options", "step_ns",
                "step_ns_profiled", "overhead_frac", "peak_bytes", "peak_source"}  # fmt: skip
    assert expected <= set(seen.provenance)
    assert seen.provenance["settings"] == {"rows": 16, "name": "é"}
    assert seen.provenance["what"] == "a small step"
    assert seen.provenance["options"] == {"warmup": 2, "steps": 3, "memory": True, "shapes": False, "stacks": False}
    assert seen.provenance["step_ns"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's peak is its allocator's own: tests/test_gpu.py")
def test_the_peak_is_that_of_the_replay_whatever_was_recorded_before(step):
    keep = []
    ek.capture(lambda: keep.append(torch.ones(500_000)), memory=True)
    keep.clear()
    seen = ek.capture(step, memory=True)
    births = seen.allocations[["alloc_ns", "size_bytes"]].set_axis(["time_ns", "size_bytes"], axis=1)
    deaths = seen.allocations[["free_ns", "size_bytes"]].set_axis(["time_ns", "size_bytes"], axis=1).dropna()
    changes = pd.concat([births, deaths.assign(size_bytes=-deaths["size_bytes"])]).sort_values("time_ns", kind="stable")
    assert seen.provenance["peak_bytes"] == changes["size_bytes"].cumsum().max()
    assert recording.peak_memory(lambda: torch.ones(1000))[0] == 4000
    assert recording.peak_memory(lambda: torch.ones(1000), resident_bytes=50)[0] == 4050


def test_inside_an_active_profiler_it_refuses(step):
    from torch.profiler import ProfilerActivity, profile

    with (
        profile(activities=[ProfilerActivity.CPU]),
        pytest.raises(RuntimeError, match="another profiler is active"),
    ):
        ek.capture(step)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("ek.capture(lambda: ek.capture(lambda: None))", id="itself"),
        pytest.param("with profile(schedule=schedule(wait=0, warmup=1, active=1)): ek.capture(lambda: None)",
                     id="another that warms up",
                     marks=pytest.mark.xfail(reason="is not noticed: the process ends by SIGSEGV", strict=True)),
    ],
)  # fmt: skip
def test_inside_a_profiler_that_is_not_recording_yet_it_refuses(code):
    done = python(f"import effkit as ek\nfrom torch.profiler import profile, schedule\n{code}")
    assert done.returncode == 1
    assert "RuntimeError: capture() was called while another profiler is active" in done.stderr


def test_kineto_stays_quiet():
    done = python("import effkit as ek; ek.capture(lambda: None, memory=True)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def same(one: ek.Capture, other: ek.Capture) -> None:
    pd.testing.assert_frame_equal(one.events, other.events)
    assert (one.allocations is None) == (other.allocations is None)
    if one.allocations is not None:
        pd.testing.assert_frame_equal(one.allocations, other.allocations)
    assert one.provenance == other.provenance


def test_a_capture_comes_back_as_it_was(seen, tmp_path):
    path = seen.save(tmp_path / "new" / "seen.zip")
    same(ek.load(path), seen)
    same(ek.load(ek.load(path).save(tmp_path / "again.zip")), seen)
    without = ek.Capture(seen.events.head(0), None, seen.provenance)
    same(ek.load(without.save(tmp_path / "without.zip")), without)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(names=st.lists(NAMES, min_size=1, max_size=4), times=st.lists(st.integers(0, 2**62) | st.none(), max_size=4))
def test_any_name_and_any_time_come_back(seen, tmp_path_factory, names, times):
    events = seen.events.head(len(names)).assign(name=pd.array(names, dtype=seen.events["name"].dtype))
    allocations = seen.allocations.head(len(times))
    allocations = allocations.assign(alloc_ns=pd.array(times[: len(allocations)], dtype="Int64"))
    capture = ek.Capture(events, allocations, {"names": names})
    same(ek.load(capture.save(tmp_path_factory.mktemp("any") / "any.zip")), capture)


def test_a_name_with_a_carriage_return_comes_back(seen, tmp_path):
    capture = ek.Capture(seen.events.head(1).assign(name="a\rb"), None, {})
    same(ek.load(capture.save(tmp_path / "seen.zip")), capture)


def test_equal_captures_are_equal_files(seen, tmp_path):
    first, second = seen.save(tmp_path / "a.zip"), seen.save(tmp_path / "b.zip")
    assert first.read_bytes() == second.read_bytes()
    assert {entry.date_time[0] for entry in zipfile.ZipFile(first).infolist()} == {1980}, "and no clock is in them"


def test_a_saved_capture_is_as_readable_as_any_file(seen, tmp_path):
    (tmp_path / "ordinary").touch()
    assert seen.save(tmp_path / "seen.zip").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_failed_save_leaves_the_old_file_and_nothing_else(seen, tmp_path, monkeypatch):
    path = seen.save(tmp_path / "seen.zip")
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space left"):
        seen.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["seen.zip"]


EVENTS = "name,category,start_ns,dur_ns,rank,process,thread,stream,correlation\na,b,1,2,0,1,1,,\n"
TYPES = {"name": "str", "category": "str", "start_ns": "int64", "dur_ns": "int64", "rank": "int64", "process": "str",
         "thread": "str", "stream": "Int64", "correlation": "Int64"}  # fmt: skip


def archive(header: object = None, events: str | None = EVENTS, **changes: object) -> bytes:
    """A saved capture made by hand, with some of its header's fields changed."""
    fields = {"format": storage.FORMAT, "version": 1, "provenance": {}, "columns": {"events": TYPES}} | changes
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("capture.json", json.dumps(fields) if header is None else header)
        if events is not None:
            file.writestr("events.csv", events)
    return out.getvalue()


def patched(offset: int, value: bytes) -> bytes:
    """The same with bytes of the central directory's first entry replaced."""
    content = bytearray(archive())
    start = content.index(b"PK\1\2") + offset
    content[start : start + len(value)] = value
    return bytes(content)


def scrambled() -> bytes:
    content = bytearray(archive())
    content[30 + len("capture.json") : 44 + len("capture.json")] = b"\xff" * 14
    return bytes(content)


def load_bytes(tmp_path: Path, content: bytes) -> ek.Capture:
    path = tmp_path / "given.zip"
    path.write_bytes(content)
    return ek.load(path)


def test_the_archive_made_by_hand_is_a_good_one(tmp_path):
    assert load_bytes(tmp_path, archive()).events["name"].tolist() == ["a"]


def test_a_newer_version_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="of version 2 and this effkit reads up to 1: upgrade effkit"):
        load_bytes(tmp_path, archive(version=2))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(500), id="a picture"),
        pytest.param(bytes(range(256)) * 9, id="garbage"),
        pytest.param(archive()[:-30], id="truncated"),
        pytest.param(archive()[:200], id="truncated early"),
        pytest.param(archive("{"), id="no JSON"),
        pytest.param(archive("[1]"), id="another JSON"),
        pytest.param(archive(format="other"), id="another format"),
        pytest.param(archive(version="1"), id="a version that is no number"),
        pytest.param(archive(events=None), id="without events"),
        pytest.param(archive(columns={}), id="no columns"),
        pytest.param(archive(columns={"events": 3}), id="columns that are none"),
        pytest.param(archive(columns={"events": {"name": "nonsense"}}), id="an unknown type"),
        pytest.param(archive(events=EVENTS.replace(",1,2,", ",x,2,")), id="a time that is no number"),
        pytest.param(patched(24, (2**32 - 2).to_bytes(4, "little")), id="declares more than 4 GiB with the rest"),
        pytest.param(scrambled(), id="scrambled bytes"),
        pytest.param(patched(10, b"\x63"), id="an unknown compression"),
        pytest.param(patched(8, b"\x01"), id="an encrypted entry"),
        pytest.param(archive("[" * 100_000), id="nested too deep"),
        pytest.param(archive(events=EVENTS.replace("1,2,0", "9" * 25 + ",2,0")), id="a time beyond 64 bits"),
        pytest.param(archive(provenance=3), id="provenance that is none"),
        pytest.param(archive(events="name\na\n"), id="without a column"),
    ],
)
def test_another_or_a_damaged_file_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"given\.zip is not a capture that can be read"):
        load_bytes(tmp_path, content)


def test_a_zip_bomb_is_refused_within_a_gibibyte(tmp_path):
    path = tmp_path / "bomb.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("capture.json", "w") as entry,
    ):
        for _ in range(80):
            entry.write(b" " * 2**24)  # 1.25 GiB in all
    assert path.stat().st_size < 2**23
    done = python(f"""
import re, resource
import effkit
used_KiB = int(re.search("VmSize:(.*)kB", open("/proc/self/status").read()).group(1))
resource.setrlimit(resource.RLIMIT_AS, (used_KiB * 2**10 + 2**30,) * 2)
effkit.load({str(path)!r})
""")
    assert "ValueError" in done.stderr.splitlines()[-1]


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "absent.zip", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"give the path of a file that Capture\.save\(\) wrote"):
            ek.load(path)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("name", ["start", "step", "stop"])
def test_a_press_while_the_profiler_begins_goes_on_or_ends_waits(name):
    """A profiler that is left half-way refuses the next one, and ends the process."""
    own = getattr(torch.profiler.profile, name)

    def pressing(profiler):
        signal.raise_signal(signal.SIGINT)
        own(profiler)

    with mock.patch.object(torch.profiler.profile, name, pressing), pytest.raises(KeyboardInterrupt):
        ek.capture(lambda: torch.ones(2).sum(), steps=1, warmup=0)
    assert len(ek.capture(lambda: torch.ones(2).sum(), steps=1, warmup=0).steps) == 1


@pytest.mark.parametrize(("kind", "counts"), [("cuda", True), ("xpu", True), ("mps", False)])
def test_a_step_on_an_accelerator_lasts_until_its_work_is_done(kind, counts, monkeypatch):
    queue = accelerators.installed(monkeypatch, kind)

    def step():
        queue.give(0.02)
        queue.peak_bytes = 4096

    seen = ek.capture(step, warmup=0, steps=2)
    assert seen.provenance["kind"] == kind
    assert min(seen.provenance["step_ns"], seen.provenance["step_ns_profiled"]) >= 20_000_000
    assert seen.provenance["peak_bytes"] == (4096 if counts else None)
    source = "torch.{}.max_memory_allocated" if counts else "not visible: torch counts no peak of memory on {}"
    assert seen.provenance["peak_source"] == source.format(kind)


def test_the_peak_of_a_step_on_an_accelerator_is_its_allocators(monkeypatch):
    queue = accelerators.installed(monkeypatch, "xpu")
    queue.peak_bytes = 10**9  # of before
    assert recording.peak_memory(lambda: setattr(queue, "peak_bytes", 512), resident_bytes=7) == (
        512, "torch.xpu.max_memory_allocated"
    )  # fmt: skip


def test_no_result_of_the_profiler_is_left_to_the_collector():
    """Kineto ends the process where one dies while another is recorded."""

    def step():
        torch.ones(4).sum()

    ek.capture(step, steps=1, warmup=0)
    recording.memory_events(step)
    with pytest.raises(ZeroDivisionError):
        recording.memory_events(lambda: 1 / 0)
    results = [one.kineto_results for one in gc.get_objects() if type(one) is torch.autograd.profiler.profile]
    assert not any(results)
