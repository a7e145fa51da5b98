"""Levers, one by one and in pairs: their bytes are forecast, and their settings are checked."""

import statistics
from itertools import combinations, permutations

import pytest
import torch
from activation_models import SMALL, TINY, batch_of, recorded_peak
from hypothesis import given, settings
from hypothesis import strategies as st

from effkit import activations, models
from effkit.activations.forecasting import Forecaster
from effkit.activations.levers import KNOBS, Levers, Size
from effkit.activations.timeline import Timeline

torch.set_num_threads(1)
# positions of one family exclude each other
FAMILIES = {
    "checkpoint": [{"checkpoint_every": 1}, {"checkpoint_every": 2}, {"checkpoint_every": 1, "keep": "matmul"}],
    "compress": [{"compress": "int8"}, {"compress": "fp8_e4m3"}],
    "offload": [{"offload_frac": 0.5}],
    "micro-batches": [{"micro_batches": 2}, {"micro_batches": 4}],
    "autocast": [{"autocast": "bfloat16"}],
    "states": [{"optimizer_states": "int8"}, {"optimizer_states": "fp8_e4m3"}],
}
SINGLES = [one for family in FAMILIES.values() for one in family]
AMX = pytest.mark.xfail(
    torch.cpu._is_amx_tile_supported(), strict=False, reason="AMX kernels take workspace of their own"
)
# Of any two families, each position with one of the other; and all of recomputation with half precision, which is hard.
PAIRS = [one[i % len(one)] | two[i % len(two)]
         for one, two in combinations(FAMILIES.values(), 2) for i in range(max(len(one), len(two)))]  # fmt: skip


@pytest.fixture(scope="module")
def gpt():
    return models.gpt(layers=2, **SMALL)


@pytest.fixture(scope="module")
def batch(gpt):
    return gpt.random_batch(8, 64)


@pytest.fixture(scope="module")
def forecaster(gpt, batch):
    return Forecaster(gpt, batch)


def forecast(forecaster, levers):
    return int(forecaster.timeline(forecaster.size, levers).levels().sum(axis=0).max())


def test_every_pair_of_levers_is_forecast_within_one_percent_and_at_worst_five(gpt, batch, forecaster):
    errors = {}
    for pair in PAIRS:
        levers = Levers(**pair)
        errors[str(pair)] = abs(forecast(forecaster, levers) / recorded_peak(gpt, batch, levers) - 1)
    assert len(errors) == 34
    blind = [str({"checkpoint_every": 1, **more, "autocast": "bfloat16"}) for more in ({}, {"keep": "matmul"})]
    assert max(errors.pop(pair) for pair in blind) < 0.07  # see the test below
    assert statistics.median(errors.values()) <= 0.01, errors
    assert max(errors.values()) <= 0.05, errors


@pytest.mark.parametrize("keep", [pytest.param("none", marks=AMX), "matmul"])
def test_recomputing_under_autocast_is_forecast_from_small_steps_under_autocast(gpt, batch, keep):
    levers = Levers(checkpoint_every=1, keep=keep, autocast="bfloat16")
    found = activations.forecast(gpt, batch, **levers.changed)
    assert found.total == pytest.approx(recorded_peak(gpt, batch, levers), rel=0.05)


@pytest.mark.parametrize("other", [{"micro_batches": 2}, {"checkpoint_every": 1}], ids=str)
def test_the_optimizer_may_have_the_peak_at_its_last_parameter(other):
    model = torch.nn.Sequential(*(torch.nn.Linear(64, size) for size in (64, 64, 4000)))
    batch, levers = torch.randn(2, 64), Levers(**other, optimizer_states="int8")

    def square(output):
        return output.square().mean()

    truth = recorded_peak(model, batch, levers, loss=square)
    found = activations.forecast(model, batch, loss=square, **levers.changed)
    assert found.total == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("single", [{}, *SINGLES], ids=str)
def test_every_lever_alone_is_forecast_and_its_rows_are_the_allocators_peak(gpt, batch, forecaster, single):
    levers = Levers(**single)
    seen = forecaster.observe(gpt, batch, levers)
    assert sum(seen.rows.values()) == seen.peak_bytes
    assert seen.peak_bytes == recorded_peak(gpt, batch, levers)
    assert forecast(forecaster, levers) == pytest.approx(seen.peak_bytes, rel=0.005)
    if levers.micro_batches <= 2:
        assert seen.timeline.ops == forecaster.timeline(forecaster.size, levers).ops


@pytest.mark.parametrize("name", ["text", "speech", "vision", "convolutional"])
@pytest.mark.parametrize(
    "levers", [{"checkpoint_every": 1, "micro_batches": 2}, {"compress": "int8", "optimizer_states": "int8"}], ids=str
)
def test_rows_of_other_architectures_under_levers_are_the_peak_too(name, levers):
    model = TINY[name].build()
    batch = batch_of(model, *TINY[name].sizes[0])
    seen = Forecaster(model, batch).observe(model, batch, Levers(**levers))
    assert sum(seen.rows.values()) == seen.peak_bytes
    assert seen.peak_bytes == pytest.approx(recorded_peak(model, batch, Levers(**levers)), rel=1e-4)


def saved_bytes(forecaster, **levers) -> int:
    return int(forecaster.timeline(forecaster.size, Levers(**levers)).retained["size_bytes"].sum())


