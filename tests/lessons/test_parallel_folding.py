"""Groups of attention and experts, folded and not, and the bytes that cross nodes."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lessons import parallel_folding

_sizes = st.sampled_from([1, 2, 3, 4])


@st.composite
def mappings(draw):
    """Sizes that both mappings admit."""
    tp, cp, pp, ep, more = draw(st.tuples(*[_sizes] * 5).filter(lambda drawn: np.prod(drawn) <= 96))
    etp = draw(st.sampled_from([d for d in (1, 2, 3, 4) if (tp * cp * more) % d == 0]))
    return {"world_size": tp * cp * pp * ep * more, "tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp}


def by_coordinates(order, sizes):
    """Group of each rank by plain counting: the first axis of ``order`` varies fastest."""
    coordinates = []
    for rank in range(int(np.prod([sizes[axis] for axis in order]))):
        rest, place = rank, {}
        for axis in order:
            place[axis], rest = rest % sizes[axis], rest // sizes[axis]
        coordinates.append(place)

    def group(rank, *axes):
        own = coordinates[rank]
        return tuple(
            other
            for other, place in enumerate(coordinates)
            if all(place[axis] == own[axis] for axis in order if axis not in axes)
        )

    return group


@settings(max_examples=60, deadline=None)
@given(mappings())
def test_groups_are_those_that_counting_coordinates_gives(given_sizes):
    tp, cp, pp, ep, etp = (given_sizes[name] for name in ("tp", "cp", "pp", "ep", "etp"))
    world = given_sizes["world_size"]
    dp, edp = world // (tp * cp * pp), world // (etp * ep * pp)
    folded = parallel_folding.groups(**given_sizes)
    unfolded = parallel_folding.groups(**{**given_sizes, "etp": tp}, folded=False)
    attention = by_coordinates(("tp", "cp", "dp", "pp"), {"tp": tp, "cp": cp, "dp": dp, "pp": pp})
    experts = by_coordinates(("etp", "ep", "edp", "pp"), {"etp": etp, "ep": ep, "edp": edp, "pp": pp})
    within = by_coordinates(("etp", "cp", "ep", "d", "pp"), {"etp": tp, "cp": cp, "ep": ep, "d": dp // ep, "pp": pp})
    for rank in range(world):
        for name in parallel_folding.ATTENTION:
            assert folded["attention", name][rank] == unfolded["attention", name][rank] == attention(rank, name)
        for name in parallel_folding.EXPERTS:
            assert folded["experts", name][rank] == experts(rank, name)
            axes = ("cp", "d") if name == "edp" else (name,)
            assert unfolded["experts", name][rank] == within(rank, *axes)


@settings(max_examples=60, deadline=None)
@given(mappings(), st.booleans())
def test_groups_partition_the_ranks_and_meet_in_one(given_sizes, is_folded):
    world = given_sizes["world_size"]
    sizes = given_sizes if is_folded else {**given_sizes, "etp": given_sizes["tp"]}
    table = parallel_folding.groups(**sizes, folded=is_folded)
    for column in table.columns:
        distinct = set(table[column])
        assert sorted(itertools.chain(*distinct)) == list(range(world))
        assert all(rank in members for rank, members in table[column].items())
    for side, names in (("attention", parallel_folding.ATTENTION), ("experts", parallel_folding.EXPERTS)):
        lengths = [len(table[side, name][0]) for name in names]
        assert np.prod(lengths) == world
        for one, other in itertools.combinations(names, 2):
            shared = set(table[side, one][0]) & set(table[side, other][0])
            assert shared == {0}
    # stages of the pipeline are the same for attention and experts, or layers would not follow one another
    assert table["attention", "pp"].equals(table["experts", "pp"])


def test_megatron_s_order_on_sixteen_ranks():
    # 16 ranks, tensor 2, pipeline 2, data 4, order tp-dp-pp
    table = parallel_folding.groups(16, tp=2, pp=2)
    assert set(table["attention", "tp"]) == {(i, i + 1) for i in range(0, 16, 2)}
    assert set(table["attention", "dp"]) == {(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15)}
    assert set(table["attention", "pp"]) == {(i, i + 8) for i in range(8)}


def test_without_attention_s_own_splits_both_mappings_are_one():
    folded, unfolded = (parallel_folding.groups(16, ep=4, pp=2, folded=flag) for flag in (True, False))
    pd.testing.assert_frame_equal(folded, unfolded)
    table = parallel_folding.crossing(16, ep=4, pp=2, node_size=2, num_tokens=8, hidden=4, top_k=2)
    assert table.loc["folded"].equals(table.loc["unfolded"])


def counted(table, exchange, node_size, num_tokens, hidden, top_k, bytes_per_value):
    """Own, within, across by sending one by one."""
    routed = num_tokens * top_k * hidden * bytes_per_value
    sums = [0, 0, 0]
    by_experts = exchange in ("dispatch", "combine")
    for rank, members in table["experts", "ep" if by_experts else "etp"].items():
        for other in members:
            if other == rank:
                sums[0] += routed // len(members) if by_experts else 0
                continue
            sums[1 if other // node_size == rank // node_size else 2] += (
                routed // len(members) if by_experts else routed
            )
    return sums


@settings(max_examples=60, deadline=None)
@given(mappings(), st.integers(1, 3), st.data())
def test_bytes_are_those_of_sending_one_by_one(given_sizes, top_k, data):
    world = given_sizes["world_size"]
    node_size = data.draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    load = {"num_tokens": 12 * given_sizes["ep"], "hidden": 5, "top_k": top_k, "bytes_per_value": 2}
    table = parallel_folding.crossing(**given_sizes, node_size=node_size, **load)
    assert table.attrs["impossible"] == {}
    own = {"folded": parallel_folding.groups(**given_sizes),
           "unfolded": parallel_folding.groups(**{**given_sizes, "etp": given_sizes["tp"]}, folded=False)}  # fmt: skip
    for mapping, exchange in table.index:
        expected = counted(own[mapping], exchange, node_size, **load)
        assert table.loc[(mapping, exchange)].iloc[:3].tolist() == expected
    # every routed byte goes somewhere, whatever the mapping
    for exchange in ("dispatch", "combine"):
        sums = table.xs(exchange, level="exchange")[["own_bytes", "within_bytes", "across_bytes"]].sum(axis=1)
        assert (sums == world * load["num_tokens"] * top_k * 5 * 2).all()


def test_folding_keeps_the_exchange_within_a_node():
    table = parallel_folding.crossing(64, tp=4, cp=2, ep=8, num_tokens=4096, hidden=6144, top_k=2)
    assert table.loc[("folded", "dispatch"), "across_bytes"] == 0
    assert table.loc[("unfolded", "dispatch"), "within_bytes"] == 0  # members are 8 ranks apart: one in each node
    assert table.loc[("unfolded", "dispatch"), "across_frac"] == 1
    assert table.loc[("folded", "all_gather")].iloc[:3].tolist() == [0, 0, 0]
    assert pd.isna(table.loc[("folded", "all_gather"), "across_frac"])
    assert table.loc[("unfolded", "all_gather"), "within_bytes"] > 0


def test_a_mapping_that_cannot_be_has_no_numbers_and_a_reason():
    table = parallel_folding.crossing(8, tp=4, ep=8, node_size=8, num_tokens=64, hidden=16, top_k=1)
    assert table.loc["folded", "within_bytes"].notna().all()
    assert table.loc["unfolded"].isna().all(axis=None)
    assert "unfolded" in table.attrs["impossible"]
    assert "folded" not in table.attrs["impossible"]


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"world_size": 12, "tp": 8}, "tp \\* cp \\* pp is 8, expected a divisor of world_size = 12"),
        ({"world_size": 12, "ep": 5}, "etp \\* ep \\* pp is 5, expected a divisor of world_size = 12"),
        ({"world_size": 8, "tp": 0}, "tp is 0, expected a whole number"),
        ({"world_size": 8, "ep": 2.0}, "ep is 2.0, expected a whole number"),
        ({"world_size": 8, "tp": 2, "folded": False}, "etp is 1 and tp 2, expected the same"),
        ({"world_size": 8, "tp": 2, "etp": 2, "cp": 2, "ep": 4, "folded": False}, "ep is 4, expected a divisor of dp"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        parallel_folding.groups(**sizes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"node_size": 3}, "node_size is 3, expected a divisor of world_size = 8"),
        ({"num_tokens": 5}, "num_tokens \\* top_k is 5, expected a multiple of ep = 4"),
        ({"hidden": 0}, "hidden is 0"),
        ({"tp": 3}, "tp \\* cp \\* pp is 3"),
    ],
)
def test_loads_that_do_not_divide_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        parallel_folding.crossing(**({"world_size": 8, "ep": 4, "num_tokens": 8, "hidden": 4, "top_k": 1} | changes))
