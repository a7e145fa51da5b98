"""Goodput, hashed paths, and times of messages: against hand calculations and simulation."""

import itertools

import pytest

from lessons.cluster import goodput, placement


def test_downtime_is_failures_times_the_four_parts():
    day = goodput.Failures(per_day=2, detect_s=60, isolate_s=600, restart_s=300, checkpoint_s=1200)
    lost = goodput.downtime(day).closed()
    assert lost.total == 1e9 * 2 * (60 + 600 + 300 + 600)
    assert goodput.goodput(day) == pytest.approx(1 - 3120 / 86_400)
    assert set(lost.frame["basis"]) == {"assumed"}


def test_no_failures_lose_nothing_and_too_many_lose_everything():
    assert goodput.goodput(goodput.Failures(0, 1, 1, 1, 1)) == 1
    with pytest.raises(ValueError, match="no progress"):
        goodput.downtime(goodput.Failures(10, 3600, 7200, 0, 0))
    with pytest.raises(ValueError, match="at least 0"):
        goodput.Failures(1, -1, 0, 0, 0)


def test_levers_add_up_to_all_of_it():
    table = goodput.levers()
    alone = table.loc[[name for name in table.index if name.endswith("alone")], "saved_frac"]
    assert alone.sum() == pytest.approx(table.loc["all of it", "saved_frac"])  # parts of one sum
    assert table.loc["as it was", ["saved_frac", "cut_frac"]].tolist() == [0, 0]
    assert table["cut_frac"].between(0, 1).all()


def test_the_published_parts_sum_to_the_published_totals():
    total = goodput.published().loc["total"]
    assert total["before_frac"] == pytest.approx(0.3119)
    assert total["after_frac"] == pytest.approx(0.0116)


@pytest.mark.parametrize(("flows", "links"), [(1, 3), (2, 2), (3, 2), (4, 3), (5, 4)])
def test_the_fullest_link_by_trying_every_hash(flows, links):
    ways = list(itertools.product(range(links), repeat=flows))
    mean = sum(max(way.count(link) for link in range(links)) for way in ways) / len(ways)
    assert goodput.most_loaded(flows, links) == pytest.approx(mean)


def test_simulated_hashes_agree_with_the_formula():
    assert goodput.hashed(16, 8, num_trials=20_000) == pytest.approx(goodput.most_loaded(16, 8), rel=0.01)
    assert goodput.most_loaded(9, 1) == pytest.approx(9)
    assert goodput.most_loaded(400, 4) == pytest.approx(goodput.hashed(400, 4), rel=0.01)  # beyond 170!, too


def test_hashing_is_worst_for_as_many_flows_as_links():
    table = goodput.collisions(8, (8, 64))
    assert table.loc[8, "times_longer"] > table.loc[64, "times_longer"] > 1
    with pytest.raises(ValueError, match="at least 1 of each"):
        goodput.most_loaded(0, 8)


def test_cards_of_different_kinds_speak_ethernet():
    assert placement.slower("InfiniBand", "InfiniBand") == "InfiniBand"
    assert placement.slower("InfiniBand", "RoCE") == "Ethernet"
    with pytest.raises(ValueError, match="no class of cards"):
        placement.slower("InfiniBand", "token ring")


def test_a_step_of_two_stages_by_hand():
    job = placement.Job(num_params=8e9, hidden=1000, sequence=100, micro_batches=10, stages=2, num_gpus=8,
                        gpus_per_card=1, flops_per_s=1e12)  # fmt: skip
    step = placement.step(job, "InfiniBand", "Ethernet").closed()
    assert step.frame["value"].tolist() == [
        round(1e9 * 6 * 8e9 * 1000 / 2 / 1e12 * 1.1),  # a tenth of bubble
        round(1e9 * 2 * 3 / 4 * 2 * 4e9 / 25e9),
        round(1e9 * 2 * 2 * 100 * 1000 * 10 / 3.1e9),
    ]


def test_one_stage_hands_nothing_over():
    job = placement.Job(stages=1)
    assert placement.step(job, "RoCE", "RoCE").frame.loc["activations", "value"] == 0


def test_a_good_placement_lies_between_rdma_and_ethernet():
    times = placement.holmes()["times"]
    good, bad, rdma, ethernet = times
    assert rdma < good < bad < ethernet


def test_same_cards_make_both_placements_nearly_alike():
    same = placement.holmes(clusters=("RoCE", "RoCE"))["step_ns"]
    assert same.iloc[0] == same.iloc[1]


def test_a_gather_takes_the_slowest_link():
    links = placement.Links(pair=200.0, node=50.0, between=100.0)
    assert placement.gather_s(100, 1, links) == 0
    assert placement.gather_s(100, 2, links) == pytest.approx(50 / 200)
    assert placement.gather_s(100, 8, links) == pytest.approx(87.5 / 50)
    assert placement.gather_s(100, 16, links) == pytest.approx(100 * 15 / 16 / 50)
    assert placement.gather_s(100, 4, links, groups_per_node=8) == pytest.approx(75 / 12.5)
    with pytest.raises(ValueError, match="at least 1"):
        placement.gather_s(100, 0, links)


def test_finer_shards_take_less_memory_and_longer_gathers():
    table = placement.sharding(20e9, {"pair of dies": 2, "node": 8, "all": 384})
    assert table["memory_bytes"].tolist() == [20_000_000_000, 5_000_000_000, round(40e9 / 384)]
    assert table["gather_ns"].is_monotonic_increasing


def test_messages_of_three_levels_by_hand():
    account = placement.partitioned("three levels", num_params=1e9, num_dies=16, micro_batches=3).closed()
    across = 2e9 / 8 * (1 / 2) / (100e9 / 8)
    assert account.frame["value"].tolist() == [
        round(1e9 * 3 * 1e9 / 200e9),
        round(1e9 * 3 * 1e9 / 200e9),
        round(1e9 * 3 * 2e9 * 7 / 8 / 50e9),
        round(1e9 * (2 * across + 2e9 * 3 / 8 / 50e9)),
    ]


def test_three_levels_gain_with_micro_batches():
    table = placement.frontier()
    assert table["ZeRO++"].is_monotonic_increasing
    assert (table["ZeRO-3"] >= table["ZeRO++"]).all()
    with pytest.raises(ValueError, match="'three levels'"):
        placement.partitioned("ZeRO-4")


def test_tokens_of_a_video():
    assert placement.video_tokens(120, 720, 1280) == 15 * 45 * 80
    assert placement.video_tokens(1, 720, 1280) == 45 * 80  # a picture is one latent frame
    assert placement.video_tokens(9, 17, 16, vae=(8, 8, 8), patch=1) == 2 * 3 * 2
    with pytest.raises(ValueError, match="at least 1 each"):
        placement.video_tokens(0, 720, 1280)


def test_attention_is_half_at_six_times_the_width():
    assert placement.VideoModel(hidden=100).attention_frac(600) == 0.5


def test_long_videos_scale_better_and_one_node_is_the_unit():
    table = placement.weak_scaling({"short": 1000, "long": 100_000}, (1, 8, 64))
    assert table.loc[1].tolist() == [1, 1]
    assert (table["long"] >= table["short"]).all()
    assert table["short"].is_monotonic_decreasing
    one = placement.VideoModel().step(1000, 1).closed()
    assert one.frame.loc["gradients", "value"] == 0
    with pytest.raises(ValueError, match="at least 1 of each"):
        placement.VideoModel().step(0, 1)
