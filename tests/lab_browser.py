"""JupyterLab in a real browser, as with-statements: what the browser test and the slider bench share.

    with jupyterlab(folder) as lab, notebook_page(lab, "01_padding.ipynb") as page:
        run_all_cells(page)
        press_key(page, first_slider(page), "ArrowRight")

The server is started the way `make lab` starts it, with the project's own config, so the tests see what a
reader sees. Whatever happens, the server, its kernels and the browser end: a kernel left behind by a
killed test would keep a core busy and make every later timing wrong.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from playwright.sync_api import Locator, Page, sync_playwright

REPO = Path(__file__).resolve().parents[1]
CONFIG = REPO / "notebooks" / "jupyter_server_config.py"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET = "--disable-component-update --disable-sync"
NO_NAMES = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # nor is any host found by name
OUTSIDE = re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1[:/])")
# With "none" every cell is in the page, on the screen or not. The rest is JupyterLab as it comes.
SETTINGS = {"@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"}}
PR_SET_PDEATHSIG = 1


def why_no_browser() -> str | None:
    """The sentence to skip a browser test with, or None where there is a chromium to drive."""
    if any(shutil.which(name) for name in BROWSERS):
        return None
    return (
        "there is no chromium on the PATH; install it with `sudo apt-get install chromium` "
        "(`make test` does it by itself when it runs as root)"
    )


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: where it answers, what it serves, what it has said so far."""

    url: str
    token: str
    folder: Path
    process: psutil.Process
    log: Path


def _ended_with_its_parent() -> Callable[[], None] | None:
    """What a child does first so that the system stops it when the test is killed outright."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM) and None


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ask the server to stop, which stops its kernels, then end by id what is still there."""
    try:
        family = psutil.Process(server.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)  # the server leads a group of its own
        server.wait()
    for process in psutil.wait_procs(family, timeout=5)[1]:
        process.kill()  # psutil knows a process by its start time too: never a stranger with a reused id
    psutil.wait_procs(family, timeout=5)


def _own_environment(home: Path) -> dict[str, str]:
    """The environment in which Jupyter and IPython read and write in `home` and nowhere else."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    env |= {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env |= {f"JUPYTERLAB_{name}_DIR": str(home / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    env |= {"IPYTHONDIR": str(home / "ipython")}
    for plugin, values in SETTINGS.items():
        path = home / "settings" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    return env


@contextmanager
def jupyterlab(notebooks: Path, config: Path = CONFIG) -> Iterator[Lab]:
    """Serve a copy of the folder `notebooks`, with the repository's data beside it as in a checkout."""
    with tempfile.TemporaryDirectory(prefix="lab_browser_", ignore_cleanup_errors=True) as temp:
        home, folder = Path(temp), Path(temp) / "checkout" / "notebooks"
        shutil.copytree(notebooks, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
        if (REPO / "data").is_dir():
            (folder.parent / "data").symlink_to(REPO / "data")
        command = [sys.executable, "-m", "jupyterlab", f"--config={config}", f"--ServerApp.root_dir={folder}"]
        log = home / "lab.log"
        with log.open("wb") as said:
            server = subprocess.Popen(
                [*command, "--no-browser", "--port=0", "--expose-app-in-browser"],
                cwd=folder,
                env=_own_environment(home),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_ended_with_its_parent(),
            )
        try:
            address = _address(server, home / "runtime" / f"jpserver-{server.pid}.json", log)
            yield Lab(address["url"], address["token"], folder, psutil.Process(server.pid), log)
        finally:
            _end(server)


def _address(server: subprocess.Popen[bytes], path: Path, log: Path, timeout_s: float = 60) -> dict[str, str]:
    """The port and token that the server chose for itself, as it writes them down for its own tools."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and server.poll() is None:
        if path.exists() and (text := path.read_text()).endswith("}"):
            return json.loads(text)
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start in {timeout_s:.0f} s; it said:\n{log.read_text()[-3000:]}")


@contextmanager
def notebook_page(lab: Lab, name: str, blocked: list[str] | None = None) -> Iterator[Page]:
    """The notebook `name` open in JupyterLab. Addresses off loopback are refused and noted in `blocked`."""
    blocked = [] if blocked is None else blocked
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise RuntimeError(why_no_browser())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=[*FLAGS.split(), *QUIET.split(), NO_NAMES]
        )
        context = browser.new_context(viewport={"width": 1280, "height": 1600}, service_workers="block")

        def refuse(route):
            blocked.append(route.request.url)
            route.abort()

        context.route(OUTSIDE, refuse)
        page = context.new_page()
        # Playwright routes no websocket; --host-resolver-rules refuses those, and here they are counted.
        page.on("websocket", lambda ws: blocked.append(ws.url) if OUTSIDE.match(ws.url) else None)
        try:
            page.goto(f"{lab.url}lab/tree/{name}?reset&token={lab.token}")
            wait_until(page, lambda: (_state(page) or {}).get("status") == "idle", "the kernel started", 90)
            yield page
        finally:
            browser.close()


def wait_until(page: Page, true: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Look again and again, letting the browser's events in; one long wait would be deaf to them."""
    end = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s:.0f} s in vain until {what}")
        page.wait_for_timeout(200)


