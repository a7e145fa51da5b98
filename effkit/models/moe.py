"""An expert-parallel mixture of experts: router, dispatch, experts, combine; forward and backward, on any ranks.

Rows travel to their experts and back in pieces that overlap with computing, and so do their gradients.
Shapes: N tokens of this rank, H hidden, F inner width of an expert, E experts in all, k choices per token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import gelu

from effkit.device import usual_device
from effkit.models import lsh
from effkit.models.building import check_counts
from effkit.models.exchange import Exchange, Marks
from effkit.models.messages import form_of, pack, unpack
from effkit.quantisation import GROUP

Pending = Callable[[], torch.Tensor]


class ExpertParallel(nn.Module):
    """A top-k mixture of experts whose experts lie on the ranks of a group.

    The weights depend on the seed and the expert alone, so that any number of ranks computes the same. ``marks`` say
    what the last step did when. Of the last forward pass on this rank, ``kept_counts`` and ``sent_counts`` are token
    copies kept, and rows sent, by expert [E], ``num_dropped`` the token copies that found their expert full.
    """

    place: torch.Tensor

    def __init__(
        self, hidden: int, ffn: int, num_experts: int, top_k: int, *, capacity_factor: float, pad: bool,
        num_chunks: int, num_chunks_backward: int, compress: str, num_hashes: int, compensate: bool, message_dtype: str,
        owner: Sequence[int] | None, group: Any, barriers: bool, device: str | None, dtype: torch.dtype | None,
        seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.degrees = (num_chunks, num_chunks_backward or num_chunks)
        check_counts(hidden=hidden, ffn=ffn, num_experts=num_experts, top_k=top_k, num_chunks=num_chunks,
                     num_chunks_backward=self.degrees[1], num_hashes=num_hashes)  # fmt: skip
        for wrong, sentence in (
            (top_k > num_experts, f"top_k is at most num_experts, {num_experts}; given: {top_k}"),
            (capacity_factor < 0, f"capacity_factor is at least 0; given: {capacity_factor}"),
            (compress not in ("none", "lsh"), f"compress is one of none, lsh; given: {compress!r}"),
            (num_hashes > lsh.MAX_HASHES, f"num_hashes is at most {lsh.MAX_HASHES}; given: {num_hashes}"),
            (pad and compress != "none", "pad sends messages of one size and compress makes them smaller: choose one"),
            (message_dtype not in ("same", "bfloat16", "float8"),
             f"message_dtype is one of same, bfloat16, float8; given: {message_dtype!r}"),
            (message_dtype == "float8" and hidden % GROUP,
             f"float8 messages have a scale per {GROUP} numbers: hidden is a multiple of {GROUP}; given: {hidden}"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(sentence)
        self.hidden, self.num_experts, self.top_k = hidden, num_experts, top_k
        self.capacity_factor, self.pad = capacity_factor, pad
        self.compress, self.num_hashes, self.compensate = compress, num_hashes, compensate
        self.message_dtype = message_dtype
        device, dtype = device or usual_device(), dtype or torch.float32
        num_ranks = torch.distributed.get_world_size(group) if group is not None else 1
        owner = _owners(owner, num_experts, num_ranks)
        self.marks = Marks(torch.device(device))
        self.exchange = Exchange(group, self.marks, barriers=barriers)
        me = self.exchange.rank
        #: experts that each rank holds, in the order in which rows for it are sorted; -1 is on every rank
        self.held = [[e for e, at in enumerate(owner) if at in (rank, -1)] for rank in range(num_ranks)]
        self.replicated = frozenset(e for e, at in enumerate(owner) if at == -1)
        # where each expert stands in the order of rows: rank by rank, replicated ones on our own
        at = torch.tensor([me if rank == -1 else rank for rank in owner])
        self.register_buffer("place", at.argsort(stable=True).argsort().to(device), persistent=False)
        self.gate = nn.Linear(hidden, num_experts, bias=False, device=device, dtype=dtype)
        self.inner = nn.ParameterDict()
        self.outer = nn.ParameterDict()
        draw = torch.Generator()
        with torch.no_grad():
            seed <<= 16  # seeds far apart: no expert of one is an expert of another
            gate = torch.randn(num_experts, hidden, generator=draw.manual_seed(seed))
            self.gate.weight.copy_(gate / math.sqrt(hidden))
            for e in self.held[me]:
                draw.manual_seed(seed + 1 + e)
                inner = torch.randn(hidden, ffn, generator=draw) / math.sqrt(hidden)
                outer = torch.randn(ffn, hidden, generator=draw) / math.sqrt(ffn)
                self.inner[str(e)] = nn.Parameter(inner.to(device, dtype))
                self.outer[str(e)] = nn.Parameter(outer.to(device, dtype))
        self.kept_counts = self.sent_counts = torch.zeros(num_experts, dtype=torch.int64)
        self.num_dropped = 0

    def forward(self, x: torch.Tensor, scores: torch.Tensor | None = None) -> torch.Tensor:
        """Each token's mixture of its experts' answers [N, H], in the dtype of the weights, under autocast too.

        ``x`` has shape [N, H] (ValueError for another). ``scores`` [N, E] choose the experts instead of the router's
        logits, which then weigh the chosen ones only.
        """
        if x.dim() != 2 or x.shape[1] != self.hidden:
            raise ValueError(f"x is tokens by hidden, [N, {self.hidden}]; given: {list(x.shape)}. Flatten other axes")
        # the gradients that are computed by hand know one dtype
        with torch.autocast(x.device.type, enabled=False):
            return self._mixture(x.to(self.gate.weight.dtype), scores)

    def _mixture(self, x: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
        marks = self.marks
        marks.clear()
        marks.enter("gate")
        x = _Enters.apply(x, marks, "")
        logits = self.gate(x)
        chosen = (logits if scores is None else scores).topk(self.top_k, dim=-1).indices  # [N, k]
        weight = logits.gather(1, chosen).softmax(-1)
        weight = _Enters.apply(weight, marks, "gate")
        token, slot, counts = self._sorted(chosen)

        marks.enter("permute")
        rows = x[token]
        if self.pad:
            rows = rows.new_zeros(self.num_experts * self._capacity(len(x)), self.hidden).index_copy(0, slot, rows)
        rows = _Enters.apply(rows, marks, "permute")
        sent, back, residual = rows, None, None
        if self.compress == "lsh":
            marks.enter("compress")
            bucket = lsh.buckets(x.detach(), lsh.directions(self.hidden, self.num_hashes, x.device))[token]
            # experts apart and in their order
            expert = torch.repeat_interleave(torch.arange(self.num_experts, device=x.device), counts)
            apart = expert * lsh.num_cells(self.num_hashes) + bucket
            sent, back = lsh.centroids(rows, apart)
            residual = rows - sent[back] if self.compensate else None
            of_sent = expert.new_empty(len(sent)).index_copy_(0, back, expert)
            counts = torch.bincount(of_sent, minlength=self.num_experts)
            sent = _Enters.apply(sent, marks, "compress")

        self.sent_counts = counts[self.place].cpu()
        mine = [str(e) for e in self.held[self.exchange.rank]]
        weights = [self.inner[e] for e in mine] + [self.outer[e] for e in mine]
        answers = Travel.apply(sent, self, counts[self.place], *weights)

        if back is not None:
            marks.enter("compress")
            answers = answers[back] if residual is None else answers[back] + residual
            answers = _Enters.apply(answers, marks, "compress")
        marks.enter("unpermute")
        if self.pad:
            answers = answers[slot]
        weighed = answers * weight.T.reshape(-1)[self._order][:, None]
        y = torch.zeros_like(x).index_add(0, token, weighed)
        marks.leave()
        return y

    def random_batch(self, num_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """``x`` [N, H], normal."""
        check_counts(num_tokens=num_tokens)
        x = torch.randn(num_tokens, self.hidden, generator=torch.Generator().manual_seed(seed))
        return {"x": x.to(self.gate.weight)}

    def _capacity(self, num_tokens: int) -> int:
        most = math.ceil(self.capacity_factor * self.top_k * num_tokens / self.num_experts)
        return most if self.capacity_factor else num_tokens

    def _sorted(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token of each kept copy in the order of places, its row among full capacities, and rows per place [E]. First
        choices come before second ones (GShard), so that these are dropped first."""
        num_tokens = len(chosen)
        place = self.place[chosen.T.reshape(-1)]  # [k * N]
        order = place.argsort(stable=True)
        counts = torch.bincount(place, minlength=self.num_experts)
        most = self._capacity(num_tokens)
        sorted_place = place[order]
        position = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[sorted_place]
        fits = position < most
        if self.capacity_factor:
            order, sorted_place, position = order[fits], sorted_place[fits], position[fits]
        self._order = order
        kept = counts.clamp(max=most)
        self.num_dropped = len(place) - len(order)
        self.kept_counts = kept[self.place].cpu()
        return order % num_tokens, sorted_place * most + position, torch.full_like(kept, most) if self.pad else kept


