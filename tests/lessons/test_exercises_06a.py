"""The exercises of mini-lab 06a, and its law of steps by batch size."""

import pytest
from test_exercises import in_notebook, refused

from lessons.minilabs import Interval
from lessons.steps import batches, distilling, labs

NAME = "06a_steps_to_quality"


def test_the_cells_accept_the_right_answer_alone():
    check = in_notebook(NAME, "my_batch = 32\n", law=batches.Law(28.0, 7.0))
    check("my_batch = 23\n")  # letters grow as B + 7: 30 of them are twice the 15 of a batch of 8
    refused(check, *(f"my_batch = {size}\n" for size in (8, 16, 22, 24, 32)))

    first = "def my_students(scoring, chosen, whole):\n    return 1  # two or three lines of yours\n\n\nmy_answer = 1\n"
    costs = distilling.miniplm_costs(num_steps=1)
    check = in_notebook(NAME, first, costs=costs, labs=labs, distilling=distilling)
    code = "def my_students(once, each, whole):\n    return int(once / ({}) {}) + 1\n\n\nmy_answer = {}\n"
    check(code.format("whole - each", "", 8))
    refused(check, *(code.format("whole - each", "", students) for students in (1, 2, 7, 9)))
    refused(check, *(code.format(*wrong, 8) for wrong in (("whole", ""), ("whole - each", "+ 1"), ("each", ""))))


def test_students_share_what_is_paid_once():
    assert distilling.students(14, 4, 12) == 2  # 14 / 8 is 1.75
    assert distilling.students(8, 4, 12) == 2, "one student breaks even, two save"
    with pytest.raises(ValueError, match="it never pays"):
        distilling.students(14, 12, 12)


def test_the_law_goes_through_both_batch_sizes_and_is_told_of_a_third():
    law = batches.through(60, 30)
    # by hand: S_min + slope / 8 = 60 and S_min + slope / 32 = 30, so that slope is 320 and S_min 20
    assert law == pytest.approx((20, 16))
    assert [law.steps(size) for size in (8, 16, 32)] == pytest.approx([60, 40, 30])


def test_a_prediction_lies_in_its_band_and_beyond_the_fitted_sizes_it_says_so():
    inside, beyond = batches.predict(batch_size=16), batches.predict(batch_size=64)
    assert inside.in_range
    assert not beyond.in_range
    assert inside.low < inside.total < inside.high
    letters = inside.companion("Letters read")
    assert letters.total == inside.total * 16 * 32
    stored = labs.LAMB.stored()["AdamW, batch 8"]
    expected = Interval.of(stored, ratios=False)
    at_8 = batches.predict(batch_size=8)
    assert (at_8.low, at_8.total, at_8.high) == tuple(map(round, (expected.run_low, expected.mean, expected.run_high)))


@pytest.mark.usefixtures("one_thread")
def test_a_run_of_fewer_pieces_takes_more_steps_and_the_slider_predicts_both():
    base = batches.measure(batch_size=8)
    assert base.companion("Letters read").total == base.total * 8 * 32
    panel = batches.whatif(base)
    panel.controls["batch_size"].value = 32
    assert panel.result.total == batches.predict(batch_size=32).total < batches.predict(batch_size=8).total
