"""Messages lose what their form rounds off and no more; hashing is integer arithmetic, the same on every machine."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from effkit import models
from effkit.models import lsh
from effkit.models.messages import GROUP, pack, row_bytes, unpack
from effkit.moe import routing
from effkit.moe.setting import Setting

FINITE = st.floats(-(2**20), 2**20, width=32, allow_subnormal=False)


def there(rows: torch.Tensor, form: str) -> torch.Tensor:
    return unpack(pack(rows, form), form, rows.shape[1], rows.dtype)


def numbers(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", ["same", "bfloat16", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_a_message_has_the_bytes_that_are_predicted(form, dtype, num_rows):
    for hidden in (GROUP, 3 * GROUP):
        rows = numbers((num_rows, hidden)).to(dtype)
        message = pack(rows, form)
        assert message.dtype == torch.uint8
        assert tuple(message.shape) == (num_rows, row_bytes(form, hidden, rows.element_size()))
        back = unpack(message, form, hidden, dtype)
        assert (back.shape, back.dtype) == (rows.shape, dtype)


def test_rows_that_do_not_lie_together_travel_too():
    rows = numbers((GROUP, 8)).T
    for form in ("same", "bfloat16", "float8"):
        assert torch.equal(there(rows, form), there(rows.contiguous(), form))


@given(arrays.arrays("float32", (3, 5), elements=FINITE))
def test_same_loses_nothing_and_bfloat16_one_in_256(numpy_rows):
    rows = torch.from_numpy(numpy_rows)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(there(rows.to(dtype), "same"), rows.to(dtype))
    assert ((there(rows, "bfloat16") - rows).abs() <= rows.abs() * 2**-8).all()
    assert torch.equal(there(rows.bfloat16(), "bfloat16"), rows.bfloat16())


@given(arrays.arrays("float32", (2, 2 * GROUP), elements=FINITE))
def test_float8_rounds_each_number_to_4_bits_or_to_a_step_of_its_group(numpy_rows):
    rows = torch.from_numpy(numpy_rows)
    error = (there(rows, "float8") - rows).abs()
    # e4m3: 4 significant bits down to 2 ** -6, steps of 2 ** -9 below; its largest number is the largest of the group
    scale = rows.view(2, 2, GROUP).abs().amax(-1).clamp(min=1e-12).repeat_interleave(GROUP, dim=1) / 448
    assert (error <= 1.0001 * torch.maximum(rows.abs() * 2**-4, scale * 2**-10)).all()


def test_each_group_has_a_scale_of_its_own():
    rows = numbers((4, 2 * GROUP))
    rows[:, GROUP:] *= 1e-6
    error = (there(rows, "float8") - rows).norm() / rows.norm()
    assert 0.01 < error < 0.04, "3 bits and a sign: a few percent"
    small = rows[:, GROUP:]
    assert (there(rows, "float8")[:, GROUP:] - small).norm() < 0.04 * small.norm()
    largest = rows.view(4, 2, GROUP).abs().argmax(-1, keepdim=True)
    found = there(rows, "float8").view(4, 2, GROUP).gather(-1, largest)
    torch.testing.assert_close(found, rows.view(4, 2, GROUP).gather(-1, largest), rtol=1e-6, atol=0)


def by_hand(x: np.ndarray, num_hashes: int) -> list[int]:
    """Buckets in int64, token by token; of directions that are equally close the first."""
    signs = lsh.directions(x.shape[1], num_hashes).numpy().astype(np.int64)
    whole = np.clip(np.rint(x.astype(np.float64) * 32), -255, 255).astype(np.int64)
    found = []
    for token in whole:
        number = 0
        for hash_ in range(num_hashes):
            along = token @ signs[:, 8 * hash_ : 8 * hash_ + 8]
            nearest = int(np.abs(along).argmax())
            number += (2 * nearest + int(along[nearest] < 0)) * 16**hash_
        found.append(number)
    return found


@pytest.mark.parametrize("hidden", [4, 256, 2048])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_buckets_are_those_of_integer_arithmetic(hidden, size):
    """Small numbers tie often, large ones are cut off; both are the same to the last token."""
    x = size * numbers((200, hidden))
    found = lsh.buckets(x, lsh.directions(hidden, 5))
    assert found.dtype == torch.int64
    assert found.tolist() == by_hand(x.numpy(), 5)
    assert 0 <= int(found.min()) <= int(found.max()) < lsh.num_cells(5)


def test_a_bucket_depends_on_the_token_alone():
    x = numbers((300, 64))
    signs = lsh.directions(64, 4)
    found = lsh.buckets(x, signs)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(lsh.buckets(x[order], signs), found[order])
    assert torch.equal(lsh.buckets(x.repeat(3, 1), signs), found.repeat(3))
    assert torch.equal(torch.cat([lsh.buckets(one, signs) for one in x.split(1)]), found)
    assert lsh.buckets(x[:0], signs).shape == (0,)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lsh.buckets(x, signs), found)
    was = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(lsh.buckets(x, signs), found)
    finally:
        torch.set_float32_matmul_precision(was)


def test_the_far_side_is_another_cell_of_each_hash():
    x = numbers((100, 64))
    signs = lsh.directions(64, 3)
    near, far = (lsh.buckets(side, signs) for side in (x, -x))
    assert ((near ^ far) == 0b0001_0001_0001).all(), "the same directions, and the other side of each"


def test_more_hashes_part_what_fewer_held_together():
    x = numbers((500, 32))
    few, many = (lsh.buckets(x, lsh.directions(32, num)) for num in (2, 4))
    assert 1 < len(few.unique()) < len(many.unique()) <= 500
    assert lsh.num_cells(lsh.MAX_HASHES) * 2**15 <= 2**63


@pytest.mark.parametrize("num_clusters", [32, 64])
def test_four_hashes_send_a_tenth_to_a_quarter_of_clustered_tokens(num_clusters):
    setting = Setting(compress="lsh", num_hashes=4, num_clusters=num_clusters)
    for seed in range(3):
        traffic = routing.traffic(setting.change(seed=seed), 1, 0)
        assert 0.08 < traffic.rows.sum() / traffic.kept.sum() < 0.26
    random = routing.traffic(setting.change(num_clusters=0), 1, 0)
    assert random.rows.sum() / random.kept.sum() > 0.95


def test_a_centroid_is_the_mean_of_its_rows_and_so_is_its_gradient():
    rows = numbers((6, 3)).double().requires_grad_()
    bucket = torch.tensor([70, 5, 70, 5, 5, 2**60])
    means, place = lsh.centroids(rows, bucket)
    torch.testing.assert_close(means, torch.stack([rows[[1, 3, 4]].mean(0), rows[[0, 2]].mean(0), rows[5]]))
    assert place.tolist() == [1, 0, 1, 0, 0, 2]
    assert torch.autograd.gradcheck(lambda rows: lsh.centroids(rows, bucket)[0], rows)


def test_a_mean_of_many_short_floats_neither_overflows_nor_stalls():
    """In float16, 1000 hundreds are infinite; in bfloat16, 256 and 1 is 256."""
    for dtype, number in ((torch.float16, 100.0), (torch.bfloat16, 1.0)):
        means, _ = lsh.centroids(torch.full((1000, 2), number, dtype=dtype), torch.zeros(1000, dtype=torch.int64))
        assert means.dtype == dtype
        assert means.tolist() == [[number, number]]


def layer_of(hidden, **changes):
    return models.expert_parallel(**{"hidden": hidden, "ffn": 8, "num_experts": 4, "device": "cpu", **changes})


def let_experts_do_nothing(layer):
    """Every expert returns what it gets: gelu(x) - gelu(-x) = x."""
    eye = torch.eye(layer.hidden, dtype=layer.gate.weight.dtype)
    for e in layer.inner:
        layer.inner[e] = torch.nn.Parameter(torch.cat([eye, -eye], dim=1))
        layer.outer[e] = torch.nn.Parameter(torch.cat([eye, -eye], dim=0))


def test_compensation_is_exact_for_experts_that_do_nothing():
    x = numbers((200, 6)).double()
    for compensate in (True, False):
        layer = layer_of(6, compress="lsh", num_hashes=1, compensate=compensate, dtype=torch.float64)
        let_experts_do_nothing(layer)
        error = (layer(x) - x).norm() / x.norm()
        assert int(layer.sent_counts.sum()) < 100
        assert error < 1e-12 if compensate else error > 0.3


@pytest.mark.parametrize("compensate", [True, False])
def test_equal_tokens_travel_once_and_lose_nothing(compensate):
    x = numbers((5, 6)).repeat(20, 1)
    layer, plain = layer_of(6, compress="lsh", num_hashes=4, compensate=compensate), layer_of(6)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-6)
    assert int(layer.sent_counts.sum()) == 5 * 2, "to two experts each"


@pytest.mark.parametrize(("form", "least", "most"), [("bfloat16", 5e-4, 2**-7), ("float8", 5e-3, 0.06)])
@pytest.mark.parametrize("chunks", [1, 4, 64])
def test_messages_are_rounded_on_one_rank_as_between_ranks(form, least, most, chunks):
    """In 64 pieces, most are empty."""
    x, grad = numbers((40, GROUP)).requires_grad_(), numbers((40, GROUP), seed=1)
    found = []
    for layer in (layer_of(GROUP, message_dtype=form, num_chunks=chunks), layer_of(GROUP)):
        y = layer(x)
        found.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], grad)])
    for lossy, exact in zip(*found, strict=True):
        assert least < (lossy - exact).norm() / exact.norm() < most
