"""Forecasts of ranks beside real gloo ranks: models by strategies by levers, on 2 and 4; wants a quarter of an hour."""

from __future__ import annotations

import itertools
import resource
import statistics
import time

import pytest
import torch
from bench_table import row
from sharding_receipts import predicted_and_measured

import effkit as ek
from effkit.activations.on_ranks import SENT_BYTES, TIME
from effkit.ranks.launching import Ranks, why_no_links
from lessons import small_models, spiking

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

SMALL = {"layers": 3, "hidden": 64, "heads": 4}
MODELS = {
    "gpt": (lambda: ek.models.gpt(**SMALL, device="cpu"), (4, 32)),
    "text": (lambda: ek.models.text(**SMALL, device="cpu"), (4, 32)),
    "speech": (lambda: ek.models.speech(encoder_layers=2, decoder_layers=2, device="cpu"), (4, 64)),
    "vision": (lambda: ek.models.vision(**SMALL, device="cpu"), (4,)),
    "convolutional": (lambda: small_models.convolutional(device="cpu"), (4,)),
    "recurrent": (lambda: small_models.recurrent(device="cpu"), (4, 16)),
    "spiking": (lambda: spiking.build(learning="bptt"), (4,)),
}
STRATEGIES = (
    {"shard": "ddp"}, {"shard": "fsdp2"}, {"shard": "fsdp2", "reshard_after_forward": False}, {"shard": "zero1"},
    {"param_dtype": "bfloat16"}, {"num_replicas": 2}, {"tensor_parallel": 2},
)  # fmt: skip
LEVERS = ({}, {"checkpoint_every": 1}, {"micro_batches": 2})


def test_forecasts_of_ranks():
    print(f"\n\n{'ranks':>5} {'model':<14}{'setting':<62}{'error':>9}  bytes sent")
    errors, sent, residuals = [], [], []
    for num_ranks, every in ((2, 1), (4, 3)):
        with Ranks(num_ranks, "effkit.activations.on_ranks") as ranks:
            cases = list(itertools.product(MODELS, STRATEGIES, LEVERS))[::every]
            for name, strategy, levers in cases:
                make, sizes = MODELS[name]
                model, setting = make(), {**strategy, **levers}
                if name == "convolutional" and "param_dtype" in strategy:
                    continue  # torch's batch norm on a CPU takes no bfloat16 weights beside float32 statistics
                batch = model.random_batch(*sizes)
                try:
                    predicted, measured = predicted_and_measured(model, batch, ranks, **setting)
                except ValueError:  # no plan for tensor parallel, no blocks to recompute
                    print(f"{num_ranks:>5} {name:<14}{setting!s:<62} not forecast")
                    continue
                residuals.append(measured.residual != 0)  # of gloo's threads, which allocate when they like
                errors.append(abs(predicted.total / measured.total - 1))
                bytes_sent = [
                    account.companion(SENT_BYTES).frame["value"].to_dict() for account in (predicted, measured)
                ]
                sent.append(bytes_sent[0] == bytes_sent[1])
                print(f"{num_ranks:>5} {name:<14}{setting!s:<62}{errors[-1]:>9.3%}  {sent[-1]}", flush=True)
    print(f"{len(errors)} settings; bytes of collectives exact in {sum(sent)}")
    exact = 100 * sum(sent) / len(sent)
    held = [row("forecast of ranks, median error of the peak", 100 * statistics.median(errors), 0.5, "%"),
            row("forecast of ranks, worst error of the peak", 100 * max(errors), 3, "%"),
            row("measured ranks with a residual", sum(residuals), 0, "settings"),
            row("forecast of ranks, collectives exact", exact, 100, "% of settings", at_least=True)]  # fmt: skip
    assert all(held)


# neither a calibration nor the design has seen them
TIMED = (
    {"shard": "zero1", "micro_batches": 3}, {"reshard_after_forward": False, "micro_batches": 4},
    {"shard": "ddp", "checkpoint_every": 2}, {"shard": "zero3", "wrap": "model", "micro_batches": 2},
    {"shard": "zero2", "checkpoint_every": 1, "keep": "matmul"}, {"shard": "ddp", "micro_batches": 4, "batch_size": 12},
    {"shard": "fsdp2", "batch_size": 5}, {"shard": "zero1", "batch_size": 16},
)  # fmt: skip
TIMED_MODELS = {
    "gpt": (lambda: ek.models.gpt(layers=3, hidden=320, heads=4, device="cpu"), (8, 48)),
    "recurrent": (lambda: small_models.recurrent(layers=1, hidden=256, device="cpu"), (8, 24)),
    "convolutional": (lambda: small_models.convolutional(width=48, device="cpu"), (8,)),
    "speech": (lambda: ek.models.speech(encoder_layers=3, decoder_layers=2, hidden=192, device="cpu"), (8, 96)),
}


@pytest.mark.skipif(bool(why_no_links()), reason=why_no_links())
def test_times_of_steps_on_a_limited_link():
    print(f"\n\n{'MB/s':>5} {'model':<14}{'setting':<62}{'predicted':>10}{'measured':>10}{'error':>8}{'band':>7}")
    errors, within, bands = [], [], []
    for rate in (60e6, 250e6):
        links = ek.activations.links(2, link_bytes_per_s=rate, num_repeats=5)
        for name, (make, sizes) in TIMED_MODELS.items():
            model = make()
            batch = model.random_batch(*sizes)
            base = ek.activations.measure(model, batch, time_levers=True, links=links)
            for setting in TIMED:
                how = {"world_size": 2, **setting}
                try:
                    predicted = ek.activations.predict(base, **how).companion(TIME)
                except ValueError:  # no blocks to recompute
                    continue
                measured = ek.activations.measure(model, batch, base=base, **how).companion(TIME)
                errors.append(predicted.total / measured.total - 1)
                within.append(predicted.low <= measured.total <= predicted.high)
                bands.append((predicted.high - predicted.low) / 2 / predicted.total)
                print(f"{rate / 1e6:>5.0f} {name:<14}{setting!s:<62}{predicted.total / 1e6:>8.1f}ms"
                      f"{measured.total / 1e6:>8.1f}ms{errors[-1]:>+8.1%}{bands[-1]:>7.1%}", flush=True)  # fmt: skip
    sizes_of_errors = [abs(error) for error in errors]
    held = [row("time of ranks on a link, median error", 100 * statistics.median(sizes_of_errors), 8, "%"),
            row("time of ranks on a link, worst error", 100 * max(sizes_of_errors), 20, "%"),
            row("time of ranks on a link, in the band", 100 * statistics.mean(within), 90, "%", at_least=True),
    ]  # fmt: skip
    print(f"{len(errors)} settings, median band {statistics.median(bands):.1%}")
    assert all(held)


def test_a_model_of_7_billion_on_64_ranks():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(use_cache=False)).to(torch.bfloat16).train()
    tokens = torch.randint(0, 32_000, (1, 2048))
    begun = time.perf_counter()
    ek.activations.forecast(llama, {"input_ids": tokens, "labels": tokens}, world_size=64, device="cuda")
    took, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    held = [row("forecast of 7 B on 64 ranks", took, 30), row("forecast of 7 B on 64 ranks, memory", peak, 4, "GiB")]
    assert all(held)
