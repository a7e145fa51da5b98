"""Regions of storages: views come back from them, share them, and are forgotten with them."""

import weakref
from contextlib import ExitStack

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effkit.activations.storage_views import Once, PerStorage, Region

VIEWS = {
    "flat": lambda x: x.view(-1),
    "transposed": lambda x: x.transpose(0, 1),
    "third": lambda x: x[..., 4:8],
    "row": lambda x: x[2],
    "column": lambda x: x[:, :, 3],
    "expanded": lambda x: x[0, 0].expand(7, 12),
    "every second": lambda x: x[:, ::2],
    "scalar": lambda x: x[1, 2, 3],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("in_order", [False, True])
def test_a_view_comes_back_from_its_region(name, in_order):
    view = VIEWS[name](torch.randn(5, 6, 12))
    region = Region.of(view, in_order=in_order)
    flat = region.cut(view)
    assert flat.shape == (region.numel,)
    assert torch.equal(region.place(flat.clone()), view)
    if in_order:
        assert torch.equal(flat, view.reshape(-1))


def test_which_views_share_a_region():
    x = torch.randn(5, 6, 12)
    whole = Region.of(x).key
    assert all(Region.of(VIEWS[name](x)).key == whole for name in ("flat", "transposed", "third", "every second"))
    assert all(Region.of(VIEWS[name](x)).key != whole for name in ("row", "column"))
    assert Region.of(x[2]).numel == 72, "a small part is kept alone"
    assert Region.of(x[:, :, 3]).numel == 30
    x.add_(1)
    assert Region.of(x).key != whole, "other values"
    assert Region.of(x.view(torch.int32)).key != Region.of(x).key


@pytest.mark.parametrize("fake", [False, True])
def test_views_share_what_is_restored_while_one_is_alive(fake):
    with FakeTensorMode() if fake else ExitStack():
        once, calls = Once("kept"), []

        def restore(kept):
            calls.append(kept)
            return torch.zeros(12)

        first = once.restored(restore).view(3, 4)
        second = once.restored(restore)
        assert calls == ["kept"]
        assert first.untyped_storage() is second.untyped_storage()
        assert second.shape == (12,)
        storage = weakref.ref(first.untyped_storage())
        del first, second
        assert storage() is None
        once.restored(restore)
        assert calls == ["kept", "kept"]


def test_a_region_is_made_once_and_forgotten():
    cache, x = PerStorage(), torch.ones(4)
    first = cache.once(Region.of(x), lambda: 1)
    assert cache.once(Region.of(x.view(2, 2)), lambda: 2) is first
    assert len(cache) == 1
    del first
    assert len(cache) == 0
