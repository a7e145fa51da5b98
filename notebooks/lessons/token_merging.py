"""Merging the tokens of an encoder that are most alike, so that the layers behind have fewer of them.

Bipartite soft matching as in token merging (ToMe, arXiv 2210.09461), at one layer, as patches are summarised in BUS
(arXiv 2307.08504). PYRA's modulation before merging (arXiv 2403.09192), which is learned, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from effkit import models
from effkit.decoder.module_roles import like_layers
from effkit.restoring import unchanged
from effkit.timing import interleaved_ns
from effkit.training import forward, own_loss
from lessons.saved_for_backward import saved_bytes


def merge_tokens(
    tokens: torch.Tensor, keep: int, size: torch.Tensor | None = None, *, protect_first: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the most alike tokens until ``keep`` are left.

    In each round the tokens at even places each choose the most alike, by cosine, of those at odd places; the pairs
    that are most alike merge into the average, weighted by ``size``, which stays at the odd place. A round can take
    away half the tokens, so there are several if ``keep`` is below N / 2. Order is kept. Gradients flow through the
    averages, not through the choice.

    Parameters
    ----------
    tokens
        [B, N, H].
    keep
        How many of the N are left.
    size
        [B, N]: of how many tokens each is the average already; ones for None.
    protect_first
        Leave the first token alone, which may be a class token; others do not merge into it either.

    Returns
    -------
    tuple
        Tokens [B, keep, H] and their sizes [B, keep]. The sum of size x token is that before, to rounding.

    Raises
    ------
    ValueError
        When keep is not from 1 (2 with ``protect_first``, where N is above 1) to N, or size has another shape.

    Examples
    --------
    >>> merged, size = merge_tokens(torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.5, 0.5]]]), keep=3)
    >>> merged.tolist(), size.tolist()
    ([[[1.5, 0.0], [0.0, 1.0], [0.5, 0.5]]], [[2.0, 1.0, 1.0]])
    """
    batch, length, _ = tokens.shape
    least = min(length, 2 if protect_first else 1)
    if not least <= keep <= length:
        raise ValueError(f"keep is from {least} to the {length} tokens there are; given: {keep}")
    if size is None:
        size = tokens.new_ones(batch, length)
    if size.shape != (batch, length):
        raise ValueError(f"size is one number per token, {(batch, length)}; given: {tuple(size.shape)}")
    while tokens.shape[1] > keep:
        place, left = _places(tokens.detach(), keep, protect_first)
        weighted = tokens * size[..., None]
        size = size.new_zeros(batch, left).scatter_add(1, place, size)
        sums = torch.zeros_like(weighted[:, :left]).scatter_add(1, place[..., None].expand_as(weighted), weighted)
        tokens = sums / size[..., None]
    return tokens, size


@torch.no_grad()
def _places(tokens: torch.Tensor, keep: int, protect_first: bool) -> tuple[torch.Tensor, int]:
    """Where each token goes in a round [B, N], and how many places there are after it."""
    batch, length, _ = tokens.shape
    unit = functional.normalize(tokens.float(), dim=-1)
    alike = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if protect_first:
        alike[:, 0] = -torch.inf
    num = min(length - keep, alike.shape[1] - protect_first)
    best, partner = alike.max(dim=-1)
    leaving = best.argsort(dim=1, descending=True, stable=True)[:, :num]
    stays = torch.ones(batch, length, dtype=torch.bool, device=tokens.device).scatter(1, 2 * leaving, False)
    joins = torch.arange(length, device=tokens.device).repeat(batch, 1)
    joins = joins.scatter(1, 2 * leaving, 2 * partner.gather(1, leaving) + 1)
    return (stays.cumsum(dim=1) - 1).gather(1, joins), length - num


@contextmanager
def merged(
    model: nn.Module, keep_frac: float, layer: int = 0, *, protect_first: bool = True, proportional: bool = False
) -> Iterator[None]:
    """Within this context an encoder merges its tokens before one of its layers; the model's code is unchanged.

    ::

        with merged(model, keep_frac=0.5, layer=1):
            model(**batch).loss.backward()

    Parameters
    ----------
    model
        A :func:`effkit.models.vision` or another model of transformers whose layers are one list, and take hidden
        states [B, N, H] first and a mask second. What reads the class token alone, as a classifier does, can follow;
        what needs each patch in its place cannot.
    keep_frac
        Of the tokens, without the protected one, which is kept on top; above 0. At 1 nothing is changed.
    layer
        Before which layer, counted from 0.
    protect_first
        Leave the class token alone.
    proportional
        Add log(size) to the scores of a merged token from this layer on, so that it weighs as much as those it stands
        for: then equal tokens merge without any change of the output. The mask that this takes can cost the fused
        kernel of attention.

    Raises
    ------
    ValueError
        When the model has no list of layers or not this one, keep_frac is not above 0 and at most 1, or, from the
        forward, when there is an attention mask, which knows nothing of merged tokens.
    """
    layers = _layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer is from 0 to {len(layers) - 1}; given: {layer}")
    if not 0 < keep_frac <= 1:
        raise ValueError(f"keep_frac is above 0 and at most 1; given: {keep_frac}")
    seen: list[torch.Tensor | None] = [None]  # log(size) as a mask, from the layer that merges to those behind

    def merge(_: nn.Module, args: Any) -> Any:
        if not args:
            raise ValueError(
                "a layer is called with its hidden states first; call merge_tokens() in the forward instead"
            )
        hidden, *rest = args
        if rest and rest[0] is not None:
            raise ValueError("tokens merge only where no attention mask is given; leave the mask out")
        num = hidden.shape[1] - protect_first
        hidden, size = merge_tokens(hidden, max(1, round(keep_frac * num)) + protect_first, protect_first=protect_first)
        seen[0] = size.log()[:, None, None, :]
        return (hidden, *rest)

    def weigh(_: nn.Module, args: Any) -> Any:
        return (args[0], seen[0], *args[2:])

    with ExitStack() as stack:
        if keep_frac < 1:
            stack.callback(layers[layer].register_forward_pre_hook(merge).remove)
            for behind in layers[layer:] if proportional else ():
                stack.callback(behind.register_forward_pre_hook(weigh).remove)
        yield


