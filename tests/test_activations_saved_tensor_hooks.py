"""Stages of saved tensors compose in any nesting order, know weights, and leave nothing behind."""

import gc
import threading
import weakref
from contextlib import ExitStack, contextmanager
from itertools import permutations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from effkit.activations.checkpointing import checkpoint
from effkit.activations.compressing import Compressed, compressed
from effkit.activations.offloading import Offloaded, Staying, offloaded
from effkit.activations.saved_tensor_hooks import Place, is_weight, stage, tensors_away, tensors_in, watch
from effkit.activations.storage_views import Once


@contextmanager
def entered(*contexts):
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32)) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x.square().sum()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def gradients(net, x, *contexts):
    with entered(*contexts):
        loss = net(x)
    return torch.autograd.grad(loss, list(net.parameters()))


def kinds_seen(net, x, *contexts):
    """What the contexts keep, among them a watch that this adds as the last of the given places."""
    kept = []
    with entered(*contexts, watch(lambda _, k: kept.append(k))):
        net(x)
    return kept


def held():
    gc.collect()
    return sum(isinstance(thing, Once) for thing in gc.get_objects())


@pytest.mark.parametrize("order", permutations(range(4)))
def test_levers_compose_in_any_order(net, order):
    x = torch.randn(64, 32)
    seen = []
    makers = [
        lambda: compressed(min_elements=1),
        lambda: offloaded(min_elements=1),
        lambda: checkpoint(net, 2),
        lambda: watch(lambda _, kept: seen.append(kept)),
    ]
    expected = gradients(net, x, *(make() for make in makers[:3]))
    found = gradients(net, x, *(makers[i]() for i in order))
    assert all(map(torch.equal, found, expected))
    activations = [kept for kept in seen if isinstance(kept, Compressed)]
    assert activations
    assert all(len(tensors_away(kept)) == len(tensors_in(kept)) == 3 for kept in activations), "codes, scales and lows"


@pytest.mark.parametrize("order", permutations(range(3)))
def test_lossless_levers_are_exact_in_any_order(net, order):
    x = torch.randn(64, 32)
    makers = [lambda: offloaded(0.5, min_elements=1), lambda: checkpoint(net, 2), lambda: watch(lambda *_: None)]
    assert all(map(torch.equal, gradients(net, x, *(makers[i]() for i in order)), gradients(net, x)))


def test_stages_run_by_place_and_come_back_in_reverse():
    calls = []

    def at(place):
        return stage(
            place,
            lambda original, kept: calls.append(("pack", place.name)) or (place, kept),
            lambda kept: calls.append(("unpack", kept[0].name)) or kept[1],
        )

    x = torch.ones(3, requires_grad=True)
    with at(Place.WATCH), at(Place.COMPRESS), at(Place.OFFLOAD):
        y = x.exp()
    y.sum().backward()
    names = ["COMPRESS", "OFFLOAD", "WATCH"]
    assert calls == [("pack", name) for name in names] + [("unpack", name) for name in reversed(names)]
    assert torch.equal(x.grad, y)


def test_of_two_compressions_the_innermost_holds_and_all_watches_do(net):
    counts = [0, 0]
    x = torch.randn(64, 32)

    def count(i):
        return watch(lambda *_: counts.__setitem__(i, counts[i] + 1))

    kept = kinds_seen(net, x, compressed(min_elements=1), count(0), compressed("fp8_e4m3", min_elements=1), count(1))
    dtypes = {k.values.kept.codes.dtype for k in kept if isinstance(k, Compressed)}
    assert dtypes == {torch.float8_e4m3fn}
    assert counts[0] == counts[1] == len(kept)


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_hooked_after_leaving(net, raises):
    x = torch.randn(64, 32)
    try:
        with compressed(min_elements=1), offloaded(min_elements=1), watch(lambda *_: None):
            net(x)
            if raises:
                raise KeyError
    except KeyError:
        pass
    y = x.clone().requires_grad_().exp()
    assert isinstance(y.grad_fn._raw_saved_result.data, torch.Tensor), "hooks would have packed this"
    assert torch.equal(y.grad_fn._saved_result, y)
    assert all(not isinstance(kept, Compressed | Offloaded) for kept in kinds_seen(net, x))


