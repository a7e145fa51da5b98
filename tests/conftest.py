"""What several test files share: small recordings, made once."""

import gc
import json
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

sys.modules.setdefault("rfc3987_syntax", None)  # a grammar of addresses, which jsonschema compiles for a second or more

with suppress(ImportError):  # a machine that is lent for its GPU may have neither; what runs there needs none
    import matplotlib

    matplotlib.use("agg")  # here, and not in the environment: kernels that tests start draw inline
with suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("effkit", deadline=None, max_examples=60)
    settings.load_profile("effkit")


# Their verdicts rest on a clock: `make test` runs them after the others, one on each core.
TIMED = {"test_advice_planted", "test_decoder_measure", "test_padding_common_loaders", "test_timing"}
# They time ranks or all cores: last, one after another.
ALONE = {
    "test_device",
    "test_ranks_links",
    "test_moe_measure",
    "test_moe_rank",
    "test_pair_delays",
}
# They take more than ten seconds each; with the lessons' own tests, what `make quick` leaves to `make test`.
SLOW = {
    "test_activations_architectures", "test_activations_forecast", "test_activations_levers",
    "test_activations_memory_model", "test_activations_planning",
    "test_activations_whatif", "test_advice_door", "test_advice_probing", "test_app", "test_decoder_floors",
    "test_decoder_memory", "test_loading_damaged", "test_loading_ranks", "test_model_zoo", "test_model_zoo_levers",
    "test_padding_peers", "test_padding_sampling", "test_ranks", "test_site",
    "test_recorded_by_others", "test_recording", "test_snapshot_hostile", "test_unchanged_figures",
}  # fmt: skip
SOME_CLOCKED = "test_notebooks"  # the one file of which single tests are timed, or run alone


def pytest_ignore_collect(collection_path, config):
    """Where only timed tests are asked for, or those that run alone, no other file need be imported."""
    wanted = {"timed": TIMED, "alone": ALONE}.get(config.option.markexpr)
    if wanted and collection_path.suffix == ".py":
        return True if collection_path.stem not in {*wanted, SOME_CLOCKED} else None
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        own = {mark.name for mark in item.iter_markers()} & {"timed", "alone"}
        if own and item.path.stem != SOME_CLOCKED:
            raise pytest.UsageError(f"{item.nodeid} is {', '.join(own)}: name its file in TIMED or ALONE")
        if item.path.stem in TIMED:
            item.add_marker("timed")
        if item.path.stem in ALONE:
            item.add_marker("alone")
        if item.path.stem in SLOW or item.path.parent.name == "lessons":
            item.add_marker("slow")
    # whole notebooks first, then other long ones: no worker waits at the end
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, item.path.stem != "test_notebooks"))


def pytest_collection_finish():
    """What is imported by now stays: the collector's sweeps, of which some tests ask for many, pass it by."""
    gc.collect()
    gc.freeze()


def matmul_step():
    """A training step in miniature: allocates, computes, frees."""
    import torch

    weight = torch.ones(16, 16, requires_grad=True)
    (weight @ torch.ones(16, 8)).relu().sum().backward()


@pytest.fixture(scope="module")
def small_heap():
    """Each sweep of the collector goes through all that lives: what other tests left behind is put aside."""
    gc.freeze()
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    """Two threads that wait for each other on a busy machine are slow, and not always equally so."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C: a shell keeps it from what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def step():
    return matmul_step


@pytest.fixture(scope="session")
def seen():
    """A live Capture of three small steps, memory included."""
    import effkit as ek

    return ek.capture(matmul_step, memory=True, settings={"rows": 16, "name": "é"}, what="a small step")


@pytest.fixture(scope="session")
def kineto(tmp_path_factory) -> bytes:
    """What torch.profiler itself exports, with memory, without effkit's help."""
    from torch.profiler import ProfilerActivity, profile, record_function

    path: Path = tmp_path_factory.mktemp("kineto") / "trace.json"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiler:
        for _ in range(3):
            with record_function("a name, with a comma"):
                matmul_step()
    profiler.export_chrome_trace(str(path))
    return path.read_bytes()


@pytest.fixture(scope="session")
def plain_events(kineto) -> list[dict]:
    """The same trace as plain Python reads it."""
    return json.loads(kineto)["traceEvents"]


@pytest.fixture(scope="module")
def gpt():
    """A tiny GPT-2 for the tests of one file."""
    from activation_models import SMALL

    from effkit import models

    return models.gpt(layers=2, **SMALL)


@pytest.fixture(scope="module")
def batch(gpt):
    return gpt.random_batch(4, 64)
