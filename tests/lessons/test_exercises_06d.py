"""The exercises of lesson 06d, and the prediction that it runs: against counts by hand."""

import pytest
import torch
from test_exercises import in_notebook, refused

from effkit import Account, Receipt
from lessons.precision import continual, formats, labs, rotary, sparse_layers, wider

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "06d_precision_and_sparsity"
GPT3_XL = {"layers": 24, "hidden": 2048, "vocabulary": 50_257, "context": 2048}
COST = wider.StepCost(fixed_ns=1000.0, weight_ns=2.0, low_times=0.9, high_times=1.2, most_weights=2_500_000)


def base(cost=COST):
    rows = {"forward": 400_000, "backward": 800_000}
    return Account.of(wider.TITLE, "ns", rows, total=1_200_000, source="the clock", calibration=cost,
                      setting={"zeros_percent": 0})  # fmt: skip


def test_the_zeros_that_make_a_model_four_times_cheaper_are_accepted_alone():
    # 24 x 24 x 2048^2 of the blocks, and 24 x 4 x 2048^2 + 2 x 2048 x 50,257 that stay: 6.1% of the blocks are left
    full = sparse_layers.flops_per_token(**GPT3_XL)
    names = {"sparse_layers": sparse_layers, "gpt3_xl": GPT3_XL, "full": full}
    check = in_notebook(NAME, "my_percent = 75\n", **names)
    check("my_percent = 94\n")
    refused(check, *(f"my_percent = {n}\n" for n in (75, 93, 95, 99, 0, "'94'")))


def test_the_share_of_zeros_from_which_skipping_pays_is_accepted_alone():
    first = "def my_break_even(times, zeros_frac):\n    return zeros_frac  # two or three lines of yours\n"
    check = in_notebook(NAME, first, sparse_layers=sparse_layers)
    code = "def my_break_even(times, zeros_frac):\n    return {}\n"
    check(code.format("1 - (1 - zeros_frac) / times"))
    refused(check, *map(code.format, ("zeros_frac", "1 - 1 / times", "1 - (1 - zeros_frac) * times", "None")))
    assert sparse_layers.break_even_frac(2.0, 0.5) == 0.75


def test_a_step_is_predicted_from_the_weights_that_are_read():
    # 75% zeros: hidden layers of 1,024, and as many kept as the dense network has
    kept = 2 * 64 * 512 + 2 * 512**2
    read = 2 * 64 * 1024 + 2 * 1024**2
    guess = wider.predict(base(), zeros_percent=75).closed()
    assert guess.frame["value"].tolist() == [2 * kept, 2 * (read - kept), 1000]
    assert guess.total == 1000 + 2 * read
    assert (guess.low, guess.high) == (round(0.9 * guess.total), round(1.2 * guess.total))
    assert guess.in_range
    assert not wider.predict(base(), zeros_percent=90).in_range
    assert wider.predict(base(), zeros_percent=0).frame["value"]["zeros"] == 0
    with pytest.raises(ValueError, match="no cost of a step"):
        wider.predict(base(None), zeros_percent=75)


def test_a_cost_is_found_that_made_the_times():
    cost = wider.fit([100, 300, 1000], [700 + 3 * w for w in (100, 300, 1000)])
    assert (cost.fixed_ns, cost.weight_ns) == pytest.approx((700, 3))
    assert (cost.low_times, cost.high_times) == pytest.approx((0.9, 1.1))
    assert cost.most_weights == 1000
    assert cost.time_ns(10) == pytest.approx(730)
    uneven = wider.fit([100, 100, 200, 200], [90, 110, 180, 220])
    assert (uneven.low_times, uneven.high_times) == pytest.approx((0.9 * 0.9 / 0.99, 1.1 * 1.1 / 0.99), rel=0.02)
    for weights, times in (([1], [1]), ([1, 1], [1, 2]), ([1, 2], [0, 1]), ([1, 2], [1])):
        with pytest.raises(ValueError, match="two different networks"):
            wider.fit(weights, times)


def test_what_is_counted_is_what_is_built():
    table = wider.counted((0, 75), sizes=[8, 16, 16, 8])
    assert table["width"].tolist() == [16, 32]
    assert table["FLOPs on paper"].tolist() == [1, 1]
    assert table["weights read"].tolist() == [1, (2 * 8 * 32 + 32**2) / (2 * 8 * 16 + 16**2)]
    assert wider.wide([8, 16, 8], 75) == [8, 32, 8]
    assert wider.num_weights([8, 32, 8]) == 512


def test_networks_are_run_and_the_slider_predicts(monkeypatch):
    monkeypatch.setattr(wider, "SIZES", (8, 16, 16, 16, 8))
    measured = wider.calibrate((8, 32, 64), repeats=1).closed()
    assert list(measured.frame.index) == ["forward", "backward"]
    assert measured.calibration.most_weights == 2 * 8 * 64 + 2 * 64**2
    panel = wider.whatif(measured)
    panel.controls["zeros_percent"].value = 75
    assert panel.result.setting == {"zeros_percent": 75}
    receipt = panel.measure()
    assert isinstance(receipt, Receipt)
    assert receipt.measured.total > 0
    assert wider.compressed_times(50, repeats=1) > 0


def test_steps_of_formats_by_their_bits():
    assert formats.times_coarser("fp8_e4m3", "bfloat16") == 16
    assert formats.times_coarser("bfloat16", "float32") == 2**16
    assert formats.times_coarser("int4", "int8") == pytest.approx(127 / 7)
    with pytest.raises(ValueError, match="two floats or two integers"):
        formats.times_coarser("int8", "fp8_e4m3")
    with pytest.raises(ValueError, match="'int3'"):
        formats.times_coarser("int3", "int4")


def test_errors_stand_beside_what_their_bits_say():
    stored = labs.SURVEY.stored()
    errors = stored.iloc[[0]].T.set_axis(["weights"], axis="columns")
    table = labs.coarser(errors)
    assert table["by the bits"].tolist() == pytest.approx([16, 2, 127 / 7])
    assert table.loc["int4 over int8", "live"] == stored["int4"].iloc[0] / stored["int8"].iloc[0]
    assert stored["int4"].div(stored["int8"]).min() < table.loc["int4 over int8", "stored"]


def test_zeros_that_save_as_much_and_time_that_attention_saves():
    # 3 / (0.75 x 2.8 x kept) is 10 at kept 0.142857: in thousandths 0.142
    assert continual.zeros_for(10) == pytest.approx(0.858)
    assert continual.Saving(0.142, 0.8 * 0.142, 0.5).times_less >= 10
    times = rotary.attention_ns([8, 8], heads=1, channels=4, repeats=1)
    assert min(times.values()) > 0
    assert labs.ANCHOR.claim("AnchorAttention", {"full": 4, "anchored": 1}) == 0.75
    assert torch.get_num_threads() == 1
