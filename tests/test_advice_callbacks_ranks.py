"""On several ranks each records steps of the training itself, rank 0 writes one page, and the weights are the same."""

import json
import os
import pickle
import socket
import subprocess
import sys
import types
import warnings
from pathlib import Path

import planted
import pytest
import test_advice_callbacks as alone
import torch
from child_ranks import end_well

import effkit as ek
from effkit.advice import callbacks, memory_history, recording_ranks
from effkit.advice.families import COMMUNICATION

pytestmark = pytest.mark.usefixtures("one_thread")
RANKS = (0, 1)
MIB = 2**20
FILES = [f"rank{rank}.pt.trace.json.gz" for rank in RANKS]


def trained_on_two_ranks(folder: Path, max_steps: int, num_batches: int) -> None:
    """What torchrun would start, ended by their own ids whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "trainer_rank.py"
    usual = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
             "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, str(script), str(folder), str(max_steps), str(num_batches)]
    ranks = [
        subprocess.Popen(command, env=usual | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
        for rank in RANKS
    ]  # fmt: skip
    end_well(ranks, 200)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("trained")
    trained_on_two_ranks(folder, max_steps=7, num_batches=3)
    return folder


def told(folder, name, rank):
    return json.loads((folder / f"{name}{rank}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("rank", RANKS)
def test_the_weights_of_every_rank_are_bit_for_bit_those_of_a_training_that_nobody_watched(trained, rank):
    plain, watched = (torch.load(trained / f"{name}{rank}.pt", weights_only=True) for name in ("plain", "watched"))
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    before = alone.model().state_dict()
    assert not all(torch.equal(plain[f"inner.{name}"], before[name]) for name in before), "it has learned something"
    assert told(trained, "watched", rank)["losses"] == told(trained, "plain", rank)["losses"]
    assert told(trained, "watched", rank)["warnings"] == []


@pytest.mark.slow
def test_each_rank_leaves_its_trace_and_rank_0_one_page(trained):
    assert sorted(path.name for path in (trained / "effkit").iterdir()) == [*FILES, "report.html"]
    assert [told(trained, "watched", rank)["studied"] for rank in RANKS] == [True, False]
    page = (trained / "effkit" / "report.html").read_text()
    assert "2 ranks, 3 steps each" in page
    assert "ranks were not recorded" not in page


@pytest.mark.slow
def test_the_recorded_steps_are_the_trainers_own(trained):
    """With its loss, two batches a step, its precision and its collectives."""
    seen = ek.load(trained / "effkit")
    assert len(seen.overview()) == 6
    for mark in ("own loss", "autocast True"):
        marked = seen.events[seen.events["name"] == mark]
        assert marked.groupby("rank").size().tolist() == [2 * 3, 2 * 3], mark
    assert seen.memory().total > 0
    study = ek.study(trace=trained / "effkit")
    assert study.num_ranks == 2
    assert COMMUNICATION in study.time.frame.index


# One process that passes for one of two


@pytest.fixture
def of_two(monkeypatch):
    monkeypatch.setattr(callbacks, "place", lambda: (0, 2))
    monkeypatch.setattr(recording_ranks, "_PATIENCE_S", 0.0)


def test_a_rank_that_never_came_is_missing_on_the_page(tmp_path, of_two):
    callback = ek.advice.trainer_callback(num_batches=2, folder=tmp_path / "seen")
    alone.hugging_face(tmp_path, [callback])
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == [FILES[0], "report.html"]
    assert callback.study.num_steps == 2


def test_a_training_of_too_few_steps_is_said_to_have_none(tmp_path, of_two):
    callback = ek.advice.trainer_callback(num_batches=4)
    with pytest.warns(UserWarning, match="there is no trace of rank 0: that takes 2 steps to warm up and 4 to record"):
        _, losses = alone.hugging_face(tmp_path, [callback])
    assert callback.study is None
    assert len(losses) > 4
    assert ek.capture(lambda: torch.ones(2).sum(), steps=1).steps.shape[0] == 1, "its profiler has ended"


def test_a_trace_of_an_earlier_run_is_not_taken_for_one_of_this(tmp_path, of_two):
    for name in FILES:
        (tmp_path / name).write_bytes(b"of yesterday")
    callback = ek.advice.trainer_callback(num_batches=4, folder=tmp_path)
    with pytest.warns(UserWarning, match="no trace of rank 0"):
        alone.hugging_face(tmp_path, [callback])
    assert not (tmp_path / FILES[0]).exists(), "each rank takes its own away as training begins"


def test_another_profiler_comes_first(tmp_path, of_two):
    transformers = pytest.importorskip("transformers")
    ends = []

    class Profiling(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                self.own = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
                self.own.start()

        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                self.own.stop()
                ends.append(len(self.own.events()))

    callback = ek.advice.trainer_callback(num_batches=2)
    with pytest.warns(UserWarning, match="no trace of rank 0: .* no other profiler that begins meanwhile"):
        _, losses = alone.hugging_face(tmp_path, [callback, Profiling()])
    assert ends[0] > 0
    assert len(losses) > 4, "nobody's training broke off"


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_a_profiler_that_was_there_before_comes_first(tmp_path, of_two, warmup):
    """torch's own does not say that it warms up: a second one would end the process."""
    callback = ek.advice.trainer_callback(num_batches=2)
    plan = torch.profiler.schedule(wait=0, warmup=warmup, active=9)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], schedule=plan) as own:
        with pytest.warns(UserWarning, match="another profiler is at work, and there can be but one"):
            _, losses = alone.hugging_face(tmp_path, [callback])
        own.step()
    assert len(losses) > 4
    assert callback.study is None
    again = ek.advice.trainer_callback(num_batches=2)
    alone.hugging_face(tmp_path, [again])
    assert again.study.num_steps == 2, "it has ended"


