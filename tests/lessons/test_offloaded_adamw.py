"""The interleaved optimizer equals torch's, and the calculator balances what bounds it."""

import copy
from fractions import Fraction

import pytest
import torch

from effkit import models
from lessons.offloaded_adamw import InterleavedAdamW, Rates, interleave

SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.98), "eps": 1e-6, "weight_decay": 0.1}


def train(model, optimizer, steps: int, start: int = 0) -> list[float]:
    losses = []
    for seed in range(start, start + steps):
        loss = model(**model.random_batch(2, 17, seed=seed)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def build(device: str = "cpu"):
    return models.gpt(layers=2, hidden=24, heads=2, vocabulary=77, device=device)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def fused():
    model = build()
    return model, train(model, torch.optim.AdamW(model.parameters(), **SETTINGS, fused=True), 6)


@pytest.mark.parametrize("stride", [None, 0, 1, Fraction(4, 3), 2, 3])
def test_it_is_torch_fused_to_the_last_bit(fused, stride):
    model = build()
    optimizer = InterleavedAdamW(model.parameters(), **SETTINGS, stride=stride, num_subgroups=5)
    assert train(model, optimizer, 6) == fused[1]
    assert equal(model, fused[0])
    plain = build()
    train(plain, torch.optim.AdamW(plain.parameters(), **SETTINGS), 6)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)  # another order of operations


@pytest.mark.parametrize(
    ("stride", "on_device"),
    [(0, ""), (1, "DDDDDDDD"), (2, "D.D.D.D."), (3, "D..D..D."), (Fraction(4, 3), "D.DDD.DD"), (1.6, "D.D.DD.D")],
)
def test_the_stride_says_which_subgroups_the_device_updates(monkeypatch, stride, on_device):
    order = []
    for method, letter in (("_update_on_device", "D"), ("_update_on_host", ".")):
        whole = getattr(InterleavedAdamW, method)
        monkeypatch.setattr(
            InterleavedAdamW,
            method,
            lambda self, members, *rest, whole=whole, letter=letter: (
                order.append((letter, [id(m.parameter) for m in members])),
                whole(self, members, *rest),
            )[1],
        )
    ours = [torch.nn.Parameter(torch.ones(10)) for _ in range(16)]
    for parameter in ours:
        parameter.grad = torch.ones(10)
    InterleavedAdamW(ours, stride=stride, num_subgroups=8).step()
    assert "".join(letter for letter, _ in order) == (on_device or "........")
    assert [key for _, keys in order for key in keys] == [id(parameter) for parameter in ours]
    assert {len(keys) for _, keys in order} == {2}
    assert all(parameter.max() < 1 for parameter in ours)


@pytest.mark.parametrize("stride", [0, 2])
def test_states_go_to_and_come_from_torch(fused, stride):
    model = build()
    ours = InterleavedAdamW(model.parameters(), **SETTINGS, stride=stride, num_subgroups=4)
    train(model, ours, 2)
    theirs = torch.optim.AdamW(model.parameters(), **SETTINGS, fused=True)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    theirs.param_groups[0]["fused"] = True  # a state brings its settings along, and ours has no choice of kernels
    train(model, theirs, 2, start=2)
    again = InterleavedAdamW(model.parameters(), **SETTINGS, stride=stride, num_subgroups=4)
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert train(model, again, 2, start=4) == fused[1][4:]
    assert equal(model, fused[0])


def test_parameters_loaded_between_steps_are_noticed():
    def two_lives(make):
        model = build()
        optimizer = make(model.parameters())
        kept = copy.deepcopy(model.state_dict())
        train(model, optimizer, 2)
        model.load_state_dict(kept)
        train(model, optimizer, 2)
        return model

    ours = two_lives(lambda p: InterleavedAdamW(p, **SETTINGS, stride=2, num_subgroups=4))
    assert equal(ours, two_lives(lambda p: torch.optim.AdamW(p, **SETTINGS, fused=True)))


def test_each_parameter_group_has_its_own_settings_and_frozen_ones_are_left_alone():
    def groups(model):
        first, *rest = model.parameters()
        rest[-1].requires_grad_(False)
        return [{"params": [first], "lr": 1e-1}, {"params": rest, "weight_decay": 0.5}]

    ours, theirs = build(), build()
    train(ours, InterleavedAdamW(groups(ours), stride=2, num_subgroups=3), 3)
    train(theirs, torch.optim.AdamW(groups(theirs), fused=True), 3)
    assert equal(ours, theirs)


def test_the_calculator_balances_cpu_and_link():
    cpu, link, params = 1.5e9, 25e9, 10**9
    best = interleave(Rates(cpu, 1e12, link), params, num_subgroups=1000)
    assert best.gpu_subgroups / 1000 == pytest.approx((link - 4 * cpu) / (link + 4 * cpu), abs=1e-3)
    assert best.cpu_seconds == pytest.approx(params / cpu)
    assert best.gpu_seconds == pytest.approx(8 * params / link)
    assert best.seconds < 0.9 * min(best.cpu_seconds, best.gpu_seconds)
    assert best.stride == Fraction(1000, best.gpu_subgroups)


@pytest.mark.parametrize(
    ("rates", "gpu_subgroups", "bound"),
    [
        (Rates(1e9, 1e12, 1e9), 0, "link"),  # moments would be the slower way over a slow link
        (Rates(1e6, 1e12, 1e12), 16, "link"),
        (Rates(1e9, 1e9, 1e15), 8, "cpu"),
        (Rates(1e9, 1e-3, 1e15), 0, "cpu"),
    ],
)
def test_the_slowest_part_decides(rates, gpu_subgroups, bound):
    best = interleave(rates, 10**6)
    assert (best.gpu_subgroups, best.bound) == (gpu_subgroups, bound)
    assert best.seconds <= min(best.cpu_seconds, best.gpu_seconds)


def test_where_there_is_no_gpu_its_times_are_absent():
    best = interleave(Rates(2e9), 10**9)
    assert (best.gpu_subgroups, best.stride, best.gpu_seconds) == (0, None, None)
    assert best.seconds == best.cpu_seconds == 0.5


def test_this_machine_is_measured():
    rates = Rates.here(num_params=1 << 16, repeats=3)
    assert rates.cpu_params_per_s > 1e6
    assert (rates.gpu_params_per_s is None) == (rates.link_bytes_per_s is None) == (not torch.cuda.is_available())


def test_what_it_cannot_do_is_refused_in_a_sentence():
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"num_subgroups is at least 1, and stride too unless 0; given: 16 and 0\.5"):
        InterleavedAdamW([parameter], stride=0.5)
    with pytest.raises(ValueError, match="move the model to one first"):
        InterleavedAdamW([parameter, torch.nn.Parameter(torch.zeros(1, device="meta"))])
    with pytest.raises(ValueError, match="num_params and num_subgroups are at least 1; given: 0 and 16"):
        interleave(Rates(1e9), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stride", [None, 0, 1, 2])
def test_on_a_gpu_moments_stay_in_pinned_memory_and_results_agree(stride):
    ours, theirs = build("cuda"), build("cuda")
    optimizer = InterleavedAdamW(ours.parameters(), **SETTINGS, stride=stride, num_subgroups=5)
    train(ours, optimizer, 6)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **SETTINGS, fused=True), 6)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    assert all(state["exp_avg"].is_pinned() and state["exp_avg_sq"].is_pinned() for state in optimizer.state.values())
