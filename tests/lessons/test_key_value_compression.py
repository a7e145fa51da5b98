"""Condensed attention begins as attention to averages, and its table says what is kept and computed."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lessons.key_value_compression import CondensedAttention, attention_flops, condensed, pixart_flops

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(num: int, hidden: int = 16) -> torch.Tensor:
    return torch.randn(2, num, hidden, generator=torch.Generator().manual_seed(0))


def by_hand(attention, x, keys, values):
    """Softmax attention of four heads, written out; keys and values [B, M, H]."""
    q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in (attention.query(x), keys, values))
    scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return attention.out((scores @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_without_condensing_it_is_plain_attention():
    attention, x = CondensedAttention(16, 4), tokens(36)
    torch.testing.assert_close(attention(x), by_hand(attention, x, attention.key(x), attention.value(x)))
    assert attention.condense is None


@torch.no_grad()
@pytest.mark.parametrize("ratio", [2, 3, 6])
def test_it_begins_as_attention_to_averages(ratio):
    attention, x = CondensedAttention(16, 4, ratio), tokens(36)

    def averaged(rows):
        """By loops over the grid, row by row: token r * 6 + c is at (r, c)."""
        grid = rows.view(2, 6, 6, 16)
        cells = [grid[:, r : r + ratio, c : c + ratio].mean(dim=(1, 2)) for r in range(0, 6, ratio)
                 for c in range(0, 6, ratio)]  # fmt: skip
        return torch.stack(cells, dim=1)

    keys, values = averaged(attention.key(x)), averaged(attention.value(x))
    for found, expected in zip(attention.keys_values(x), (keys, values), strict=True):
        torch.testing.assert_close(found.transpose(1, 2).flatten(2), expected)
    torch.testing.assert_close(attention(x), by_hand(attention, x, keys, values))


@torch.no_grad()
def test_plain_weights_fit_in_and_the_convolution_counts():
    plain, attention, x = CondensedAttention(16, 4), CondensedAttention(16, 4, 2), tokens(36)
    left = attention.load_state_dict(plain.state_dict(), strict=False)
    assert left.missing_keys == ["condense.weight", "condense.bias"]
    assert torch.equal(attention.key(x), plain.key(x))
    before = attention(x)
    attention.condense.weight.mul_(torch.rand(attention.condense.weight.shape) * 2)
    assert (attention(x) - before).abs().max() > 1e-4


def test_every_weight_learns():
    attention = CondensedAttention(16, 4, 2)
    attention(tokens(16)).square().sum().backward()
    idle = [n for n, p in attention.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    assert not [n for n in idle if n != "key.bias"], "which moves all scores of a query alike"


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_flops_of_products_and_convolutions_are_torchs_own(ratio):
    attention, x = CondensedAttention(16, 4, ratio), tokens(64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attention(x)
    counted, fused = counter.get_total_flops(), 2 * 4 * 64 * (64 // ratio**2) * 16
    # this torch does not count fused attention on a CPU; a later one may
    assert attention_flops(64, 16, ratio, batch=2) in (counted, counted + fused)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_table_has_bytes_that_can_be_counted_by_hand(batch):
    found = condensed((16, 64), (1, 2, 4), hidden=16, heads=4, batch=batch, repeats=1, device="cpu")
    assert found.index.names == ["num_tokens", "ratio"]
    assert found.index.tolist() == [(num, ratio) for num in (16, 64) for ratio in (1, 2, 4)]
    assert list(found.columns) == ["time_ns", "kv_bytes", "saved_bytes", "flops"]
    assert (found["time_ns"] > 0).all()
    for (num, ratio), row in found.iterrows():
        width = batch * num * 16 * 4  # of one tensor of all tokens
        assert row["kv_bytes"] == 2 * width // ratio**2
        # queries, what attention gives, and one number per query and head; then full and condensed keys and values
        kept = 2 * width + batch * 4 * num * 4 + 2 * width + (2 * width // ratio**2 if ratio > 1 else 0)
        assert row["saved_bytes"] == kept
        assert row["flops"] == attention_flops(num, 16, ratio, batch=batch)


def test_condensing_takes_time_away_where_there_are_many_tokens():
    times = condensed((2304,), (1, 4), hidden=32, heads=2, repeats=3)["time_ns"]
    assert times[2304, 4] < 0.8 * times[2304, 1]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"num_tokens": (15,)}, "square grid; given: 15"),
        ({"ratios": (3,)}, r"ratio divides the side of the grid \(4\); given: 3"),
        ({"ratios": (0,)}, r"ratio divides the side of the grid \(4\); given: 0"),
        ({"repeats": 0}, "repeats is at least 1; given: 0"),
        ({"hidden": 30}, "hidden is a multiple of heads; given: 30 and 4"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        condensed(**{"num_tokens": (16,), "ratios": (2,), "repeats": 1, **wrong})


def test_the_module_refuses_what_is_no_grid():
    attention = CondensedAttention(16, 4, 2)
    with pytest.raises(ValueError, match="no square number"):
        attention(tokens(17))
    with pytest.raises(ValueError, match=r"side of the grid \(5\)"):
        attention(tokens(25))
    with pytest.raises(ValueError, match="ratio is at least 1; given: 0"):
        CondensedAttention(16, 4, 0)


def test_pixart_saves_33_9_percent():
    table = pixart_flops()
    assert table.loc["total", "saved_frac"] == pytest.approx(0.339, abs=0.0005)
    assert table.attrs["recomputed"] == table.loc["total", "saved_frac"]
    assert abs(table.attrs["error"]) < 0.005
    assert table.attrs["published"] == 0.34
    with_text = pixart_flops(num_text_tokens=300)
    assert with_text.loc["total", "saved_frac"] == pytest.approx(0.333, abs=0.0005)
    items, total = table.iloc[:-1], table.iloc[-1]
    assert items.sum().tolist() == pytest.approx(total.tolist())
    assert table.loc[["projections", "feed-forward"], "saved_frac"].eq(0).all()
    assert table.loc["attention", "saved_frac"] > total["saved_frac"]  # less what the convolution costs


@pytest.mark.parametrize(("ratio", "num_compressed"), [(1, 1), (2, 1), (4, 2)])
def test_pixart_count_is_that_of_torch(ratio, num_compressed):
    """A transformer of these shapes on the meta device, counted by torch."""
    tokens, hidden, text, num_layers = 64, 32, 10, 3
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        weight, wide = torch.empty(hidden, hidden), torch.empty(4 * hidden, hidden)
        x, words = torch.empty(tokens, hidden), torch.empty(text, hidden)
        for layer in range(num_layers):
            query, key, value = (x @ weight for _ in range(3))
            if layer >= num_layers - num_compressed and ratio > 1:
                kernel, grid = torch.empty(hidden, 1, ratio, ratio), (1, hidden, 8, 8)
                key, value = (
                    functional.conv2d(part.T.reshape(grid), kernel, stride=ratio, groups=hidden)[0].flatten(1).T
                    for part in (key, value)
                )
            x = ((query @ key.T) @ value) @ weight
            query, key, value = x @ weight, words @ weight, words @ weight
            x = ((query @ key.T) @ value) @ weight
            x = (x @ wide.T) @ wide
    table = pixart_flops(tokens, ratio, num_layers, num_compressed, hidden, num_text_tokens=text)
    assert table.loc["total", "compressed_flops"] == counter.get_total_flops()
    if ratio == 1:
        assert table.loc["total", "saved_frac"] == 0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"num_compressed": 29}, "num_compressed is 29, expected 0 to 28"),
        ({"num_tokens": 65_537}, "num_tokens is 65,537, expected a multiple"),
        ({"ratio": 0}, "given: ratio 0"),
    ],
)
def test_transformers_that_cannot_be_compressed_are_refused_in_a_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        pixart_flops(**given)
