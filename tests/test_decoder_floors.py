"""Floors of a step: counts against those made by hand, and no part of a live model that beats its own."""

import time
from functools import cache
from types import SimpleNamespace
from unittest import mock

import accelerators
import pytest
import torch
from moments import at_a_quiet_moment
from test_decoder_module_timers import MODELS, SMALL

import effkit as ek
from effkit import decoder
from effkit.decoder import calibration, live, module_timers
from effkit.decoder.generating import prepared, setting_of
from effkit.decoder.module_roles import CROSS, EMBEDDING, FFN, NORMS, OUTPUT, SELF
from effkit.decoder.module_timers import Call, Framework, Launches, Operators, step_times
from effkit.decoder.product_costs import product_cost, reading_rate
from effkit.device import Device

PARTS = [SELF, CROSS, FFN, NORMS, EMBEDDING, OUTPUT]
# One whose ceilings are round numbers
ROUND = SimpleNamespace(kind="cpu", rate_flops_per_s={"float32": 1e9}, launch_overhead_ns=1000)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def speech():
    return ek.models.speech(hidden=32, encoder_layers=2, decoder_layers=3, heads=2)


def measured(model, **given):
    """Without most probes: a floor rests on the base's run."""
    with mock.patch.object(live, "probes", lambda *asked: calibration.probes(*asked)[:1]):
        return decoder.measure(model, **given)


@pytest.fixture(scope="module")
def base(speech):
    return measured(speech, num_steps=6, batch=2, input_length=41, repeats=2)


def test_bytes_and_products_are_those_that_a_hand_counts(speech, base):
    table = decoder.roofline(base, ROUND)
    assert list(table.index) == [*PARTS, "step"]
    # 3 layers; four matrices of 32 x 32 with biases, of cross-attention two; 6 steps after 1 token: 4 cells on average
    square, layers, rows = 32 * 32 + 32, 3, 2
    weights = {SELF: 4 * square * layers, CROSS: 2 * square * layers, OUTPUT: 32 * 1000, NORMS: 0, EMBEDDING: 0}
    assert {part: table.loc[part, "weight_bytes"] / 4 for part in weights} == weights
    assert table.loc[FFN, "weight_bytes"] / 4 == layers * (2 * 32 * 128 + 32 + 128)
    cells = {SELF: 4, CROSS: 11}  # 41 frames become 21, and those 11 cells
    assert {part: table.loc[part, "kv_bytes"] for part in cells} == {
        part: 2 * 4 * layers * rows * 32 * number for part, number in cells.items()
    }
    assert (table.loc[[FFN, OUTPUT, NORMS], "kv_bytes"] == 0).all()
    for part, number in {**cells, OUTPUT: 0}.items():
        # a multiplication and an addition for each weight and row; keys and values meet one query each
        assert table.loc[part, "flops"] == 2 * weights[part] * rows + 2 * 2 * layers * rows * 32 * number


def test_grouped_heads_read_less_and_compute_as_much():
    model = ek.models.text(hidden=64, heads=4, layers=2, kv_heads=1)
    table = decoder.roofline(measured(model, num_steps=4, input_length=10, repeats=1), ROUND)
    assert table.loc[SELF, "kv_bytes"] == 2 * 4 * 2 * 12 * 16
    assert table.loc[SELF, "flops"] == 2 * table.loc[SELF, "weight_bytes"] / 4 + 4 * 2 * 12 * 64
    assert CROSS not in table.index


