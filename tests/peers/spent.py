"""What this process has cost so far, its children included: printed by the peers' scripts when asked for ``--time``."""

import json
import resource


def spent() -> str:
    """``cpu_s`` and ``peak_bytes`` as JSON. The peak is that of the largest process; Linux counts it in KiB."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(one.ru_utime + one.ru_stime for one in used)
    return json.dumps({"cpu_s": round(cpu_s, 3), "peak_bytes": 1024 * max(one.ru_maxrss for one in used)})