class _Enters(torch.autograd.Function):
    """Identity, whose backward begins a phase; the empty one ends the phase before."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, marks: Marks, phase: str) -> torch.Tensor:
        ctx.marks, ctx.phase = marks, phase
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        if ctx.phase:
            ctx.marks.enter(ctx.phase)
        else:
            ctx.marks.leave()
        return grads[0], None, None


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


def chunks(counts: list[list[int]], layer: ExpertParallel, degree: int, device: torch.device) -> list[Chunk]:
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
        ctx: Any, rows: torch.Tensor, layer: ExpertParallel, counts: torch.Tensor, *weights: torch.Tensor
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
    layer: ExpertParallel, rows: torch.Tensor, pieces: Sequence[Chunk],
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


def _owners(owner: Sequence[int] | None, num_experts: int, num_ranks: int) -> Sequence[int]:
    """The rank of each expert, -1 for all: as given, or equal shares of neighbours."""
    if owner is None:
        if num_experts % num_ranks:
            raise ValueError(f"{num_experts} experts cannot be shared equally by {num_ranks} ranks")
        owner = [e * num_ranks // num_experts for e in range(num_experts)]
    if len(owner) != num_experts or not all(-1 <= rank < num_ranks for rank in owner):
        raise ValueError(f"owner names a rank, 0 to {num_ranks - 1}, or -1 for each of the {num_experts} experts; "
                         f"given: {list(owner)}")  # fmt: skip
    if idle := sorted(set(range(num_ranks)) - set(owner)) if -1 not in owner else []:
        raise ValueError(f"every rank holds an expert; owner gives none to rank {', '.join(map(str, idle))}")
    return owner
