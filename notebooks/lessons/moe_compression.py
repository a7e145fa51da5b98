"""What the lossy levers of a setting do to the layer's output and gradients, before training."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch

from effkit.moe import routing
from effkit.moe.costs import message_bytes
from effkit.moe.setting import Setting

NUM_CLUSTERS = 64  # where a setting has none
_LOSSLESS: dict[str, Any] = {"compress": "none", "message_dtype": "same", "capacity_factor": 0.0, "pad": False}


def output_error(setting: Setting | None = None, **changes: Any) -> pd.DataFrame:
    """The error that the lossy levers of a setting make together, on clustered and on random tokens.

    The levers are ``compress`` with ``compensate``, ``message_dtype``, and the tokens that ``capacity_factor`` drops.
    The layer with them is compared to the layer without any: same weights, tokens and routing. It runs in this process
    alone, on the tokens that rank 0 has in its first step; the ranks of a run have the same weights, and messages are
    packed and unpacked here as they are there.

    The gradient that comes from above is a random linear function of the token, so that tokens that are alike have
    gradients that are alike. LSH hands every token of a bucket the mean of their gradients: where m tokens of a bucket
    have independent ones, the error of the input's gradient is near sqrt(1 - 1 / m) instead. ValueError for a change
    that no setting has or allows.

    Parameters
    ----------
    setting
        ``Setting()`` unless given.
    **changes
        To the setting, such as ``compress="lsh"``.

    Returns
    -------
    pandas.DataFrame
        Rows ``clustered`` (the setting's clusters, 64 if it has none) and ``random``. ``output_error_frac``,
        ``input_gradient_error_frac``, ``weight_gradient_error_frac`` (all weights as one vector): the L2 norm of the
        difference over that of the exact one; the gradients are nan without a backward pass. ``sent_frac``: rows sent
        over token copies kept; ``bytes_frac``: bytes of the messages over those of the lossless layer, over all
        exchanges (dispatch and combine, forward and backward).

    Examples
    --------
    >>> output_error(num_tokens=64, hidden=16, ffn=16, message_dtype="bfloat16")["bytes_frac"].tolist()
    [0.5, 0.5]
    """
    setting = (setting or Setting()).change(**changes).change(num_chunks=1, num_chunks_backward=0, num_replicas=0)
    rows = {}
    for name, num_clusters in (("clustered", setting.num_clusters or NUM_CLUSTERS), ("random", 0)):
        of_tokens = setting.change(num_clusters=num_clusters)
        lossy, exact = _Step(of_tokens), _Step(of_tokens.change(**_LOSSLESS))
        errors = {f"{part}_error_frac": relative_error(getattr(lossy, part), getattr(exact, part))
                  for part in ("output", "input_gradient", "weight_gradient")}  # fmt: skip
        rows[name] = {**errors, "sent_frac": lossy.num_sent / lossy.num_kept,
                      "bytes_frac": lossy.size_bytes / exact.size_bytes}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("tokens")


class _Step:
    """One step of the layer of a setting, in this process, and what it sent."""

    def __init__(self, setting: Setting) -> None:
        layer = setting.layer()
        x = torch.from_numpy(routing.tokens(setting, 0, 0)).to(layer.gate.weight).requires_grad_(setting.backward)
        scores = torch.from_numpy(routing.scores(setting, 0, 0)).to(x.device)
        with torch.set_grad_enabled(setting.backward):
            output = layer(x, scores)
        self.output = output.detach()
        self.input_gradient = self.weight_gradient = None
        if setting.backward:
            draw = np.random.default_rng([setting.seed, 5]).standard_normal((setting.hidden, setting.hidden))
            above = x.detach() @ torch.from_numpy(draw / math.sqrt(setting.hidden)).to(x)
            grads = torch.autograd.grad(output, [x, *layer.parameters()], above)
            self.input_gradient = grads[0]
            self.weight_gradient = torch.cat([grad.reshape(-1) for grad in grads[1:]])
        self.num_sent, self.num_kept = int(layer.sent_counts.sum()), int(layer.kept_counts.sum())
        ways = product((True, False) if setting.backward else (True,), (True, False))
        self.size_bytes = self.num_sent * sum(message_bytes(setting, forward=way, out=out) for way, out in ways)


def relative_error(lossy: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    """Relative L2 error; nan where there is nothing to compare."""
    if lossy is None or exact is None:
        return math.nan
    return float((lossy.double() - exact.double()).norm() / exact.double().norm())