def test_what_is_kept_dies_with_the_graph(net):
    x, before = torch.randn(64, 32), held()
    with compressed(min_elements=1), offloaded(0.5, min_elements=1):
        for _ in range(3):
            loss = net(x)
            inside = held()
            loss.backward()
            del loss
            assert inside > before
            assert held() == before, "between steps of one context"
    with compressed(min_elements=1):
        net(x)  # never used
    assert held() == before


def test_an_output_that_is_kept_does_not_hold_itself():
    with watch(lambda *_: None):
        y = torch.ones(3, requires_grad=True).exp()
    storage = weakref.ref(y.untyped_storage())
    del y
    assert storage() is None


def test_backward_may_run_in_another_thread(net):
    x, found = torch.randn(64, 32), []
    expected = gradients(net, x, compressed(min_elements=1), offloaded(min_elements=1))
    with compressed(min_elements=1), offloaded(min_elements=1):
        loss = net(x)
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, list(net.parameters()))))
    thread.start()
    thread.join()
    assert all(map(torch.equal, found, expected))


def test_contexts_of_one_thread_are_not_those_of_another(net):
    kept = []
    with compressed(min_elements=1):
        thread = threading.Thread(target=lambda: kept.extend(kinds_seen(net, torch.randn(64, 32))))
        thread.start()
        thread.join()
    assert kept
    assert not any(isinstance(k, Compressed) for k in kept)


def test_a_change_in_place_is_noticed():
    x = torch.ones(3, requires_grad=True)
    for context in (watch(lambda *_: None), offloaded(0.0, min_elements=1)):
        with context:
            y = x * 2
            z = y * y
        y.add_(1)
        with pytest.raises(RuntimeError, match=r"shape \(3,\) that backward needs was changed in place .*version 1"):
            z.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fake", [False, True])
def test_weights_are_known_from_activations(autocast, fake):
    with FakeTensorMode() if fake else ExitStack():
        net, tokens = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6), nn.Linear(6, 4)), torch.arange(3)
        seen = []
        context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with watch(lambda original, _: seen.append((is_weight(original), tuple(original.shape)))), context:
            net(tokens)
    assert {shape for weight, shape in seen if weight} <= {(4, 6), (6, 4), (8, 6), (6, 8)}
    assert any(weight for weight, _ in seen)
    assert {(3, 8), (3, 6)} <= {shape for weight, shape in seen if not weight}, "and an embedding's output is none"


def test_frozen_weights_and_their_views_are_weights():
    weight = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    assert is_weight(weight)
    assert is_weight(weight.t())
    assert not is_weight(torch.ones(2, 3, requires_grad=True).t())
    assert not is_weight((weight + 1).t())


@pytest.mark.parametrize("frac", [0.0, 0.3, 0.5, 1.0])
def test_offloading_takes_its_share_of_the_bytes(frac):
    torch.manual_seed(0)
    sizes = {}

    def seen(original, kept):
        storage = original.untyped_storage()
        sizes[storage._cdata] = storage.nbytes(), isinstance(kept, Offloaded)
        assert isinstance(kept, Offloaded | Staying)
        assert len(tensors_away(kept)) == isinstance(kept, Offloaded)

    x = torch.ones(8, requires_grad=True)
    with offloaded(frac, min_elements=1), watch(seen):
        kept = [(x * i).repeat(1 + i % 7).exp() for i in range(60)]
        again = [y.view(-1, 4).square() for y in kept]  # the same storages: the same decisions
    assert len(again) == 60
    away, total = (sum(size for size, gone in sizes.values() if gone), sum(size for size, _ in sizes.values()))
    assert abs(away / total - frac) <= 8 * 7 * 4 / total
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"frac is a share in \[0, 1\]; given: {wrong}"), offloaded(wrong):
            pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offloading_on_a_gpu_frees_its_memory_and_is_exact():
    net = Net().cuda()
    x = torch.randn(1 << 16, 32, device="cuda")
    expected = gradients(net, x)
    peaks = []
    for frac in (0.0, 1.0):
        before = torch.cuda.memory_allocated()
        with offloaded(frac):
            loss = net(x)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.memory_allocated() - before)
        assert all(map(torch.equal, torch.autograd.grad(loss, list(net.parameters())), expected))
        del loss
    assert peaks[1] < 0.3 * peaks[0]
