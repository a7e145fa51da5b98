"""Screen: a widget whose sentence and picture live in one trait, and which shows a picture where there is no kernel."""

from __future__ import annotations

import base64
import html
import re
from typing import Any

import ipywidgets as widgets


class Screen(widgets.VBox):
    """What the widgets of this library share. A subclass has ``screen``, and draws itself in ``_png``."""

    screen: widgets.HTML

    def shown(self) -> str:
        """The sentence on the screen, read back from the trait that the browser draws."""
        match = re.search(r"<p [^>]*>(.*?)</p>", self.screen.value, flags=re.DOTALL)
        return html.unescape(re.sub(r"<[^>]+>", "", match.group(1))) if match else ""

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
