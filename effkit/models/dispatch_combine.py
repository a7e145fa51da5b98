"""Rows travel to their experts and back, in pieces that overlap with computing; so do their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.functional import gelu

from effkit.models.exchange import Exchange, Marks
from effkit.models.messages import form_of, pack, unpack

Pending = Callable[[], torch.Tensor]


class Layer(Protocol):
    """What the rows have to know of their layer; :class:`effkit.models.moe.ExpertParallel` says what each is."""

    exchange: Exchange
    marks: Marks
    held: list[list[int]]
    replicated: frozenset[int]
    degrees: tuple[int, int]
    message_dtype: str
    compress: str


class Chunk(NamedTuple):
    """One piece of the exchange, as one rank sees it.

    ``rows``: which of its own rows travel (None: all); ``sent`` and ``received``: rows to and from each rank;
    ``order``: the rows that arrive, sorted by expert; ``sizes``: how many each held expert gets; ``home``: their places
    among all rows that arrive in the step, sorted by expert, rank and row.
    """

    rows: torch.Tensor | None
    sent: list[int]
    received: list[int]
    order: torch.Tensor
    sizes: list[int]
    home: torch.Tensor


def chunks(counts: list[list[int]], layer: Layer, degree: int, device: torch.device) -> list[Chunk]:
    """Cut the rows of every rank and expert, ``counts[rank][expert]``, into ``degree`` pieces as equal as can be."""
    me, held = layer.exchange.rank, layer.held
    num_ranks = len(counts)

    def size(rank: int, to: int, expert: int) -> int:
        return counts[rank][expert] if rank == to or expert not in layer.replicated else 0

    sent = [(to, size(me, to, expert)) for to in range(num_ranks) for expert in held[to]]
    received = [size(rank, me, expert) for expert in held[me] for rank in range(num_ranks)]
    pieces = []
    for piece in range(degree):
        rows = _cut([num for _, num in sent], piece, degree)
        num_sent = [0] * num_ranks
        for (to, _), part in zip(sent, rows, strict=True):
            num_sent[to] += len(part)
        home = _cut(received, piece, degree)
        arriving = np.array([len(part) for part in home], dtype=int).reshape(len(held[me]), num_ranks)
        # they arrive sorted by rank, and the experts want them sorted by expert
        starts = (arriving.T.cumsum() - arriving.T.ravel()).reshape(arriving.T.shape).T
        order = [range(start, start + num) for start, num in zip(starts.flat, arriving.flat, strict=True)]
        pieces.append(Chunk(_index(rows, device) if degree > 1 else None, num_sent, arriving.sum(axis=0).tolist(),
                            _index(order, device), arriving.sum(axis=1).tolist(), _index(home, device)))  # fmt: skip
    return pieces


def _cut(sizes: Sequence[int], piece: int, degree: int) -> list[range]:
    """Which rows of each block are in this piece; blocks of such sizes lie one after another."""
    starts = itertools.accumulate(sizes, initial=0)
    return [range(start + piece * num // degree, start + (piece + 1) * num // degree)
            for start, num in zip(starts, sizes, strict=False)]  # fmt: skip


class Travel(torch.autograd.Function):
    """Answers [num_rows, H] of the experts to ``rows`` [num_rows, H], which are sorted by rank and expert.

    The gradients of the experts' weights are computed here by hand, so that forward and backward can be cut into
    different numbers of pieces.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, layer: Layer, counts: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        layer.marks.enter("dispatch")
        table = layer.exchange.counts(counts).tolist()
        first, second = layer.degrees
        layer.marks.enter("permute")
        pieces = chunks(table, layer, first, rows.device)
        ctx.layer, ctx.pieces = layer, pieces
        ctx.later = pieces if first == second else chunks(table, layer, second, rows.device)
        inner, outer = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        inputs, hiddens = [], []

        def experts(arrived: torch.Tensor, piece: Chunk) -> torch.Tensor:
            x = arrived[piece.order]
            answers, before = [], []
            for part, w1, w2 in zip(x.split(piece.sizes), inner, outer, strict=True):
                before.append(part @ w1)
                answers.append(gelu(before[-1]) @ w2)
            inputs.append(x)
            hiddens.append(torch.cat(before))
            return torch.empty_like(x).index_copy_(0, piece.order, torch.cat(answers))

        answers = _there_and_back(layer, rows, pieces, experts, forward=True)
        ctx.save_for_backward(*weights, *inputs, *hiddens)
        return answers

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, pieces, num = ctx.layer, ctx.later, len(ctx.pieces)
        saved = ctx.saved_tensors
        weights, inputs, hiddens = saved[: -2 * num], list(saved[-2 * num : -num]), list(saved[-num:])
        inner, outer = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        if pieces is not ctx.pieces:
            layer.marks.enter("permute")
            home = torch.cat([piece.home for piece in ctx.pieces])
            inputs, hiddens = _recut(inputs, home, pieces), _recut(hiddens, home, pieces)
        left = iter(zip(inputs, hiddens, strict=True))
        of_inner: list[Any] = [None] * len(inner)
        of_outer: list[Any] = [None] * len(outer)

        def experts(arrived: torch.Tensor, piece: Chunk) -> torch.Tensor:
            x, before = next(left)
            back = []
            parts = zip(arrived[piece.order].split(piece.sizes), x.split(piece.sizes), before.split(piece.sizes),
                        strict=True)  # fmt: skip
            for e, (grad, x_e, before_e) in enumerate(parts):
                _add(of_outer, e, gelu(before_e).T, grad)
                grad = torch.ops.aten.gelu_backward(grad @ outer[e].T, before_e)
                _add(of_inner, e, x_e.T, grad)
                back.append(grad @ inner[e].T)
            return torch.empty_like(x).index_copy_(0, piece.order, torch.cat(back))

        back = _there_and_back(layer, grads[0], pieces, experts, forward=False)
        if shared := [i for i, e in enumerate(layer.held[layer.exchange.rank]) if e in layer.replicated]:
            layer.marks.enter("replicas")
            layer.exchange.sum([grads_of[i] for grads_of in (of_inner, of_outer) for i in shared])
        layer.marks.enter("permute" if layer.compress == "none" else "compress")
        return (back, None, None, *of_inner, *of_outer)


