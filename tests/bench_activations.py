"""The timed bars of the activation lab, each beside its peer or a plain step in the same run: ``make bench``."""

from __future__ import annotations

import copy
import statistics
import time
from itertools import product

import pytest
import torch
from bench_table import row
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._pytree import tree_map_only
from transformers import LlamaConfig, LlamaForCausalLM

import effkit as ek
from effkit import activations
from effkit.activations.on_ranks import TIME

# none of these was run by a calibration, nor is any in the ledger's grid
COMBINED = (
    {"checkpoint_every": 2, "micro_batches": 2},
    {"checkpoint_every": 1, "compress": "int8"},
    {"micro_batches": 2, "autocast": "bfloat16"},
    {"compress": "int8", "micro_batches": 2},
    {"checkpoint_every": 1, "autocast": "bfloat16", "optimizer_states": "int8"},
    {"checkpoint_every": 2, "micro_batches": 4, "optimizer_states": "int8"},
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def measured():
    """A small GPT, a batch, and the account of its step with every lever timed."""
    model = ek.models.gpt()
    batch = model.random_batch(8, 96)
    return model, batch, activations.measure(model, batch, time_levers=True)


def took_s(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def in_turn(functions, rounds=7):
    """The seconds of each function, median over rounds in which all run one after another; the first warms up."""
    spent = [[took_s(function)[0] for function in functions] for _ in range(rounds + 1)][1:]
    return [statistics.median(times) for times in zip(*spent, strict=True)]


def step_ns(account):
    return account.companion(TIME).total


def test_a_slider_follows_the_hand(measured):
    base = measured[2]
    positions = ({}, {"checkpoint_every": 1}, {"micro_batches": 2}, {"checkpoint_every": 1, "autocast": "bfloat16"})
    fitted_s = [took_s(lambda p=p: activations.predict(base, batch_size=9, **p))[0] for p in positions]
    moves = [
        (position, rows, cells) for position, rows, cells in product(positions, range(5, 31, 5), range(30, 180, 25))
    ]
    times = [
        took_s(lambda m=m: activations.predict(base, batch_size=m[1], length=m[2], **m[0]))[0] for m in moves
    ]  # fmt: skip
    median = statistics.median(times)
    print(f"\n\na slider's first move with a lever: {statistics.median(fitted_s):.2f} s, worst {max(fitted_s):.2f} s")
    print(f"  each of {len(moves)} further moves: median {median * 1e3:.2f} ms, worst {max(times) * 1e3:.2f} ms")
    assert median <= 0.005


def barred(what, bar_s, functions):
    """The median of these, held against its bar."""
    spent = [took_s(function)[0] for function in functions]
    median = statistics.median(spent)
    print(f"\n  runs [s]: {', '.join(f'{one:.2f}' for one in spent)}")
    assert row(what, median, bar_s)


def seven_billion():
    """A Llama-2-7B on the meta device, and a batch of 4 x 2,048 tokens."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            use_cache=False,
        )).to(torch.bfloat16)  # fmt: skip
    cells = torch.zeros(4, 2048, dtype=torch.long)
    return model, {"input_ids": cells, "labels": cells}


@pytest.mark.parametrize(
    ("lever", "bar_s"), [({}, 4), ({"checkpoint_every": 1}, 4), ({"compress": "int8"}, 8)], ids=str
)
def test_a_llama_of_seven_billion_is_forecast_on_a_laptop(lever, bar_s):
    model, batch = seven_billion()
    barred(f"forecast of 7 B, {lever}", bar_s, [lambda: activations.forecast(model, batch, **lever)] * 3)


def test_a_step_is_measured_while_one_waits():
    model = ek.models.gpt()
    batch = model.random_batch(8, 96)
    barred("measure()", 2, [lambda: activations.measure(model, batch)] * 3)
    barred("measure(time_levers=True)", 8, [lambda: activations.measure(model, batch, time_levers=True)] * 3)


def relative_time(model, batch, base, **setting):
    """Time of a step at this setting over the base's."""
    return step_ns(activations.measure(model, batch, base=base, repeats=9, **setting)) / step_ns(base)


def test_the_first_prediction_of_a_lever_and_the_first_move_of_a_slider_take_half_a_second():
    model = ek.models.gpt()
    base = activations.measure(model, model.random_batch(8, 96), time_levers=True)
    levers = ({"checkpoint_every": 1}, {"compress": "int8"}, {"micro_batches": 2}, {"autocast": "bfloat16"},
              {"optimizer_states": "int8"}, {"offload_frac": 1.0})  # fmt: skip
    barred("first predict() of a lever", 0.5, [lambda one=one: activations.predict(base, **one) for one in levers])
    panel = activations.whatif(activations.measure(model, model.random_batch(8, 96)))
    moves = [lambda to=to: setattr(panel.controls[to[0]], "value", to[1]) for to in (
        ("checkpoint_every", 1), ("compress", "int8"), ("micro_batches", 2), ("batch_size", 9), ("length", 120),
    )]  # fmt: skip
    barred("first move of a slider", 0.5, moves)


def test_the_time_of_combined_levers_is_foretold(measured):
    model, batch, base = measured
    predicted = [step_ns(activations.predict(base, **setting)) / step_ns(base) for setting in COMBINED]
    ratios = [relative_time(model, batch, base, **setting) for setting in COMBINED]
    errors = [guess / truth - 1 for guess, truth in zip(predicted, ratios, strict=True)]
    print(f"\n\ntime of a step over that of a plain step of {step_ns(base) / 1e6:.0f} ms: predicted, measured, error")
    for setting, guess, truth, error in zip(COMBINED, predicted, ratios, errors, strict=True):
        named = ", ".join(f"{name}={value}" for name, value in setting.items())
        print(f"  {named:<76}{guess:>6.2f}{truth:>6.2f}{error:>+8.1%}")
    sizes = list(map(abs, errors))
    print(f"  median {statistics.median(sizes):.1%}, worst {max(sizes):.1%}")
    assert statistics.median(sizes) <= 0.08
    assert max(sizes) <= 0.20


def test_what_compression_costs(measured):
    model, batch, base = measured
    ratio = relative_time(model, batch, base, compress="int8")
    squeezed = activations.measure(model, batch, base=base, repeats=1, compress="int8")
    print("\n\nactivations saved in int8, beside a plain step")
    print(f"  time {ratio - 1:+.1%}, peak {squeezed.total / base.total - 1:+.1%}")
    assert squeezed.total < base.total


def test_what_low_bit_states_cost():
    """One update of 6 million parameters; torch's own one after another and all at once, which is its default."""
    torch.manual_seed(0)
    updates = {}
    for name, make in {
        "torch.optim.AdamW": torch.optim.AdamW,
        "torch.optim.AdamW, foreach": lambda ours: torch.optim.AdamW(ours, foreach=True),
        "LowBitAdamW, int8": activations.LowBitAdamW,
        "LowBitAdamW, fp8_e4m3": lambda ours: activations.LowBitAdamW(ours, states="fp8_e4m3"),
    }.items():
        parameters = [torch.nn.Parameter(torch.randn(1000, 1000)) for _ in range(6)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        updates[name] = make(parameters)
    seconds = in_turn([update.step for update in updates.values()])
    print("\n\none update of 6 million parameters")
    state_bytes = {}
    for (name, update), spent in zip(updates.items(), seconds, strict=True):
        tensors = [leaf for state in update.state.values() for leaf in torch.utils._pytree.tree_leaves(state)]
        state_bytes[name] = sum(leaf.nbytes for leaf in tensors if isinstance(leaf, torch.Tensor))
        print(f"  {name:<28}{spent * 1e3:>8.1f} ms{spent / seconds[0]:>7.2f}x{state_bytes[name] / 2**20:>8.1f} MiB")
    assert state_bytes["LowBitAdamW, int8"] < 0.3 * state_bytes["torch.optim.AdamW"]


def test_forecasts_beside_torchs_memory_tracker(measured):
    """torch's MemTracker over two steps, of which the first makes the optimizer's state: on fake tensors, and for real.

    On fake tensors it sees another step than is run: transformers takes them for a compiler's, and makes a mask.
    """
    model, batch, base = measured

    def tracked(subject, inputs):
        update = torch.optim.AdamW(subject.parameters(), lr=0.0)
        tracker = MemTracker()
        tracker.track_external(subject, update, *inputs.values())
        with tracker:
            for turn in range(2):
                subject(**inputs).loss.backward()
                update.step()
                update.zero_grad(set_to_none=True)
                if not turn:
                    tracker.reset_mod_stats()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
        return peak["Total"]

    def theirs():
        mode = FakeTensorMode()
        with FakeCopyMode(mode):
            faked = copy.deepcopy(model)
        with mode:
            return tracked(faked, tree_map_only(torch.Tensor, mode.from_tensor, batch))

    def for_real():
        return tracked(model, batch)

    def ours():
        return activations.forecast(model, batch).total

    functions = (ours, theirs, for_real)
    our_error, their_error, real_error = (function() / base.total - 1 for function in functions)
    our_s, their_s, real_s = in_turn(functions, rounds=5)
    print(f"\n\nforecast of a GPT's step, measured {base.total / 2**20:.2f} MiB")
    print(f"  ours {our_error:+.3%} in {our_s:.2f} s; MemTracker {their_error:+.3%} in {their_s:.2f} s")
    print(f"  no forecast: MemTracker around real steps {real_error:+.3%} in {real_s:.2f} s")
    assert abs(our_error) <= 0.005
    assert our_s <= their_s


def test_a_front_is_found_while_one_waits(measured):
    base = activations.measure(*measured[:2], time_levers=True)  # nothing replayed yet
    spent, table = took_s(lambda: activations.front(base))
    again, _ = took_s(lambda: activations.front(base))
    print(f"\n\nfront() of a small GPT: {len(table)} combinations in {spent:.1f} s, {table['on_front'].sum()} of them")
    print(f"  on the front; once more {again:.2f} s")
    assert table["on_front"].sum() > 1
