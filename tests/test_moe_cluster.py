"""A cluster that is not here, in figures that a person can check by hand."""

from dataclasses import replace

import numpy as np
import pytest

from effkit.account import Account
from effkit.moe import routing
from effkit.moe.calibration import Calibration
from effkit.moe.costs import Costs, terms
from effkit.moe.setting import Setting
from lessons.moe_cluster import BOOKKEEPING, WAITING, scale, scaling_table

# 1024 copies of 256 bytes a rank, four experts a rank: messages of 262,144 bytes
SETTING = Setting(num_tokens=512, hidden=64, ffn=64, num_experts=8, top_k=2, skew=0.0)
INTRA, INTER = (1_000.0, 100e9), (5_000.0, 10e9)


def calibration(**changes):
    """2 ns per row and hidden number of experts forward, 4 backward; a gate of 10,000 ns; 0.5 ns per expert x rank."""
    experts = np.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # rows * (hidden + ffn): 128 per row
    phases = {
        (True, "before", "gate"): np.array([10_000.0, 0.0, 0.0]),
        (True, "before", "permute"): np.array([0.0, 0.5, 0.0, 0.0, 0.0]),
        (True, "during", "experts"): experts,
        (False, "during", "experts"): 2 * experts,
    }
    values = {
        "setting": SETTING, "settings": [SETTING], "num_ranks": 2, "ranks_per_node": 2, "anchors": {1: 1.0, 2: 1.0},
        "costs": Costs(phases, np.array([2_000.0, 0.0, 0.5, 0.0])), "error_frac": 0.05,
        "pieces_error_frac": 0.05, "noise_frac": 0.0,
        "num_steps": 1, "walls_ns": (), "lever_anchors": {},
    }  # fmt: skip
    # a cluster needs no more of what was measured
    return Calibration(**(dict.fromkeys(Calibration.__dataclass_fields__) | values | changes))


def base(**changes):
    return Account.of(
        "Time of one step", "ns", {"experts": 1}, total=1, source="made up", calibration=calibration(**changes)
    )


@pytest.fixture
def sixteen():
    """Two nodes of eight: of a rank's 262,144 bytes 7/16 go to others of the node and 8/16 through its NIC."""
    return scale(base(), 16, intra=INTRA, inter=INTER)


def test_two_nodes_by_hand(sixteen):
    value = sixteen.frame["value"]
    assert value["gate"] == 10_000
    assert value["experts"] == 3 * 1024 * 128
    # tables of 8 experts by 2 ranks as measured; 64 by 16 are told apart
    assert value["permute"] == 8
    assert sixteen.companions[2].total == 64 * 16 / 2 - 8
    assert sixteen.companions[2].title == BOOKKEEPING
    # 131,072 bytes over 10 GB/s take 13,107 ns; the 114,688 bytes within the node, over 100 GB/s, pass meanwhile
    exchange = 5_000 + 13_107.2
    # counts: 8 bytes of each of 64 experts to each of 8 ranks beyond the node
    counts = 5_000 + 8 * 64 * 8 / 10
    assert value["dispatch moving"] == round(2 * exchange + counts)
    assert value["combine moving"] == round(2 * exchange)
    assert sixteen.residual == 0
    assert WAITING not in value


def test_what_is_assumed_is_said(sixteen):
    basis = sixteen.frame["basis"]
    assert set(basis[["dispatch moving", "combine moving"]]) == {"assumed"}
    assert set(basis[["gate", "experts", "permute"]]) == {"derived"}
    assert not sixteen.in_range
    moving = int(sixteen.frame["value"][["dispatch moving", "combine moving"]].sum())
    margin = 0.1 * (sixteen.total - moving) + 0.11 * moving
    assert sixteen.high - sixteen.total == pytest.approx(margin, abs=1)
    assert sixteen.total - sixteen.low == pytest.approx(margin, abs=1)
    named = {
        "num_ranks": 16, "node_size": 8, "intra_alpha_ns": 1_000, "intra_bytes_per_s": 100e9, "inter_alpha_ns": 5_000,
        "inter_bytes_per_s": 10e9, "num_nics_per_node": 8, "overlap_frac": None, "imbalance": 1.0,
    }  # fmt: skip
    assert named.items() <= sixteen.setting.items()
    assert sixteen.setting["num_experts"] == 64
    assert "outside the calibrated range" in repr(sixteen)


