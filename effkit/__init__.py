"""effkit: see where the time and memory of a PyTorch model go, ask what if, and have the answer measured."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from effkit.account import Account
from effkit.captured import Capture
from effkit.claims import claims
from effkit.device import Device
from effkit.lazy import lazily
from effkit.loading import load
from effkit.receipt import Receipt
from effkit.recording import capture

if TYPE_CHECKING:
    from effkit import activations, advice, decoder, models, moe, padding
    from effkit.advice import study
    from effkit.whatif import WhatIf

__version__ = "0.1.0"
__all__ = [
    "Account", "Capture", "Device", "Receipt", "WhatIf", "activations", "advice", "capture", "claims", "decoder",
    "load", "models", "moe", "padding", "study",
]  # fmt: skip


_named = lazily(__name__, {"whatif": ["WhatIf"], "advice": ["study"], "magics": ["load_ipython_extension"]})


def __getattr__(name: str) -> Any:
    """What brings widgets and pictures along is imported when first named: a file from a cluster needs neither."""
    if name in ("activations", "advice", "decoder", "models", "moe", "padding"):
        return import_module(f"effkit.{name}")
    return _named(name)


__dir__ = __all__.copy  # what a reader's Tab shows
