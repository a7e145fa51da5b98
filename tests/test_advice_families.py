"""Rows of a step's time: the family of an operator by its name, and rows that sum to the time of plain steps."""

from __future__ import annotations

import pytest
import torch
from made_traces import capture_of, launched, note, op
from torch.utils.checkpoint import checkpoint

import effkit as ek
from effkit.advice.families import (
    ASKING,
    ATTENTION,
    CLEARING,
    COMMUNICATION,
    HOST,
    NORMS,
    OPTIMIZER,
    OTHER,
    PRODUCTS,
    RECOMPUTATION,
    ROWS,
    rows_ns,
    share_of_products,
)
from effkit.advice.step_hooks import RECOMPUTED, listening

pytestmark = pytest.mark.usefixtures("one_thread")
US = 1000


# Made by hand: microseconds


def made(tmp_path, *events, end=100):
    return capture_of(tmp_path, note("ProfilerStep#1", 0, end), *events)


def test_annotations_decide_before_names(tmp_path):
    seen = made(
        tmp_path, op("aten::addmm", 0, 20),
        op("autograd::engine::evaluate_function: CheckpointFunctionBackward", 25, 55),
        note(RECOMPUTED, 30, 50), op("aten::mm", 32, 48),
        note("Optimizer.step#SGD.step", 60, 80), op("aten::addmm", 62, 70),
        note("Optimizer.zero_grad#SGD.zero_grad", 80, 85), op("aten::softmax", 81, 84),
    )  # fmt: skip
    assert rows_ns(seen, 100 * US) == pytest.approx({
        PRODUCTS: 20 * US, RECOMPUTATION: 20 * US, OPTIMIZER: 20 * US, CLEARING: 5 * US, HOST: (10 + 25) * US,
    })  # fmt: skip


def test_what_recording_cost_is_taken_from_around_each_event(tmp_path):
    """Five operators side by side, 10 us more than plain: 2 us each, and all of it from the host."""
    seen = made(tmp_path, *[op("aten::mm", 20 * i, 20 * i + 10) for i in range(5)])
    assert rows_ns(seen, 90 * US) == pytest.approx({PRODUCTS: 50 * US, HOST: 40 * US})


def test_what_recording_cost_inside_of_an_operator(tmp_path):
    """Four events inside of one: of its 60 us, 40 are theirs and 4 x 2 are the recording's."""
    inner = [op("aten::mul", 12 * i + 2, 12 * i + 12) for i in range(4)]
    seen = made(tmp_path, op("aten::layer_norm", 0, 60), *inner)
    assert rows_ns(seen, 90 * US) == pytest.approx({NORMS: 12 * US, OTHER: 40 * US, HOST: 38 * US})


def test_steps_that_were_quicker_recorded_are_scaled(tmp_path):
    seen = made(tmp_path, op("aten::mm", 0, 50))
    assert rows_ns(seen, 120 * US) == pytest.approx({PRODUCTS: 60 * US, HOST: 60 * US})


@pytest.mark.parametrize("plain_us", [1, 30, 70, 100, 400])
def test_rows_sum_to_the_plain_time(tmp_path, plain_us):
    inner = [op("aten::mul", i, i + 0.5) for i in range(1, 40)]
    seen = made(tmp_path, op("aten::softmax", 0, 45), *inner, op("aten::mm", 50, 60), op("aten::item", 60, 61))
    rows = rows_ns(seen, plain_us * US)
    assert sum(rows.values()) == pytest.approx(plain_us * US)
    assert min(rows.values()) > 0
    assert list(rows) == [row for row in ROWS if row in rows]


def test_on_a_gpu_kernels_count_and_the_host_is_what_they_leave(tmp_path):
    seen = made(
        tmp_path, op("aten::mm", 0, 10), launched("gemm", 2, 12, 42, 1),
        note("Optimizer.step#AdamW.step", 20, 30), op("aten::_foreach_add_", 21, 29), launched("add", 22, 45, 60, 2),
        op("aten::add", 30, 40), launched("elementwise", 32, 60, 65, 3),
    )  # fmt: skip
    assert rows_ns(seen, 100 * US) == pytest.approx({
        PRODUCTS: 30 * US, OPTIMIZER: 15 * US, OTHER: 5 * US, HOST: 50 * US,
    })  # fmt: skip


