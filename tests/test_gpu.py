"""What only a GPU can show: its allocator's own peak, its kernels, and predictions that hold on it."""

import numpy as np
import pandas as pd
import pytest
import torch

import effkit as ek
from effkit import activations, decoder, moe, padding
from effkit.device import fastest_ns
from effkit.panes.breakdown import PARTS
from effkit.timing import Stopwatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def train():
    """A training step whose memory is the same each time: gradients go as they came."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 512)).cuda()
    batch = torch.randn(1024, 512, device="cuda")

    def step():
        model(batch).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


@pytest.fixture(scope="module")
def lengths() -> pd.DataFrame:
    """Utterances of 2 to 30 s with their tokens."""
    generator = np.random.default_rng(0)
    frames = np.clip(generator.lognormal(6.6, 0.6, 640), 200, 3000).astype("int64")
    return pd.DataFrame({"input_length": frames, "output_length": np.maximum(4, frames // 25)})


@pytest.fixture(scope="module")
def model():
    return ek.models.speech(encoder_layers=8, decoder_layers=4, hidden=512, heads=8, vocabulary=5000)


def test_the_peak_is_the_allocators_own(train):
    for _ in range(3):
        train()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    train()
    torch.cuda.synchronize()
    expected = torch.cuda.max_memory_allocated()
    seen = ek.capture(train, memory=True)
    assert seen.provenance["peak_bytes"] == expected
    assert seen.provenance["peak_source"] == "torch.cuda.max_memory_allocated"


def test_allocations_of_the_gpu_are_told_from_those_of_the_host(train):
    seen = ek.capture(train, memory=True)
    assert "device0" in set(seen.allocations["device"])
    assert seen.allocations.loc[seen.allocations["device"] == "device0", "size_bytes"].max() >= 1024 * 2048 * 4


def test_kernels_carry_their_stream_and_the_launch_they_came_from(train):
    seen = ek.capture(train)
    kernels = seen.events[seen.events["category"] == "kernel"]
    assert len(kernels) >= 3 * 5
    assert kernels["stream"].notna().all()
    assert kernels["correlation"].notna().all()
    launches = seen.events[seen.events["category"].isin(["cuda_runtime", "cuda_driver"])]
    assert set(kernels["correlation"]) <= set(launches["correlation"].dropna())
    assert (kernels["dur_ns"] > 0).all()


def test_a_capture_of_a_gpu_comes_back_as_it_was(train, tmp_path):
    seen = ek.capture(train, memory=True)
    back = ek.load(seen.save(tmp_path / "seen.zip"))
    pd.testing.assert_frame_equal(back.events, seen.events)
    pd.testing.assert_frame_equal(back.allocations, seen.allocations)


def test_the_overview_of_a_gpu_is_filled_by_its_kernels(train):
    seen = ek.capture(train, steps=3)
    overview = seen.overview()
    assert len(overview) == 3
    assert (overview["kernel_ns"] > 0).all()
    assert overview["device_busy_frac"].between(0, 1).all()
    parts = [name for name in PARTS if overview[name].notna().all()]
    assert (overview[parts].sum(axis=1) == overview["dur_ns"]).all()


def test_device_time_of_operators_equals_key_averages(train, tmp_path):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        train()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    seen = ek.load(tmp_path / "trace.json")
    table, oracle = seen.operators(), {row.key: row for row in profiler.key_averages()}
    for name in table.index.intersection(list(oracle)):
        found = table.loc[name, ["device_self_ns", "device_total_ns", "host_self_ns"]] / 1000
        torchs = oracle[name]
        expected = [torchs.self_device_time_total, torchs.device_time_total, torchs.self_cpu_time_total]
        assert found.tolist() == pytest.approx(expected, abs=1e-6), name
    assert "gemm" in " ".join(seen.kernels().index).lower()
    assert seen.kernels()["occupancy_frac"].notna().any()


def test_a_memory_snapshot_is_explained_to_the_byte(train, tmp_path):
    train()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.memory._record_memory_history()
    train()
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    torch.cuda.memory._dump_snapshot(str(tmp_path / "snapshot.pickle"))
    torch.cuda.memory._record_memory_history(enabled=None)
    account = ek.load(tmp_path / "snapshot.pickle").memory()
    assert account.residual == 0
    assert account.total == peak
    assert account.frame.loc["saved activation", "value"] >= 1024 * 2048 * 4


@pytest.fixture(scope="module")
def gpt():
    return ek.models.gpt(layers=6, hidden=512, heads=8, vocabulary=5000)


@pytest.fixture(scope="module")
def base(gpt):
    return activations.measure(gpt, gpt.random_batch(16, 512), repeats=2)


def test_the_peak_of_a_step_is_the_allocators_own_and_explained_to_one_percent(gpt, base):
    batch, update = gpt.random_batch(16, 512), torch.optim.AdamW(gpt.parameters(), lr=0.0)
    try:
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            gpt(**batch).loss.backward()
            update.step()
            update.zero_grad(set_to_none=True)
    finally:
        peak = torch.cuda.max_memory_allocated()
        gpt.zero_grad(set_to_none=True)
    assert base.source == "torch.cuda.max_memory_allocated"
    assert base.total == pytest.approx(peak, rel=0.01)
    assert abs(base.residual) <= 0.01 * base.total, base


@pytest.mark.parametrize(
    "setting", [{}, {"batch_size": 24}, {"length": 300}, {"checkpoint_every": 1}, {"compress": "int8"}], ids=str
)
def test_the_peak_of_a_step_is_forecast_on_the_gpu(gpt, base, setting):
    truth = activations.measure(gpt, gpt.random_batch(16, 512), base=base, repeats=1, **setting)
    guess = activations.forecast(gpt, gpt.random_batch(16, 512), **setting)
    assert guess.total == pytest.approx(truth.total, rel=0.08), guess.compare(truth)


def test_a_gpu_is_forecast_from_a_model_that_is_not_on_it(gpt, base):
    copied = ek.models.gpt(layers=6, hidden=512, heads=8, vocabulary=5000, device="cpu")
    guess = activations.forecast(copied, copied.random_batch(16, 512), device="cuda")
    assert set(guess.frame["basis"]) == {"assumed"}
    assert guess.total == pytest.approx(base.total, rel=0.08), guess.compare(base)


def test_what_is_offloaded_leaves_the_gpu(gpt):
    batch, held = gpt.random_batch(16, 512), []
    for frac in (0.0, 1.0):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with activations.offloaded(frac):
            loss = gpt(**batch).loss
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        gpt.zero_grad(set_to_none=True)
        del loss
    assert held[1] < 0.3 * held[0], held


@pytest.mark.slow
def test_a_bucketed_epoch_is_predicted_from_a_random_one(model, lengths):
    base = padding.measure(padding.plan(lengths, "random", batch_size=16), model, num_batches=8)
    guess = padding.predict(base, strategy="bucket", num_buckets=6)
    truth = padding.measure(padding.plan(lengths, "bucket", batch_size=16, num_buckets=6), model, base=base)
    receipt = ek.Receipt(guess, truth).frame
    assert guess.total < base.total
    assert abs(receipt["error"].iloc[0]) < 0.10, receipt
    assert abs(receipt.loc[receipt["unit"] == "bytes", "error"]).item() < 0.08, receipt


@pytest.mark.slow
def test_this_gpu_reaches_no_more_than_its_datasheet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = ek.Device.here()
    assert here.kind == "cuda"
    if here.datasheet is None:
        pytest.skip(f"no datasheet held for {here.name}")
    reached = here.frame["reached_frac"].dropna()
    assert len(reached) >= 3
    assert (reached <= 1.05).all(), here.frame
    assert reached.drop("memory [B]").min() > 0.2, here.frame


def test_rates_with_tf32_are_kept_apart(tmp_path, monkeypatch):
    if torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"{torch.cuda.get_device_name()} has no TF32")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        plain = ek.Device.here()
        torch.set_float32_matmul_precision("high")
        short = ek.Device.here()
        torch.set_float32_matmul_precision("highest")
        assert ek.Device.here() == plain
    finally:
        torch.set_float32_matmul_precision(before)
    assert (plain.float32_precision, short.float32_precision) == ("ieee", "tf32")
    assert short.rate_flops_per_s["float32"] > 1.5 * plain.rate_flops_per_s["float32"]


def test_a_ceiling_is_what_events_on_the_stream_tell():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    found = fastest_ns(lambda: x @ x, seconds=0.3)
    clock, times = Stopwatch("cuda"), []
    for _ in range(20):
        marks = [clock.mark()]
        for _ in range(20):
            x @ x
        times.append(clock.ns([*marks, clock.mark()])[1] / 20)
    assert found == pytest.approx(min(times), rel=0.03)


def test_operators_take_the_time_of_their_kernels_and_not_of_their_launches(tmp_path):
    from effkit.decoder.module_timers import Operators

    x, tiny = torch.randn(2048, 2048, device="cuda"), torch.ones(8, device="cuda")

    def run():
        for _ in range(20):
            tiny.cos()
        return x @ x

    with torch.no_grad(), Operators(99, "cuda") as recorder:
        run()
    found = recorder.ns([0, 20, 21])
    kernels = ek.capture(run, steps=1).kernels()
    is_product = kernels["total_ns"] == kernels["total_ns"].max()
    assert found[2] - found[1] == pytest.approx(kernels.loc[is_product, "total_ns"].sum(), rel=0.15)
    small = kernels.loc[~is_product, "total_ns"].sum()
    assert small <= found[1] < small + 20 * 4_000, "20 kernels, and the marks between them"


def test_matrix_products_of_a_capture_are_held_against_the_datasheet(train):
    table = ek.capture(train, shapes=True).products()
    assert table["flops"].tolist() == [2 * 1024 * 512 * 2048] * len(table)
    assert table["calls"].sum() == 3 * 5, "two layers: forward, their weights' gradients, and the second's input"
    if ek.Device.here().datasheet is not None:
        assert table["reached_frac"].between(0, 1).all(), table


def test_experts_on_the_gpu_exchange_through_the_host_or_by_nccl():
    base = moe.measure(num_tokens=512, num_rounds=2, num_steps=2)
    assert ("nccl" if torch.cuda.device_count() >= 2 else "exchanged through the host") in base.source
    assert abs(base.residual) < 0.05 * base.total, base
    receipt = ek.Receipt(moe.predict(base, num_tokens=384), moe.measure(base=base, num_tokens=384))
    assert (receipt.frame.loc[receipt.frame["unit"] != "ns", "error"] == 0).all(), receipt


def test_a_generation_on_the_gpu_is_told_by_its_own_clock_and_predicted():
    model = ek.models.text(layers=8, hidden=512, heads=8)
    base = decoder.measure(model, num_steps=24, input_length=64)
    assert ek.Device.here().kind == "cuda"
    assert next(model.parameters()).is_cuda
    assert abs(base.residual) < 0.3 * base.total, base
    assert {"prefill", "self-attention", "feed-forward", "sampling and host"} <= set(base.frame.index)
    assert (decoder.positions(base)["time_ns"] > 0).all()
    table = decoder.roofline(base)
    assert (table["reached_frac"] < 1.05).all(), table
    assert table.loc["step", "binds"] == "launches"
    guess = decoder.predict(base, decoder_layers=4, batch=4)
    receipt = ek.Receipt(guess, decoder.measure(model, base=base, decoder_layers=4, batch=4)).frame
    assert guess.in_range
    assert abs(receipt["error"].iloc[0]) < 0.3, receipt
    assert (receipt.loc[receipt["unit"] == "bytes", "error"] == 0).all(), receipt


def test_a_study_on_the_gpu_gives_the_model_back_and_explains_its_peak():
    model = ek.models.gpt(layers=4, hidden=512, heads=8)
    update = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = [parameter.clone() for parameter in model.parameters()]

    def step():
        update.zero_grad()
        model(**batch).loss.backward()
        update.step()

    batch = model.random_batch(8, 256)
    study = ek.study(step=step, model=model, num_batches=4)
    page = study.overview()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not update.state
    assert abs(page.time.residual) < 0.05 * page.time.total, page
    assert abs(page.memory.residual) < 0.02 * page.memory.total, page
    assert page.ceilings["reached_frac"].between(0, 1.05).all(), page.ceilings
    for lever in study.advise():
        assert lever.measure().measured.total < 1.05 * lever.base.total, lever