def test_each_lever_does_what_it_is_for(forecaster):
    plain = saved_bytes(forecaster)
    assert saved_bytes(forecaster, checkpoint_every=1) < saved_bytes(forecaster, checkpoint_every=2) < plain
    kept = saved_bytes(forecaster, checkpoint_every=1, keep="matmul")
    assert saved_bytes(forecaster, checkpoint_every=1) < kept < plain
    assert saved_bytes(forecaster, compress="int8") < 0.5 * plain
    assert saved_bytes(forecaster, micro_batches=4) == pytest.approx(plain / 4, rel=0.05)
    assert saved_bytes(forecaster, autocast="bfloat16") < plain
    timelines = [forecaster.timeline(forecaster.size, Levers(offload_frac=frac)).retained for frac in (0.0, 0.5, 1.0)]
    gone = [one.loc[one["category"] == "offloaded activation", "size_bytes"].sum() / one["size_bytes"].sum()
            for one in timelines]  # fmt: skip
    assert gone[0] == 0
    assert gone[1] == pytest.approx(0.5, abs=0.15)
    assert gone[2] > 0.8
    states = [forecaster.timeline(forecaster.size, Levers(optimizer_states=form)).resident_bytes["optimizer state"]
              for form in ("float32", "int8", "fp8_e4m3")]  # fmt: skip
    assert states[1] < 0.35 * states[0]
    assert states[2] < 0.35 * states[0]


def test_a_setting_reads_the_same_in_any_order(gpt, batch):
    changes = {"micro_batches": 2, "checkpoint_every": 1, "compress": "int8"}
    orders = list(permutations(changes.items()))
    found = {activations.forecast(gpt, batch, **dict(order)).total for order in (orders[0], orders[3], orders[5])}
    assert len(found) == 1


@pytest.mark.parametrize(("rows", "parts"), [(7, 2), (7, 3), (5, 4), (3, 3)])
def test_micro_batches_of_uneven_size_are_forecast(gpt, rows, parts):
    batch, levers = gpt.random_batch(rows, 48), Levers(micro_batches=parts)
    forecaster = Forecaster(gpt, batch)
    observed = forecaster.observe(gpt, batch, levers)
    assert sum(observed.rows.values()) == observed.peak_bytes
    assert forecast(forecaster, levers) == pytest.approx(observed.peak_bytes, rel=0.005)


def test_micro_batches_of_uneven_size_are_as_large_as_the_largest(gpt, forecaster):
    levers = Levers(micro_batches=3)
    truth = recorded_peak(gpt, gpt.random_batch(7, 40), levers)
    assert sum(forecaster.peak(Size(7, 40), levers).rows.values()) == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("single", SINGLES, ids=str)
def test_a_replay_with_levers_is_the_same_again(gpt, batch, forecaster, single):
    levers = Levers(**single)
    other = Forecaster(gpt, batch).timeline(forecaster.size, levers)
    one = forecaster.timeline(forecaster.size, levers)
    assert isinstance(other, Timeline)
    assert (one.levels() == other.levels()).all()


# The settings


@settings(max_examples=50)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "checkpoint_every": st.integers(0, 3),
            "keep": st.sampled_from(["none", "matmul"]),
            "compress": st.sampled_from(["none", "int8", "fp8_e4m3", "fp8_e5m2"]),
            "group": st.integers(1, 512),
            "offload_frac": st.floats(0, 1),
            "micro_batches": st.integers(1, 8),
            "autocast": st.sampled_from(["none", "bfloat16"]),
            "optimizer_states": st.sampled_from(["float32", "int8", "fp8_e4m3"]),
        },
    )
)
def test_what_changed_makes_the_levers_again(setting):
    levers = Levers(**setting)
    assert Levers(**levers.changed) == levers
    assert set(levers.changed) <= set(setting)
    lossy = {"compress", "autocast", "optimizer_states"} & set(levers.changed)
    assert levers.lossless == (not lossy)


def test_the_defaults_are_a_plain_step():
    assert Levers().changed == {}
    assert Levers().lossless
    assert set(KNOBS) == set(vars(Levers()))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"keep": "all"}, "keep is one of none, matmul; given: 'all'"),
        ({"compress": "int4"}, "compress is one of none, int8, fp8_e4m3, fp8_e5m2; given: 'int4'"),
        ({"compress": None}, "compress is one of none, int8, fp8_e4m3, fp8_e5m2; given: None"),
        ({"autocast": "float16"}, "autocast is one of none, bfloat16; given: 'float16'"),
        ({"optimizer_states": "int4"}, "optimizer_states is one of float32, int8, fp8_e4m3; given: 'int4'"),
        ({"checkpoint_every": -1}, "checkpoint_every is a whole number from 0 on; given: -1"),
        ({"micro_batches": 0}, "micro_batches is a whole number from 1 on; given: 0"),
        ({"micro_batches": 1.5}, r"micro_batches is a whole number from 1 on; given: 1\.5"),
        ({"group": 0}, "group is a whole number from 1 on; given: 0"),
        ({"offload_frac": 1.1}, r"offload_frac is a share in \[0, 1\]; given: 1\.1"),
        ({"offload_frac": float("nan")}, r"offload_frac is a share in \[0, 1\]; given: nan"),
    ],
)
def test_bad_levers_are_refused_in_one_sentence(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        Levers(**setting)


def test_low_bit_states_bring_their_own_optimizer():
    with pytest.raises(ValueError, match="optimizer_states='int8' brings its own AdamW: leave out optimizer=, or"):
        Levers(optimizer_states="int8").optimizer(torch.optim.SGD)
    assert Levers().optimizer(torch.optim.SGD) is torch.optim.SGD
