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
