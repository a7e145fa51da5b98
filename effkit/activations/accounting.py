"""account(): what fills the peak of a run that was recorded."""

from __future__ import annotations

from effkit.account import Account
from effkit.captured import Capture


def account(recorded: Capture, *, by: str = "category", device: str | None = None, rank: int | None = None) -> Account:
    """The peak of a capture, live or loaded, by ``"category"`` or ``"stack"``: see :meth:`Capture.memory`.

    A recording tells categories by stacks and lifetimes, and what these do not tell is *unknown*; :func:`measure`
    follows the live step and knows them all.
    """
    if not isinstance(recorded, Capture):
        raise TypeError(
            f"account() takes a Capture, from capture(memory=True) or load(); given: {type(recorded).__name__}"
        )
    return recorded.memory(by=by, device=device, rank=rank)
