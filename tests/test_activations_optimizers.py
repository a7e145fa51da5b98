"""AdamW with moments in eight bits: equal to torch's in float32, small between and during steps, its error measured."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effkit import models
from effkit.activations.low_bit import LowBitAdamW
from effkit.quantisation import SIGNED, UNSIGNED, dequantise_state, quantise_state
from lessons.moments import update_error

FORMATS = ["int8", "fp8_e4m3"]


def train(build_optimizer, steps: int, model=None, optimizer=None, start: int = 0):
    """A small GPT on a language where each token has four followers; returns it, its optimizer and the losses."""
    # as wide as a group, so that no group holds parts of two rows, as in models of real width
    model = models.gpt(layers=2, hidden=128, vocabulary=200, device="cpu") if model is None else model
    optimizer = build_optimizer(model.parameters()) if optimizer is None else optimizer
    followers = torch.randint(200, (200, 4), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        tokens = [torch.randint(200, (8,), generator=generator)]
        for _ in range(31):
            tokens.append(followers[tokens[-1], torch.randint(4, (8,), generator=generator)])
        ids = torch.stack(tokens, dim=1)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


@pytest.fixture(scope="module")
def adam():
    """torch's optimizer after 50 steps, and the losses."""
    _, optimizer, losses = train(lambda p: torch.optim.AdamW(p, 1e-3), 50)
    assert losses[-1] < 0.8 * losses[0]
    return optimizer, losses