def test_a_disk_that_is_full_ends_no_training(tmp_path, of_two, monkeypatch):
    def fails(*_):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", fails)
    callback = ek.advice.trainer_callback(num_batches=2, folder=tmp_path / "seen")
    with pytest.warns(UserWarning, match="which goes on") as said:
        _, losses = alone.hugging_face(tmp_path / "training", [callback])
    first, last = (str(each.message) for each in said if "effkit" in str(each.message))
    assert first.endswith("OSError: no room")
    assert "there is no trace of rank 0" in last
    assert len(losses) > 4
    assert not list((tmp_path / "seen").iterdir())


BREAKING = """
import sys, tempfile, torch, transformers
import effkit as ek
from effkit.advice import callbacks
import test_advice_callbacks as alone

class Breaking(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyError("planted")

callbacks.place = lambda: (0, 2)
training = alone.hugging_face, tempfile.mkdtemp(), [ek.advice.trainer_callback(num_batches=4), Breaking()]
try:
    training[0](*training[1:])
except KeyError:
    if sys.argv[1:] == ["goes on"]:
        print(ek.capture(lambda: torch.ones(2).sum(), steps=1))
    else:
        raise
"""


@pytest.mark.slow
@pytest.mark.parametrize(("then", "status"), [("ends", 1), ("goes on", 0)])
def test_a_training_that_breaks_off_while_it_is_recorded_harms_nothing(then, status):
    paths = [str(Path(__file__).parent), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", BREAKING, then], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == status, done.stderr
    assert ("KeyError: 'planted'" in done.stderr) == (then == "ends")
    assert ("Capture of" in done.stdout) == (then == "goes on")


def test_a_training_that_broke_off_leaves_its_profiler_to_the_next(tmp_path, of_two):
    callback = ek.advice.trainer_callback(num_batches=2)
    callback.on_train_begin(types.SimpleNamespace(output_dir=tmp_path), None, None, model=alone.model())
    alone.hugging_face(tmp_path, [callback])
    assert callback.study.num_steps == 2


@pytest.mark.parametrize("accumulated", [1, 2])
def test_lightnings_steps_are_those_of_its_optimizer(tmp_path, monkeypatch, of_two, accumulated):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", types.SimpleNamespace(Callback=type("Callback", (), {})))
    module = alone.lightning_like(alone.Logging)
    update = module.configure_optimizers()
    loader = torch.utils.data.DataLoader(alone.dataset(), batch_size=2, collate_fn=planted.padded)
    trainer = types.SimpleNamespace(default_root_dir=tmp_path, global_step=0)
    callback = ek.advice.lightning_callback(num_batches=3)
    callback.on_train_start(trainer, module)
    for number, batch in enumerate(loader, 1):
        with torch.profiler.record_function("a batch"):
            module.training_step(batch, 0)["loss"].backward()
        if number % accumulated == 0:
            update.step()
            update.zero_grad()
            trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, batch, number)
    callback.on_train_end(trainer, module)
    assert callback.study.num_steps == 3
    assert (callback.study.capture.events["name"] == "a batch").sum() == 3 * accumulated
    assert (tmp_path / "effkit" / "report.html").is_file()


