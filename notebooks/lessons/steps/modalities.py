"""Experts grouped by modality, each choosing its tokens (MoMa, arXiv 2407.21770), on English and program source."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from effkit import models
from lessons import corpora, meter
from lessons.steps.distilling import adamw
from lessons.steps.language import Learning

LENGTH, BATCH = 64, 8  # letters of one row, half of each stream; rows
DESIGNS = ("dense", "grouped experts")
NUM_EXPERTS, HIDDEN = 4, 64  # of each stream; width of a token


class ChoosingExperts(nn.Module):
    """Experts that choose tokens, not tokens experts; each of the four of a stream takes a quarter of its tokens.

    So each token is computed once on average and a step costs what one dense feed-forward of that width costs, beside
    the router. Gates are sigmoids, as in MoMa. What an expert takes depends on the whole batch, later letters
    included; held-out data are routed by the score that was just enough in training, which looks at no other token (the
    paper trains auxiliary routers for that).

    Parameters
    ----------
    hidden, ffn
        Widths of the tokens and within an expert.
    """

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        num_experts = 2 * NUM_EXPERTS
        self.gate, self.up = (nn.Parameter(0.02 * torch.randn(num_experts, hidden, ffn)) for _ in range(2))
        self.down = nn.Parameter(0.02 * torch.randn(num_experts, ffn, hidden))
        self.router = nn.Linear(hidden, num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.register_buffer("enough", torch.zeros(num_experts))
        self.enough: torch.Tensor  # score of the last token that each expert took, a moving average
        self.is_second: torch.Tensor | None = None  # which tokens are of the second stream, shape (rows, letters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, letters, hidden) -> the same; a token that no expert takes gets 0."""
        tokens = x.flatten(0, -2)
        scores = self.router(tokens).sigmoid()
        output = torch.zeros_like(tokens)
        assert self.is_second is not None  # set by the model before its layers run
        for stream in (0, 1):
            members = (self.is_second.flatten() == bool(stream)).nonzero()[:, 0].to(x.device)
            chosen = range(stream * NUM_EXPERTS, (stream + 1) * NUM_EXPERTS)
            of_group = scores[members, chosen.start : chosen.stop].T  # (experts, tokens of the stream)
            if self.training:
                best, places = of_group.topk(-(-len(members) // NUM_EXPERTS), dim=-1)
                with torch.no_grad():
                    self.enough[chosen.start : chosen.stop].lerp_(best[:, -1], 0.1)
                taken = members[places]
                output = output.index_add(
                    0, taken.flatten(), (best[..., None] * self._compute(taken, tokens, chosen)).flatten(0, 1)
                )
            else:
                for row, expert in enumerate(chosen):
                    taken = members[of_group[row] >= self.enough[expert]]
                    gates = scores[taken, expert, None]
                    output = output.index_add(0, taken, gates * self._compute(taken[None], tokens, [expert])[0])
        return output.view_as(x)

    def _compute(self, taken: torch.Tensor, tokens: torch.Tensor, chosen: Iterable[int]) -> torch.Tensor:
        """(experts, capacity) positions of tokens -> (experts, capacity, hidden)."""
        at, which = tokens[taken], list(chosen)
        inner = functional.silu(torch.bmm(at, self.gate[which])) * torch.bmm(at, self.up[which])
        return torch.bmm(inner, self.down[which])


def model_of(design: str, *, seed: int = 0) -> Any:
    """A Llama (transformers) over both alphabets; 2 layers, feed-forward (of each expert too) of twice the width.

    Raises
    ------
    ValueError
        For another design than those of ``DESIGNS``.
    """
    if design not in DESIGNS:
        raise ValueError(f"the design is {design!r}, expected one of {', '.join(DESIGNS)}")
    model: Any = models.text(layers=2, hidden=HIDDEN, ffn=2 * HIDDEN, heads=2, vocabulary=2 * corpora.VOCABULARY,
                             max_input_cells=LENGTH, seed=seed)  # fmt: skip
    if design == "dense":
        return model
    layers = [ChoosingExperts(HIDDEN, 2 * HIDDEN).to(model.device) for _ in model.model.layers]
    for layer, experts in zip(model.model.layers, layers, strict=True):
        layer.mlp = experts

    def tell(_: Any, __: Any, keywords: dict[str, Any]) -> None:
        for experts in layers:
            experts.is_second = keywords["input_ids"] >= corpora.VOCABULARY

    model.register_forward_pre_hook(tell, with_kwargs=True)
    return model


@cache
def streams() -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Letters of English and of program source (the second alphabet is 128 further on), and held-out rows, (32, 64)."""
    both = [
        corpora.split(corpora.encode(text) + shift) for text, shift in ((corpora.english(), 0), (corpora.code(), 128))
    ]
    held = torch.cat([corpora.windows(ids, 32, LENGTH // 2) for _, ids in both], 1)
    return (both[0][0], both[1][0]), held


class TwoStreams(Learning):
    """Learning rows whose first half is English and whose second half is program source."""

    @torch.no_grad()
    def loss(self) -> float:
        """Held-out loss [nats per letter]."""
        self.model.eval()
        value = super().loss()
        self.model.train()
        return value


def learning_both(design: str, *, rate: float = 4e-3) -> Callable[[int], TwoStreams]:
    """A start for the meter: one design of feed-forward; 4e-3 was the best of {1, 2, 4} times 1e-3 for each of them."""

    def start(seed: int) -> TwoStreams:
        generator = meter.reproducible(seed)
        learn, held = streams()
        model = model_of(design, seed=seed)

        def draw() -> torch.Tensor:
            return torch.cat([corpora.windows(ids, BATCH, LENGTH // 2, generator) for ids in learn], 1)

        return TwoStreams(model, [adamw(model, rate)], draw, held, batch_size=BATCH)

    return start