def test_in_float32_it_is_torch_to_the_last_bit():
    settings = {"lr": 3e-3, "betas": (0.8, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    ours, _, losses = train(lambda p: LowBitAdamW(p, **settings, states="float32"), 8)
    theirs, _, expected = train(lambda p: torch.optim.AdamW(p, **settings, foreach=False), 8)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("states", FORMATS)
def test_eight_bits_train_as_well(adam, states):
    losses = train(lambda p: LowBitAdamW(p, 1e-3, states=states), 50)[2]
    assert losses[-1] == pytest.approx(adam[1][-1], rel=0.02)


@pytest.mark.parametrize("states", FORMATS)
def test_the_state_is_two_bytes_per_parameter_and_sixteen_per_group(states):
    parameter = torch.nn.Parameter(torch.randn(64, 128))
    parameter.grad = torch.randn(64, 128)
    optimizer = LowBitAdamW([parameter], states=states, group=128)
    optimizer.step()
    kept = [value for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
    assert sum(tensor.nbytes for tensor in kept) == 2 * parameter.numel() + 16 * parameter.numel() // 128


def within_a_step_bytes(optimizer) -> int:
    """What a step holds at most above what it leaves, by the profiler's allocation events of the first two."""
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
        optimizer.step()
    level = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak - level


def test_a_step_has_one_parameters_moments_in_full():
    for states in FORMATS:
        held = []
        for count in (2, 16):
            ours = [torch.nn.Parameter(torch.randn(64, 128)) for _ in range(count)]
            for parameter in ours:
                parameter.grad = torch.randn(64, 128)
            held.append(within_a_step_bytes(LowBitAdamW(ours, states=states)))
        assert held[0] == held[1], "it does not grow with the number of parameters"
        assert 2 * 4 * 64 * 128 <= held[0] <= 6 * 4 * 64 * 128, "two to six float32 tensors of the parameter's size"


@pytest.mark.parametrize("states", ["float32", *FORMATS])
def test_a_saved_state_goes_on_as_if_never_stopped(states, tmp_path):
    def build(parameters):
        return LowBitAdamW(parameters, 1e-3, states=states, group=32)

    whole, _, expected = train(build, 6)
    model, optimizer, _ = train(build, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = LowBitAdamW(model.parameters())  # the settings come with the state
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    untouched = copy.deepcopy(saved)
    fresh.load_state_dict(saved)
    assert train(build, 3, model, fresh, start=3)[2] == expected[3:]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    for key, state in untouched["state"].items():
        assert all(torch.equal(v.float(), saved["state"][key][n].float()) for n, v in state.items() if n != "step")


@pytest.mark.parametrize("states", ["float32", *FORMATS])
def test_steps_run_on_fake_tensors(states):
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.randn(5, 7))
        optimizer = LowBitAdamW([parameter], states=states)
        for _ in range(2):
            parameter.grad = torch.randn(5, 7)
            optimizer.step()
    assert optimizer.state[parameter]["step"] == 2


def test_half_precision_parameters_have_float32_moments():
    parameter = torch.nn.Parameter(torch.randn(3, 7, dtype=torch.bfloat16))
    before = parameter.detach().clone()
    parameter.grad = torch.randn(3, 7, dtype=torch.bfloat16)
    optimizer = LowBitAdamW([parameter], lr=0.1, states="float32")
    assert optimizer.step(lambda: 3.0) == 3.0
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
    # the first update of Adam is the gradient's sign
    expected = before.float() * (1 - 0.1 * 1e-2) - 0.1 * parameter.grad.float().sign()
    torch.testing.assert_close(parameter.detach().float(), expected, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("states", FORMATS)
@pytest.mark.parametrize("forms", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("expand", [True, False])
def test_packing_keeps_shape_sign_zero_and_the_largest(states, forms, expand):
    values = torch.randn(5, 67, generator=torch.Generator().manual_seed(0))
    values[0, :3] = 0
    values[3] = 0  # whole groups of it
    values = values.abs() if forms is UNSIGNED else values
    back = dequantise_state(quantise_state(values, forms[states], 16, expand=expand), forms[states], values.shape)
    assert back.shape == values.shape
    assert (back[values == 0] == 0).all()
    assert (back * values >= 0).all()
    assert back.abs().max() == pytest.approx(values.abs().max().item(), rel=1e-5)
    assert (back - values).norm() / values.norm() < 0.05
    if expand:
        assert (back[values != 0] != 0).all(), "the smallest of a group has a code of its own"


@pytest.mark.parametrize("states", FORMATS)
def test_extremes_stay_finite(states):
    # all alike, a range far beyond that of the format, and subnormal
    for values in (torch.full((40,), 3.0), torch.tensor([1e-18, 1.0, 1e18, 0.0]), torch.full((40,), 1e-42)):
        back = dequantise_state(quantise_state(values, SIGNED[states], 16, expand=True), SIGNED[states], values.shape)
        assert back.isfinite().all()
        if values.max() > 1e-38:
            assert torch.equal(back == 0, values == 0)
            torch.testing.assert_close(back.amax(), values.amax())


def test_expansion_lowers_the_error_of_the_update_in_fp8(adam):
    table = update_error(adam[0]).set_index(["states", "expand"])
    plain, expanded = table.loc[("fp8_e4m3", False)], table.loc[("fp8_e4m3", True)]
    # three times in the mean squared error, which COAT reports; that is the square of the ratio of norms, which is 2
    assert plain["mean_squared_error"] / expanded["mean_squared_error"] >= 3
    ratio = plain["error_frac"] / expanded["error_frac"]
    assert 1.8 < ratio < 3
    assert ratio**2 == pytest.approx(plain["mean_squared_error"] / expanded["mean_squared_error"], rel=1e-3)
    assert expanded["error_frac"] < 0.02


def test_without_expansion_int8_loses_second_moments_of_wide_groups(adam):
    table = update_error(adam[0], group=4096).set_index(["states", "expand"])
    assert table.loc[("int8", False), "lost_frac"] > 0.01
    assert table.loc[("int8", False), "error_frac"] > 1
    assert table.loc[("int8", True), "lost_frac"] == 0
    assert table.loc[("int8", True), "error_frac"] < 0.2


def test_update_error_takes_pairs_and_counts_by_hand():
    first, second = torch.tensor([1.0, -0.5, 0.0, 0.25]), torch.tensor([4.0, 1.0, 1.0, 1.0])
    row = update_error([(first, second)], eps=0.0).set_index(["states", "expand"]).loc[("int8", False)]
    m = torch.tensor([127.0, -64.0, 0.0, 32.0]) / 127  # 63.5 is rounded to even
    v = torch.tensor([255.0, 64.0, 64.0, 64.0]) / 255 * 4
    exact, change = first / second.sqrt(), m / v.sqrt() - first / second.sqrt()
    assert row["error_frac"] == pytest.approx(float(change.norm() / exact.norm()), rel=1e-4)
    assert row["mean_squared_error"] == pytest.approx(float(change.square().mean()), rel=1e-4)


def test_what_it_cannot_do_is_refused_in_a_sentence(adam):
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="states is one of float32, int8, fp8_e4m3; given: 'int4'"):
        LowBitAdamW([parameter], states="int4")
    with pytest.raises(ValueError, match="group is a whole number from 1 on; given: 0"):
        LowBitAdamW([parameter], group=0)
    with pytest.raises(ValueError, match="train a little first"):
        update_error(torch.optim.AdamW([parameter]))
