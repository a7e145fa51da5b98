"""A step on a cluster that is not here: the measured costs of computing, and links as they are assumed to be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from effkit.account import Account
from effkit.lab import calibration_of, interval
from effkit.moe import costs, routing
from effkit.moe.calibration import Calibration
from effkit.moe.live import COMMUNICATION, TIME
from effkit.moe.recorded import Array
from effkit.moe.setting import Setting
from effkit.trace.names import ITEM_BYTES

SIZES = (8, 16, 32, 64, 128, 256, 512)
BYTES = "Bytes that a rank sends to others in one step"
WAITING = "waiting for the most loaded rank"
BOOKKEEPING = "Tables of experts by ranks, beyond the measured ones"
_LINK_BAND_FRAC = 0.11  # the worst miss of the same formula on DeepEP's published table


class Level(NamedTuple):
    """Links of one kind: what an exchange takes at once, and what one rank (within a node) or one NIC sends."""

    alpha_ns: float
    bytes_per_s: float


@dataclass(frozen=True)
class _Expected:
    """Traffic as it is on average, in the form in which :func:`effkit.moe.costs.terms` reads it: all ranks alike."""

    kept: Array
    rows: Array
    arrived: Array
    rows_beside: float

    def held(self, rank: int) -> Array:
        return self.arrived

    def beside(self, rank: int) -> float:
        return self.rows_beside


def scale(
    base: Account, num_ranks: int, *, node_size: int = 8, intra: tuple[float, float] | None = None,
    inter: tuple[float, float] | None = None, num_nics_per_node: int = 0, overlap_frac: float | None = None,
    imbalance: float = 1.0, **changes: Any,
) -> Account:  # fmt: skip
    """A step of the measured layer on ``num_ranks`` ranks of a cluster: what is computed as measured, links as assumed.

    An exchange takes ``alpha + max(bytes to ranks of the node / intra, bytes to other nodes / inter)``, the formula
    that the lesson on DeepEP holds against a published table; what a rank keeps does not travel. Every rank sends every
    other the same, the expected bytes. Every rank has the tokens and the experts of a measured one, unless
    ``num_tokens`` or ``num_experts`` (over all ranks) are given. ValueError for a base without calibration, ranks that
    do not fill nodes or cannot share the experts, a link that was neither measured nor given, or numbers that cannot
    be.

    Parameters
    ----------
    base
        What :func:`effkit.moe.measure` returned.
    num_ranks, node_size
        Ranks in all, and of a node: less than one node, or whole ones.
    intra
        ``(alpha_ns, bytes_per_s)`` between ranks of a node, for each rank. None: as measured between the ranks here,
        all of whose bytes share one memory.
    inter
        ``(alpha_ns, bytes_per_s)`` of one NIC, each way; needed for more than one node.
    num_nics_per_node
        Shared equally by the node's ranks; 0: one for each.
    overlap_frac
        What part of the shorter of exchange and experts, forward and backward each, runs under the longer. None: what a
        pipeline of the setting's degree r could at best, ``1 - 1 / r``.
    imbalance
        Rows of the most loaded rank over the mean; its experts, and the exchanges with it, take that many times as
        long. 1: balanced.
    changes
        To the measured :class:`Setting`.

    Returns
    -------
    Account
        In ns, with rows as of a measured one. Computing is ``derived``; exchanges and waiting are ``assumed``. The band
        is that of the calibration on computing, and 11% on exchanges, if the links are as assumed. Never ``in_range``.
        Companions: communication exposed and hidden; bytes by level; and what is left out: this layer makes tables of
        experts by ranks in Python, and one made for hundreds of ranks would not. ``setting`` lists what was assumed.
    """
    calibration = calibration_of(base, Calibration, "moe")
    _check(num_ranks, node_size, num_nics_per_node, overlap_frac, imbalance, intra, inter)
    setting = _setting(calibration, num_ranks, changes)
    way = _way(calibration, num_ranks, node_size, intra, inter, num_nics_per_node)
    mean, most = (_computed(calibration, setting, num_ranks, load) for load in (1.0, imbalance))
    tables_ns, _ = (sum(phases.pop(BOOKKEEPING).values()) for phases in (mean, most))
    num_rows = _expected(calibration, setting, 1, num_ranks).rows[0, 0]
    moving, hidden, sent = _exchanged(setting, num_rows, way, overlap_frac, mean["experts"])
    moving_most, _, _ = _exchanged(setting, num_rows * imbalance, way, overlap_frac, most["experts"])
    rows: dict[str, float] = {name: sum(times.values()) for name, times in mean.items()}
    waiting = sum(sum(times.values()) for times in most.values()) - sum(rows.values())
    waiting += sum(moving_most.values()) - sum(moving.values())
    moving["dispatch"] += way.dur_ns(*way.split(costs.COUNT_BYTES * setting.num_experts * num_ranks))
    moving |= _replicas(setting, way)
    rows |= {f"{kind} moving": time_ns for kind, time_ns in moving.items()}
    if waiting > 0:
        rows[WAITING] = waiting
    whole = {name: round(time_ns) for name, time_ns in rows.items()}
    total = sum(whole.values())
    basis = {name: "assumed" if name == WAITING or name.endswith(" moving") else "derived" for name in whole}
    assumed = sum(time_ns for name, time_ns in whole.items() if basis[name] == "assumed")
    half_width = calibration.band_frac * (total - assumed) + _LINK_BAND_FRAC * assumed
    inter_alpha_ns, inter_bytes_per_s = inter or (None, None)
    return Account.of(
        TIME, "ns", whole, total=total, basis=basis, source=f"the costs measured on {calibration.num_ranks} ranks, and "
        f"links that are assumed, for {num_ranks} ranks", **interval(total, half_width), in_range=False,
        setting={**setting.plain(), "num_ranks": num_ranks, "node_size": node_size,
                 "intra_alpha_ns": way.fast.alpha_ns, "intra_bytes_per_s": way.fast.bytes_per_s,
                 "inter_alpha_ns": inter_alpha_ns, "inter_bytes_per_s": inter_bytes_per_s,
                 "num_nics_per_node": way.num_nics, "overlap_frac": overlap_frac,
                 "imbalance": imbalance},
        calibration=calibration, companions=_companions(moving, hidden, sent, round(tables_ns)),
    )  # fmt: skip


def _companions(
    exposed: dict[str, float], hidden: dict[str, float], sent: dict[str, float], tables_ns: int
) -> tuple[Account, ...]:
    times = {f"{kind} {word}": round(time_ns) for word, of_kinds in (("exposed", exposed), ("hidden", hidden))
             for kind, time_ns in of_kinds.items()}  # fmt: skip
    return (
        Account.of(COMMUNICATION, "ns", times, total=sum(times.values()), basis="assumed",
                   source="alpha and bytes over the assumed links"),
        Account.of(BYTES, "bytes", {name: round(size) for name, size in sent.items()}, basis="derived",
                   total=round(sum(sent.values())), source="the expected routing, rows alone"),
        Account.of(BOOKKEEPING, "ns", {"permute": tables_ns}, basis="derived", total=tables_ns,
                   source="experts times ranks; not in the step's time"),
    )  # fmt: skip


def scaling_table(
    base: Account, sizes: Sequence[int] = SIZES, *, node_size: int = 8, intra: tuple[float, float] | None = None,
    inter: tuple[float, float] | None = None, num_nics_per_node: int = 0, overlap_frac: float | None = None,
    imbalance: float = 1.0, **changes: Any,
) -> pd.DataFrame:  # fmt: skip
    """:func:`scale` at several numbers of ranks, a row per size; the other keywords are those of :func:`scale`.

    Indexed by ``num_ranks``: ``total_ns``, ``low_ns``, ``high_ns``; ``computing_ns``, ``moving_ns`` (exposed),
    ``waiting_ns``; ``hidden_ns``; ``moving_frac`` of the total; ``between_nodes_frac`` of the bytes that leave a rank;
    ``efficiency_frac``: tokens per second and rank, relative to the first size. ValueError as :func:`scale`.
    """
    rows = []
    for num_ranks in sizes:
        step = scale(
            base, num_ranks, node_size=node_size, intra=intra, inter=inter, num_nics_per_node=num_nics_per_node,
            overlap_frac=overlap_frac, imbalance=imbalance, **changes,
        )  # fmt: skip
        value, hidden = step.frame["value"], step.companion(COMMUNICATION).frame["value"]
        moving = int(value[value.index.str.endswith(" moving")].sum())
        waiting = int(value.get(WAITING, 0))
        rows.append({
            "num_ranks": num_ranks, "total_ns": step.total, "low_ns": step.low, "high_ns": step.high,
            "computing_ns": step.total - moving - waiting, "moving_ns": moving, "waiting_ns": waiting,
            "hidden_ns": int(hidden[hidden.index.str.endswith(" hidden")].sum()), "moving_frac": moving / step.total,
            "between_nodes_frac": float(step.companion(BYTES).share.get("to other nodes", 0.0)),
        })  # fmt: skip
    table = pd.DataFrame(rows).set_index("num_ranks")
    table["efficiency_frac"] = table["total_ns"].iloc[0] / table["total_ns"]
    return table


def _setting(calibration: Calibration, num_ranks: int, changes: dict[str, Any]) -> Setting:
    """The measured setting with as many experts on each rank; expected loads need no placement."""
    measured = calibration.setting
    per_rank = (measured.num_experts - measured.num_replicas) // calibration.num_ranks
    grown = {"num_experts": per_rank * num_ranks + measured.num_replicas, "placement": "block"}
    setting = measured.change(**(grown | changes))
    routing.owners(setting, num_ranks)
    calibration.knows(setting)
    return setting


def _expected(
    calibration: Calibration, setting: Setting, num_rows: int, num_ranks: int, load: float = 1.0
) -> _Expected:
    """What a rank of ``num_ranks`` sends and, with ``load`` times the mean, gets; ``num_rows`` ranks are listed."""
    asked = setting.num_tokens * setting.top_k
    capacity = routing.capacity(setting) * setting.num_experts
    kept = float(min(asked, capacity))
    rows = float(capacity) if setting.pad else kept
    if setting.compress == "lsh":  # centroids per copy, as in the measured routing
        measured = setting.change(num_experts=calibration.setting.num_experts)
        traffic = routing.traffic(measured, calibration.num_ranks, 0)
        rows *= float(traffic.rows.sum() / traffic.kept.sum())
    # replicas take their share of the rows of their own rank, all experts of a rank together what a rank sends
    single = (setting.num_experts - setting.num_replicas) // num_ranks
    arrived = np.full((1, single + setting.num_replicas), load * rows / (single + setting.num_replicas))
    beside = min(load, 1.0) * rows * (calibration.num_ranks - 1)  # what ranks share, they share as was measured
    return _Expected(np.full((1, 1), kept), np.full((num_rows, 1), rows), arrived, beside)


def _computed(calibration: Calibration, setting: Setting, num_ranks: int, load: float) -> dict[str, dict[bool, float]]:
    """Time of each phase, forward and backward [ns]."""
    times: dict[str, dict[bool, float]] = defaultdict(lambda: {True: 0.0, False: 0.0})
    traffics = [_expected(calibration, setting, num, num_ranks, load) for num in (1, 2)]
    anchor = calibration.anchor(setting)
    # the ranks for which as many tables would be made as were
    as_measured = calibration.setting.num_experts * calibration.num_ranks / setting.num_experts
    for key in calibration.costs.phases:
        forward, _, phase = key
        if (not forward and not setting.backward) or (phase == "replicas" and not setting.num_replicas):
            continue
        one, two = (anchor * calibration.costs.phase_ns(key, setting, traffic, 0) for traffic in traffics)  # type: ignore[arg-type]
        times[phase][forward] += one + (two - one) * (as_measured - 1)
        times[BOOKKEEPING][forward] += (two - one) * (num_ranks - as_measured)
    return times


class _Way(NamedTuple):
    """The links between ranks: ``fast`` in a node of ``within`` ranks, ``slow`` (a rank's share of NICs) beyond."""

    num_ranks: int
    within: int
    num_nics: int
    fast: Level
    slow: Level | None

    def split(self, size_bytes: float) -> tuple[float, float]:
        """Of what a rank has for all ranks, itself included: bytes to others of its node, and to other nodes."""
        inside, outside = self.within - 1, self.num_ranks - self.within
        return size_bytes * inside / self.num_ranks, size_bytes * outside / self.num_ranks

    def dur_ns(self, inside: float, outside: float, pieces: int = 1) -> float:
        """Alpha of the slowest link that is used, once per piece, and the slower of the two transfers."""
        if self.num_ranks == 1:
            return 0.0
        over_nic = outside / self.slow.bytes_per_s if self.slow else 0.0
        return (self.slow or self.fast).alpha_ns * pieces + max(inside / self.fast.bytes_per_s, over_nic) * 1e9


def _exchanged(
    setting: Setting, num_rows: float, way: _Way, overlap_frac: float | None, experts_ns: dict[bool, float]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Exchanges of a rank's rows, by kind: exposed and hidden [ns]; and by level: bytes."""
    exposed, hidden, sent = (defaultdict[str, float](float) for _ in range(3))
    for forward in (True, False) if setting.backward else (True,):
        degree = setting.degrees[0 if forward else 1]
        took = {}
        for out in (True, False):
            # forward the rows leave by the dispatch, backward their gradients by the combine's way
            kind = "dispatch" if out == forward else "combine"
            inside, outside = way.split(num_rows * costs.message_bytes(setting, forward=forward, out=out))
            took[kind] = way.dur_ns(inside, outside, degree)
            sent["within the node"] += inside
            sent["to other nodes"] += outside
        whole = sum(took.values())
        overlap = 1 - 1 / degree if overlap_frac is None else overlap_frac
        under = overlap * min(whole, experts_ns[forward])
        for kind, time_ns in took.items():
            share = under * time_ns / whole if whole else 0.0
            hidden[kind] += share
            exposed[kind] += time_ns - share
    return exposed, hidden, sent


def _way(
    calibration: Calibration, num_ranks: int, node_size: int, intra: tuple[float, float] | None,
    inter: tuple[float, float] | None, num_nics: int,
) -> _Way:  # fmt: skip
    within = min(node_size, num_ranks)
    if intra is None:
        alpha_ns, _, ns_per_byte, _ = (float(value) for value in calibration.costs.moving)
        if not ns_per_byte:
            raise ValueError("no exchange within a node was measured: give intra=(alpha_ns, bytes_per_s), or measure "
                             "with ranks that share a node")  # fmt: skip
        intra = alpha_ns, 1e9 / ns_per_byte / within
    if num_ranks > node_size and inter is None:
        raise ValueError(f"{num_ranks} ranks are {num_ranks // node_size} nodes of {node_size}: give inter=(alpha_ns, "
                         "bytes_per_s) of a NIC")  # fmt: skip
    num_nics = num_nics or within
    slow = Level(inter[0], inter[1] * num_nics / within) if inter and num_ranks > node_size else None
    return _Way(num_ranks, within, num_nics, Level(*intra), slow)


def _replicas(setting: Setting, way: _Way) -> dict[str, float]:
    """``replicas``: the time to sum their gradients over the ranks [ns]; {} where none are. A ring: every rank sends
    all but its own share, twice, to its neighbour; one rank of a node to the next node."""
    if not (setting.backward and setting.num_replicas and way.num_ranks > 1):
        return {}
    weights = 2 * setting.num_replicas * setting.hidden * setting.ffn * ITEM_BYTES[setting.dtype]
    ring = 2 * weights * (way.num_ranks - 1) / way.num_ranks
    return {"replicas": way.dur_ns(ring, ring * way.num_nics / way.within)}


def _check(
    num_ranks: int, node_size: int, num_nics: int, overlap_frac: float | None, imbalance: float, *levels: Any
) -> None:
    if node_size < 1 or num_ranks < 1 or (num_ranks > node_size and num_ranks % node_size):
        raise ValueError(f"num_ranks is at most node_size or a multiple of it; given: {num_ranks} and {node_size}")
    if num_nics < 0:
        raise ValueError(f"num_nics_per_node is at least 1, or 0 for one per rank; given: {num_nics}")
    if overlap_frac is not None and not 0 <= overlap_frac <= 1:
        raise ValueError(f"overlap_frac is from 0 to 1, or None; given: {overlap_frac}")
    if not imbalance >= 1:
        raise ValueError(f"imbalance is the most loaded rank's rows over the mean, 1 or more; given: {imbalance}")
    for level in levels:
        if level is not None and not (len(level) == 2 and level[0] >= 0 and level[1] > 0):
            raise ValueError(f"intra and inter are (alpha_ns, bytes_per_s), a time and a rate; given: {level}")