def test_the_largest_floor_binds_and_the_step_is_the_sum_of_its_parts(base):
    table = decoder.roofline(base, ROUND)
    counted = ["time_ns", "launches", "weight_bytes", "kv_bytes", "flops"]
    assert table.loc["step", counted].astype(float).tolist() == pytest.approx(
        table.loc[PARTS, counted].sum().astype(float).tolist(), abs=4
    )
    assert (table["launches_ns"] == 1000 * table["launches"]).all()
    assert table["arithmetic_ns"].tolist() == pytest.approx(table["flops"].tolist(), abs=1)
    rate = base.calibration.read_bytes_per_s
    reading = (table["weight_bytes"] + table["kv_bytes"]) / rate * 1e9
    assert table["reading_ns"].tolist() == pytest.approx(reading.tolist(), abs=1)
    named = table[["launches_ns", "reading_ns", "arithmetic_ns"]]
    assert (table["floor_ns"] == named.max(axis=1)).all()
    assert all(row[f"{row['binds']}_ns"] == row["floor_ns"] for _, row in table.iterrows())
    assert table["reached_frac"].tolist() == pytest.approx((table["floor_ns"] / table["time_ns"]).tolist(), rel=0.01)
    slow = SimpleNamespace(kind="cpu", rate_flops_per_s={"float32": 1e3}, launch_overhead_ns=1000)
    assert (decoder.roofline(base, slow).loc[[SELF, CROSS, FFN, OUTPUT], "binds"] == "arithmetic").all()
    still = SimpleNamespace(kind="cpu", rate_flops_per_s={"bfloat16": 1e15}, launch_overhead_ns=0)
    assert (decoder.roofline(base, still).loc[[SELF, CROSS, FFN, OUTPUT], "binds"] == "reading").all()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("hidden", [32, 64, 256])
@pytest.mark.parametrize("kind", ["speech", "text"])
def test_no_part_and_no_step_beats_its_own_floor(kind, hidden, batch):
    sizes = {"encoder_layers": 1, "decoder_layers": 2} if kind == "speech" else {"layers": 2}
    model = getattr(ek.models, kind)(hidden=hidden, heads=2, **sizes)
    _beaten(model, batch=batch)


@pytest.mark.parametrize("name", ["bart", "t5", "gpt2"])
def test_nor_do_those_of_other_models(name):
    _beaten(MODELS[name]())


def test_nor_do_experts_of_which_a_token_meets_few():
    import transformers as hub

    wide = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = hub.MixtralConfig(**SMALL | wide, num_local_experts=32, num_experts_per_tok=1)
    table = _beaten(hub.MixtralForCausalLM(config))
    assert table.loc[FFN, "weight_bytes"] == 4 * 2 * (3 * 128 * 512 + 32 * 128)


@cache
def _ceilings():
    """Of this machine, measured by this process: those on disk may be of a busy moment."""
    return Device.here(refresh=True)


def _beaten(model, **setting):
    def floors_of():
        return decoder.roofline(measured(model, num_steps=5, repeats=2, **setting), _ceilings())

    def holds(table):
        if (table["reached_frac"] < 1).all():
            return True
        _ceilings.cache_clear()  # a busy moment's are too low, and its floors too high
        return False

    table = at_a_quiet_moment(floors_of, holds)
    assert (table["floor_ns"] > 0).all()
    assert (table["reached_frac"] < 1).all(), table
    return table


def test_operators_that_are_no_views_are_counted():
    x, weight = torch.ones(2, 3, 4), torch.ones(5, 4)

    def some():
        y = torch.nn.functional.linear(x, weight)  # one product; its transpose and the reshaping launch nothing
        y = y.transpose(0, 1)[:2].unsqueeze(0)
        z = torch.empty(3)
        return y + 1, z.view(3, 1), torch.cat([x, x])

    counter = Launches()
    with torch.no_grad(), counter:
        some()
    assert counter.mark() == 3
    assert counter.ns([2, 3, 7]).tolist() == [0, 1, 5]


def test_a_deeper_model_launches_in_proportion():
    model = MODELS["text"]()

    def launches(**changes):
        ready = prepared(model, None, setting_of(model, num_steps=3, **changes))
        counter = Launches()
        with counter:
            return module_timers.watch(ready.model.eval(), ready.call, counter).steps.iloc[-1]

    three, six, beams = launches(), launches(decoder_layers=6), launches(num_beams=3)
    for part in (SELF, FFN, NORMS):
        assert six[part] == 2 * three[part] > 0
    assert three[FFN] == 3 * 5, "three products, silu and a product of two halves"
    assert three[OUTPUT] == 1
    assert beams["sampling and host"] > 2 * three["sampling and host"], "which choose, and copy the cache"


def test_small_weights_are_read_no_more_slowly_than_large_ones():
    small, large = (reading_rate(size, torch.float32, torch.device("cpu")) for size in (2**18, 2**26))
    assert large > 1e8
    assert small > 0.5 * large
    for dtype in (torch.bfloat16, torch.float16):
        assert reading_rate(2**16, dtype, torch.device("cpu")) > 0
    assert reading_rate(1, torch.float32, torch.device("cpu")) > 0, "of less than one row too"