def _there_and_back(
    layer: Layer, rows: torch.Tensor, pieces: Sequence[Chunk],
    experts: Callable[[torch.Tensor, Chunk], torch.Tensor], *, forward: bool,
) -> torch.Tensor:  # fmt: skip
    """Send the pieces off, let the experts work on each as it arrives, and send their answers back. Backward, the
    gradients of what the combine brought go first, by the way that the dispatch took."""
    marks, exchange = layer.marks, layer.exchange
    out, home = ("dispatch", "combine") if forward else ("combine", "dispatch")
    form, rest = (form_of(layer.message_dtype, forward=forward, out=side) for side in (True, False))
    overlap = len(pieces) > 1

    def send(rows: torch.Tensor, form: str, kind: str, sent: list[int], received: list[int]) -> Pending:
        if form != "same":
            marks.enter("compress")
        message = pack(rows, form)
        marks.enter(kind)
        return exchange.rows(message, sent, received, kind, overlap=overlap)

    def receive(pending: Pending, form: str, kind: str) -> torch.Tensor:
        marks.enter(kind)
        message = pending()
        if form != "same":
            marks.enter("compress")
        return unpack(message, form, rows.shape[1], rows.dtype)

    on_the_way = []
    for piece in pieces:
        if piece.rows is not None:
            marks.enter("permute")
        own = rows.contiguous() if piece.rows is None else rows[piece.rows]
        on_the_way.append(send(own, form, out, piece.sent, piece.received))
    returning = []
    for pending, piece in zip(on_the_way, pieces, strict=True):
        arrived = receive(pending, form, out)
        marks.enter("experts")
        answers = experts(arrived, piece)
        returning.append(send(answers, rest, home, piece.received, piece.sent))
    back = [receive(pending, rest, home) for pending in returning]
    if not overlap:
        return back[0]
    marks.enter("permute")
    own_rows = torch.cat([piece.rows for piece in pieces if piece.rows is not None])
    return torch.empty_like(rows).index_copy_(0, own_rows, torch.cat(back))


def _recut(parts: list[torch.Tensor], home: torch.Tensor, pieces: Sequence[Chunk]) -> list[torch.Tensor]:
    """What was computed in some pieces, in others."""
    whole = torch.cat(parts)
    whole = torch.empty_like(whole).index_copy_(0, home, whole)
    return [whole[piece.home] for piece in pieces]


def _add(sums: list[Any], e: int, left: torch.Tensor, right: torch.Tensor) -> None:
    sums[e] = left @ right if sums[e] is None else sums[e].addmm_(left, right)


def _index(ranges: Sequence[range], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(itertools.chain.from_iterable(ranges)), dtype=torch.int64).to(device)
