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
    family,
    rows_ns,
    share_of_products,
)
from effkit.advice.listening import RECOMPUTED, listening

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = {
    PRODUCTS: """aten::mm aten::addmm aten::bmm aten::baddbmm aten::matmul aten::linear aten::dot aten::mv aten::addmv_
        aten::mkldnn_linear aten::_grouped_mm aten::convolution aten::conv2d aten::_convolution
        aten::mkldnn_convolution aten::convolution_backward aten::lstm aten::mkldnn_rnn_layer aten::gru aten::rnn_tanh
        aten::_thnn_fused_lstm_cell aten::einsum""",
    ATTENTION: """aten::scaled_dot_product_attention aten::_scaled_dot_product_flash_attention_for_cpu
        aten::_scaled_dot_product_flash_attention_for_cpu_backward aten::_flash_attention_forward
        aten::_efficient_attention_backward aten::_scaled_dot_product_cudnn_attention
        flash_attn::_flash_attn_forward""",
    NORMS: """aten::layer_norm aten::native_layer_norm aten::native_layer_norm_backward aten::_fused_rms_norm
        aten::native_batch_norm aten::group_norm aten::linalg_vector_norm aten::_foreach_norm aten::softmax
        aten::_log_softmax aten::_softmax_backward_data aten::logsumexp aten::nll_loss_nd aten::nll_loss_forward
        aten::nll_loss_backward aten::cross_entropy_loss""",
    COMMUNICATION: """gloo:all_reduce nccl:all_reduce nccl:_all_gather_base c10d::allreduce_ record_param_comms
        symm_mem::one_shot_all_reduce""",
    ASKING: "aten::item aten::_local_scalar_dense aten::is_nonzero",
    HOST: """AddmmBackward0 MmBackward0 ConvolutionBackward0 NllLossBackward0 torch::autograd::AccumulateGrad
        ScaledDotProductFlashAttentionForCpuBackward0 MyFunctionBackward""",
    OTHER: """aten::add aten::mul_ aten::copy_ aten::_to_copy aten::embedding aten::embedding_dense_backward aten::gelu
        aten::dropout aten::index_select aten::_foreach_addcdiv_ aten::clone aten::silu_backward aten::randperm
        aten::cumsum aten::addcmul aten::dropout_ aten::items aten::sum""",
}  # fmt: skip
US = 1000


@pytest.mark.parametrize(("row", "name"), [(row, name) for row, names in NAMES.items() for name in names.split()])
def test_family_of_an_operator(row, name):
    assert family(name) == row


def test_nodes_of_autograd_are_the_hosts_whatever_they_call():
    for name in ("AddmmBackward0", "torch::autograd::AccumulateGrad", "NativeLayerNormBackward0"):
        assert family(f"autograd::engine::evaluate_function: {name}") == HOST


@pytest.mark.parametrize("name", ["aten::normal_", "aten::normal", "aten::log_normal_"])
def test_normal_numbers_are_no_norm(name):
    assert family(name) == OTHER


@pytest.mark.parametrize("name", ["aten::_scaled_mm", "aten::_int_mm", "aten::_addmm_activation"])
def test_products_of_fewer_bits_and_fused_ones(name):
    assert family(name) == PRODUCTS


def test_conversions_are_no_convolutions():
    assert family("aten::_convert_indices_from_coo_to_csr") == OTHER


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
