"""The quantiser's error is bounded; a GPT in eight bits keeps its gradient and loses its bytes."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel

from effkit.activations.compressing import Compressed, compressed
from effkit.activations.gradients import gradient_error
from effkit.activations.saved_tensor_hooks import is_weight, tensors_in, watch
from effkit.quantisation import dequantise, quantise

FORMATS = ["int8", "fp8_e4m3", "fp8_e5m2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def steps_of(q):
    """The scale of each value."""
    num = math.prod(q.shape)
    if q.group == "tensor":
        return q.scales.expand(num).view(q.shape)
    if q.group == "head":
        return q.scales.repeat_interleave(q.shape[-1] // q.scales.numel()).expand(q.shape)
    return q.scales.repeat_interleave(q.group)[:num].view(q.shape)


@given(
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    group=st.sampled_from([1, 3, 8, 128, "tensor", "head"]),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
@example(shape=(3, 300_000), group=100, dtype=torch.float32, spread=1.0, seed=0)  # several chunks
def test_int8_is_within_half_a_step(shape, group, dtype, spread, seed):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread + spread).to(dtype)
    if group == "head":
        x = x.unsqueeze(-1).expand(*shape, 6) * torch.arange(6).to(dtype)
    q = quantise(x, "int8", group, num_heads=3 if group == "head" else None)
    back = dequantise(q)
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    assert back.is_contiguous()
    rounding = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps * 4
    assert ((back.double() - x.double()).abs() <= steps_of(q) * 0.5 * (1 + 1e-4) + x.double().abs() * rounding).all()


@pytest.mark.parametrize(("dtype", "error"), [("fp8_e4m3", 2**-4), ("fp8_e5m2", 2**-3)])
@pytest.mark.parametrize("group", [1, 100, "tensor", "head"])
def test_fp8_has_a_relative_error(dtype, error, group):
    x = torch.randn(40, 12)
    q = quantise(x, dtype, group, num_heads=4 if group == "head" else None)
    subnormal = steps_of(q) * torch.finfo(q.codes.dtype).smallest_normal
    assert ((dequantise(q) - x).abs() <= (x.abs().clamp_min(subnormal)) * error * 1.001).all()


def test_every_code_of_e4m3_is_read_as_torch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes.float().isfinite()
    q = quantise(torch.ones(256), "fp8_e4m3", "tensor")._replace(codes=codes, scales=torch.ones(1))
    assert torch.equal(dequantise(q)[finite], codes.float()[finite])


@pytest.mark.parametrize("dtype", FORMATS)
def test_zeros_and_equal_values_are_exact(dtype):
    assert torch.equal(dequantise(quantise(torch.zeros(300), dtype)), torch.zeros(300))
    assert torch.equal(dequantise(quantise(torch.full((300,), 7.0), dtype)), torch.full((300,), 7.0))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_group_with_an_overflow_has_no_finite_value_and_others_are_well(dtype, value):
    x = torch.randn(40)
    x[13] = value
    back = dequantise(quantise(x, dtype, group=10))
    assert not back[10:20].isfinite().any()
    assert back[:10].isfinite().all()
    assert back[20:].isfinite().all()


def test_strides_do_not_matter_and_the_tensor_is_left_alone():
    x = torch.randn(30, 20)
    before = x.clone()
    assert torch.equal(dequantise(quantise(x.t())), dequantise(quantise(x.t().contiguous())))
    assert torch.equal(x, before)


def test_a_head_has_its_own_scale():
    x = torch.randn(50, 8) * torch.tensor([1.0] * 4 + [1000.0] * 4)
    low = (dequantise(quantise(x, group="head", num_heads=2)) - x)[:, :4].abs().max()
    shared = (dequantise(quantise(x, group="tensor")) - x)[:, :4].abs().max()
    assert low < shared / 50


@pytest.mark.parametrize(("dtype", "ratio"), [("int8", 512 / 136), ("fp8_e4m3", 512 / 132)])
def test_bytes(dtype, ratio):
    q = quantise(torch.randn(1280), dtype)
    assert sum(tensor.nbytes for tensor in tensors_in(q)) == 5120 / ratio


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "dtype is one of int8, fp8_e4m3, fp8_e5m2; given: 'int4'"),
        ({"group": 0}, "from 1 up, .* given: 0"),
        ({"group": "row"}, "given: 'row'"),
        ({"group": "head"}, "num_heads is the number of heads"),
        ({"num_heads": 2}, "num_heads is the number of heads"),
        ({"group": "head", "num_heads": 3}, r"num_heads=3 does not divide the last dimension of \(4, 8\)"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        quantise(torch.ones(4, 8), **options)
    if "divide" not in message:
        with pytest.raises(ValueError, match=message), compressed(**options):
            pass


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"floating-point tensor; given: torch\.int64"):
        quantise(torch.arange(3))


def gpt(attention="sdpa", layers=1):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 128, "n_embd": 256, "n_layer": layers, "n_head": 4}
    silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **silent, use_cache=False, attn_implementation=attention)).train()
    model.loss_type = "ForCausalLM"
    tokens = torch.randint(0, 300, (4, 128))
    return model, {"input_ids": tokens, "labels": tokens}


def saved_bytes(model, batch, context):
    known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    storages = {}

    def seen(original, kept):
        if not is_weight(original):
            for storage in (tensor.untyped_storage() for tensor in tensors_in(kept)):
                storages[storage._cdata] = storage.nbytes()

    with watch(seen), context:
        loss = model(**batch).loss
    del loss
    return sum(size for key, size in storages.items() if key not in known)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("group", "heads"), [(128, None), ("head", 4)])
def test_a_gpt_block_keeps_its_gradient_in_a_quarter_of_the_bytes(attention, group, heads):
    model, batch = gpt(attention)

    def lever():
        return compressed("int8", group, num_heads=heads)

    exact = saved_bytes(model, batch, nullcontext())
    assert exact > 2**20
    assert exact / saved_bytes(model, batch, lever()) >= 3.5
    assert gradient_error(model, batch, lever).set_index("parameter").loc["all", "cosine"] >= 0.999


def test_fake_tensors_are_kept_as_real_ones_are():
    def layers():
        return torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(3)))

    def bytes_of(net, x):
        sizes = []
        with compressed(), watch(lambda _, kept: sizes.append([tensor.nbytes for tensor in tensors_in(kept)])):
            net(x).sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        return sizes

    real = bytes_of(layers(), torch.randn(128, 64))
    with FakeTensorMode():
        assert bytes_of(layers(), torch.randn(128, 64)) == real


def test_the_forward_pass_is_exact():
    model, batch = gpt()
    with compressed():
        kept = model(**batch).loss
    assert torch.equal(kept, model(**batch).loss)


def test_a_storage_is_quantised_once():
    x = torch.randn(64, 96).requires_grad_()
    kept = []
    with compressed(min_elements=1), watch(lambda _, k: kept.append(k)):
        y = x * 1.5
        for view in (y, y.view(-1, 96), y.t(), *y.chunk(3, dim=1)):
            view.square()
    assert len(kept) == 6
    assert len({id(k.values) for k in kept}) == 1
    y = y.detach()
    assert all(torch.allclose(k.region.place(dequantise(k.values.kept).view(-1)), v, atol=0.05)
               for k, v in zip(kept, (y, y.view(-1, 96), y.t(), *y.chunk(3, dim=1)), strict=True))  # fmt: skip


def test_what_changed_in_between_is_quantised_again():
    x = torch.zeros(64, 64).requires_grad_()
    with compressed(min_elements=1):
        y = x + 1
        a = y.square()
        with torch.no_grad():
            y.add_(1)
        b = y.square()
    (gradient,) = torch.autograd.grad((a + b).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 2 * 1 + 2 * 2))


def test_weights_integers_and_small_tensors_stay():
    net, kept = torch.nn.Sequential(torch.nn.Embedding(9, 64), torch.nn.Linear(64, 64)), []
    with compressed(min_elements=200), watch(lambda o, k: kept.append((o, k))):
        net(torch.arange(9) % 3).square().sum().backward()
        net(torch.arange(2)).square()
    for original, k in kept:
        floats = original.is_floating_point() and original.numel() >= 200 and not is_weight(original)
        assert isinstance(k, Compressed) == floats
    assert {isinstance(k, Compressed) for _, k in kept} == {True, False}
