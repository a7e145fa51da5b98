"""Ranks that a test starts as processes of its own."""


def end_well(ranks, timeout_s):
    """Wait until all of these processes have ended by themselves; none is left, whatever happens."""
    try:
        said = [rank.communicate(timeout=timeout_s)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(said)