def test_what_a_weight_costs():
    cpu = torch.device("cpu")
    cost = product_cost(64, 256, 2**20, (1, 2, 16), torch.float32, cpu)
    assert all(0 < time_ns < 1000 for time_ns in cost.times_ns)
    small, large = (product_cost(width, 4 * width, 2**20, (1,), torch.float32, cpu) for width in (16, 256))
    assert small.times_ns[0] > 2 * large.times_ns[0], "of small matrices the launch is most of it"


class Slow(torch.nn.Module):
    """A model whose operators and Python code take times that are known: products of a size, and a loop."""

    def __init__(self, size, loops):
        super().__init__()
        self.weight, self.loops, self.written = torch.nn.Parameter(torch.ones(size, size)), loops, torch.zeros(1)

    def forward(self, x):
        for _ in range(self.loops):
            pass
        self.written.add_(1)
        return (x @ self.weight).view(1, -1)


def test_operators_and_framework_are_told_apart_and_nothing_is_changed():
    def apart(size, loops):
        model = Slow(size, loops)
        x = torch.ones(size, size)
        with torch.no_grad():
            with Operators(9) as recorder:
                model(x)
            with Framework(recorder) as clock:
                begin = clock.mark()
                model(x)
                end = clock.mark()
        assert [call.func.name() for call in recorder.calls] == ["aten::add_.Tensor", "aten::mm"], (
            "views are no operators"
        )
        assert model.written.item() == 2, "once for each time it was called, none for the operators alone"
        return recorder.ns([0, 2])[1], clock.ns([begin, end])[1]

    (few, short), (many, long) = apart(64, 0), apart(512, 300_000)
    assert many > 10 * few
    assert long > 10 * short
    assert apart(512, 0)[1] < 0.3 * many, "products that are not run take no time"


def test_operators_of_an_accelerator_take_its_time_and_not_that_of_their_launches(monkeypatch):
    queue = accelerators.installed(monkeypatch, "cuda")
    monkeypatch.setattr(module_timers, "occupy", lambda kind, time_ns: queue.give(time_ns / 1e9))

    def launch(seconds):
        time.sleep(0.005)  # the host needs longer than the work
        queue.give(seconds)

    recorder = Operators(9, "cuda")
    recorder.calls.extend(Call(launch, (seconds,), {}, None) for seconds in (0.001, 0.002, 0.0005))
    recorder.number = 3
    assert recorder.ns([0, 1, 2, 3]).tolist() == pytest.approx([0, 1e6, 3e6, 3.5e6], abs=2e5)


def test_on_an_accelerator_the_slower_of_it_and_its_host_explains_a_step(base):
    table = decoder.roofline(base, SimpleNamespace(**vars(ROUND) | {"kind": "cuda"}))
    host_ns = table["launches_ns"] + table["framework_ns"]
    longer = table["operators_ns"].where(table["operators_ns"] > host_ns, host_ns)
    assert table["explained_frac"].tolist() == pytest.approx((longer / table["time_ns"]).tolist(), rel=0.01)


def test_a_live_steps_operators_and_framework_explain_its_time(speech):
    def told_apart():
        return decoder.roofline(measured(speech, num_steps=6, input_length=41, repeats=2)).loc["step"]

    step = at_a_quiet_moment(told_apart, lambda step: 0.8 < step["explained_frac"] < 1.3)
    assert 0.6 < step["explained_frac"] < 1.6, "how closely says the ledger, on an idle machine"
    assert step["explained_frac"] == pytest.approx((step["operators_ns"] + step["framework_ns"]) / step["time_ns"])
    assert step["operators_ns"] > 0 < step["framework_ns"]


def test_the_step_that_is_told_apart_is_the_last_one():
    model = MODELS["text"]().eval()
    ready = prepared(model, None, setting_of(model, num_steps=3))
    with torch.no_grad():
        found = step_times(ready.model, ready.call, 3)
        with Launches() as counter:
            counted = module_timers.watch(ready.model, ready.call, counter).steps.iloc[-1]
    assert list(found.index) == list(counted.index)
    assert ((found["operators"] > 0) == (counted > 0)).all()


def test_without_a_calibration_there_are_no_floors(speech):
    account = decoder.measure(speech, num_steps=2, repeats=1, calibrated=False)
    with pytest.raises(ValueError, match="carries no calibration"):
        decoder.roofline(account)
