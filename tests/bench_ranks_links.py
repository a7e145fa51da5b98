"""Links and slow ranks, live: held-out errors of alpha and bandwidth, and 20 of 20 injected slow ones (`make bench`).

A trial is a window of rounds of one launch: the router changes what is slow while the ranks go on.
"""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from effkit.ranks import launching, links
from lessons.pair_delays import delays as delays_of_pairs
from lessons.slow_ranks import find_slow

pytestmark = pytest.mark.skipif(bool(launching.why_no_links()), reason=launching.why_no_links())

NUM_RANKS, NUM_ROUNDS, NUM_LAUNCHES = 4, 10, 2
RATE, SLOWER = 100e6, 3
KINDS = ("sender", "receiver", "rank", "link")


def injection(kind, rank, peer):
    """What to make slow, and what is to be found."""
    names = {"link": {"sender": rank, "receiver": peer}}.get(kind, {kind: rank})
    return {**names, "bytes_per_s": RATE / SLOWER}, (kind, rank, peer if kind == "link" else None)


@pytest.fixture(scope="module")
def trials():
    """(expected, found) of 20 windows with something slow and 20 without, in turn."""
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(NUM_LAUNCHES):
        made = [injection(kind, *map(int, rng.choice(NUM_RANKS, 2, replace=False))) for kind in rng.permutation(
            np.repeat(KINDS, 20 // NUM_LAUNCHES // 4 + 1))[: 20 // NUM_LAUNCHES].tolist()]  # fmt: skip
        slow = [one for injected, _ in made for one in (None, injected)]
        delays = delays_of_pairs(NUM_RANKS, num_rounds=NUM_ROUNDS, slow=slow, link_bytes_per_s=RATE, timeout_s=400)
        expected = [one for _, what in made for one in (None, what)]
        for what, window in zip(expected, delays, strict=True):
            seen.append((what, find_slow(window)))
    print(
        f"\n\n{NUM_RANKS} ranks, {NUM_ROUNDS} rounds a window, {RATE / 1e6:.0f} MB/s, slow ones {SLOWER} times slower"
    )
    print("  injected                    found                       ratio")
    for what, found in seen:
        got = (found.kind, found.rank, found.peer) if found else None
        print(f"  {what!s:<28}{got!s:<28}{f'{found.ratio:.2f}' if found else ''}")
    return seen


def test_what_is_slow_is_found_in_every_trial(trials):
    slow = [(what, found) for what, found in trials if what]
    right = [found is not None and (found.kind, found.rank, found.peer) == what for what, found in slow]
    print(f"\nfound: {sum(right)} of {len(right)}")
    assert len(right) == 20
    assert all(right)


def test_nothing_is_found_where_nothing_is_slow(trials):
    alarms = [found for what, found in trials if what is None and found is not None]
    print(f"\nfalse alarms: {len(alarms)} in {sum(what is None for what, _ in trials)}")
    assert not alarms


@pytest.mark.parametrize(
    ("num_ranks", "rate", "ranks_per_node"), [(2, 0.0, 0), (2, 100e6, 0), (4, 50e6, 2), (4, 100e6, 0)]
)
def test_held_out_sizes(num_ranks, rate, ranks_per_node):
    """An earlier study: 0.2 to 4% on a limited link, 8 to 17% on plain loopback."""
    seen = links.link(num_ranks, link_bytes_per_s=rate, ranks_per_node=ranks_per_node)
    held_out = seen.frame["held_out_error"].dropna().abs()
    large = held_out.loc[2**16 :]
    print(f"\n{seen!r}\n  held out, by size: median {held_out.median():.1%}, worst {held_out.max():.1%}")
    print(f"  from 64 KiB on: median {large.median():.1%}, worst {large.max():.1%}")
    if rate:
        assert seen.bandwidth_bytes_per_s == pytest.approx(rate, rel=0.1)
        assert large.median() <= 0.04
    else:
        assert held_out.median() <= 0.17


MOE = (
    "from effkit.moe.live import WORK, run_settings\nfrom effkit.moe.setting import Setting\n"
    "from effkit.ranks.launching import Ranks\n"
    "with Ranks(2, WORK, link_bytes_per_s=50e6) as ranks:\n"
    "    run_settings(ranks, [Setting(num_tokens=64)], num_rounds={rounds}, num_steps=2)"
)
SHARDED = (
    "import torch\nfrom effkit import activations\n"
    "model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))\n"
    "activations.measure(model, torch.randn(4, 8), loss=torch.sum, world_size=2, repeats={rounds})"
)


@pytest.mark.parametrize("code", [MOE, SHARDED], ids=["MoE", "sharded"])
def test_nobody_is_left_after_twenty_runs_of_which_five_are_killed(code):
    """Fifteen runs come to their end; five are killed, the process that starts the ranks, each at another moment."""
    for number in range(20):
        killed = number % 4 == 0
        starter = subprocess.Popen([sys.executable, "-c", code.format(rounds=100_000 if killed else 1)])
        if killed:
            time.sleep(1.5 + 0.4 * number)
            starter.kill()
        assert starter.wait() == (-9 if killed else 0)
    deadline = time.monotonic() + 5
    while (left := _ranks()) and time.monotonic() < deadline:
        time.sleep(0.1)
    print(f"\nprocesses left after 20 runs, 5 of them killed: {len(left)}")
    assert not left


def _ranks():
    """Command lines of ranks and of their launchers on this machine."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if "effkit.ranks.forking" in line]
