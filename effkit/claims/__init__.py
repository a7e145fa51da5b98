"""The papers that this kit starts from: what they claim, and what one machine can say about it.

``effkit.claims`` is the function, for readers; this package, which bears its name, is only imported from:
``from effkit.claims import check``. That holds because ``effkit`` itself imports the package before anyone else can:
Python binds a subpackage to its parent once, when it is first imported, and the function is bound after it.
"""

from effkit.claims.bounds import ceilings
from effkit.claims.table import Finding, check, claims

__all__ = ["Finding", "ceilings", "check", "claims"]

__dir__ = __all__.copy  # what a reader's Tab shows
