"""effkit: see where the time and memory of a PyTorch model go, ask what if, and have the answer measured."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from effkit.claims import claims  # before anybody asks for the package of that name
from effkit.lazy import lazily

if TYPE_CHECKING:
    from effkit import activations, advice, decoder, models, moe, padding
    from effkit.account import Account
    from effkit.advice import study
    from effkit.captured import Capture
    from effkit.device import Device
    from effkit.loading import load
    from effkit.receipt import Receipt
    from effkit.recording import capture
    from effkit.whatif import WhatIf

__version__ = "0.1.0"
__all__ = [
    "Account", "Capture", "Device", "Receipt", "WhatIf", "activations", "advice", "capture", "claims", "decoder",
    "load", "models", "moe", "padding", "study",
]  # fmt: skip


_named = lazily(__name__, {
    "account": ["Account"], "captured": ["Capture"], "device": ["Device"], "loading": ["load"], "receipt": ["Receipt"],
    "recording": ["capture"], "whatif": ["WhatIf"], "advice": ["study"], "magics": ["load_ipython_extension"],
})  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imported when first named: a file from a cluster needs no widgets and no pictures, a plan no trace."""
    if name in ("activations", "advice", "decoder", "models", "moe", "padding"):
        return import_module(f"effkit.{name}")
    return _named(name)


__dir__ = __all__.copy  # what a reader's Tab shows
