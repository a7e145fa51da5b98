"""measure(): a live expert-parallel layer on ranks of its own, and where the time of its steps goes."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effkit.account import Account
from effkit.arguments import checked_whole, described
from effkit.lab import Progress, calibration_of, relative_source
from effkit.moe import breakdown, routing
from effkit.moe.calibration import Calibration, calibrate, probes, total_ns
from effkit.moe.recorded import Array, Run, Step, joined, read
from effkit.moe.setting import Setting
from effkit.progress_bar import working
from effkit.ranks.launching import Ranks

WORK = "effkit.moe.rank"  # what each rank runs

TIME = "Time of one step"
COMMUNICATION = "Communication of one step"
BYTES = "Bytes between ranks in one step"
COPIES = "Token copies in one step"
ON = ("num_ranks", "ranks_per_node", "link_bytes_per_s")  # what a setting is measured on


def run_settings(
    ranks: Ranks, settings: Sequence[Setting], *, num_rounds: int = 3, num_steps: int = 4, barriers: bool = False,
    profile: str | Path | None = None, timeout_s: float = 120.0, progress: Progress | None = None,
    of_runs: tuple[int, int] = (0, 1),
) -> Run:  # fmt: skip
    """Let ranks run these settings in turn, ``num_rounds`` times ``num_steps`` steps of each.

    ValueError when the ranks cannot be, or cannot share the experts. RuntimeError when one ends or hangs.

    Parameters
    ----------
    barriers
        Let ranks meet before every exchange.
    profile
        A folder for the traces of one more round of the first setting, a file per rank.
    of_runs
        How many runs came before, and how many there are in all: ``progress`` tells of all of them.
    """
    ranks.check()
    for setting in settings:
        routing.owners(setting, ranks.num_ranks)
    jobs = [{"setting": setting.plain(), "barriers": barriers} for setting in settings]
    what = {"jobs": jobs, "num_rounds": num_rounds, "num_steps": num_steps, "profile": profile is not None}
    before, total = (number * (num_rounds + 1) * len(jobs) for number in of_runs)
    folder = ranks.run(what, timeout_s=timeout_s, progress=progress, before=before, total=total)
    if profile is not None:
        Path(profile).mkdir(parents=True, exist_ok=True)
        for trace in folder.glob("trace*.json"):
            shutil.move(trace, Path(profile) / trace.name)
    return read(folder)


@working("Measuring steps on ranks")
def measure(
    setting: Setting | None = None, num_ranks: int = 2, *, base: Account | None = None, levers: Sequence[str] = (),
    link_bytes_per_s: float | None = None, ranks_per_node: int | None = None, num_rounds: int = 3, num_steps: int = 3,
    barriers: bool = False, profile: str | Path | None = None, backend: str = "auto", timeout_s: float = 180.0,
    progress: Progress | None = None, **changes: Any,
) -> Account:  # fmt: skip
    """Run an expert-parallel layer on ranks of its own; an Account in ns of a step, forward and backward.

    Rows are means over the ranks; each rank's phases and its waiting (until the last rank has come to an exchange) and
    moving (from then on), where no computing hides them. The total is the slowest rank's wall time: the median over
    ``num_rounds``, averaged over ``num_steps`` steps of different routing. Companions: communication exposed and
    hidden, bytes between ranks, token copies kept and dropped (both exact). ValueError when the ranks cannot share the
    experts, or the link cannot be made here. RuntimeError when a rank fails or hangs: its own error, and where the log
    is.

    Parameters
    ----------
    setting, changes
        What to run: a :class:`Setting` (by default the default one, or that of ``base``) and changes to it.
    num_ranks
        2 to 8, processes on this machine.
    base
        An earlier measurement: the setting is then run in turn with it, and its time is told relative to it, for the
        machine's speed drifts. Ranks and link are those of ``base``. Without it the costs of a step are fitted, on this
        setting and five around it.
    levers
        Of ``"lsh", "bfloat16", "float8"``: also time these, so that :func:`predict` knows what they cost.
    link_bytes_per_s, ranks_per_node
        A slower network, made for real: see :class:`effkit.ranks.launching.Ranks`.
    barriers
        Let the ranks meet before every exchange: waiting is then what the barrier took, another way to tell it.
    profile
        A folder for a trace of each rank.
    """
    calibration = calibration_of(base, Calibration, "moe") if base is not None else None
    if not isinstance(setting, Setting | None):
        raise TypeError(f"setting is a moe.Setting, of a layer that is made here; given: {described(setting)}")
    setting = (setting or (calibration.setting if calibration else Setting())).change(**changes)
    num_rounds, num_steps = checked_whole("num_rounds", num_rounds, 1), checked_whole("num_steps", num_steps, 1)
    how: dict[str, Any] = {"num_rounds": num_rounds, "profile": profile, "timeout_s": timeout_s, "progress": progress}
    if base is not None and calibration is not None:
        with ranks_of(calibration, backend) as ranks:
            return beside(ranks, base, setting, barriers=barriers, **how)
    on: dict[str, Any] = {"link_bytes_per_s": link_bytes_per_s or 0.0, "ranks_per_node": ranks_per_node or 0,
                          "backend": backend}  # fmt: skip
    runs: list[Run] = []
    with Ranks(num_ranks, WORK, **on) as ranks:
        if barriers:
            return accounted(run_settings(ranks, [setting], num_steps=num_steps, barriers=True, **how), 0, None)
        jobs = probes(setting, num_ranks, levers)
        while True:  # every round on ranks of its own: what differs from launch to launch is part of the noise
            runs.append(run_settings(ranks, jobs, num_steps=num_steps, of_runs=(len(runs), num_rounds),
                            **how | {"num_rounds": 1, "profile": None if runs else profile}))  # fmt: skip
            if len(runs) >= min(2, num_rounds):
                calibration = calibrate(run := joined(runs))
                if len(runs) == num_rounds or not calibration.shrinks:
                    return accounted(run, 0, calibration)


def ranks_of(calibration: Calibration, backend: str = "auto") -> Ranks:
    """Ranks like those that were calibrated on."""
    return Ranks(calibration.num_ranks, WORK, link_bytes_per_s=calibration.link_bytes_per_s,
                 ranks_per_node=calibration.ranks_per_node, backend=backend)  # fmt: skip


def beside(ranks: Ranks, base: Account, setting: Setting, *, barriers: bool = False, **how: Any) -> Account:
    """The setting, run in turn with that of the base, and told relative to it."""
    calibration = calibration_of(base, Calibration, "moe")
    run = run_settings(ranks, [calibration.setting, setting], num_steps=calibration.num_steps, barriers=barriers, **how)
    scale = base.total / total_ns(run.of_job(0))
    return accounted(run, 1, None if barriers else calibration.moved(run, 1, scale), scale)


def prepare(
    folder: str | Path, setting: Setting | None = None, *, num_ranks: int, num_nodes: int = 1,
    levers: Sequence[str] = (), num_rounds: int = 3, num_steps: int = 3, **changes: Any,
) -> str:  # fmt: skip
    """Write down a measurement for ranks that are started elsewhere; returns the command to start them with.

    Every node of a cluster runs the command (with its own rendezvous options); what they write into ``folder``, which
    all must see, :func:`effkit.moe.account` reads. ValueError when the ranks cannot share the experts, or do not fill
    the nodes.
    """
    if num_nodes < 1 or num_ranks % num_nodes:
        raise ValueError(f"num_ranks is a multiple of num_nodes; given: {num_ranks} and {num_nodes}")
    jobs = probes((setting or Setting()).change(**changes), num_ranks, levers)
    for job in jobs:
        routing.owners(job, num_ranks)
    run = {"jobs": [{"setting": job.plain()} for job in jobs], "num_rounds": num_rounds, "num_steps": num_steps,
           "ranks_per_node": num_ranks // num_nodes}  # fmt: skip
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "run.json").write_text(json.dumps(run))
    return f"torchrun --nnodes {num_nodes} --nproc-per-node {num_ranks // num_nodes} -m effkit.moe.rank {folder}"


def of_folder(folder: str | Path) -> Account:
    """The Account of what the ranks of :mod:`effkit.moe.rank` wrote into a folder."""
    run = read(folder)
    return accounted(run, 0, calibrate(run) if len(run.settings) > 1 else None)


def accounted(run: Run, job: int, calibration: Calibration | None, scale: float = 1.0) -> Account:
    """The account of one setting of a run; times are multiplied by ``scale``."""
    steps, setting = run.of_job(job), run.settings[job]
    numbers = sorted({step.number for step in steps})
    where = f"{run.num_ranks} ranks on {run.facts['where']}, {run.facts['backend']}"
    more = f", {len({step.round for step in steps})} rounds{relative_source(scale)}"
    if link := run.facts["link_bytes_per_s"]:
        where += f", a link of {link / 1e6:g} MB/s"
    if run.facts["where"] == "cuda" and run.facts["backend"] == "gloo":
        where += ", exchanged through the host"
    return account_of(
        steps, scale, setting, [run.kept[job, n] for n in numbers], [run.dropped[job, n] for n in numbers],
        counted="the sizes of all messages", source=f"the slowest of {where}{more}", calibration=calibration,
        setting=setting.plain() | {name: run.facts[name] for name in ON},
    )  # fmt: skip


def account_of(
    steps: Sequence[Step], scale: float, layer: Setting, kept: Sequence[Array], dropped: Sequence[Array], *,
    counted: str, basis: str = "measured", assumed: str = "measured", **more: Any,
) -> Account:  # fmt: skip
    """The account of the steps of a layer, whose times are multiplied by ``scale``.

    ``kept`` and ``dropped`` are the token copies of each step by rank; ``counted`` says from what the bytes are known,
    ``assumed`` on what basis rows of moving are.
    """
    rows, exchanged = ({name: round(scale * time_ns) for name, time_ns in breakdown.typical(steps, of_step).items()}
                       for of_step in (breakdown.rows_ns, breakdown.communication_ns))  # fmt: skip
    sizes = _size_bytes(steps)
    copies = {name: int(np.mean([copies.sum() for copies in of_steps]).round())
              for name, of_steps in (("kept", kept), ("dropped", dropped))}  # fmt: skip
    asked = len(steps[0].ranks) * layer.num_tokens * layer.top_k
    companions = tuple(
        Account.of(title, unit, of_kind, total=total, source=source, basis=basis)
        for title, unit, of_kind, total, source in (
            (COMMUNICATION, "ns", exchanged, sum(exchanged.values()), "the collectives' own times"),
            (BYTES, "bytes", sizes, sum(sizes.values()), counted),
            (COPIES, "tokens", copies, asked, "tokens times choices"),
        )
    )
    bases = {name: assumed if "moving" in name else basis for name in rows}
    total = round(scale * total_ns(steps))
    return Account.of(TIME, "ns", rows, total=total, basis=bases, companions=companions, **more)


def _size_bytes(steps: Sequence[Step]) -> dict[str, int]:
    """Bytes that all ranks send to others in a step, by kind, the mean over the steps' routings."""
    sizes: dict[str, float] = defaultdict(float)
    once = {step.number: step for step in steps}
    for step in once.values():
        for rank, record in enumerate(step.ranks):
            for call in record.calls:
                others = sum(call.sent_bytes) - (call.sent_bytes[rank] if call.sent_bytes else 0)
                if others:
                    sizes[call.kind] += others / len(once)
    return {kind: round(size) for kind, size in sizes.items()}
