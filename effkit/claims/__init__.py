"""The papers that this kit starts from: what they claim, and what one machine can say about it.

``effkit.claims`` is the function, for readers; this package, which bears its name, is only imported from:
``from effkit.claims import check``. That holds because ``effkit`` itself imports the package before anyone else can:
Python binds a subpackage to its parent once, when it is first imported, and the function is bound after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from effkit.claims.findings import Finding, check
from effkit.claims.table import claims

if TYPE_CHECKING:
    from effkit.claims.browser import ClaimsBrowser

__all__ = ["Finding", "browse", "check", "claims"]


def browse() -> ClaimsBrowser:
    """The table with widgets to filter it by."""
    from effkit.claims.browser import ClaimsBrowser  # widgets and pictures only for who asks for them

    return ClaimsBrowser()


def __dir__() -> list[str]:
    return __all__
