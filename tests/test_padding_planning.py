"""plan(): every strategy under random limits, each property checked against plain loops."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effkit.padding import STRATEGIES, fit_memory, plan
from effkit.padding.live import choose
from effkit.padding.plans import CELLS

BUCKETED = ("bucket", "bucket2d", "optimal")
LISTS = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40)), min_size=1, max_size=80)


def frame(pairs):
    return pd.DataFrame(pairs, columns=["input_length", "output_length"]).astype("int64")


def spread(num_examples=2000, seed=0):
    rng = np.random.default_rng(seed)
    inputs = np.clip(rng.lognormal(4.5, 0.6, num_examples), 5, 600).astype("int64")
    return pd.DataFrame({"input_length": inputs, "output_length": inputs // 7 + rng.integers(1, 9, num_examples)})


def effective(length, quadratic):
    return length + (length**2 / quadratic if quadratic else 0)


@st.composite
def asked(draw, strategies=STRATEGIES):
    """A list of lengths, a strategy, and limits that it can keep."""
    lengths = frame(draw(LISTS))
    strategy = draw(st.sampled_from(strategies))
    limits = {"num_buckets": draw(st.integers(1, 8)), "num_output_buckets": draw(st.integers(1, 3))}
    limits["seed"] = draw(st.integers(0, 3))
    by_cells = strategy in ("pack", "token_budget") or draw(st.booleans())
    if by_cells:
        if strategy != "pack":
            limits["quadratic"] = draw(st.none() | st.integers(20, 500))
        least = int(np.ceil(effective(int(lengths["input_length"].max()), limits.get("quadratic"))))
        limits["max_input_cells"] = least + draw(st.integers(0, 1000))
    if not by_cells or draw(st.booleans()):
        limits["batch_size"] = draw(st.integers(1, 20))
    return lengths, strategy, limits


def padded_shapes(planned, column):
    """Rows and the longest row of each batch, the plain way."""
    lengths = planned.lengths[column].to_numpy()
    for batch in range(len(planned.batches)):
        rows = [int(lengths[row].sum()) for row in planned.rows(batch)]
        yield len(rows), max(rows)


@given(asked())
def test_each_example_comes_exactly_once(case):
    lengths, strategy, limits = case
    planned = plan(lengths, strategy, **limits)
    assert sorted(i for batch in planned.batches for i in batch.tolist()) == list(range(len(lengths)))


@given(asked())
def test_no_batch_exceeds_its_limits(case):
    lengths, strategy, limits = case
    planned = plan(lengths, strategy, **limits)
    rows_at_most = limits.get("batch_size", 1 if strategy == "pack" else len(lengths))
    for rows, longest in padded_shapes(planned, "input_length"):
        assert rows <= rows_at_most
        if strategy == "pack":
            assert longest <= limits["max_input_cells"]
        elif "max_input_cells" in limits:
            assert rows * effective(longest, limits.get("quadratic")) <= limits["max_input_cells"] * (1 + 1e-12)


@given(asked())
def test_rows_are_the_batches_cut_up(case):
    lengths, strategy, limits = case
    planned = plan(lengths, strategy, **limits)
    for number, batch in enumerate(planned.batches):
        rows = planned.rows(number)
        assert np.concatenate(rows).tolist() == batch.tolist()
        assert strategy == "pack" or {len(row) for row in rows} == {1}
    assert sum(len(planned.rows(i)) for i in range(len(planned.batches))) == planned.num_rows


@given(asked())
def test_the_frame_sums_what_the_batches_hold(case):
    lengths, strategy, limits = case
    planned = plan(lengths, strategy, **limits)
    inputs, outputs = (lengths[name].to_numpy() for name in ("input_length", "output_length"))
    shapes = zip(padded_shapes(planned, "input_length"), padded_shapes(planned, "output_length"), strict=True)
    for number, ((rows, longest), (_, longest_output)) in enumerate(shapes):
        batch, told = planned.batches[number], planned.frame.loc[number]
        assert (told.num_rows, told.num_examples) == (rows, len(batch))
        assert (told.input_length, told.output_length) == (longest, longest_output)
        assert (told.input_real, told.output_real) == (inputs[batch].sum(), outputs[batch].sum())
        assert told.input_squared_real == (inputs[batch] ** 2).sum()
        assert told.cross_real == (inputs[batch] * outputs[batch]).sum()


@given(asked(), st.sampled_from(CELLS))
def test_every_account_closes_on_the_shapes(case, cells):
    lengths, strategy, limits = case
    planned = plan(lengths, strategy, **limits)
    account = planned.account(cells).closed()
    assert account.unit == ("FLOPs" if cells == "flops" else "cells")
    assert (account.frame["value"] >= 0).all()
    if cells != "flops":
        column, power = ("output_length", 1) if cells == "output" else ("input_length", 1 + (cells == "input_squared"))
        assert account.frame.loc["real", "value"] == (lengths[column] ** power).sum()
        assert account.total == sum(rows * longest**power for rows, longest in padded_shapes(planned, column))


@given(asked(BUCKETED))
def test_batches_stay_inside_the_edges_of_their_bucket(case):
    lengths, strategy, limits = case
    planned = plan(lengths, strategy, **limits)
    edges = planned.edges
    inputs = np.unique(edges["input_length"])
    for bucket, batch in zip(planned.bucket, planned.batches, strict=True):
        upper = edges.loc[bucket, "input_length"]
        below = inputs[inputs < upper]
        members = lengths.loc[batch]
        assert members["input_length"].max() <= upper
        assert not len(below) or members["input_length"].min() > below[-1]
        if strategy == "bucket2d":
            row = edges.loc[edges["input_length"] == upper, "output_length"]
            smaller = row[row < edges.loc[bucket, "output_length"]]
            assert members["output_length"].max() <= edges.loc[bucket, "output_length"]
            assert not len(smaller) or members["output_length"].min() > smaller.max()


@given(asked())
def test_a_seed_decides_everything(case):
    lengths, strategy, limits = case
    first, second = (plan(lengths, strategy, **limits) for _ in range(2))
    assert [b.tolist() for b in first.batches] == [b.tolist() for b in second.batches]


@pytest.mark.parametrize("strategy", ["random", *BUCKETED])
def test_another_seed_is_another_plan(strategy):
    one, two = (plan(spread(), strategy, batch_size=16, num_buckets=5, seed=seed) for seed in (0, 1))
    assert {frozenset(b.tolist()) for b in one.batches}.isdisjoint(frozenset(b.tolist()) for b in two.batches)


@given(st.data())
def test_sizes_per_bucket_are_kept(data):
    lengths = frame(data.draw(LISTS))
    edges = plan(lengths, "bucket", batch_size=1, num_buckets=5).edges["input_length"].to_numpy()
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=len(edges), max_size=len(edges)))
    planned = plan(lengths, "bucket", batch_size=sizes, num_buckets=5)
    for bucket in range(len(edges)):
        counts = planned.frame.loc[planned.bucket == bucket, "num_rows"].tolist()
        assert all(count == sizes[bucket] for count in counts[:-1])  # only a bucket's last batch may be short
        assert all(1 <= count <= sizes[bucket] for count in counts)


def test_sorted_and_token_budget_run_from_short_to_long():
    for planned in (plan(spread(), "sorted", batch_size=7), plan(spread(), "token_budget", max_input_cells=3000)):
        assert (np.diff(spread()["input_length"].to_numpy()[planned.order]) >= 0).all()


def test_a_better_strategy_pads_less():
    padding = {
        name: plan(spread(), name, batch_size=16, num_buckets=6).account().share["padding"]
        for name in ("random", "bucket", "sorted")
    }
    assert padding["random"] > 2 * padding["bucket"] > 2 * padding["sorted"]


def test_without_put_back_one_example_may_overshoot_as_lhotse_does():
    lengths = pd.DataFrame({"input_length": np.random.default_rng(0).permutation(np.r_[[10] * 300, [400] * 20])})
    cells = [plan(lengths, "random", max_input_cells=400, put_back=back).frame for back in (True, False)]
    largest = [int((f["num_rows"] * f["input_length"]).max()) for f in cells]
    assert largest[0] <= 400
    assert largest[1] > 2 * 400


def test_flops_by_hand():
    lengths = frame([(800, 10), (400, 5)])
    h, rows, t, u = 2, 2, 100, 10  # T after 8x subsampling
    encoder = 24 * h * h * t + 4 * h * t * t
    decoder = 24 * h * h * u + 4 * h * u * u + 4 * h * h * (u + t) + 4 * h * u * t
    planned = plan(lengths, "sorted", batch_size=2)
    account = planned.account("flops", hidden=h, encoder_layers=3, decoder_layers=5, subsampling=8)
    assert account.total == rows * (3 * encoder + 5 * decoder)
    short = 3 * (24 * 4 * 50 + 8 * 50**2) + 5 * (24 * 4 * 5 + 8 * 25 + 16 * 55 + 8 * 5 * 50)
    assert account.frame.loc["real", "value"] == 3 * encoder + 5 * decoder + short


def test_memory_gives_each_bucket_what_fits():
    memory = fit_memory(pd.DataFrame({"input_length": [50, 100, 300, 600], "batch_size": [239.5, 119.5, 39.5, 19.5]}))
    planned = plan(spread(), "bucket", num_buckets=4, memory=memory)
    sizes = planned.frame.groupby("bucket")["num_rows"].max()
    assert sizes.tolist() == (12000 // planned.edges["input_length"]).tolist()


def test_batches_are_a_sequence():
    batches = plan(frame([(9, 1), (1, 1), (8, 1), (2, 1), (5, 1)]), "sorted", batch_size=2).batches
    assert [b.tolist() for b in batches] == [[1, 3], [4, 2], [0]]
    assert batches[-1].tolist() == [0]
    assert [b.tolist() for b in batches[1:]] == [[4, 2], [0]]
    with pytest.raises(IndexError):
        batches[3]


def test_an_index_of_labels_does_not_confuse_positions():
    lengths = spread(50)
    relabelled = lengths.set_axis(range(1000, 1050))
    assert (
        plan(relabelled, "bucket", batch_size=4).order.tolist() == plan(lengths, "bucket", batch_size=4).order.tolist()
    )


ERRORS = {
    "unknown strategy": ({"strategy": "sort"}, "choose one of random, sorted"),
    "no limit": ({"strategy": "random"}, "batch_size or max_input_cells"),
    "no cells to pack into": ({"strategy": "pack", "batch_size": 2}, "needs max_input_cells"),
    "no token budget": ({"strategy": "token_budget", "batch_size": 2}, "needs max_input_cells"),
    "too long": ({"strategy": "bucket", "max_input_cells": 99}, "raise the limit or filter"),
    "too long with the quadratic term": (
        {"strategy": "random", "max_input_cells": 150, "quadratic": 100},
        "counts 200 cells.*raise the limit",
    ),
    "too long to pack": ({"strategy": "pack", "max_input_cells": 99}, "raise the limit or filter"),
    "sizes and buckets": ({"strategy": "bucket", "batch_size": [4, 2, 1], "num_buckets": 2}, "one size per bucket"),
    "sizes without buckets": ({"strategy": "random", "batch_size": [4, 2]}, "goes with a bucket strategy"),
    "edges too short": ({"strategy": "bucket", "batch_size": 2, "edges": [50]}, "longer than the last edge 50"),
    "zero": ({"strategy": "random", "batch_size": 0}, "batch_size is a whole number from 1 on; given: 0"),
    "zero for one bucket": (
        {"strategy": "bucket", "batch_size": [4, 0], "num_buckets": 2},
        "batch_size is a whole number from 1 on",
    ),
}


@pytest.mark.parametrize(("limits", "words"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_to_do(limits, words):
    with pytest.raises(ValueError, match=words):
        plan(frame([(100, 3), (40, 2), (41, 2)]), **limits)


def test_no_output_lengths_for_two_dimensions():
    inputs = frame([(100, 3), (40, 2)])[["input_length"]]
    with pytest.raises(ValueError, match="use strategy='bucket'"):
        plan(inputs, "bucket2d", batch_size=2)
    with pytest.raises(ValueError, match="ask for cells='input'"):
        plan(inputs, "bucket", batch_size=2).account("output")
    with pytest.raises(ValueError, match="cells is one of input, output"):
        plan(inputs, "bucket", batch_size=2).account("inputs")


@pytest.mark.parametrize("lengths", [frame([]), pd.DataFrame({"length": [1]})], ids=["empty", "other column"])
def test_nothing_to_plan(lengths):
    with pytest.raises(ValueError, match=r"padding\.lengths\(\) makes one"):
        plan(lengths, "random", batch_size=2)


def test_packing_what_does_not_fit_is_an_error_whatever_put_back_says():
    with pytest.raises(ValueError, match="raise the limit or filter"):
        plan(frame([(100, 3), (40, 2)]), "pack", max_input_cells=99, put_back=False)


def test_packing_drops_the_quadratic_term_that_it_has_no_use_for():
    assert len(plan(frame([(100, 3), (40, 2)]), "pack", max_input_cells=140, quadratic=10).batches) == 1


@pytest.mark.parametrize("strategy", ["random", "sorted", "bucket"])
def test_a_batch_size_holds_where_memory_would_allow_more(strategy):
    memory = fit_memory(pd.DataFrame({"input_length": [100, 200, 400, 800], "batch_size": [800, 400, 200, 100]}))
    assert plan(spread(), strategy, batch_size=2, memory=memory).frame["num_rows"].max() == 2


def test_a_calibration_has_a_batch_whose_inputs_are_long_and_outputs_few():
    """Else inputs and outputs grow together in every batch, and what each of them takes cannot be told."""
    rng = np.random.default_rng(0)
    lengths = frame(list(zip(rng.integers(50, 600, 640), rng.integers(5, 100, 640), strict=True)))
    made = plan(lengths, "random", batch_size=16)
    shapes = pd.DataFrame([probe.shape() for probe in choose(made, 8, cut_down=True)])
    shares = shapes["output_length"] / shapes["input_length"]
    assert len(shapes) == 8
    assert shares.min() < 0.5 * shares.drop(shares.idxmin()).min()
    assert shapes["input_length"][shares.idxmin()] > 300
    assert shapes["num_rows"][shares.idxmin()] == 8


def test_a_calibration_of_inputs_alone_has_as_many_batches():
    made = plan(spread(640)[["input_length"]], "random", batch_size=16)
    assert len(choose(made, 8, cut_down=True)) == 8


@pytest.mark.parametrize("put_back", [True, False])
def test_a_length_of_nothing_is_refused_in_a_sentence(put_back):
    lengths = pd.DataFrame({"input_length": [3, 0, 2]})
    with pytest.raises(ValueError, match="shortest length is 0; a length is at least 1"):
        plan(lengths, "random", max_input_cells=10, put_back=put_back)
