"""predict(): the step at another setting, without running it; whatif(): the same with sliders; the best degrees."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effkit.account import Account
from effkit.arguments import checked_number, checked_whole
from effkit.lab import Progress, banded, calibration_of
from effkit.moe import live, routing
from effkit.moe.calibration import Calibration
from effkit.moe.setting import COMPRESSIONS, MESSAGE_DTYPES, PLACEMENTS

if TYPE_CHECKING:
    from effkit.whatif import WhatIf

_MOST_CHUNKS = 8


def predict(base: Account, **setting: Any) -> Account:
    """The step at another setting, without running anything.

    Every rank's phases and exchanges are played through, with the costs that were fitted; bytes and token copies are
    counted exactly. ValueError for an unknown knob, a base without calibration, ranks that cannot share the experts, or
    a lever whose time was not measured.

    Parameters
    ----------
    base
        What :func:`measure` returned.
    setting
        Any field of :class:`Setting`; ``num_ranks``, ``ranks_per_node``; ``link_bytes_per_s``, the rate of the link
        between nodes, which is then assumed and not measured. The rest stays as it was measured.

    Returns
    -------
    Account
        In ns, with a band; communication, bytes and token copies are companions. ``in_range`` is False for more than
        the calibration has seen, levers or overlaps that it did not run, other ranks or another link: the band is
        wider there. At the measured setting: ``base`` itself.
    """
    calibration = calibration_of(base, Calibration, "moe")
    on: dict[str, Any] = {name: setting.pop(name) for name in live.ON if setting.get(name) is not None}
    wanted = calibration.setting.change(**setting)
    num_ranks = checked_whole("num_ranks", on.get("num_ranks", calibration.num_ranks), 1)
    as_measured = calibration.ranks_per_node if num_ranks == calibration.num_ranks else num_ranks
    per_node = checked_whole("ranks_per_node", on.get("ranks_per_node", as_measured), 1)
    link = float(checked_number("link_bytes_per_s", on.get("link_bytes_per_s", calibration.link_bytes_per_s)))
    if link and per_node == num_ranks and "ranks_per_node" not in on:
        per_node = 1  # a link between nodes: each rank is one, unless they are said to share
    on = {"num_ranks": num_ranks, "ranks_per_node": per_node, "link_bytes_per_s": link}
    full = wanted.plain() | on
    if full == dict(base.setting):
        return base
    calibration.knows(wanted)
    steps = calibration.steps(wanted, **on)
    anchor = calibration.anchor(wanted)
    same_link = link == calibration.link_bytes_per_s and per_node == calibration.ranks_per_node
    band_frac, in_range = calibration.band_at(wanted, on)
    traffic = [routing.traffic(wanted, num_ranks, n) for n in range(calibration.num_steps)]
    account = live.account_of(
        steps, anchor, wanted, [step.kept for step in traffic], [step.dropped for step in traffic],
        counted="the routing", basis="derived", assumed="derived" if same_link else "assumed",
        source=f"the costs of {len(calibration.settings)} measured settings", in_range=in_range, setting=full,
        calibration=calibration,
    )  # fmt: skip
    bands = zip(account.companions, (band_frac, 0.0, 0.0), strict=True)
    return replace(banded(account, band_frac), companions=tuple(banded(one, frac) for one, frac in bands))


def best_degrees(base: Account, most: int = _MOST_CHUNKS, **setting: Any) -> tuple[int, int]:
    """Into how many pieces to cut the exchange, forward and backward: the pair that :func:`predict` finds quickest.

    Each direction has a best degree of its own, for backward computes twice as much (FSMoE, 2501.10714, section 4); but
    where they differ, what forward has kept must be cut anew. So all pairs up to ``most`` are played through. Closed
    forms, for costs without waiting, are in the lesson on pipelining degrees.
    """
    degrees = range(1, most + 1)
    return min(
        itertools.product(degrees, degrees),
        key=lambda pair: predict(base, **setting, num_chunks=pair[0], num_chunks_backward=pair[1]).total,
    )


def whatif(base: Account, *, num_rounds: int = 3, timeout_s: float = 180.0) -> WhatIf:
    """Sliders over :func:`predict`; the button runs the setting on ranks of its own and shows the receipt.

    Levers appear when their time was measured.
    """
    from effkit.whatif import Choice, Slider, WhatIf

    calibration = calibration_of(base, Calibration, "moe")
    at = calibration.setting
    knobs: list[Slider | Choice] = [
        Slider("num_tokens", "Tokens per rank [count]", max(1, at.num_tokens // 4), 2 * at.num_tokens,
               max(1, at.num_tokens // 16), "Tokens of each rank in a step"),
        Slider("top_k", "Choices per token [count]", 1, min(4, at.num_experts // at.num_modalities), 1,
               "Experts that each token goes to"),
        Slider("capacity_factor", "Capacity [tenths]", 0, 30, 1,
               "What an expert takes of each rank, over its fair share; the rest is dropped. 0 drops none", scale=0.1),
        Slider("skew", "Skew of loads [tenths]", 0, 20, 1, "Zipf exponent of the experts' popularity", scale=0.1),
        Slider("num_chunks", "Pieces forward [count]", 1, _MOST_CHUNKS, 1, "The exchange is cut into, and overlaps"),
        Slider("num_chunks_backward", "Pieces backward [count]", 0, _MOST_CHUNKS, 1, "0: as many as forward"),
        *([] if isinstance(at.placement, tuple)
          else [Choice("placement", "Placement", PLACEMENTS, "Which rank holds which expert")]),
        Slider("num_replicas", "Replicas [experts]", 0, at.num_experts, calibration.num_ranks,
               "The most popular ones, held by every rank"),
    ]  # fmt: skip
    if any(setting.compress == "lsh" for setting in calibration.settings):
        knobs.append(Choice("compress", "Compression", COMPRESSIONS, "One centroid travels for tokens that are alike"))
    measured = {setting.message_dtype for setting in calibration.settings}
    dtypes = [name for name in MESSAGE_DTYPES if name in measured]
    if len(dtypes) > 1:
        knobs.append(Choice("message_dtype", "Messages", dtypes, "What rows are written in while they travel"))

    def run(progress: Progress, **setting: Any) -> Account:
        return live.beside(ranks, base, at.change(**setting), num_rounds=num_rounds, timeout_s=timeout_s,
                           progress=progress)  # fmt: skip

    ranks = live.ranks_of(calibration)  # they stay up from one press of the button to the next
    panel = WhatIf(base, predict, knobs, run)
    panel.observe(lambda _: ranks.close(), "comm")  # as it is closed
    return panel
