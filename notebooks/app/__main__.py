"""Serve the what-if page without its code: `make app`, or `python notebooks/app --port=8866`.

For this machine alone and asking nothing of the network, as `make lab`, whose config is read for what both share.
Every page that is opened has a kernel of its own, which ends some minutes after the page is closed.
"""

import html
import tempfile
import webbrowser
from pathlib import Path

from traitlets.config import Config, PyFileConfigLoader
from voila.app import Voila

HERE = Path(__file__).resolve().parent
LAB = PyFileConfigLoader("jupyter_server_config.py", str(HERE.parent)).load_config().ServerApp

# Of JupyterLab's extensions, those that draw widgets.
WIDGETS = ("@voila-dashboards/widgets-manager8", "@jupyter-widgets/jupyterlab-manager")
# The browser itself refuses what is not from here, whatever a template or a widget may ask for.
OWN_ADDRESS_ONLY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self' ws://127.0.0.1:*; frame-ancestors 'none'"
)


class App(Voila):
    """Voilà with a template of our own, and with a browser that is let in."""

    def setup_template_dirs(self):
        """Put our template before Voilà's, which links to a stylesheet on a CDN."""
        super().setup_template_dirs()
        self.template_paths.insert(0, str(HERE / "template"))

    def launch_browser(self):
        """Open the page with its token, which Voilà leaves out; in a file, since everybody can read commands."""
        address = html.escape(self.display_url)
        with tempfile.NamedTemporaryFile("w", suffix=".html", delete=False, dir=self.connection_dir) as page:
            page.write(f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={address}">')
        webbrowser.open(Path(page.name).as_uri())


def configuration():
    """How the page is served; what is given on the command line comes before it."""
    c = Config()
    c.Voila.ip = LAB.ip
    c.Voila.auto_token = True  # loopback is shared by everybody who has a login on the machine
    c.Voila.open_browser = LAB.open_browser
    c.Voila.kernel_websocket_connection_class = LAB.kernel_websocket_connection_class
    c.Voila.tornado_settings = {
        "allow_remote_access": False,
        "headers": {"Content-Security-Policy": OWN_ADDRESS_ONLY},
    }
    c.MappingKernelManager.cull_idle_timeout, c.MappingKernelManager.cull_interval = 300, 60  # [s] without a page
    c.VoilaConfiguration.strip_sources = True
    c.VoilaConfiguration.file_allowlist = ["(?!)"]  # no file beside the notebook is served
    c.VoilaConfiguration.allow_template_override = c.VoilaConfiguration.allow_theme_override = "NO"
    c.VoilaConfiguration.extension_allowlist = [
        "@voila-dashboards/widgets-manager8",
        "@jupyter-widgets/jupyterlab-manager",
    ]
    c.VoilaConfiguration.resources = {"metadata": {"name": "What if? · effkit"}, "language_code": "en"}
    c.VoilaExecutor.cell_error_instruction = "The terminal in which the app runs says why."
    return c


if __name__ == "__main__":
    App.launch_instance(notebook_path=str(HERE / "whatif.ipynb"), config=configuration())
