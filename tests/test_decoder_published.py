"""Published figures of Canary and PixArt-Sigma beside what is recounted."""

import math

import pytest
import torch

from effkit.decoder import recounts


def test_canary_gains_2_83_with_the_decoder_at_84_percent():
    table = recounts.canary()
    assert table.index.tolist() == ["24/24", "32/8", "32/4", "17/4"]
    assert table.loc["32/4", "speed_up"] == pytest.approx(2.83, abs=0.005)
    assert table.loc["24/24", "decoder_frac"] == pytest.approx(0.84, abs=0.005)
    assert table.loc["24/24", "rtfx"] == pytest.approx(369.4, abs=0.05)
    assert table.loc["32/4", "decoder_frac"] == pytest.approx(0.397, abs=0.0005)
    assert table.loc["32/4", "published"] == 3.0
    assert table.loc["32/4", "error"] == pytest.approx(-0.056, abs=0.0005)
    assert table["published"].notna().sum() == 1
    assert table.attrs["layer_ratio"] == pytest.approx(5.26, abs=0.005)


def test_canary_line_passes_through_both_published_splits():
    table = recounts.canary()
    assert table.loc[["32/8", "32/4"], "rtfx"].tolist() == pytest.approx([749, 1046])
    assert table["basis"].tolist() == ["derived", "published", "published", "not visible"]
    assert table.loc["17/4", ["rtfx", "decoder_frac", "speed_up"]].isna().all()
    assert table[["encoder_layers", "decoder_layers"]].to_numpy().tolist() == [[24, 24], [32, 8], [32, 4], [17, 4]]


def test_layer_times_are_found_again():
    encoder_s, decoder_s = 2e-5, 7e-5
    rtfx = {split: 1 / (split[0] * encoder_s + split[1] * decoder_s) for split in ((10, 3), (6, 12))}
    assert recounts.layer_times(rtfx) == pytest.approx((encoder_s, decoder_s))
    table = recounts.canary(rtfx)
    assert table.loc["24/24", "decoder_frac"] == pytest.approx(7 / 9)


def test_pixart_saves_33_9_percent():
    table = recounts.pixart_flops()
    assert table.loc["total", "saved_frac"] == pytest.approx(0.339, abs=0.0005)
    assert table.attrs["recomputed"] == table.loc["total", "saved_frac"]
    assert abs(table.attrs["error"]) < 0.005
    assert table.attrs["published"] == 0.34
    with_text = recounts.pixart_flops(num_text_tokens=300)
    assert with_text.loc["total", "saved_frac"] == pytest.approx(0.333, abs=0.0005)
    items, total = table.iloc[:-1], table.iloc[-1]
    assert items.sum().tolist() == pytest.approx(total.tolist())
    assert table.loc[["projections", "feed-forward"], "saved_frac"].eq(0).all()
    assert table.loc["attention", "saved_frac"] > total["saved_frac"]  # less what the convolution costs


@pytest.mark.parametrize(("ratio", "num_compressed"), [(1, 1), (2, 1), (4, 2)])
def test_pixart_count_is_that_of_torch(ratio, num_compressed):
    """A transformer of these shapes on the meta device, counted by torch."""
    from torch.nn import functional as F
    from torch.utils.flop_counter import FlopCounterMode

    tokens, hidden, text, num_layers = 64, 32, 10, 3
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        weight, wide = torch.empty(hidden, hidden), torch.empty(4 * hidden, hidden)
        x, words = torch.empty(tokens, hidden), torch.empty(text, hidden)
        for layer in range(num_layers):
            query, key, value = (x @ weight for _ in range(3))
            if layer >= num_layers - num_compressed and ratio > 1:
                kernel = torch.empty(hidden, 1, ratio, ratio)
                key, value = (
                    F.conv2d(part.T.reshape(1, hidden, 8, 8), kernel, stride=ratio, groups=hidden)[0].flatten(1).T
                    for part in (key, value)
                )
            x = ((query @ key.T) @ value) @ weight
            query, key, value = x @ weight, words @ weight, words @ weight
            x = ((query @ key.T) @ value) @ weight
            x = (x @ wide.T) @ wide
    table = recounts.pixart_flops(tokens, ratio, num_layers, num_compressed, hidden, num_text_tokens=text)
    assert table.loc["total", "compressed_flops"] == counter.get_total_flops()
    if ratio == 1:
        assert table.loc["total", "saved_frac"] == 0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: recounts.layer_times({(32, 4): 1046.0}), "rtfx has 1 splits, expected two"),
        (lambda: recounts.layer_times({(32, 4): 1046.0, (16, 2): 2000.0}), "splits 32/4 and 16/2, expected two of"),
        (lambda: recounts.pixart_flops(num_compressed=29), "num_compressed is 29, expected 0 to 28"),
        (lambda: recounts.pixart_flops(num_tokens=65_537), "num_tokens is 65,537, expected a multiple"),
        (lambda: recounts.pixart_flops(ratio=0), "given: ratio 0"),
    ],
)
def test_wrong_questions_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_nothing_is_guessed_for_another_width():
    assert math.isnan(recounts.canary().loc["17/4", "rtfx"])
