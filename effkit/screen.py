"""Screen: a widget whose sentence and picture live in one trait, and which shows a picture where there is no kernel."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets


class Screen(widgets.VBox):
    """What the widgets of this library share: rows of controls, and under them a screen. A subclass draws ``_png``."""

    def __init__(self, children: Sequence[widgets.Widget], name: str, below: Sequence[widgets.Widget] = ()) -> None:
        self.screen = widgets.HTML().add_class("effkit-screen")
        super().__init__([*children, self.screen, *below])
        self.add_class(f"effkit-{name}")

    def shown(self) -> str:
        """The sentence on the screen, read back from the trait that the browser draws."""
        match = re.search(r"<p [^>]*>(.*?)</p>", self.screen.value, flags=re.DOTALL)
        return html.unescape(re.sub(r"<[^>]+>", "", match.group(1))) if match else ""

    def _tell(self, sentence: str, rest: str = "", *, alert: bool = False, style: str = "") -> None:
        """Put a sentence on the screen, which screen readers read out, and below it HTML: a picture, a table."""
        role = 'role="alert" aria-live="assertive"' if alert else 'role="status" aria-live="polite"'
        self.screen.value = f"<p {role}{style}>{html.escape(sentence)}</p>{rest}"

    def _png(self) -> bytes:
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live widget, and a picture for readers who have no kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data is not None:
            data["text/plain"] = repr(self)
            data["image/png"] = base64.b64encode(self._png()).decode()
        return bundle
