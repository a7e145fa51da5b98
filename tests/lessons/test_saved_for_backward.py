"""Bytes that autograd saves for backward."""

import torch
from torch.nn import functional

from lessons.saved_for_backward import saved_bytes


def test_saved_storages_count_once_and_what_is_known_does_not():
    weight, x = torch.ones(8, 8, requires_grad=True), torch.ones(4, 8)
    assert saved_bytes(lambda: (x @ weight).exp().sum(), [weight, x]) == 4 * 8 * 4, "the exponential's own output"
    assert saved_bytes(lambda: (x @ weight).exp().sum(), [weight]) == 2 * 4 * 8 * 4, "and x"
    y = torch.ones(4, 8, requires_grad=True)
    assert saved_bytes(lambda: y * y, []) == 4 * 8 * 4
    with torch.no_grad():
        assert saved_bytes(lambda: functional.gelu(y), []) == 4 * 8 * 4, "as if gradients were wanted"