# Memory, with a stand-in for CUDA's allocator


def a_full_snapshot(path):
    frames = [{"filename": "me/train.py", "line": 7, "name": "main"}]
    block = {"address": MIB, "size": MIB, "requested_size": MIB, "state": "active_allocated", "frames": frames}
    segment = {"device": 0, "address": MIB, "total_size": MIB, "stream": 0, "blocks": [block]}
    trace = [{"action": "alloc", "addr": MIB, "size": MIB, "time_us": 1, "frames": frames},
             {"action": "oom", "size": 9 * MIB, "time_us": 2, "device_free": 2 * MIB, "frames": frames}]  # fmt: skip
    Path(path).write_bytes(pickle.dumps({"segments": [segment], "device_traces": [trace]}))


@pytest.fixture
def allocator(monkeypatch):
    """The calls to torch's allocator of CUDA, and the observer that it was given."""
    seen = types.SimpleNamespace(kept=[], observers=[])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **given: seen.kept.append(given))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", a_full_snapshot)
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", seen.observers.append, raising=False)
    return seen


def test_running_out_of_memory_is_one_sentence_and_a_snapshot(tmp_path, allocator):
    history = memory_history.MemoryHistory(tmp_path / "memory" / "rank0.pickle")
    assert allocator.kept == [{"max_entries": memory_history._MOST_EVENTS}]
    with pytest.warns(UserWarning, match="^Memory of device0 when") as said:
        allocator.observers[0](0, 9 * MIB, 80 * MIB, 2 * MIB)
    (sentence,) = (str(each.message) for each in said)
    assert sentence.startswith("Memory of device0 when 2.0 MiB were free and 9.0 MiB asked for by me/train.py:7 main")
    assert "Most is held by 1.0 MiB for me/train.py:7 main" in sentence
    path = tmp_path / "memory" / "rank0.pickle"
    assert f"effkit.load({str(path)!r}).out_of_memory()" in sentence
    assert ek.load(path).out_of_memory().total == MIB
    history.close()
    assert allocator.kept[-1] == {"enabled": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocator.observers[0](0, 1, 1, 1)  # another training of this process runs out: not ours to tell


def test_a_training_that_is_begun_again_after_it_ran_out_tells_once(tmp_path, allocator):
    """As with auto_find_batch_size."""
    callback = ek.advice.trainer_callback(**alone.FEW, memory_history=True)
    model = alone.model()
    update = torch.optim.AdamW(model.parameters())
    loader = torch.utils.data.DataLoader(alone.dataset(), batch_size=4, collate_fn=planted.padded)
    for _ in range(2):
        args = types.SimpleNamespace(output_dir=tmp_path)
        callback.on_train_begin(args, None, None, model=model, optimizer=update, train_dataloader=loader)
    first, second = allocator.observers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first(0, 1, 1, 1)
    with pytest.warns(UserWarning, match="^Memory of device0 when"):
        second(0, 1, 1, 1)
    assert (tmp_path / "effkit" / "memory" / "rank0.pickle").is_file()


def test_a_snapshot_that_fails_does_not_hide_torchs_own_error(tmp_path, allocator, monkeypatch):
    def fails(_):
        raise OSError("no room")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fails)
    memory_history.MemoryHistory(tmp_path / "rank0.pickle")
    with pytest.warns(UserWarning, match="out of memory, and no snapshot of it: OSError: no room"):
        allocator.observers[0](0, 1, 1, 1)


def test_where_there_is_no_such_history_the_training_goes_on(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    callback = ek.advice.trainer_callback(**alone.FEW, memory_history=True)
    with pytest.warns(UserWarning, match="memory_history=True takes a CUDA device"):
        alone.hugging_face(tmp_path, [callback])
    assert isinstance(callback.study, ek.advice.Study)