def test_bytes_by_level(sixteen):
    sent = sixteen.companions[1]
    assert sent.frame["value"].to_dict() == {"within the node": 4 * 114_688, "to other nodes": 4 * 131_072}
    one_node = scale(base(), 8, intra=INTRA).companions[1]
    assert one_node.frame["value"].to_dict() == {"within the node": 4 * 262_144 * 7 // 8, "to other nodes": 0}


def test_one_node_uses_its_own_links():
    value = scale(base(), 8, intra=INTRA).frame["value"]
    assert value["combine moving"] == round(2 * (1_000 + 262_144 * 7 / 8 / 100))
    alone = scale(base(), 1, intra=INTRA).frame["value"]
    assert alone["dispatch moving"] == alone["combine moving"] == 0


def test_measured_links_within_a_node_share_one_memory():
    """0.5 ns per byte of all ranks: eight ranks have 250 MB/s each."""
    seen = scale(base(), 8)
    assert seen.setting["intra_bytes_per_s"] == pytest.approx(250e6)
    assert seen.setting["intra_alpha_ns"] == 2_000
    assert seen.frame["value"]["combine moving"] == round(2 * (2_000 + 8 * 262_144 * 7 / 8 * 0.5))


def test_nics_that_are_shared_are_slower(sixteen):
    two = scale(base(), 16, intra=INTRA, inter=INTER, num_nics_per_node=2)
    assert two.frame["value"]["combine moving"] == round(2 * (5_000 + 4 * 13_107.2))
    eight = scale(base(), 16, intra=INTRA, inter=INTER, num_nics_per_node=8)
    assert eight.total == sixteen.total


def test_overlap_hides_the_shorter_of_the_two(sixteen):
    half = scale(base(), 16, intra=INTRA, inter=INTER, overlap_frac=0.5)
    exchange = 2 * (5_000 + 13_107.2)  # dispatch and combine, less than the experts' 131,072 ns
    assert sixteen.total - half.total == pytest.approx(2 * exchange / 2, abs=2)
    communication = half.companions[0].frame["value"]
    assert communication["dispatch hidden"] + communication["combine hidden"] == pytest.approx(exchange, abs=2)
    assert communication.filter(like="exposed").sum() == half.frame["value"].filter(like=" moving").sum()
    # two pieces: half of it at best, and another start-up each
    pieces = scale(base(), 16, intra=INTRA, inter=INTER, num_chunks=2)
    experts = pieces.frame["value"]["experts"] - sixteen.frame["value"]["experts"]
    assert experts == 0
    later = 2 * (2 * 5_000 + 13_107.2)
    assert pieces.frame["value"]["combine moving"] == round(later / 2)


def test_overlap_cannot_hide_more_than_the_experts_take():
    slow = scale(base(), 16, intra=INTRA, inter=(0.0, 1e6), overlap_frac=1.0)
    assert slow.companions[0].frame["value"].filter(like="hidden").sum() == pytest.approx(3 * 131_072, abs=2)


def test_an_imbalance_is_waited_for(sixteen):
    """Twice the rows: the experts and the bytes once more, alpha not."""
    uneven = scale(base(), 16, intra=INTRA, inter=INTER, imbalance=2.0)
    assert uneven.frame["value"][WAITING] == round(3 * 131_072 + 4 * 13_107.2)
    assert uneven.frame["basis"][WAITING] == "assumed"
    assert uneven.total == pytest.approx(sixteen.total + uneven.frame["value"][WAITING], abs=2)


def test_what_is_measured_is_anchored_and_links_are_not(sixteen):
    twice = scale(base(anchors={1: 2.0, 2: 2.0}), 16, intra=INTRA, inter=INTER)
    ratio = twice.frame["value"] / sixteen.frame["value"]
    assert ratio["experts"] == ratio["gate"] == 2
    assert ratio["dispatch moving"] == 1


def test_forward_alone_and_other_settings_of_the_layer(sixteen):
    forward = scale(base(), 16, intra=INTRA, inter=INTER, backward=False)
    assert forward.frame["value"]["experts"] == 131_072
    assert forward.frame["value"]["combine moving"] == 18_107
    padded = scale(base(), 16, intra=INTRA, inter=INTER, capacity_factor=2.0, pad=True)
    assert padded.frame["value"]["experts"] == 2 * sixteen.frame["value"]["experts"]
    dropped = scale(base(), 16, intra=INTRA, inter=INTER, capacity_factor=0.5)
    assert dropped.frame["value"]["experts"] == sixteen.frame["value"]["experts"] // 2


def test_replicas_are_summed_around_a_ring():
    """Two experts of 2 x 64 x 64 numbers on every rank: 65,536 bytes, sent almost twice, through one NIC of a node."""
    known = calibration(setting=SETTING.change(num_replicas=2))
    account = replace(base(), calibration=known)
    seen = scale(account, 16, intra=INTRA, inter=INTER, num_nics_per_node=4)
    assert seen.setting["num_experts"] == 3 * 16 + 2
    assert seen.frame["value"]["replicas moving"] == round(5_000 + 2 * 65_536 * 15 / 16 / 10)


def test_expected_traffic_reads_as_real_traffic_does():
    """On two ranks with a popularity that is even: the terms of expected traffic are near those of drawn traffic."""
    from lessons.moe_cluster import _expected

    setting = SETTING.change(num_tokens=8192)
    drawn, expected = routing.traffic(setting, 2, 0), _expected(calibration(), setting, 2, 2)
    for phase in ("gate", "permute", "experts", "unpermute", "compress"):
        key = (True, "during" if phase == "experts" else "before", phase)
        assert terms(key, setting, expected, 0) == pytest.approx(terms(key, setting, drawn, 0), rel=0.05)


def test_the_table_grows_to_hundreds_of_ranks():
    table = scaling_table(base(), intra=INTRA, inter=INTER, overlap_frac=0.3, imbalance=1.2)
    assert list(table.index) == [8, 16, 32, 64, 128, 256, 512]
    parts = table[["computing_ns", "moving_ns", "waiting_ns"]].sum(axis=1)
    assert (parts == table["total_ns"]).all()
    assert table["between_nodes_frac"].iloc[0] == 0
    assert table["between_nodes_frac"].is_monotonic_increasing
    assert table["between_nodes_frac"].iloc[-1] == pytest.approx(504 / 511, abs=1e-6)
    assert table["efficiency_frac"].iloc[0] == 1
    assert (table["low_ns"] < table["total_ns"]).all()
    assert (table["high_ns"] > table["total_ns"]).all()


@pytest.mark.parametrize(
    ("num_ranks", "given", "said"),
    [
        (12, {}, "at most node_size or a multiple of it; given: 12 and 8"),
        (0, {}, "at most node_size"),
        (16, {"inter": None}, r"16 ranks are 2 nodes of 8: give inter=\(alpha_ns, bytes_per_s\) of a NIC"),
        (16, {"num_nics_per_node": -1}, "num_nics_per_node is at least 1"),
        (16, {"overlap_frac": 1.5}, "overlap_frac is from 0 to 1"),
        (16, {"imbalance": 0.5}, "imbalance is the most loaded rank's rows"),
        (16, {"intra": (1.0, 0.0)}, r"intra and inter are \(alpha_ns, bytes_per_s\)"),
        (16, {"num_experts": 40}, "40 experts cannot be shared equally by 16 ranks"),
        (16, {"message_dtype": "bfloat16"}, "was not measured"),
        (16, {"nodes": 2}, "no such knob: nodes"),
    ],
)
def test_what_cannot_be_is_refused(num_ranks, given, said):
    with pytest.raises(ValueError, match=said) as error:
        scale(base(), num_ranks, **({"intra": INTRA, "inter": INTER} | given))
    assert "\n" not in str(error.value)


def test_an_account_without_costs_or_links_is_refused():
    with pytest.raises(ValueError, match="carries no calibration"):
        scale(replace(base(), calibration=None), 8)
    apart = Costs(calibration().costs.phases, np.array([1.0, 1.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="no exchange within a node was measured"):
        scale(base(costs=apart), 8)
