"""A world whose costs are known: steps as the simulation plays them, to calibrate on without running any."""

from dataclasses import replace

import numpy as np

from effkit.moe import routing
from effkit.moe.calibration import calibrate, probes
from effkit.moe.costs import Costs, Handing
from effkit.moe.live import accounted
from effkit.moe.recorded import Run
from effkit.moe.setting import Setting
from effkit.moe.simulating import simulate

NUM_STEPS, NUM_ROUNDS = 3, 2
_PHASES = {
    (True, "before", "gate"): [5e5, 10.0, 0.05],
    (True, "before", "permute"): [2e5, 3e3, 1.0, 1.2, 0.0],
    (True, "before", "compress"): [1e5, 0.01, 2.0, 1e4, 0.2, 2e4, 0.8],
    (True, "during", "experts"): [3e5, 0.04, 1.0, 0.0, 0.0, 0.005, 0.01],
    (True, "after", "permute"): [1e5, 0.0, 0.0, 0.5, 0.0],
    (True, "after", "unpermute"): [2e5, 0.5, 0.4],
    (False, "before", "unpermute"): [2e5, 1.0, 0.4],
    (False, "before", "permute"): [1e5, 0.0, 0.0, 0.5, 0.3],
    (False, "during", "experts"): [6e5, 0.08, 1.0, 0.0, 0.0, 0.01, 0.02],
    (False, "after", "permute"): [2e5, 3e3, 0.7, 0.9, 0.0],
    (False, "after", "gate"): [2e5, 5.0, 0.1],
}
COSTS = Costs(
    {key: np.array(values) for key, values in _PHASES.items()}, np.array([3e5, 10.0, 0.5, 5e4]), Handing(1e5, 1e5, 2e5)
)


def run_of(settings, num_ranks=2, link_bytes_per_s=1e8, ranks_per_node=1, costs=COSTS):
    """What ranks would have recorded."""
    steps = [
        simulate(setting, n, num_ranks, ranks_per_node, costs)._replace(job=job, round=around)
        for around in range(NUM_ROUNDS)
        for job, setting in enumerate(settings)
        for n in range(NUM_STEPS)
    ]
    seen = {(job, n): routing.traffic(setting, num_ranks, n) for job, setting in enumerate(settings)
            for n in range(NUM_STEPS)}  # fmt: skip
    facts = {"num_ranks": num_ranks, "ranks_per_node": ranks_per_node, "link_bytes_per_s": link_bytes_per_s,
             "backend": "gloo", "where": "cpu"}  # fmt: skip
    kept, dropped = ({key: getattr(one, name) for key, one in seen.items()} for name in ("kept", "dropped"))
    return Run(list(settings), steps, kept, dropped, facts)


def measured(setting=None, levers=(), **on):
    """The Account of a calibrated measurement in this world."""
    jobs = probes(setting or Setting(), on.get("num_ranks", 2), levers)
    run = run_of(jobs, **on)
    return accounted(run, 0, calibrate(run))


def truth(setting, **on):
    """The Account of another setting, as a measurement would find it."""
    return accounted(run_of([setting], **on), 0, None)


def slower(factor):
    """The same world where all computing takes longer."""
    return replace(COSTS, phases={key: factor * value for key, value in COSTS.phases.items()})
