"""account() of recorded generations, live and made by hand: rows sum to the wall time, and what is unseen is said."""

import pytest
import torch
from made_traces import capture_of, event, launched, note, op

import effkit as ek
from effkit import decoder
from effkit.decoder.recorded import ATTENTION, CHOOSING, COPIES, ELEMENTWISE, HOST, PRODUCTS, UNSEEN

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def seen():
    model = ek.models.speech(hidden=32, encoder_layers=1, decoder_layers=2).eval()
    sound = torch.randn(1, 40, 80)
    return ek.capture(lambda: model.generate(input_features=sound, max_new_tokens=6, min_new_tokens=6))


def rows(account):
    return account.frame["value"].to_dict()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device's rows are other ones")
def test_a_recorded_generation_is_explained_to_the_nanosecond(seen):
    account = decoder.account(seen)
    assert abs(account.residual) <= len(account.frame), "rounding alone"
    assert {ATTENTION, PRODUCTS, COPIES, CHOOSING, ELEMENTWISE, HOST} == set(account.frame.index)
    assert (account.frame["value"] > 0).all()
    assert account.total == seen.overview()["dur_ns"].sum()
    assert account.setting["device_busy_frac"] is None
    assert account.setting["num_steps"] == len(seen.overview())
    assert any("no device activity was recorded" in line for line in account.setting["notes"])


def test_a_capture_that_was_saved_gives_the_same(seen, tmp_path):
    back = ek.load(seen.save(tmp_path / "generation.zip"))
    assert repr(decoder.account(back)) == repr(decoder.account(seen))
    assert rows(decoder.account(back)) == rows(decoder.account(seen))


def test_operators_count_for_what_they_do_and_the_rest_is_the_hosts(tmp_path):
    account = decoder.account(
        capture_of(
            tmp_path,
            op("aten::addmm", 0, 30),
            op("aten::scaled_dot_product_attention", 40, 60),
            op("aten::bmm", 42, 50),
            op("aten::cat", 60, 65),
            op("aten::argmax", 65, 72),
            op("aten::silu", 80, 83),
            note("a note of somebody", 90, 100),
        )
    )
    assert rows(account) == {
        PRODUCTS: 30_000, ATTENTION: 20_000, COPIES: 5_000, CHOOSING: 7_000, ELEMENTWISE: 3_000, HOST: 35_000,
    }  # fmt: skip
    assert account.residual == 0
    assert account.total == 100_000


def test_attention_is_fused_or_written_out_and_other_products_are_products(tmp_path):
    account = decoder.account(
        capture_of(
            tmp_path,
            op("aten::bmm", 0, 10),
            op("aten::_softmax", 10, 15),
            op("aten::_grouped_mm", 15, 35),
            op("aten::lstm", 35, 40),
            op("aten::scaled_dot_product_attention", 40, 80),
            op("aten::_scaled_dot_product_attention_math", 41, 80),
            op("aten::mul", 42, 60),
        )
    )
    assert rows(account) == {PRODUCTS: 25_000, ATTENTION: 55_000}


def test_on_a_device_its_kernels_count_and_what_a_graph_hides_is_not_visible(tmp_path):
    seen = capture_of(
        tmp_path,
        note("decode", 0, 1000),
        op("aten::mm", 2, 12),
        launched("gemm", 4, 10, 40, correlation=1),
        op("aten::add", 12, 20),
        launched("add", 14, 40, 50, correlation=2),
        # the host waits for a graph that was not recorded
        op("aten::copy_", 60, 950),
        event("cuda_runtime", "cudaMemcpyAsync", 61, 62, correlation=3),
        event("cuda_runtime", "cudaStreamSynchronize", 62, 940),
        event("gpu_memcpy", "Memcpy DtoH", 930, 940, correlation=3, bytes=8),
        event("cuda_runtime", "cudaGraphLaunch", 52, 58, correlation=4),
    )
    account = decoder.account(seen, step="decode")
    found = rows(account)
    assert found[PRODUCTS] == 30_000
    assert found[ELEMENTWISE] == 10_000
    assert found[COPIES] == 10_000, "to the host"
    assert 800_000 < found[UNSEEN] < 900_000
    assert ATTENTION not in found, "no row of zeros"
    assert account.residual == 0
    assert account.total == 1_000_000
    assert account.setting["device_busy_frac"] == pytest.approx(0.05)


def test_kernels_that_no_operator_launched_count_by_their_names(tmp_path):
    seen = capture_of(
        tmp_path,
        note("decode", 0, 100),
        op("aten::mm", 0, 10),
        launched("gemm", 1, 10, 30, correlation=1),
        event("cuda_runtime", "cudaGraphLaunch", 12, 14, correlation=2),
        *(event("kernel", name, start, start + 10, correlation=2)
          for name, start in (("gemm", 40), ("paged_attention_v2", 50), ("mine", 60))),
    )  # fmt: skip
    assert rows(decoder.account(seen, step="decode")) == {
        PRODUCTS: 30_000, ATTENTION: 10_000, UNSEEN: 10_000, HOST: 50_000,
    }  # fmt: skip


def test_streams_that_overlap_share_the_time_that_any_of_them_ran(tmp_path):
    seen = capture_of(
        tmp_path,
        note("decode", 0, 100),
        op("aten::mm", 0, 10),
        launched("gemm", 1, 20, 60, correlation=1),
        op("aten::softmax", 10, 20),
        launched("softmax", 11, 20, 60, correlation=2, stream=8),
    )
    found = rows(decoder.account(seen, step="decode"))
    assert found[PRODUCTS] == found[ATTENTION] == 20_000
    assert sum(found.values()) == 100_000


