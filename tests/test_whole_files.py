"""What is written to a disk that fills up: whole files and whole lines, or none."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from made_traces import capture_of, op

from effkit import device, whole_files
from effkit.account import Account
from effkit.advice import recording_ranks
from effkit.advice.levers import ranked
from effkit.advice.overviews import NO_CEILINGS, Overview
from effkit.advice.studies import Study
from effkit.device import Device
from effkit.receipt import Receipt

resource = pytest.importorskip("resource")
STEPS = Account.of("Steps", "steps", {"steps": 10}, total=10, source="loop counter")


@contextmanager
def full_after(num_bytes):
    """No file may grow beyond this: of a write the kernel takes the first bytes, and refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


class Seen(Study):
    def _look(self):
        return Overview((STEPS,), NO_CEILINGS, ("found",), ("unseen",))


@pytest.fixture
def writers(tmp_path, monkeypatch):
    """Each writes one file into a folder."""
    monkeypatch.setattr(recording_ranks, "trace_of", lambda *_, **__: bytes(range(256)))
    capture = capture_of(tmp_path, op("aten::linear", 10, 40))
    return {
        "capture": lambda folder: capture.save(folder / "seen.zip"),
        "tensorboard": capture.tensorboard,
        "report": lambda folder: Seen("a step").report(folder / "report.html", ranked("time", [])),
        "rank": lambda folder: recording_ranks.record(folder, print, num_steps=1),
    }


@pytest.mark.parametrize("name", ["capture", "tensorboard", "report", "rank"])
def test_a_full_disk_leaves_no_half_of_a_file(name, writers, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for there in ([], [b"as it was"]):
        with full_after(100), pytest.raises(OSError, match="File too large"):
            writers[name](folder)
        assert [path.read_bytes() for path in folder.iterdir()] == there
        writers[name](folder)
        (path,) = folder.iterdir()
        assert path.stat().st_size > 100
        path.write_bytes(b"as it was")


def test_a_device_that_cannot_be_kept_is_measured_all_the_same(tmp_path, monkeypatch):
    known = Device("a part", "cpu", 2, {"float32": 5e10}, 4e9, 4_500, 2**34, "2.13.0", "2026-01-31")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device, "_measure", lambda: known)
    with full_after(100):
        assert Device.here() == known
    assert not list((tmp_path / "effkit").iterdir())


@pytest.mark.parametrize("lines_there", [0, 2])
def test_a_ledger_has_whole_lines_or_none(lines_there, tmp_path):
    path, receipt = tmp_path / "ledger.csv", Receipt(STEPS, STEPS, provenance={"device": "é"})
    for _ in range(lines_there):
        receipt.append_to(path, lab="padding", model="speech", knob="strategy")
    before = path.read_bytes() if lines_there else b""
    for room in (0, 1, 20):
        with full_after(len(before) + room), pytest.raises(OSError, match="File too large") as caught:
            receipt.append_to(path, lab="padding", model="speech", knob="strategy")
        assert caught.value.errno == errno.EFBIG
        assert [one.read_bytes() for one in tmp_path.iterdir()] == ([before] if lines_there else [])


@pytest.mark.parametrize("room", [0, 3])
def test_a_failed_append_keeps_what_another_process_added_meanwhile(room, tmp_path):
    path = tmp_path / "ledger.csv"
    path.write_bytes(b"ours\n")
    others = iter([b"theirs\n"])

    class Line(bytes):
        """Another's line is written between our opening of the file and our write."""

        def __getitem__(self, part):
            for other in others:
                whole_files.append(path, other)
            return bytes(self)[part]

    with full_after(len(b"ours\ntheirs\n") + room), pytest.raises(OSError, match="File too large"):
        whole_files.append(path, Line(b"more\n"))
    assert path.read_bytes() == b"ours\ntheirs\n"


KILLED = """
import os, signal
from effkit.ranks import launching
with launching._own_folder() as folder:
    (folder / "log.txt").write_text("a line")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.{signal})
"""


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM"])
def test_a_killed_run_of_ranks_leaves_no_folder(signal_name, tmp_path):
    env = os.environ | {"TMPDIR": str(tmp_path)}
    code = KILLED.format(signal=signal_name)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=env
    )
    assert done.returncode == -getattr(signal, signal_name)
    assert done.stdout.startswith(str(tmp_path / "effkit-ranks-")), done.stderr
    patience = time.monotonic() + 20
    while list(tmp_path.iterdir()) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def test_the_folder_of_ranks_stays_for_those_alone_who_read_its_log(tmp_path, monkeypatch):
    from effkit.ranks import launching

    monkeypatch.setattr(launching.tempfile, "tempdir", str(tmp_path))
    with launching._own_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(KeyboardInterrupt), launching._own_folder():
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), launching._own_folder() as kept:
        raise RuntimeError("a rank ended: see the log")
    time.sleep(1.5)  # longer than those who clear up after a killed run wait
    assert list(tmp_path.iterdir()) == [kept]


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("as it was")
    with pytest.raises(KeyboardInterrupt), whole_files.replacing(path) as part:  # noqa: PT012
        part.write_text("half")
        raise KeyboardInterrupt
    assert [one.read_text() for one in tmp_path.iterdir()] == ["as it was"]
