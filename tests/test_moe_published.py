"""Published figures of expert-parallel layers beside what is recounted."""

import numpy as np
import pytest

from effkit.moe import deepep, recounts


@pytest.fixture(scope="module")
def layers():
    return recounts.fsmoe_grid()


@pytest.fixture(scope="module")
def differing():
    return recounts.fsmoe_differing()


def test_fsmoe_cells_within_twelve_percent():
    table = recounts.fsmoe_table2()
    assert len(table) == 6
    assert (table["published_ns"] / 1e6).tolist() == pytest.approx([11.2, 15.5, 15.7, 28.3, 39.6, 40.8])
    assert (table["error"].abs() < 0.12).all()
    assert (table["error"] < 0).all()
    # the parts of a wrong byte count would not miss both sizes alike
    by_task = table["error"].unstack("model")
    assert (by_task["GPT2-XL"] - by_task["Mixtral-7B"]).abs().max() < 0.02


def test_fsmoe_bytes_are_counted_from_tokens():
    table = recounts.fsmoe_table2().loc["GPT2-XL"]
    tokens = np.zeros((4, 1024, 1600), dtype="float32")
    copies = 2 * 1.2
    assert table["size_bytes"]["all_gather"] == pytest.approx(tokens.nbytes * copies + tokens.nbytes)
    assert table["size_bytes"]["all_to_all"] == pytest.approx(2 * tokens.nbytes * copies / 4)


def test_a_coefficient_ten_times_too_large_shows_as_a_slope_of_a_tenth():
    plain = recounts.fsmoe_table2()
    coefficients = recounts.COEFFICIENTS_MS["testbed B"]
    wrong = {**coefficients, "all_gather": tuple(10 * value for value in coefficients["all_gather"])}
    tenfold = recounts.fsmoe_table2(coefficients_ms=wrong)
    ratio = tenfold["slope_ratio"] / plain["slope_ratio"]
    assert ratio.xs("all_gather", level="task").tolist() == pytest.approx([0.1, 0.1])
    assert ratio.drop("all_gather", level="task").tolist() == pytest.approx([1] * 4)
    assert plain["slope_ratio"].between(0.85, 1.15).all()
    one = recounts.fsmoe_table2({"GPT2-XL": recounts.TABLE2_MS["GPT2-XL"]})
    assert one["slope_ratio"].isna().all()


def test_fsmoe_grid_of_1458_layers_is_scheduled_optimally(layers):
    assert len(layers) == 3**6 * 2
    assert not layers.duplicated(list(recounts.LAYERS)).any()
    for direction in ("forward", "backward"):
        assert layers[f"{direction}_regret_frac"].max() <= 1e-9
        assert (layers[f"{direction}_degree"] == layers[f"{direction}_exhaustive_degree"]).all()
        assert layers[f"{direction}_degree"].between(1, 8).all()
        assert layers[f"{direction}_degree"].nunique() > 3  # a grid where one degree were always best proves nothing


def test_fsmoe_degrees_differ_between_forward_and_backward(layers):
    attrs = layers.attrs
    assert attrs["published"] == 912
    assert attrs["recomputed"] == (layers["forward_degree"] != layers["backward_degree"]).sum()
    assert attrs["error"] == pytest.approx(attrs["recomputed"] / 912 - 1)
    assert abs(attrs["error"]) < 0.25  # the grid's values and its coefficients are partly assumed
    assert any("hidden" in line for line in attrs["assumed"])
    heads = layers.groupby([name for name in recounts.LAYERS if name != "num_heads"])["differ"].nunique()
    assert (heads == 1).all()


def test_every_reading_of_fsmoe_s_count_is_shown_and_optimal(differing):
    assert len(differing) == 8
    assert (differing["regret_frac"] <= 1e-9).all()
    assert (differing["recomputed"] % 3 == 0).all()
    assert (differing["published"] == 912).all()
    assert differing["recomputed"].min() < 912 < differing["recomputed"].max()
    # to reduce a gradient makes the two directions less alike, and powers of two leave fewer ways to differ
    without, with_gradient = (differing.xs(flag, level="gradient")["recomputed"] for flag in (False, True))
    assert (with_gradient > without).all()
    by_degrees = differing["recomputed"].unstack("degrees")
    assert (by_degrees["powers of two"] < by_degrees["any"]).all()


def test_fsmoe_costs_are_the_authors_sizes():
    layer = {"batch": 4, "length": 1024, "hidden": 4096, "ffn_per_hidden": 3.5, "capacity_factor": 1.2, "num_gemms": 3}
    costs = recounts.fsmoe_costs(layer)
    # get_optimal_degree of the authors' file, in milliseconds: alpha + workload * beta
    values = 2.4 * 4 * 1024 * 4096
    assert costs.dispatch.chunk_ns(1) / 1e6 == pytest.approx(2.3515350484e-01 + values / 8 * 1.8543323833e-06)
    assert costs.all_gather.chunk_ns(1) / 1e6 == pytest.approx(0.0549 + values * 6.72388e-7)
    expected = 5.9194353200e-01 + values * 14336 / 8 * 3 * 5.6847387697e-11
    assert costs.experts.chunk_ns(1) / 1e6 == pytest.approx(expected)


def test_lsh_moe_closes_for_gpt_and_not_for_swin():
    table = recounts.lsh_moe()
    assert table["published"].tolist() == [1.3, 1.6, 1.28]
    assert abs(table["error"]["GPT"]) < 0.02
    assert abs(table["error"]["RoBERTa"]) < 0.10
    assert table["recomputed"]["Swin"] == pytest.approx(2.62, abs=0.01)
    assert table["error"]["Swin"] > 1
    again = 1 / (1 - table["share_frac"] + table["share_frac"] * table["implied_sent_frac"])
    assert again.tolist() == pytest.approx(table["published"].tolist())
    assert (table["published"] < table["limit"]).all()


