"""effkit: see where the time and memory of a PyTorch model go, ask what if, and have the answer measured."""

from effkit import models, padding
from effkit.account import Account
from effkit.captured import Capture
from effkit.device import Device
from effkit.loading import load
from effkit.receipt import Receipt
from effkit.recording import capture
from effkit.whatif import WhatIf

__version__ = "0.1.0"
__all__ = ["Account", "Capture", "Device", "Receipt", "WhatIf", "capture", "load", "models", "padding"]
