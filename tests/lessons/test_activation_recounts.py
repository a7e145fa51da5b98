"""Published figures of activation memory beside what is recounted."""

import pytest
import torch

from effkit.activations.levers import Levers
from effkit.activations.timeline import CATEGORIES
from lessons import coat, korthikanti, mesa


def test_deit_without_mesa_is_recounted_within_two_percent():
    table = mesa.mesa()
    plain = table.loc[["DeiT-Ti", "DeiT-S", "DeiT-B"]]
    assert list(plain["published"]) == [4171, 8459, 17691]
    assert (plain["gap_frac"].abs() < 0.02).all()
    compressed = table.loc[[f"{name} with Mesa" for name in plain.index]]
    assert list(compressed["published"]) == [1858, 3840, 8616]
    assert (compressed["gap_frac"].abs() < 0.04).all()
    parts = mesa.mesa_parts()
    assert parts.sum().to_numpy() == pytest.approx(table["recomputed"].to_numpy(dtype="float64"))
    # Mesa saves on what is kept for backward, on nothing else
    kept = parts.loc["saved activation"]
    assert 2.6 < kept["DeiT-S"] / kept["DeiT-S with Mesa"] < 2.8
    assert parts.loc["parameter", "DeiT-S"] == parts.loc["parameter", "DeiT-S with Mesa"]


def test_twelve_layers_are_replayed_as_two_foretell():
    replayer = mesa._on_meta("DeiT-Ti", 12)
    timeline = replayer.replay(mesa._images(128), Levers(autocast="bfloat16"))
    backward = [phase.startswith("backward") for phase in timeline.phases]
    levels = timeline.levels()[[name != "gradient" for name in CATEGORIES]][:, backward].sum(axis=0)
    foretold = mesa._deit_parts("DeiT-Ti", 0).drop(["gradient", "gradient bucket"]).sum()
    assert levels.max() == pytest.approx(foretold, rel=1e-6)


def test_a_llama_block_agrees_with_coat_in_all_and_not_by_row():
    table = coat.coat_block()
    assert table["published"]["Total"] == 22.66
    assert abs(table["gap_frac"]["Total"]) < 0.01
    assert table["recomputed"].drop("Total").sum() == pytest.approx(table["recomputed"]["Total"])
    assert table["recomputed"]["RMSNorm"] == pytest.approx(6, abs=0.01)
    assert table["published"]["RMSNorm"] == 4
    assert table["recomputed"][["Act Func", "FlashAttn", "Linear"]].tolist() == pytest.approx([8, 3, 5.66], rel=0.01)
    assert table.loc["Total", ["published_TE", "published_COAT"]].tolist() == [18.33, 13.33]


@pytest.mark.parametrize("rows", coat.COAT_BLOCK_U.values())
def test_printed_rows_add_up_to_the_printed_total(rows):
    assert sum(rows.values()) == pytest.approx(2 * rows["Total"])


def test_whole_llamas_agree_with_coat_and_a_single_layer_is_half_of_what_is_printed():
    table = coat.coat_totals()
    models = table.loc[["Llama-2-7B", "Llama-2-13B"]]
    assert list(models["published"]) == [25.8, 20.1]
    assert (models["gap_frac"].abs() < 0.04).all()
    single = table[table.index.str.startswith("layer ")]
    assert list(single["gap_frac"]) == pytest.approx([-0.5] * 3, abs=1e-3)


def test_the_form_of_korthikanti_holds_once_adapted():
    table = korthikanti.korthikanti(hidden=128, heads=4, sequence=128)
    assert (table["adapted_gap_frac"].abs() < 0.03).all()
    # as printed, for two bytes per value and masks of one, it is far off
    assert table["gap_frac"]["eager, dropout 0.1"] > 1.5


def test_adapted_to_the_papers_own_assumptions_it_is_the_papers_form():
    shape = (2, 1024, 768, 12)
    printed = korthikanti.korthikanti_bytes(*shape)
    assert printed == 34 * 2 * 1024 * 768 + 5 * 12 * 1024**2 * 2
    assert korthikanti.adapted_bytes(*shape) == printed + 16 * 2 * 1024  # statistics of two norms
    with pytest.raises(ValueError, match="attention is eager or sdpa"):
        korthikanti.adapted_bytes(*shape, attention="flash")


@pytest.fixture
def one_thread():
    """Small nets wait for one another's threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_groups_by_head_are_compared_on_the_same_gradient():
    table = mesa.head_groups(steps=5)
    assert list(table.loc["gpt"].index) == ["head", "tensor", "128 values"]
    assert table["relative_error"].between(1e-5, 0.05).all()
    assert (table["relative_error"] < table["noise_relative_error"] / 10).all()
    for net in ("vision", "gpt"):
        assert table.loc[net, "relative_error"]["128 values"] < table.loc[net, "relative_error"]["head"]
