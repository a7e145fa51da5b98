"""A toy detector with queries (DETR), trained with or without one-to-many heads on its encoder (Co-DETR)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lessons.generators.matching import one_to_many, one_to_one
from lessons.meter import reproducible

SIDE, PATCH, NUM_KINDS, NUM_OBJECTS, NUM_QUERIES = 12, 2, 2, 3, 8
BATCH = 16
NUM_PLACES = (SIDE // PATCH) ** 2
NOTHING_WEIGHT, BOX_WEIGHT = 0.2, 5.0


def scenes(num: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, shape (num, 12, 12), with three rectangles each; boxes, shape (num, 3, 4), and kinds, shape (num, 3).

    A rectangle is filled (kind 0) or an outline (kind 1), 3 to 6 pixels long. Boxes are centre x, y, width, height as
    fractions of the image.
    """
    size = torch.randint(3, 7, (num, NUM_OBJECTS, 2), generator=generator)
    corner = (torch.rand(num, NUM_OBJECTS, 2, generator=generator) * (SIDE - size + 1)).floor().long()
    kind = torch.randint(0, NUM_KINDS, (num, NUM_OBJECTS), generator=generator)
    pixel = torch.arange(SIDE)
    start, end = corner[..., None], (corner + size)[..., None]
    within = (pixel >= start) & (pixel < end)  # num, objects, (x, y), pixels
    edge = (pixel == start) | (pixel == end - 1)
    covered = within[:, :, 1, :, None] & within[:, :, 0, None, :]
    outline = covered & (edge[:, :, 1, :, None] | edge[:, :, 0, None, :])
    shape = torch.where((kind == 0)[..., None, None], covered, outline)
    image = shape.float().amax(1) + 0.1 * torch.randn(num, SIDE, SIDE, generator=generator)
    boxes = torch.cat([corner + size / 2, size.float()], -1) / SIDE
    return image, boxes, kind


class Attention(nn.Module):
    """Softmax attention with one head, and a feed-forward network after it; both residual, normalized before."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query, self.key_value = nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.before, self.between = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.feed = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, hidden))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Shape (batch, tokens, hidden); of the memory, or of itself."""
        normal = self.before(x)
        key, value = self.key_value(normal if memory is None else memory).chunk(2, -1)
        weights = (self.query(normal) @ key.mT / key.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out(weights @ value)
        return x + self.feed(self.between(x))


class Detector(nn.Module):
    """Patches, an encoder layer, and queries that look at what it made: kinds and boxes."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH * 9, hidden)  # a patch with a rim of its neighbours
        self.positions = nn.Parameter(torch.randn(NUM_PLACES, hidden) * 0.5)
        self.encoder = Attention(hidden)
        self.queries = nn.Parameter(torch.randn(NUM_QUERIES, hidden))
        self.decoder = nn.ModuleList([Attention(hidden), Attention(hidden)])
        self.kinds, self.boxes = nn.Linear(hidden, NUM_KINDS + 1), nn.Linear(hidden, 4)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """What the encoder makes of every place, shape (batch, places, hidden)."""
        pieces = F.unfold(images[:, None], 3 * PATCH, padding=PATCH, stride=PATCH).mT
        return self.encoder(self.patches(pieces) + self.positions)

    def decode(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the kinds and nothing, shape (batch, queries, 3), and boxes, shape (batch, queries, 4)."""
        x = self.queries.expand(len(memory), -1, -1)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.kinds(x), self.boxes(x).sigmoid()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, from images of shape (batch, 12, 12)."""
        return self.decode(self.encode(images))


def set_loss(predicted: tuple[torch.Tensor, torch.Tensor], true: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """DETR's loss in small: match one-to-one, then cross-entropy of all queries and L1 of the matched boxes, a scalar.

    Without DETR's overlap of boxes; distances are summed over a box's four numbers where boxes are matched, and
    averaged in the loss.

    Parameters
    ----------
    predicted
        Logits, shape (batch, queries, 3), and boxes, shape (batch, queries, 4).
    true, kinds
        Boxes, shape (batch, 3, 4), and kinds, shape (batch, 3).
    """
    logits, boxes = predicted
    with torch.no_grad():
        probability = logits.softmax(-1).gather(2, kinds[:, None].expand(-1, NUM_QUERIES, -1))
        distance = (boxes[:, :, None] - true[:, None]).abs().sum(-1)
        matched = one_to_one(BOX_WEIGHT * distance - probability)
    wanted = torch.full(logits.shape[:2], NUM_KINDS).scatter(1, matched, kinds)
    weights = torch.tensor([1.0] * NUM_KINDS + [NOTHING_WEIGHT])
    found = boxes.gather(1, matched[..., None].expand(-1, -1, 4))
    return F.cross_entropy(logits.mT, wanted, weights) + BOX_WEIGHT * F.l1_loss(found, true)


class DetectorTraining:
    """A detector that the meter drives; the loss it sees is always DETR's own, one-to-one, on held-out images.

    Parameters
    ----------
    seed
        Of everything.
    with_heads
        Also train a head on every place of the encoder, one-to-many (Co-DETR: Zong et al., arXiv 2211.12860), its loss
        added to the detector's. It is thrown away afterwards. The paper's second half, extra queries made from
        those positives, is left out.
    rate
        Learning rate of AdamW.
    """

    phase = "training"

    def __init__(self, seed: int, *, with_heads: bool, rate: float = 6e-3) -> None:
        self.generator = reproducible(seed)
        self.model = Detector()
        hidden = self.model.kinds.in_features
        self.head = nn.Linear(hidden, NUM_KINDS + 1 + 4) if with_heads else None
        parameters = [*self.model.parameters(), *(self.head.parameters() if self.head is not None else ())]
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True)
        self.num_tokens = BATCH  # an image is a token here
        self.held_out = scenes(256, torch.Generator().manual_seed(4321))
        place = (torch.arange(SIDE // PATCH) + 0.5) * PATCH / SIDE
        y, x = torch.meshgrid(place, place, indexing="ij")
        self.centres = torch.stack([x.flatten(), y.flatten()], 1)

    def head_loss(self, memory: torch.Tensor, true: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        """Of the one-to-many head: kinds everywhere, boxes (relative to the place) where there is one."""
        assert self.head is not None
        logits, offsets = self.head(memory).split([NUM_KINDS + 1, 4], -1)
        answers_for = one_to_many(self.centres, true)
        positive = answers_for >= 0
        index = answers_for.clamp(min=0)
        wanted = torch.where(positive, kinds.gather(1, index), NUM_KINDS)
        box = true.gather(1, index[..., None].expand(-1, -1, 4))
        predicted = torch.cat([self.centres + offsets[..., :2], offsets[..., 2:].sigmoid()], -1)
        return F.cross_entropy(logits.mT, wanted) + BOX_WEIGHT * F.l1_loss(predicted[positive], box[positive])

    def step(self) -> None:
        """One step of AdamW."""
        images, true, kinds = scenes(self.num_tokens, self.generator)
        memory = self.model.encode(images)
        loss = set_loss(self.model.decode(memory), true, kinds)
        if self.head is not None:
            loss = loss + self.head_loss(memory, true, kinds)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def loss(self) -> float:
        """DETR's loss on 256 held-out images."""
        images, true, kinds = self.held_out
        return float(set_loss(self.model(images), true, kinds))