# ---------------------------------------------------------------------------------- the notebook


def _state(page: Page) -> dict | None:
    """Status of the kernel, and count and uncalled-for error of each code cell; None before it is open."""
    return page.evaluate(
        """() => {
            const panel = window.jupyterapp?.shell.currentWidget;
            const kernel = panel?.sessionContext?.session?.kernel;
            if (!kernel || !panel.context.isReady) return null;
            const cells = panel.content.widgets.map(cell => cell.model)
                .filter(cell => cell.type === "code" && cell.sharedModel.source.trim());
            const error = cell => (cell.getMetadata("tags") ?? []).includes("raises-exception") ? null
                : cell.outputs.toJSON().find(output => output.output_type === "error");
            return {
                status: kernel.status,
                counts: cells.map(cell => cell.executionCount),
                errors: cells.map(error).filter(Boolean).map(found => `${found.ename}: ${found.evalue}`),
            };
        }"""
    )


def cell_errors(page: Page) -> list[str]:
    """Errors that stand under cells which do not carry the tag `raises-exception`."""
    return _state(page)["errors"]


def run_all_cells(page: Page, timeout_s: float = 180) -> None:
    """Run the whole notebook; done when every code cell has a new count and the kernel rests.

    The counts of the last run are cleared first. Between two cells the kernel is idle for a moment, so
    idle counts only when seen three times in a row.
    """
    for command in ("notebook:clear-all-cell-outputs", "notebook:run-all-cells"):
        page.evaluate("name => { window.jupyterapp.commands.execute(name); }", command)
    rests = 0

    def done() -> bool:
        nonlocal rests
        state = _state(page)
        if state["errors"]:
            raise AssertionError(f"a cell failed with {state['errors'][0]}")
        rests = rests + 1 if state["status"] == "idle" and all(state["counts"]) else 0
        return rests == 3

    wait_until(page, done, "every cell had run", timeout_s)


# ------------------------------------------------------------------------------------ the what-if


def whatif(page: Page) -> Locator:
    """The first WhatIf of the notebook."""
    return page.locator(".effkit-whatif").first


def first_slider(page: Page) -> str:
    """The name of the first control that is a slider."""
    row = whatif(page).locator(".effkit-control", has=page.locator(".noUi-handle")).first
    return re.search(r"effkit-control-(\S+)", row.get_attribute("class"))[1]


def status_text(page: Page) -> str:
    """The sentence that a screen reader would say."""
    return whatif(page).locator(".effkit-screen [role=status]").inner_text()


def svg_markup(page: Page) -> str:
    """The picture, as it stands in the page."""
    return whatif(page).locator(".effkit-screen svg").evaluate("svg => svg.outerHTML")


def _handle(page: Page, control: str) -> Locator:
    return whatif(page).locator(f".effkit-control-{control} .noUi-handle").first


def press_key(page: Page, control: str, key: str) -> None:
    """Give a slider the focus and press a real key on it."""
    _handle(page, control).focus()
    page.keyboard.press(key)


def click_measure(page: Page) -> None:
    """Press *Measure it*."""
    whatif(page).locator(".effkit-measure").click()


def wait_for_receipt(page: Page, timeout_s: float = 120) -> str:
    """The sentence on the screen once it speaks of a receipt."""
    wait_until(page, lambda: "receipt" in status_text(page).lower(), "a receipt was shown", timeout_s)
    return status_text(page)


def slider_latencies(page: Page, control: str, num_moves: int, pause_s: float = 0.4) -> list[float]:
    """Milliseconds from a key press to the frame that shows the changed picture, for single moves.

    Both ends are read on the browser's own clock, inside the page: the key event's time stamp, and the
    first animation frame after the picture's markup changed. Between two moves nobody asks the page
    anything, so that each meets a machine at rest.
    """
    handle = _handle(page, control)
    handle.focus()
    at_top = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    keys = ("ArrowLeft", "ArrowRight") if at_top else ("ArrowRight", "ArrowLeft")
    whatif(page).locator(".effkit-screen").evaluate(
        """screen => {
            const picture = () => screen.querySelector("svg")?.outerHTML;
            let shown = picture(), pressed = null;
            window.sliderMoves = [];
            window.addEventListener("keydown", event => { pressed = event.timeStamp; }, true);
            new MutationObserver(() => {
                const now = picture();
                if (now === undefined || now === shown) return;
                shown = now;
                if (pressed === null) return;
                const start = pressed;
                pressed = null;
                requestAnimationFrame(() => window.sliderMoves.push(performance.now() - start));
            }).observe(screen, {childList: true, subtree: true, attributes: true, characterData: true});
        }"""
    )
    for move in range(num_moves):
        page.keyboard.press(keys[move % 2])
        page.wait_for_timeout(1000 * pause_s)
        seen = lambda count=move + 1: page.evaluate("window.sliderMoves.length") >= count  # noqa: E731
        wait_until(page, seen, f"move {move + 1} of {control} changed the picture", 10)
    return page.evaluate("window.sliderMoves")
