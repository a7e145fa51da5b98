"""Fake tensors are like real ones in what a step's memory depends on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode

from effkit.activations.fake_tensors import Valued

pytestmark = pytest.mark.usefixtures("one_thread")


class Distance(nn.Module):
    def __init__(self, distance):
        super().__init__()
        self.distance = distance

    def forward(self, x):
        return self.distance(x, torch.zeros(x.shape))


LAID_OUT = {
    "batch norm of sequences": (lambda: nn.BatchNorm1d(5), lambda: torch.randn(6, 8, 5).transpose(1, 2)),
    "batch norm of columns": (lambda: nn.BatchNorm1d(8), lambda: torch.randn(8, 6).t()),
    "batch norm of images on their side": (
        lambda: nn.BatchNorm2d(6), lambda: torch.randn(4, 8, 6, 8).permute(0, 2, 3, 1)),
    "channels last": (lambda: nn.BatchNorm2d(6), lambda: torch.randn(4, 8, 8, 6).permute(0, 3, 1, 2)),
    "reflected edges": (lambda: nn.ReflectionPad2d(1), lambda: torch.randn(4, 8, 8, 6).permute(0, 3, 1, 2)),
    "log sigmoid": (nn.LogSigmoid, lambda: torch.randn(6, 8, 5).transpose(1, 2)),
    "mean square": (lambda: Distance(nn.MSELoss()), lambda: torch.randn(6, 8, 5).transpose(1, 2)),
    "smooth distance": (lambda: Distance(nn.SmoothL1Loss()), lambda: torch.randn(6, 8, 5).transpose(1, 2)),
    "Huber's distance": (lambda: Distance(nn.HuberLoss()), lambda: torch.randn(6, 8, 5).transpose(1, 2)),
}  # fmt: skip


def strides(module, inputs):
    output = module(inputs)
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs)
    return output.stride(), gradient.stride()


@pytest.mark.parametrize("name", LAID_OUT)
def test_a_fake_lies_in_memory_as_a_real_tensor_does(name):
    """What comes next copies, or shows a view, depending on it."""
    build, make = LAID_OUT[name]
    inputs, mode = make(), Valued()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(build())
    given = mode.valued(inputs).requires_grad_()
    with mode:
        found = strides(fake, given)
    assert found == strides(build(), inputs.requires_grad_())
