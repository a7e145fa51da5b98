"""What a forecast for a GPU assumes, against torch's own source and its kernels for CUDA, and against hand counts."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from effkit import activations
from effkit.activations import gpu_assumptions as assumed
from effkit.activations.forecasting import Forecaster
from effkit.activations.levers import Levers

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
GROUPS = {
    "LOWER_PRECISION_FP": assumed.HALF,
    "FP32": set(),
    "FP32_SET_OPT_DTYPE": assumed.SUMS,
    "PROMOTE": assumed.WIDEST,
}
HALF, SINGLE = torch.bfloat16, torch.float32


def loss(output):
    return output.square().mean()


def header_list(group):
    """Names of one of the header's lists."""
    text = re.search(rf"#define AT_FORALL_{group}\(_\)(.*?[^\\])\n", HEADER.read_text(), re.DOTALL)
    return set(re.findall(r"_\((\w+)", text[1]))


@pytest.mark.skipif(not HEADER.exists(), reason="this torch came without its headers")
@pytest.mark.parametrize("group", GROUPS)
def test_what_autocast_casts_is_what_torchs_header_says(group):
    here = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCPU")
    on_gpu = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    added = {name.removeprefix("aten::").split(".")[0] for name in set(on_gpu) - set(here)}
    others = assumed.HALF | assumed.SUMS | assumed.WIDEST
    listed = header_list(group)
    assert len(listed) >= 8
    assert added & listed
    if group == "FP32":
        assert not listed & others
    else:
        assert added & listed <= GROUPS[group]
        assert not listed & (others - GROUPS[group])


CASTS = {
    "exp": torch.exp, "sum": torch.sum, "sum of rows": lambda x: x.sum(-1), "log": torch.log,
    "power": lambda x: x.pow(2), "rsqrt": torch.rsqrt, "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: nn.functional.log_softmax(x, -1), "cumsum": lambda x: x.cumsum(0),
    "layer norm": lambda x: nn.functional.layer_norm(x, (8,)), "norm": lambda x: x.norm(),
    "mse": lambda x: nn.functional.mse_loss(x, x), "einsum": lambda x: torch.einsum("ij,kj->ik", x, x.float()),
    "product": lambda x: x.float() @ x.float(), "mean": torch.mean, "gelu": nn.functional.gelu,
    "addcmul": lambda x: torch.addcmul(x, x, x.float()), "cat": lambda x: torch.cat([x, x.float()]),
    "double": lambda x: x.double().exp(), "type that was asked for": lambda x: x.sum(dtype=torch.float64),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(*(x.float().view(1, 1, 8, 8),) * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASTS if name != "attention"])
def test_casts_are_those_of_torchs_own_kernels_for_cuda(name):
    """Forward on fake tensors of a GPU runs torch's CUDA autocast, on any machine."""
    found = []
    with FakeTensorMode():
        for kind in ("cuda", "cpu"):
            given = torch.empty(8, 8, dtype=HALF, device=kind)
            was = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            try:
                torch.set_autocast_enabled(kind, True)
                torch.set_autocast_dtype(kind, HALF)
                if kind == "cuda":
                    found.append(CASTS[name](given).dtype)
                else:
                    with assumed.as_on_gpu():
                        found.append(CASTS[name](given).dtype)
            finally:
                torch.set_autocast_enabled(kind, was[0])
                torch.set_autocast_dtype(kind, was[1])
    assert found[0] == found[1]


def test_exponentials_of_attention_written_by_hand_are_kept_in_float32():
    """By hand: autocast's scores are bfloat16, their exponentials and the sum are float32, and so is their quotient."""

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(64, 64, device="meta"))

        def forward(self, x):
            scores = torch.einsum("ij,kj->ik", x, self.weight)
            exponentials = torch.exp(scores)
            return exponentials / exponentials.sum(-1, keepdim=True)

    kept = {}
    for device in ("cuda", None):
        one = Forecaster(Scores(), torch.randn(64, 64), loss=loss, device=device)
        kept[device] = one.requested(one.size, Levers(autocast="bfloat16")).retained["size_bytes"]
    assert (kept["cuda"] == 64 * 64 * 4).sum() >= 2
    assert kept["cuda"].sum() > kept[None].sum()


@pytest.mark.parametrize("product", [torch.mm, lambda x, w: torch.einsum("ij,jk->ik", x, w)])
def test_a_weight_is_cast_once_under_autocast_also_without_gradients(product):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(512, 512, device="meta"))

        def forward(self, x):
            return product(product(x, self.weight), self.weight)

    one = Forecaster(Twice(), torch.randn(4, 512), device="cuda", trains=False)
    made = one.requested(one.size, Levers(autocast="bfloat16")).allocations
    cast = made[made["size_bytes"] == 512 * 512 * 2]
    assert len(cast) == 1
    assert cast["death"].iloc[0] > made.loc[made["birth"] > cast["birth"].iloc[0], "birth"].max()


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_recomputed_dropout_is_forecast_on_a_gpu():
    """Backward computes the blocks again; what makes dropout a GPU's has to hold there, too."""
    one = Forecaster(Dropping(), torch.randn(32, 64), loss=loss, device="cuda")
    plain, again = (one.requested(one.size, Levers(checkpoint_every=every)) for every in (0, 1))
    mask = 32 * 64
    assert plain.retained["size_bytes"].to_list().count(mask) == 3
    assert mask not in again.retained["size_bytes"].to_list()
    made = again.allocations
    assert (made.loc[made["birth"] >= again.backward, "size_bytes"] == mask).sum() >= 3


