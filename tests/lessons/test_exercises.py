"""The exercises accept the right answer alone: each is given the right one and three wrong ones."""

from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from transformers import LlamaConfig

import effkit as ek
from effkit import decoder, moe, padding
from effkit.claims.table import rows
from lessons import exercises, hybrid_heads, speculating, utilisation
from lessons.utilisation import PUBLISHED_BUBBLE_SAVED_FRAC

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
LAYERS, HEADS, WIDTH, TOKENS, VALUE_BYTES = 32, 8, 128, 8192, 2
REQUEST_BYTES = 2 * LAYERS * HEADS * WIDTH * TOKENS * VALUE_BYTES  # keys and values: 1 GiB


def refused(check, *wrong):
    """Each of the wrong answers is refused with a sentence."""
    assert len(wrong) >= 3
    for answer in wrong:
        with pytest.raises(AssertionError, match=r"\w+ \w+"):
            check(answer)


def in_notebook(name, first_lines, **names):
    """A check as the notebook has it: runs the exercise's own cell with another answer in place of its first lines."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if cell.source.startswith(first_lines)]

    def check(answer):
        exec(source.replace(first_lines, answer), {"exercises": exercises, **names})

    return check


def test_the_cells_of_lesson_02b_accept_the_right_answer_alone():
    totals = {"ddp": 8, "zero1": 6, "zero2": 5, "zero3": 4}

    def predict(base, *, world_size, shard="fsdp2"):
        return SimpleNamespace(total=totals.get(shard, 4) * 10 if shard in totals else 40 + 60 / world_size)

    names = {"activations": SimpleNamespace(predict=predict), "base": SimpleNamespace(total=100), "strategies": totals}
    check = in_notebook("02b_sharded_memory", "my_ranks = 1\n", **names)
    check("my_ranks = 4\n")  # 40 + 60 / 4 is the first below two thirds of 100
    refused(check, *(f"my_ranks = {n}\n" for n in (1, 2, 8, 16, 3)))

    first = 'def my_smallest(base, ranks):\n    return "ddp"  # two or three lines of yours\n'
    forecasts = {shard: SimpleNamespace(total=total) for shard, total in totals.items()}
    check = in_notebook("02b_sharded_memory", first, forecasts=forecasts, **names)
    check("def my_smallest(base, ranks):\n    return 'zero3'\n")
    refused(check, *(f"def my_smallest(base, ranks):\n    return '{name}'\n" for name in ("ddp", "zero1", "zero2")))


def test_the_cells_of_lesson_04_accept_the_right_answer_alone():
    def predict(base, *, decoder_layers, hold_parameters):
        return SimpleNamespace(total=3 * decoder_layers + 11)  # 13 layers take 50, which is half of 101

    names = {"decoder": SimpleNamespace(predict=predict), "base": SimpleNamespace(total=101)}
    check = in_notebook("04_decoder_bottleneck", "my_layers = 20\n", **names)
    check("my_layers = 13\n")
    refused(check, *(f"my_layers = {n}\n" for n in (5, 12, 14, 20, 0, "'13'")))

    first = (
        "def my_cache_bytes(num_requests):\n    return 8192 * num_requests  # two or three lines of yours\n"
        "\n\nmy_requests = 64\n"
    )
    check = in_notebook("04_decoder_bottleneck", first, decoder=decoder)
    code = "def my_cache_bytes(num_requests):\n    return num_requests * 8192 * 32 * 2 * 8 * 128 * 2\n\n\n"
    code += "my_requests = {}\n"
    check(code.format(24))
    refused(check, *(code.format(n) for n in (20, 23, 25, 1000)), code.replace("* 2 *", "*").format(24))


def test_the_cells_of_lesson_04b_accept_the_right_answer_alone():
    check = in_notebook("04b_cheaper_tokens", "my_heads = 16\n", hybrid_heads=hybrid_heads)
    check("my_heads = 25\n")  # 24 leave 8 of 32 heads, which keep 16 GiB; their own states come on top
    refused(check, *(f"my_heads = {n}\n" for n in (8, 16, 24, 26, 32, 0, "'25'")))

    first = (
        "def my_gain(num_draft, accepted, draft_frac):\n    return num_draft + 1  # two or three lines of yours\n"
        "\n\nmy_draft = 4\n"
    )
    check = in_notebook("04b_cheaper_tokens", first, speculating=speculating)
    tokens = "sum(a**n for n in range(k + 1))"
    code = f"def my_gain(k, a, c):\n    return {tokens} / (k * c + 1 + 0.05 * k)\n\n\nmy_draft = {{}}\n"
    check(code.format(5))
    refused(check, *(code.format(n) for n in (4, 6, 8)), code.replace(" + 0.05 * k", "").format(5))
    refused(check, *(code.replace(tokens, wrong).format(5) for wrong in ("k", "k * a", "(k + 1)")))


def test_the_cells_of_lesson_05_accept_the_right_answer_alone():
    def buckets(epoch, *, strategy, num_buckets):
        share = pd.Series({"padding": 0.66 / num_buckets})
        return SimpleNamespace(companion=lambda title: SimpleNamespace(share=share))

    names = {"padding": SimpleNamespace(predict=buckets, EPOCH_CELLS="cells"), "study": SimpleNamespace(epoch=None)}
    check = in_notebook("05_your_model", "my_buckets = 1  # two or three lines of yours\n", **names)
    check("my_buckets = 4\n")  # 0.66 / 4 is the first below 0.2
    refused(check, *(f"my_buckets = {n}\n" for n in (1, 3, 5, 24, 1000)))


def test_the_cells_of_lesson_06_accept_the_right_answer_alone():
    names = {"utilisation": utilisation, "published": PUBLISHED_BUBBLE_SAVED_FRAC}
    check = in_notebook("06_claims", "my_factor = 4\n", **names)
    check("my_factor = 8\n")
    refused(check, *(f"my_factor = {n}\n" for n in (4, 7, 9, 1000)))

    first = '    return [row.paper for row in all_rows if row.how == "ran"]  # two or three lines of yours\n'
    check = in_notebook("06_claims", f"def my_papers(all_rows):\n{first}", table=ek.claims(), rows=rows)
    code = "def my_papers(all_rows):\n    return [row.paper for row in all_rows if {}]\n"
    check(code.format("row.stored_low <= row.no_effect <= row.stored_high"))
    wrong = ('row.how == "ran"', "row.stored_low <= 1 <= row.stored_high", "False", 'row.paper == "Canary-1B"')
    refused(check, *map(code.format, wrong))


def test_the_deepest_decoder_in_half_of_the_time_is_accepted_alone():
    # 13 layers of 24 as in the stored run: one more takes more than half
    def check(answer):
        exercises.largest(answer, lambda n: n <= 13, most=24, what="decoder layers")

    check(13)
    refused(check, *range(5, 13), 14, 24, 0, -1, 13.0)


def test_the_requests_that_fill_the_cache_are_accepted_alone():
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    size = decoder.kv_cache_bytes(config, batch=1, length=TOKENS, dtype="bfloat16").self_attention
    assert size == REQUEST_BYTES == 2**30

    def check(answer):
        exercises.largest(answer, lambda n: n * size <= 24 * 2**30, most=1000, what="requests")

    check(24)
    refused(check, 20, 23, 25, 64)

    def of_code(answer):
        exercises.near(answer, 3 * size, "the cache of three requests")

    of_code(3 * REQUEST_BYTES)
    refused(of_code, 0, 3 * TOKENS, 3 * REQUEST_BYTES // 2, 6 * REQUEST_BYTES, None)


def test_the_growth_of_the_batch_that_saves_the_bubbles_is_accepted_alone():
    def check(answer):
        exercises.smallest(
            answer,
            lambda n: utilisation.bubbles(n).share["saved"] >= PUBLISHED_BUBBLE_SAVED_FRAC,
            most=64,
            what="times the batch",
        )

    check(8)  # n times the batch leave 1 / n of the bubbles: 1 / 8 = 1 - 87.5%
    refused(check, 4, 7, 9, 64, 1000)


def test_the_papers_without_an_effect_are_accepted_alone():
    table = ek.claims()
    expected = table.index[table["verdict"] == "no effect seen here"]

    def check(answer):
        exercises.exactly(answer, expected, "papers")

    right = [row.paper for row in rows().values() if row.stored_low <= row.no_effect <= row.stored_high]
    check(right)
    check(list(reversed(right)))
    refused(check, [], right[:-1], [*right, "Canary-1B"], list(table.index), ["Outlier-Safe Pre-Training"])


def test_the_fewest_buckets_and_micro_batches_are_accepted_alone():
    lengths = pd.DataFrame({"input_length": [10] * 8 + [20] * 8 + [40] * 8})

    def is_enough(num_buckets):
        plan = padding.plan(lengths, "bucket", num_buckets=num_buckets, batch_size=8)
        return plan.account().share["padding"] < 0.2

    def check(answer):
        exercises.smallest(answer, is_enough, most=24, what="buckets")

    check(2)  # by hand: one bucket mixes 10 with 40; two pad 8 rows of 10 to 20, which is 80 of 640 cells
    refused(check, 1, 3, 4, 24, 1000)


def test_a_plan_with_little_padding_in_few_batches_is_accepted():
    lengths = pd.DataFrame({"input_length": [10] * 32 + [20] * 32 + [40] * 32})

    def check(plan):
        exercises.little_padding(plan, lengths)

    check(padding.plan(lengths, "bucket", num_buckets=3, batch_size=16))
    refused(
        check,
        padding.plan(lengths, "random", batch_size=16),
        padding.plan(lengths, "bucket", num_buckets=3, batch_size=4),
        padding.plan(lengths[:16], "bucket", num_buckets=3, batch_size=16),
    )


def test_an_even_placement_is_accepted():
    popularity = pd.Series([40, 30, 20, 10, 8, 6, 4, 2])

    def check(placement):
        exercises.even_placement(placement, popularity)

    check(moe.balanced_placement([popularity], num_ranks=2))
    refused(check, (0, 0, 0, 0, 1, 1, 1, 1), (0, 1), (0, 1, 2, 0, 1, 2, 0, 1), (0,) * 8)


def test_the_largest_batch_is_accepted_alone():
    def check(answer):
        exercises.near(answer, 57, "the largest batch")

    check(57)
    refused(check, 56, 58, 64, 0, None)