@pytest.mark.parametrize("bytes_per_value", [2, 4])
def test_lsh_moe_equation_follows_from_counting_flops_and_bytes(bytes_per_value):
    hidden, top_k, servers, flops_per_s, bandwidth = 1024, 2, 4, 300e12, 12e9
    attention = 4 * 2 * hidden * hidden  # query, key, value, output
    experts = top_k * 2 * 2 * hidden * 4 * hidden
    computing_s = 3 * (attention + experts) / flops_per_s
    message_bytes = top_k * hidden * bytes_per_value * (servers - 1) / servers
    exchanging_s = 4 * message_bytes / bandwidth  # dispatch and combine, forward and backward
    given = {"hidden": hidden, "top_k": top_k, "num_servers": servers, "bytes_per_value": bytes_per_value}
    ratio = recounts.all_to_all_per_compute(flops_per_s, bandwidth, **given)
    assert ratio == pytest.approx(exchanging_s / computing_s)
    assert recounts.all_to_all_per_compute(flops_per_s, bandwidth, **{**given, "num_servers": 1}) == 0
    with pytest.raises(ValueError, match="hidden is 0, expected a positive number"):
        recounts.all_to_all_per_compute(flops_per_s, bandwidth, **{**given, "hidden": 0})


def test_parallel_folding_mfu():
    table = recounts.megatron_folding_mfu()
    assert table["recomputed"].tolist() == pytest.approx([458.3 / 989.5, 487.7 / 989.5])
    assert table["published"].dropna().tolist() == [0.493]
    assert table["error"].abs().max() < 0.002


def test_deepep_dispatch_within_five_percent_from_two_sizes():
    table = deepep.low_latency_table()
    unseen = table[(table["kind"] == "dispatch") & table["in_range"] & ~table["calibrated"]]
    assert unseen["ep"].tolist() == [64, 128, 256]
    assert (unseen["published_ns"] / 1e3).tolist() == [173, 192, 194]
    assert unseen["error"].abs().mean() <= 0.05
    assert table.attrs["mean_error"]["dispatch"] == pytest.approx(unseen["error"].abs().mean())


def test_deepep_combine_within_twelve_percent_from_two_sizes():
    table = deepep.low_latency_table()
    unseen = table[(table["kind"] == "combine") & table["in_range"] & ~table["calibrated"]]
    assert (unseen["published_ns"] / 1e3).tolist() == [314, 369, 360]
    assert unseen["error"].abs().mean() <= 0.12
    assert table.attrs["mean_error"]["combine"] == pytest.approx(unseen["error"].abs().mean())


def test_deepep_calibration_passes_through_its_two_sizes_and_sees_no_other(monkeypatch):
    table = deepep.low_latency_table()
    assert table.loc[table["calibrated"], "error"].abs().max() < 1e-9
    assert set(table.loc[table["calibrated"], "ep"]) == {16, 32}
    nonsense = {kind: {ep: us if ep in (16, 32) else 1.0 for ep, us in cells.items()}
                for kind, cells in deepep.PUBLISHED_US.items()}  # fmt: skip
    monkeypatch.setattr(deepep, "PUBLISHED_US", nonsense)
    assert deepep.low_latency_table()["predicted_ns"].tolist() == table["predicted_ns"].tolist()


def test_deepep_bytes_and_bandwidth_are_those_of_the_hardware():
    assert deepep.size_bytes("dispatch") / 1e6 == pytest.approx(7.57, abs=0.005)
    assert deepep.size_bytes("combine") / 1e6 == pytest.approx(14.68, abs=0.005)
    table = deepep.low_latency_table()
    assert (table["nvlink_bytes"] + table["nic_bytes"] == table["kind"].map(deepep.size_bytes)).all()
    for kind in deepep.MESSAGE_BYTES:
        fitted, _ = table.attrs["links"][kind]["nic_bytes_per_s"]
        assert fitted == pytest.approx(deepep.NIC_BYTES_PER_S, rel=0.1)
        assert 0 < table.attrs["links"][kind]["alpha_ns"][0] < 77_000  # less than a whole exchange within a node
    assert table.loc[table["ep"] > 8, "binds"].eq("nic").all()
    assert table.loc[table["ep"] == 8, "binds"].eq("nvlink").all()
    assert not table.loc[table["ep"] == 8, "in_range"].any()


def test_deepep_link_takes_the_slower_of_two():
    link = deepep.Link(alpha_ns=10.0, nic_bytes_per_s=1e9, nvlink_bytes_per_s=2e9)
    assert link.dur_ns(1000, 16) == pytest.approx(10 + 500)  # 500 bytes leave, 500 stay
    assert link.dur_ns(1000, 4) == pytest.approx(10 + 500)  # all stay
    narrow = deepep.Link(alpha_ns=10.0, nic_bytes_per_s=1e9, nvlink_bytes_per_s=1e8)
    assert narrow.dur_ns(1000, 16) == pytest.approx(10 + 5000)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: deepep.size_bytes("gather"), "kind is 'gather', expected one of"),
        (lambda: deepep.split(100, 12), "ep is 12, expected at most 8 ranks or a multiple"),
        (lambda: deepep.calibrate("dispatch", (16, 16)), "sizes is \\(16, 16\\), expected two different"),
        (lambda: deepep.low_latency_table((8, 16)), "sizes is \\(8, 16\\)"),
        (lambda: recounts.fsmoe_grid(coefficients="testbed Z"), "coefficients is 'testbed Z', expected one of"),
    ],
)
def test_wrong_questions_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
