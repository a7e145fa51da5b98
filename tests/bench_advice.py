"""The timed bars of advice: seconds from ``study()`` to its page, on the planted loops, and to advice on memory."""

from __future__ import annotations

import statistics
import time

import planted
import pytest
import torch
from bench_table import row
from transformers import LlamaConfig, LlamaForCausalLM

import effkit as ek

MEDIAN_S, WORST_S, MEMORY_S = 6.0, 12.0, 6.0
PLANTED = [make for make in (*planted.TRAINING, *planted.GENERATING, planted.hot_expert) if make is not planted.clean]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def device(one_thread):
    """Measured once on a machine, and kept."""
    ek.Device.here()


def took(call):
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def test_a_study_comes_to_its_page_in_seconds():
    seconds = {}
    print("\n\nstudy() and overview(), of loops with one thing wrong:")
    for make in PLANTED:
        torch.manual_seed(0)
        given = make().study
        _, seconds[make.__name__], cpu = took(lambda given=given: ek.study(**given).overview())
        print(f"  {make.__name__:22} {seconds[make.__name__]:5.1f} s, {cpu:5.1f} s of a processor", flush=True)
    median, worst = statistics.median(seconds.values()), max(seconds.values())
    held = row("study() to its page, planted loops, median", median, MEDIAN_S)
    assert row("study() to its page, planted loops, worst", worst, WORST_S)
    assert held


def test_advice_on_the_memory_of_a_small_llama_comes_in_seconds():
    config = LlamaConfig(vocab_size=1000, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=4, use_cache=False)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    study = ek.study(**planted.training(model, planted.loader(planted.EVEN)))
    study.overview()
    # a budget below the peak: combinations of levers are looked for
    advice, seconds, cpu = took(lambda: study.advise("memory", budget_bytes=round(0.8 * study.memory.total)))
    print(f"\n\n{advice}\n{cpu:.1f} s of a processor")
    assert advice
    assert row("advise('memory'), tiny Llama", seconds, MEMORY_S)
