"""The papers that this kit starts from: what they claim, and what one machine can say about it."""

from __future__ import annotations

from effkit.published.browser import browse
from effkit.published.claims_table import claims
from effkit.published.findings import Finding, check

__all__ = ["Finding", "browse", "check", "claims"]