def test_dropout_inside_of_torchs_own_layers_keeps_masks_of_one_byte():
    layer = nn.TransformerEncoderLayer(64, 2, 256, dropout=0.1, batch_first=True)
    one = Forecaster(layer, torch.randn(4, 16, 64), loss=loss, device="cuda")
    kept = one.requested(one.size, Levers()).retained["size_bytes"].to_list()
    assert kept.count(4 * 16 * 64) == 2
    assert 4 * 16 * 256 in kept
    assert not [size for size in kept if size == 4 * 2 * 16 * 16 * 4], "scores are not kept"


def test_dropout_in_place_has_no_mask_of_its_own_kind():
    """torch fuses dropout on a GPU where it is not in place."""
    model = nn.Sequential(nn.Linear(64, 256), nn.Dropout(0.5, inplace=True), nn.Linear(256, 8))
    one = Forecaster(model, torch.randn(128, 64), loss=loss, device="cuda")
    kept = one.requested(one.size, Levers()).retained["size_bytes"].to_list()
    assert 128 * 256 not in kept


def test_torch_is_left_as_it_was():
    before = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCPU")
    activations.forecast(Dropping(), torch.randn(8, 64), loss=loss, device="cuda", autocast="bfloat16")
    assert torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCPU") == before
    with torch.autocast("cpu", HALF):
        assert torch.exp(torch.ones(2, dtype=HALF)).dtype == HALF
    x = torch.ones(64, requires_grad=True)
    assert "Mul" in str(nn.functional.dropout(x, 0.5).grad_fn)


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, True), "SGD": (lambda p: torch.optim.SGD(p, momentum=0.9), False),
    "one by one": (lambda p: torch.optim.AdamW(p, foreach=False), False), "Adafactor": (torch.optim.Adafactor, False),
    "NAdam": (torch.optim.NAdam, True),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_temporaries_of_all_parameters_where_torch_updates_them_at_once(name):
    """AdamW takes the roots of all second moments at once; SGD with momentum updates at once and in place; Adafactor
    goes through the parameters unless it is told otherwise."""
    make, at_once = OPTIMIZERS[name]
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False, device="meta") for _ in range(8)))
    one = Forecaster(model, torch.randn(1, 512), loss=loss, optimizer=make, device="cuda")
    timeline = one.requested(one.size, Levers())
    start = timeline.segments[-1].first
    made = timeline.allocations
    most = timeline.levels()[-1, start:].max() - sum(one._workspaces)
    of_all = 8 * 512 * 512 * 4
    assert made[made["birth"] >= start]["size_bytes"].sum() > 0 or name == "SGD"
    assert (most >= of_all) == at_once, (most, of_all)


def test_torch_chooses_for_fake_parameters_of_a_gpu_as_for_real_ones():
    """A model on a GPU is replayed on fake tensors, for which torch would go through the parameters one by one."""
    from torch.optim.optimizer import _default_to_fused_or_foreach as chosen

    from effkit.activations.fake_step import updating_at_once

    with FakeTensorMode():
        parameters = [nn.Parameter(torch.empty(4, 4, device="cuda"))]
        assert chosen(parameters, False) == (False, False)
        with updating_at_once():
            assert chosen(parameters, False) == (False, True)
            assert chosen(parameters, True) == (False, False), "not where the update itself is differentiated"
        assert chosen(parameters, False) == (False, False)


@pytest.mark.parametrize(
    ("chip", "mib"),
    [("NVIDIA H100 80GB HBM3", 32), ("NVIDIA H200", 32), ("GH200", 32), ("NVIDIA B200", 32), ("GB300", 32),
     ("A800-SXM4-80GB", 8.125), ("Tesla V100-SXM2-16GB", 8.125), ("RTX PRO 6000 96GB", 8.125), ("L4", 8.125)],
)  # fmt: skip
def test_cublas_holds_a_workspace_for_each_thread_that_multiplies(chip, mib):
    """32 MiB on Hopper and Blackwell in data centres, 8 MiB and 128 KiB on others: two in training, one in forward."""
    model = nn.Linear(8, 8)
    totals = [activations.forecast(model, torch.randn(2, 8), loss=loss, device=chip, trains=trains).frame["value"]
              for trains in (True, False)]  # fmt: skip
    assert [total["workspace"] // (mib * 2**20) for total in totals] == [2, 1]


def test_a_chip_that_is_not_known_is_refused():
    for device in ("MI300X", "tpu", 3):
        with pytest.raises(ValueError, match="the name of an NVIDIA GPU such as"):
            activations.forecast(nn.Linear(8, 8), torch.randn(2, 8), loss=loss, device=device)


def test_a_forward_pass_alone_keeps_nothing_and_has_no_gradients():
    """By hand: parameters, the batch, and at most two outputs of a layer at a time."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    batch = torch.randn(64, 256)
    found = activations.forecast(model, batch, trains=False)
    assert found.title == "Peak memory of a forward pass"
    assert found.total == 4 * 256 * 256 * 4 + 3 * batch.nbytes
    assert set(found.frame.index) <= {"parameter", "input", "workspace"}
    with torch.no_grad():
        assert found.total == pytest.approx(activations.forecast(model, batch, trains=False, batch_size=64).total)
