"""How `make lab` runs JupyterLab: for this machine alone, asking nothing of the network, and quick.

The token stays on, as Jupyter has it: loopback is shared by everybody who has a login on the machine.
"""

import os
import sys

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection


class PromptConnection(ZMQChannelsWebsocketConnection):
    """A kernel's websocket that sends each message at once.

    One move of a slider makes the kernel answer in several small messages. By default TCP holds a small
    message back until the one before it is acknowledged, and the browser takes its time over that.
    """

    def connect(self):
        self.websocket_handler.set_nodelay(True)
        return super().connect()


def without_announcements(handler, page_config):
    """The page's config, less the plugin that fetches news from the network."""
    disabled = page_config.get("disabledExtensions", [])
    return {**page_config, "disabledExtensions": [*disabled, "@jupyterlab/apputils-extension:announcements"]}


# of kernels: torch's profiler warns of every optimizer that replaces a state that is older than the recording
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

c = get_config()  # noqa: F821 - Jupyter puts it there

c.ServerApp.ip = "127.0.0.1"
c.ServerApp.allow_remote_access = False
c.ServerApp.kernel_websocket_connection_class = PromptConnection

# Nothing is fetched: no news, no look for a newer version, no catalogue of extensions. The hook leaves
# out the part of JupyterLab that would still ask every reader whether to fetch news.
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.handlers.announcements.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
c.ServerApp.tornado_settings = {"page_config_hook": without_announcements}

# The address that is printed leads to the first notebook, for those who have to paste it.
c.LabApp.default_url = "/lab/tree/00_start_here.ipynb"

# Containers run as root and Jupyter refuses that unasked; everybody else keeps the refusal.
c.ServerApp.allow_root = hasattr(os, "geteuid") and os.geteuid() == 0

# Without a desktop there may still be a text browser, and it would take over the terminal that the
# address is printed in.
c.ServerApp.open_browser = not sys.platform.startswith("linux") or any(
    name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
)
