"""What the peers' scripts share: how they are asked, and what a process has cost."""

import argparse
import json
import resource
import sys
from collections.abc import Callable


def asked_in_turn(parser: argparse.ArgumentParser, answer: Callable[[argparse.Namespace], str]) -> None:
    """Print the answer to the command line; where it is empty, to each line of the input: its arguments as JSON."""
    if len(sys.argv) > 1:
        print(answer(parser.parse_args()))
        return
    for line in sys.stdin:
        print(answer(parser.parse_args(json.loads(line))), flush=True)


def spent() -> str:
    """``cpu_s`` and ``peak_bytes`` of this process and its children so far, as JSON: for ``--time``.

    The peak is that of the largest process; Linux counts it in KiB.
    """
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(one.ru_utime + one.ru_stime for one in used)
    return json.dumps({"cpu_s": round(cpu_s, 3), "peak_bytes": 1024 * max(one.ru_maxrss for one in used)})