def test_every_step_that_was_marked_counts(tmp_path):
    seen = capture_of(
        tmp_path,
        *(note("decode", start, start + 50) for start in (0, 100, 200)),
        *(op("aten::mm", start, start + 20) for start in (0, 100, 200)),
    )
    account = decoder.account(seen, step="decode")
    assert account.setting["num_steps"] == 3
    assert (account.total, rows(account)) == (150_000, {PRODUCTS: 60_000, HOST: 90_000})
    with pytest.raises(ValueError, match="no annotation is called “prefill”"):
        decoder.account(seen, step="prefill")


def test_a_capture_without_operators_is_refused(tmp_path):
    seen = capture_of(tmp_path, note("decode", 0, 100), note("decode", 100, 200))
    with pytest.raises(ValueError, match="this capture holds no operators: record the CPU activity too"):
        decoder.account(seen)


CONTEXT, GENERATION = "execute_context_2(300)_generation_0(0)", "execute_context_0(0)_generation_8(8)"  # as vLLM names


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (("step[EXTEND bs=2 toks=300]", "step[DECODE bs=8]"), {"prefill": 50_000, "decode": 30_000}),
        (("step[EXTEND bs=2 toks=300]", "step[TARGET_VERIFY bs=8]"), {"prefill": 50_000, "decode": 30_000}),
        (("step[MIXED bs=9]", "step[MIXED bs=8]"), {"mixed": 80_000}),
        ((CONTEXT, GENERATION), {"prefill": 50_000, "decode": 30_000}),
        (("execute_300_context_2(sq300sk300)_generation_0(sq0)", "execute_8_context_0(sq0sk0)_generation_8(sq8sk9)"),
         {"prefill": 50_000, "decode": 30_000}),
        (("execute_context_1(9)_generation_8(8)", GENERATION), {"mixed": 50_000, "decode": 30_000}),
    ],
)  # fmt: skip
def test_steps_of_a_serving_engine_prefill_or_decode(tmp_path, marks, expected):
    seen = capture_of(
        tmp_path,
        note(marks[0], 0, 10),
        op("aten::mm", 1, 9),
        launched("gemm", 2, 20, 70, correlation=1),  # the host runs ahead: by when it was launched, not when it ran
        note(marks[1], 12, 40),
        event("cuda_runtime", "cudaGraphLaunch", 15, 16, correlation=2),
        event("kernel", "gemm", 70, 80, correlation=2),
        event("kernel", "paged_attention", 80, 90, correlation=2),
        event("cuda_runtime", "cudaMemcpyAsync", 30, 31, correlation=3),
        event("gpu_memcpy", "Memcpy DtoH", 90, 100, correlation=3, bytes=8),
        launched("of nobody's step", 50, 100, 105, correlation=4),
    )
    account = decoder.account(seen)
    phases = account.companion("Prefill and decode")
    assert rows(phases) == expected
    assert (phases.total, phases.residual) == (85_000, 5_000), "what was launched outside of the steps is in no row"
    assert account.setting["num_steps"] == 2
    assert rows(account)[ATTENTION] == pytest.approx(80_000 * 10 / 85, rel=0.01)


def test_a_recording_without_such_steps_has_no_phases(tmp_path):
    idle, older = note("step[IDLE bs=0]", 0, 9), note("execute_new_1_cached_4", 0, 9)
    seen = capture_of(tmp_path, idle, older, op("aten::mm", 0, 5))
    assert not decoder.account(seen).companions, "requests in vLLM's older word go on prefilling, or decode"


def served(tmp_path, *more):
    """A decode behind a graph, of which all was recorded; its host first waits for a prefill that was not."""
    return capture_of(
        tmp_path,
        note("step[DECODE bs=32]", 0, 470_000),
        op("aten::copy_", 100, 464_000),
        *more,
        event("cuda_runtime", "hipMemcpyWithStream", 150, 463_800, correlation=1),
        event("gpu_memcpy", "Memcpy DtoH", 463_700, 463_800, correlation=1, bytes=8),
        event("cuda_runtime", "hipGraphLaunch", 464_000, 464_100, correlation=2),
        event("kernel", "gemm", 464_100, 474_100, correlation=2),
    )


def test_a_decode_that_waits_for_an_unrecorded_prefill_takes_its_own_time(tmp_path):
    account = decoder.account(served(tmp_path))
    assert account.total == 474_100_000 - 463_550_000, "without the wait, from its begin to the first work in it"
    assert rows(account) == {PRODUCTS: 10_000_000, COPIES: 100_000, HOST: 450_000}
    assert account.residual == 0
    assert account.setting["device_busy_frac"] == pytest.approx(10.1 / 10.55)
    assert any("ms are no part of the steps" in line for line in account.setting["notes"])
    named = decoder.account(served(tmp_path), step="step[DECODE bs=32]")
    assert (named.total, rows(named)) == (account.total, rows(account))


@pytest.mark.parametrize("own", [
    [event("cuda_runtime", "hipGraphLaunch", 110, 120, correlation=9)],  # whose work was not recorded
    launched("prepare", 110, 120, 130, correlation=9),  # after which the stream had nothing else to do
])  # fmt: skip
def test_a_wait_that_may_be_for_the_steps_own_work_is_a_part_of_it(tmp_path, own):
    account = decoder.account(served(tmp_path, own))
    assert account.total == 474_100_000
    assert rows(account)[UNSEEN] == 463_550_000


def test_work_on_another_stream_does_not_hide_that_a_step_waits(tmp_path):
    account = decoder.account(served(tmp_path, launched("arange", 110, 120, 124, correlation=9, stream=2)))
    assert account.total == 474_100_000 - 463_550_000
