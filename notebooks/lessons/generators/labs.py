"""The mini-labs of 06b: generators, a detector and networks of several widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd

from lessons import meter
from lessons.generators import detecting, expert_denoisers, flow_networks, flows, sampling_windows, supernets
from lessons.generators.alignment import AlignedTraining
from lessons.minilabs import Arm, MiniLab, ratio, to_target

FLOWS = to_target(
    "REPA and ERW", "steps to a held-out flow loss of 1.06",
    lambda: {"plain": flows.FlowTraining, "REPA": AlignedTraining, "ERW": partial(AlignedTraining, warm_up_steps=50)},
    1.06,
    {"REPA": ("plain", "REPA, encoder not counted"), "ERW": ("REPA, encoder not counted", "ERW, encoder not counted")},
    every=10, max_steps=700,
    without={
        "REPA, encoder not counted": ("REPA", "encoder"),
        "ERW, encoder not counted": ("ERW", "encoder"),
        "ERW, warm-up not counted either": ("ERW, encoder not counted", "warm-up"),
    },
)  # fmt: skip

DETECTOR = to_target(
    "Co-DETR", "steps to a held-out set loss of 1.1",
    lambda: {
        "one-to-one": partial(detecting.DetectorTraining, with_heads=False),
        "with a head": partial(detecting.DetectorTraining, with_heads=True),
    },
    1.1, {"Co-DETR": ("one-to-one", "with a head")}, every=10, max_steps=600,
)  # fmt: skip

BUDGETS = {4: 24, 14: round(24 * sampling_windows.iteration_flops(25, 4) / sampling_windows.iteration_flops(25, 14))}


def _rewards(seed: int) -> pd.Series[float]:
    """Mean reward by window, at the same FLOPs."""
    return pd.Series(
        {f"window {w}": sampling_windows.rewarded(w, iterations=n, seeds=(seed,)).iloc[0] for w, n in BUDGETS.items()}
    )


MIXGRPO = MiniLab(
    "MixGRPO", "mean reward at equal FLOPs", "", _rewards,
    lambda rewards: {name: Arm(rewards[name], n) for name, n in zip(rewards.index, BUDGETS.values(), strict=True)},
    {},
)  # fmt: skip


def _by_interval(table: pd.DataFrame) -> dict[str, Arm]:
    losses = table.droplevel("seed")
    return {
        f"{interval}, {way}": Arm(float(losses.loc[interval, way]), 600)
        for interval in losses.index
        for way in ("shared", "experts")
    }


EDIFF = MiniLab(
    "eDiff-I", "held-out loss at equal training FLOPs", "", lambda seed: expert_denoisers.branched(seeds=(seed,)),
    _by_interval, {"eDiff-I": ratio("all times, shared", "all times, experts")},
)  # fmt: skip

WORLDS: Mapping[str, tuple[Callable[[], flow_networks.World], float]] = {
    "sets": (flow_networks.sets, 0.1),
    "grid": (flow_networks.hypergrid, 0.25),
}
RATES = {("sets", False): 1e-2, ("sets", True): 2e-2, ("grid", False): 2e-2, ("grid", True): 2e-2}


def _walks(seed: int) -> dict[str, meter.ToTarget]:
    """Each world's two trainings, to the L1 distance that is its target."""
    ways = {}
    for name, (make, target) in WORLDS.items():
        world = make()
        for ahead in (False, True):
            start = partial(
                flow_networks.FlowNetworkTraining, world=world, forward_looking=ahead, rate=RATES[name, ahead]
            )
            arm = f"{name}, {'forward-looking' if ahead else 'detailed balance'}"
            ways[arm] = meter.to_target(start, target, seeds=(seed,), max_steps=500)
    return ways


def _steps(ways: Mapping[str, meter.ToTarget]) -> dict[str, Arm]:
    steps = {arm: int(way.runs["num_steps"].sum()) for arm, way in ways.items()}
    return {arm: Arm(num, num) for arm, num in steps.items()}


WALKS = MiniLab(
    "FL-GFlowNets", "steps to an L1 distance of 0.1 on sets, 0.25 on the grid", "steps", _walks, _steps,
    {"FL-GFlowNets": ratio("sets, detailed balance", "sets, forward-looking")},
)  # fmt: skip

SUPERNETS = MiniLab(
    "Mixture-of-Supernets", "held-out loss, mean over four widths", "nats",
    lambda seed: supernets.gaps(seeds=(seed,)),
    lambda table: {way: Arm(float(loss), 400) for way, loss in table.mean().items()},
    {"Mixture-of-Supernets": lambda arms: (arms["shared"] - arms["mixed"]) / (arms["shared"] - arms["alone"])},
)  # fmt: skip

LABS = (FLOWS, MIXGRPO, EDIFF, DETECTOR, WALKS, SUPERNETS)