def test_kernels_whose_operator_tells_nothing_count_by_their_own_names(tmp_path):
    seen = made(
        tmp_path, op("CompiledFunction", 0, 10), launched("nvjet_hsh_64x8_64x16", 1, 12, 32, 1),
        launched("triton_poi_fused_add_0", 5, 32, 37, 2),
        launched("flash_fwd_kernel", 30, 40, 50, 3),  # launched by no operator at all
        op("CompiledFunctionBackward", 50, 60), launched("cutlass_80_tensorop_s16816gemm", 51, 60, 65, 4),
        op("aten::scaled_dot_product_attention", 70, 90), op("aten::bmm", 71, 80), launched("gemm", 72, 80, 85, 5),
    )  # fmt: skip
    assert rows_ns(seen, 100 * US) == pytest.approx({
        PRODUCTS: 25 * US, ATTENTION: 15 * US, OTHER: 5 * US, HOST: 55 * US,
    })  # fmt: skip


def test_a_kernels_own_name_comes_before_its_operators(tmp_path):
    """Operators of somebody's own hold anything; general kernels are told by the operator around them."""
    seen = made(
        tmp_path, op("aten::mul", 0, 10), launched("cutlass_80_tensorop_s16816gemm", 1, 12, 32, 1),  # products, 20
        op("vllm::moe_forward", 10, 20), launched("void vllm::act_and_mul_kernel<silu>", 11, 32, 37, 2),  # other, 5
        launched("fused_moe_kernel", 12, 37, 47, 3),  # products, 10
        launched("topkGatingSoftmax", 13, 47, 48, 4),  # other, 1
        op("aten::layer_norm", 20, 30), launched("vectorized_elementwise_kernel", 21, 48, 52, 5),  # norms, 4
        op("aten::convolution", 30, 40), launched("ampere_sgemm_128x64_tn", 31, 52, 59, 6),  # products, 7
        op("aten::mm", 40, 50), launched("a kernel of no telling name", 41, 59, 62, 7),  # products, 3
    )  # fmt: skip
    assert rows_ns(seen, 100 * US) == pytest.approx({PRODUCTS: 40 * US, NORMS: 4 * US, OTHER: 6 * US, HOST: 50 * US})
    by_family = seen.families()["kernel_ns"].to_dict()
    assert by_family["convolution"] == 7 * US
    assert by_family["matrix products"] == 33 * US
    assert by_family["elementwise"] == 5 * US


def test_communication_and_numbers(tmp_path):
    seen = made(tmp_path, note("gloo:all_reduce", 0, 30), op("aten::item", 40, 50),
                op("aten::_local_scalar_dense", 42, 50))  # fmt: skip
    assert rows_ns(seen, 100 * US) == pytest.approx({COMMUNICATION: 30 * US, ASKING: 10 * US, HOST: 60 * US})


def test_a_step_without_operators_is_the_hosts(tmp_path):
    assert rows_ns(made(tmp_path, op("aten::mm", 0, 0)), 100 * US) == pytest.approx({HOST: 100 * US})


def test_share_of_products():
    assert share_of_products({PRODUCTS: 30.0, ATTENTION: 20.0, HOST: 50.0}) == 0.5
    assert share_of_products({HOST: 50.0}) == share_of_products({}) == 0


# Recorded here


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_real_step(reentrant):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 4))
    update = torch.optim.AdamW(model.parameters())
    batch = torch.ones(8, 16, requires_grad=True)

    def step(recompute=True):
        update.zero_grad(set_to_none=False)
        output = checkpoint(model, batch, use_reentrant=reentrant) if recompute else model(batch)
        output.square().mean().backward()
        update.step()

    with listening(model):
        twice = ek.capture(step)
    once = ek.capture(lambda: step(recompute=False))
    found = []
    for seen in (twice, once):
        recorded_ns = float(seen.steps["dur_ns"].sum())  # nothing taken for recording: no row may vanish
        found.append(rows_ns(seen, recorded_ns))
        assert sum(found[-1].values()) == pytest.approx(recorded_ns)
        assert sum(rows_ns(seen, recorded_ns / 3).values()) == pytest.approx(recorded_ns / 3)
    expected = {PRODUCTS, NORMS, OTHER, OPTIMIZER, CLEARING, HOST}
    assert set(found[1]) == expected
    assert set(found[0]) == expected | {RECOMPUTATION}