def _layers(model: nn.Module) -> nn.ModuleList:
    if (found := like_layers(model)) is None:
        raise ValueError(
            f"found no list of layers in {type(model).__name__}: merge_tokens() can be called in its forward"
        )
    return found


def closed_form_frac(
    keep_frac: float, layer: int, layers: int, num_tokens: int, hidden: int, heads: int, *, attention: str = "sdpa"
) -> float:
    """Saved activations of an encoder that merges before ``layer``, over those of one that does not.

    A layer keeps 16 N D + h N² values (N tokens, D channels, h heads, an MLP of 4 D; DeiT's as in Mesa, arXiv
    2111.11124), or, where attention is fused and stores one number per query instead of all scores, 16 N D + h N.

    Parameters
    ----------
    keep_frac
        Of the patches, that is of num_tokens - 1: the class token stays.
    layer, layers
        ``layer`` of the ``layers`` have all tokens.
    attention
        ``"sdpa"`` or ``"eager"``.

    Examples
    --------
    >>> round(closed_form_frac(0.5, 1, 4, 257, 128, 4), 3)
    0.626
    """
    if attention not in ("eager", "sdpa"):
        raise ValueError(f"attention is eager or sdpa; given: {attention!r}")

    def kept(num: int) -> int:
        return 16 * num * hidden + heads * num * (num if attention == "eager" else 1)

    fewer = 1 + max(1, round(keep_frac * (num_tokens - 1)))
    return (layer * kept(num_tokens) + (layers - layer) * kept(fewer)) / (layers * kept(num_tokens))


def kept_ratios(
    ratios: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
    *,
    layer: int = 1,
    batch: int = 4,
    repeats: int = 3,
    attention: str = "sdpa",
    seed: int = 0,
    **model: Any,
) -> pd.DataFrame:
    """Time and saved bytes of a vision transformer's step by the fraction of tokens that it keeps.

    The closed form is for layers with an MLP of 4 x hidden and without dropout. It leaves out the last
    norm, which shrinks too and counts where few layers do, what does not shrink (patches, classifier), and what is
    small (norms' statistics, the merge itself). It does not hold, and
    ``saved_frac`` is the truth, for other widths of the MLP (``ffn``), with dropout, where ``"sdpa"`` falls back to
    stored scores, and for the peak of a step, which has gradients and temporary tensors too.

    Parameters
    ----------
    ratios
        ``keep_frac`` of :func:`merged`; saved bytes are relative to 1, which is measured also where it is not asked
        for.
    layer
        Before which layer tokens merge.
    batch
        Images of a step.
    repeats
        Steps of each, run in turn.
    attention
        ``"sdpa"`` or ``"eager"``.
    **model
        Of :func:`effkit.models.vision`; 64 x 64 pixels in patches of 4, that is 257 tokens, unless given.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``keep_frac``. ``step_ns``: median of a forward and backward; ``saved_bytes``: storages that autograd
        keeps, each once, without parameters and inputs; ``saved_frac``: those over those at 1; ``closed_form_frac``:
        the same by :func:`closed_form_frac`.

    Raises
    ------
    ValueError
        For a layer that the model does not have, a ratio not above 0 and at most 1, or repeats below 1.
    """
    size: dict[str, Any] = {"image": 64, "patch": 4, **model}
    with torch.random.fork_rng():
        vision = models.vision(attention=attention, seed=seed, **size)
    images = vision.random_batch(batch, seed)
    its: Any = vision.config
    num_tokens = (its.image_size // its.patch_size) ** 2 + 1
    known = [*vision.parameters(), *images.values()]

    def loss(keep_frac: float) -> torch.Tensor:
        with merged(vision, keep_frac, layer):
            return own_loss(forward(vision, images))

    def step(keep_frac: float) -> None:
        vision.zero_grad()
        loss(keep_frac).backward()

    with unchanged(vision), torch.enable_grad():
        times = interleaved_ns({keep_frac: partial(step, keep_frac) for keep_frac in ratios}, repeats)
        saved = {keep_frac: saved_bytes(partial(loss, keep_frac), known) for keep_frac in {1.0, *ratios}}
    return pd.DataFrame(
        {
            "step_ns": [times[keep_frac] for keep_frac in ratios],
            "saved_bytes": [saved[keep_frac] for keep_frac in ratios],
            "saved_frac": [saved[keep_frac] / saved[1.0] for keep_frac in ratios],
            "closed_form_frac": [
                closed_form_frac(keep_frac, layer, its.num_hidden_layers, num_tokens, its.hidden_size,
                                 its.num_attention_heads, attention=attention)
                for keep_frac in ratios
            ],
        },
        index=pd.Index(list(ratios), name="keep_frac"),
    )  # fmt: skip
