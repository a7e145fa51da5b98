"""Timings on machines that others use too."""


def at_a_quiet_moment(measure, holds, tries=3):
    """The first measurement that holds, else the last: what is wrong is so each time, a busy moment is not."""
    for _ in range(tries):
        found = measure()
        if holds(found):
            break
    return found
