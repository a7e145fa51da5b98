"""The exercises of 06b accept the right answer alone, and its predictions are those of the formulas, by hand."""

from types import SimpleNamespace

import pandas as pd
import pytest
from test_exercises import in_notebook, refused

from effkit import Account
from lessons.generators import alignment_costs, window_costs
from lessons.generators.sampling_windows import iteration_flops

NAME = "06b_steps_of_generators"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_cells_of_06b_accept_the_right_answer_alone():
    check = in_notebook(NAME, "my_window = 4\n", iteration_flops=iteration_flops)
    check("my_window = 7\n")  # 25 + 4 * 7 = 53 passes; two thirds of 81 are 54
    refused(check, *(f"my_window = {n}\n" for n in (1, 6, 8, 14, 0, "'7'")))

    first = "def my_factor(fewer, students):\n    return fewer  # two or three lines of yours\n\n\nmy_students = 1\n"
    check = in_notebook(NAME, first, alignment_costs=alignment_costs)
    own = '150 * c["encoder"] / students + 200 / fewer * c["flow, aligned"]'
    code = (
        f"c = alignment_costs.step_flops()\ndef my_factor(fewer, students):\n    return 200 * c['flow'] / ({own})\n\n\n"
    )
    code += "my_students = {}\n"
    check(code.format(4))
    refused(check, *(code.format(n) for n in (1, 3, 5, 100)), code.replace(" / students", "").format(4))
    refused(check, *(code.replace(own, wrong).format(4) for wrong in ("200 / fewer * c['flow']", "1", f"2 * ({own})")))


def test_an_encoder_pays_off_below_the_steps_that_the_formula_says(monkeypatch):
    flops = pd.Series({"flow": 10, "encoder": 4, "warm-up": 5, "flow, aligned": 20})
    monkeypatch.setattr(alignment_costs, "step_flops", lambda: flops)
    assert alignment_costs.break_even_steps(100) == pytest.approx((1000 - 600) / 20)
    assert alignment_costs.break_even_steps(100, students=3) == pytest.approx((1000 - 200) / 20)
    assert alignment_costs.times_fewer_flops(2, 3, plain_steps=100) == pytest.approx(1000 / (200 + 1000))
    with pytest.raises(ValueError, match="students is 0, expected at least 1"):
        alignment_costs.break_even_steps(100, students=0)


def test_a_factor_depends_on_the_unit_and_on_what_is_counted():
    def way(**steps):
        index = pd.MultiIndex.from_tuples([(9, phase.replace("_", ", ")) for phase in steps], names=["seed", "phase"])
        return SimpleNamespace(runs=pd.DataFrame({"num_steps": list(steps.values())}, index=index))

    costs = pd.DataFrame({"flops": [10, 5, 20], "dur_ns": [2, 1, 2]}, index=["flow", "encoder", "flow, aligned"])
    table = alignment_costs.times_fewer({"plain": way(flow=60), "REPA": way(encoder=20, flow_aligned=40)}, costs)
    assert list(table.index) == ["REPA, all counted", "REPA, without encoder"]
    assert table.loc["REPA, all counted"].tolist() == pytest.approx([1, 600 / 900, 120 / 100])
    assert table.loc["REPA, without encoder"].tolist() == pytest.approx([1.5, 600 / 800, 120 / 80])


def test_the_steps_of_all_phases_cost_what_they_do_in_the_mini_lab():
    flops = alignment_costs.step_flops()
    assert list(flops.index) == ["flow", "encoder", "warm-up", "flow, aligned"]
    assert flops["encoder"] < flops["warm-up"] < flops["flow"] < flops["flow, aligned"]
    costs = alignment_costs.step_costs(repeats=2)
    assert (costs["flops"] == flops).all()
    assert (costs["dur_ns"] > 0).all()


def made(num_steps, window, sampling, update, repeats=(0, 0)):
    """A run whose FLOPs are 100 a forward pass; `repeats` are further times, as what they are above the total."""
    total = sampling + update
    flops = Account.of(
        window_costs.FLOPS, "FLOPs", {"sampling": 100 * num_steps, "update": 390 * window},
        total=100 * num_steps + 390 * window, source="by hand",
    )  # fmt: skip
    return Account.of(
        window_costs.TIME, "ns", {"sampling": sampling, "update": update}, total=total, source="by hand",
        setting={"window": window, "num_steps": num_steps}, calibration=[total, *(total + more for more in repeats)],
    ).with_companions(flops)  # fmt: skip


def test_time_is_predicted_from_the_medians_and_flops_from_the_formula():
    runs = [made(20, 10, 2000, 6000), made(20, 2, 2000, 1200), made(10, 5, 1000, 3000)]
    base = window_costs.calibrate(runs)
    assert window_costs.predict(base, window=10, num_steps=20) is base
    found = window_costs.predict(base, window=4, num_steps=12)
    assert found.frame["value"].to_dict() == {"sampling": 12 * 100, "update": 4 * 600}
    assert (found.low, found.total, found.high) == (3600, 3600, 3600)  # the law holds in all runs
    assert found.in_range
    flops = found.companion(window_costs.FLOPS)
    assert (flops.low, flops.total, flops.high) == (100 * (12 + 3 * 4), 100 * (12 + 4 * 4), 100 * (12 + 4 * 4))
    assert not window_costs.predict(base, window=4, num_steps=30).in_range
    assert not window_costs.predict(base, window=1, num_steps=12).in_range
    with pytest.raises(ValueError, match="the window is 13 of 12 sampling steps"):
        window_costs.predict(base, window=13, num_steps=12)
    with pytest.raises(ValueError, match="2 runs, expected at least 3"):
        window_costs.calibrate(runs[:2])


def test_the_band_is_two_errors_of_runs_left_out_and_the_noise():
    noisy = [made(20, 10, 2000, 6000, (800, 900)), made(20, 2, 2000, 1200, (320,)), made(10, 5, 1000, 3000, (400,))]
    found = window_costs.predict(window_costs.calibrate(noisy), window=4, num_steps=12)
    assert (found.low, found.high) == (2880, 4320)  # repeats lie a tenth above the fastest
    # the others say 8000 of 16000, and of 8000 the mean of 600 and 1800 each, as of 3200 and 4000
    odd = [made(20, 10, 2000, 6000), made(20, 2, 2000, 1200), made(20, 10, 4000, 12000)]
    errors = (150 * 20 + 900 * 10) / 8000 - 1, (150 * 20 + 900 * 2) / 3200 - 1, 8000 / 16000 - 1
    law = window_costs.calibrate(odd).calibration
    assert law.error_frac == pytest.approx((sum(error**2 for error in errors) / 3) ** 0.5)
    assert (law.sampled_ns, law.trained_ns) == (100, 600)


def test_a_measured_iteration_closes_and_the_screen_predicts_and_measures():
    runs = window_costs.measure([(6, 3), (6, 2), (4, 2)], repeats=2)
    for run in runs:
        run.closed(0.2)
        assert run.companion(window_costs.FLOPS).residual == 0
    panel = window_costs.whatif(window_costs.calibrate(runs))
    assert panel.setting == {"window": 3, "num_steps": 6}
    panel.controls["window"].value = 2
    receipt = panel.measure()
    assert receipt.setting == {"window": 2, "num_steps": 6}
    assert abs(receipt.frame.loc[window_costs.FLOPS, "error"]) < 0.02
    panel.controls["window"].value = 7
    assert "the window is 7 of 6 sampling steps" in panel.shown()
