"""Every matplotlib line in the library. Drawing functions compute nothing; they never touch pyplot's state."""

from effkit.view.accounts import account, page, plan
from effkit.view.comparison import Comparison
from effkit.view.panes import PANES, MemoryPicture
from effkit.view.style import GREY, OKABE_ITO, colour

__all__ = ["GREY", "OKABE_ITO", "PANES", "Comparison", "MemoryPicture", "account", "colour", "page", "plan"]
