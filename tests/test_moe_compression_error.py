"""The errors of lossy levers are those between two layers; by hand and by the analysis."""

import pytest
import torch

from effkit import models
from effkit.moe import routing
from effkit.moe.setting import Setting
from lessons.moe_compression import output_error

ERRORS = ["output_error_frac", "input_gradient_error_frac", "weight_gradient_error_frac"]
SMALL = Setting(num_tokens=256, hidden=128, ffn=64, num_clusters=16, num_hashes=4)


def test_without_a_lossy_lever_nothing_is_lost():
    for setting in (SMALL, SMALL.change(num_chunks=3, num_replicas=2, skew=2.0), SMALL.change(dtype="bfloat16")):
        found = output_error(setting)
        assert list(found.index) == ["clustered", "random"]
        assert (found[ERRORS] == 0).all(axis=None)
        assert (found[["sent_frac", "bytes_frac"]] == 1).all(axis=None)


def test_rows_sent_are_those_that_the_analysis_predicts():
    found = output_error(SMALL, compress="lsh")
    for name, num_clusters in (("clustered", 16), ("random", 0)):
        traffic = routing.traffic(SMALL.change(compress="lsh", num_clusters=num_clusters), 1, 0)
        assert found.loc[name, "sent_frac"] == traffic.rows.sum() / traffic.kept.sum()
    assert found["bytes_frac"].equals(found["sent_frac"])
    assert found.loc["clustered", "sent_frac"] < 0.25
    assert found.loc["random", "sent_frac"] > 0.95


def test_a_setting_without_clusters_is_tried_with_64():
    setting = SMALL.change(compress="lsh", num_tokens=1024)
    assert output_error(setting, num_clusters=0).equals(output_error(setting, num_clusters=64))


def test_the_error_is_that_between_two_layers():
    given = {"hidden": 128, "ffn": 64}
    plain, lossy = models.expert_parallel(**given), models.expert_parallel(compress="lsh", num_hashes=4, **given)
    x, scores = (torch.from_numpy(of(SMALL, 0, 0)).to(plain.place.device) for of in (routing.tokens, routing.scores))
    exact = plain(x, scores)
    by_hand = (lossy(x, scores) - exact).norm() / exact.norm()
    found = output_error(SMALL, compress="lsh").loc["clustered", "output_error_frac"]
    assert found == pytest.approx(by_hand.item(), rel=1e-5)


def test_residuals_on_top_of_experts_that_never_saw_them_do_harm():
    with_, without = (output_error(SMALL, compress="lsh", compensate=on)["output_error_frac"] for on in (True, False))
    assert 0.05 < without["clustered"] < 0.15, "about the spread of the clusters"
    assert 1.5 < with_["clustered"] / without["clustered"] < 3.5
    assert 1.5 < with_["random"] / without["random"] < 3.5


def test_fewer_hashes_send_less_and_lose_more():
    found = [output_error(SMALL, compress="lsh", num_hashes=num, num_clusters=0).loc["random"] for num in (1, 2, 4)]
    assert found[0]["sent_frac"] < found[1]["sent_frac"] < found[2]["sent_frac"]
    for name in ERRORS:
        assert found[0][name] > found[1][name] > found[2][name] > 0


@pytest.mark.parametrize(
    ("form", "bytes_frac", "most"), [("bfloat16", 0.5, 0.008), ("float8", (33 / 32 + 6) / 16, 0.05)]
)
def test_shorter_numbers_lose_their_rounding_alone(form, bytes_frac, most):
    found = output_error(SMALL, message_dtype=form)
    assert (found["bytes_frac"] == bytes_frac).all()
    assert (found["sent_frac"] == 1).all()
    assert ((found[ERRORS] > 1e-4) & (found[ERRORS] < most)).all(axis=None)


@pytest.mark.parametrize("pad", [True, False])
def test_dropped_copies_are_an_error_and_save_bytes_unless_padded(pad):
    found = output_error(SMALL, capacity_factor=1.0, pad=pad)
    assert (found[ERRORS] > 0.1).all(axis=None)
    traffic = routing.traffic(SMALL.change(capacity_factor=1.0), 1, 0)
    kept_frac = traffic.kept.sum() / traffic.routed.sum()
    assert kept_frac < 1
    assert found.loc["clustered", "bytes_frac"] == pytest.approx(1.0 if pad else kept_frac)
    assert found.loc["clustered", "sent_frac"] == pytest.approx(1 / kept_frac if pad else 1.0)


def test_without_a_backward_pass_its_gradients_are_not_visible():
    found = output_error(SMALL, message_dtype="float8", backward=False)
    assert found[ERRORS[1:]].isna().all(axis=None)
    assert (found["output_error_frac"] > 0).all()
    assert (found["bytes_frac"] == (33 / 32 + 2) / 8).all()


def test_it_leaves_the_callers_mode_alone():
    with torch.no_grad():
        found = output_error(SMALL, compress="lsh")
        assert not torch.is_grad_enabled()
    assert found.equals(output_error(SMALL, compress="lsh"))


def test_an_unknown_knob_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="no such knob: tokens"):
        output_error(tokens=3)
