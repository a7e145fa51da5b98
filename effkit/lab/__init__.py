"""What the four analyses share: knobs and how they are checked, held-out error, noise, range, band, progress."""

from effkit.lab.bands import OF_A_MEDIAN, SPREAD, Hull, Trust, banded, interval, noise, rms
from effkit.lab.calibrated import calibration_of, relative_source
from effkit.lab.knobs import asked, changed, check, flag, number, one_of, share, whole
from effkit.progress_bar import Progress, tell

__all__ = [
    "OF_A_MEDIAN", "SPREAD", "Hull", "Progress", "Trust", "asked", "banded", "calibration_of", "changed", "check",
    "flag", "interval", "noise", "number", "one_of", "relative_source", "rms", "share", "tell", "whole",
]  # fmt: skip
