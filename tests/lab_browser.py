"""JupyterLab in a real browser, as with-statements: what the browser test and the slider bench share.

    with jupyterlab(folder) as lab, notebook_page(lab, "01_padding.ipynb") as page:
        run_all_cells(page)
        press_key(page, first_slider(page), "ArrowRight")

The server runs with the project's own config, as under `make lab`. Whatever happens, the server, its kernels and the
browser end: a kernel left behind by a killed test would keep a core busy and make every later timing wrong.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from lab_processes import serving
from playwright.sync_api import Browser, Locator, Page, Playwright, sync_playwright

REPO = Path(__file__).resolve().parents[1]
CONFIG = REPO / "notebooks" / "jupyter_server_config.py"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update"""
NO_NAMES = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # no other host is even found
OUTSIDE = re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1[:/])")


def why_no_browser() -> str | None:
    """The sentence to skip a browser test with, or None where there is a chromium to drive."""
    if any(map(shutil.which, BROWSERS)):
        return None
    return "no chromium on the PATH: `sudo apt-get install chromium` (`make test` does it by itself when run as root)"


def launched(playwright: Playwright) -> Browser:
    """A chromium that finds no other host. RuntimeError where there is none."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise RuntimeError(why_no_browser())
    return playwright.chromium.launch(executable_path=program, args=[*FLAGS.split(), NO_NAMES])


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: where it answers, its process, and the file with what it has said."""

    url: str
    token: str
    process: psutil.Process
    log: Path


@contextmanager
def jupyterlab(notebooks: Path, config: Path = CONFIG) -> Iterator[Lab]:
    """Serve a copy of the folder `notebooks`, beside the repository's data as in a checkout."""
    with tempfile.TemporaryDirectory(prefix="lab_browser_", ignore_cleanup_errors=True) as temp:
        home, folder = Path(temp), Path(temp) / "checkout" / "notebooks"
        shutil.copytree(notebooks, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
        if (REPO / "data").is_dir():
            (folder.parent / "data").symlink_to(REPO / "data")
        command = [sys.executable, "-m", "jupyterlab", f"--config={config}", f"--ServerApp.root_dir={folder}"]
        log = home / "lab.log"
        with serving([*command, "--no-browser", "--port=0", "--expose-app-in-browser"], folder, home, log) as server:
            address = _address(server, home / "JUPYTER_RUNTIME" / f"jpserver-{server.pid}.json", log)
            yield Lab(address["url"], address["token"], psutil.Process(server.pid), log)


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

    def note(url: str) -> None:
        if blocked is not None and OUTSIDE.match(url):
            blocked.append(url)

    with sync_playwright() as playwright:
        browser = launched(playwright)
        context = browser.new_context(viewport={"width": 1280, "height": 1600}, service_workers="block")
        context.route(OUTSIDE, lambda route: route.abort())  # routes no websocket: NO_NAMES refuses those
        page = context.new_page()
        page.on("request", lambda request: note(request.url))
        page.on("websocket", lambda socket: note(socket.url))
        try:
            page.goto(f"{lab.url}lab/tree/{name}?reset&token={lab.token}")
            wait_until(page, lambda: (_state(page) or {}).get("status") == "idle", "the kernel was up", 90)
            yield page
        finally:
            browser.close()


def wait_until(page: Page, true: Callable[[], Any], what: str, timeout_s: float) -> None:
    """Look again and again, letting the browser's events in; one long wait would be deaf to them."""
    end = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s:.0f} s in vain until {what}")
        page.wait_for_timeout(200)


STATE = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    const kernel = panel?.sessionContext?.session?.kernel;
    if (!kernel || !panel.context.isReady) return null;
    if (!window.observerErrors) {
        window.observerErrors = [];
        kernel.iopubMessage.connect((_, {parent_header, content}) => {
            if (content.ename && parent_header.msg_type === "comm_msg") window.observerErrors.push(content);
        });
    }
    const cells = panel.content.widgets.map(cell => cell.model)
        .filter(cell => cell.type === "code" && cell.sharedModel.source.trim());
    const errors = cells.filter(cell => !cell.getMetadata("tags")?.includes("raises-exception"))
        .flatMap(cell => cell.outputs.toJSON()).filter(output => output.output_type === "error");
    return {
        status: kernel.status,
        counts: cells.map(cell => cell.executionCount),
        errors: [...errors, ...window.observerErrors].map(error => `${error.ename}: ${error.evalue}`),
    };
}"""


def _state(page: Page) -> dict[str, Any] | None:
    """The kernel's status, each code cell's count, and errors not called for; None before it is open."""
    return page.evaluate(STATE)


def errors(page: Page) -> list[str]:
    """Errors under cells without the tag `raises-exception`, and those of observers, which JupyterLab shows nowhere."""
    return _state(page)["errors"]


def run_all_cells(page: Page, timeout_s: float = 180) -> None:
    """Run the whole notebook until every code cell has a new count and the kernel is idle three times running."""
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


def whatif(page: Page) -> Locator:
    """The first WhatIf of the notebook."""
    return page.locator(".effkit-whatif").first


def first_slider(page: Page) -> str:
    """The name of the first control that is a slider."""
    row = whatif(page).locator(".effkit-control", has=page.locator(".noUi-handle")).first
    return re.search(r"effkit-control-(\S+)", row.get_attribute("class"))[1]


def handle(page: Page, control: str) -> Locator:
    """The part of a slider that takes the focus and the keys."""
    return whatif(page).locator(f".effkit-control-{control} .noUi-handle").first


def status_text(page: Page) -> str:
    """The sentence that a screen reader would say."""
    return whatif(page).locator(".effkit-screen [role=status]").inner_text()


def svg_markup(page: Page) -> str:
    """The picture, as it stands in the page."""
    return whatif(page).locator(".effkit-screen svg").evaluate("svg => svg.outerHTML")


def press_key(page: Page, control: str, key: str) -> None:
    """Give a slider the focus and press a real key on it."""
    handle(page, control).focus()
    page.keyboard.press(key)


def click_measure(page: Page) -> None:
    """Press *Measure it*."""
    whatif(page).locator(".effkit-measure").click()


def wait_for_receipt(page: Page, timeout_s: float = 120) -> str:
    """The sentence on the screen once it speaks of a receipt; what went wrong is raised, not waited for."""

    def shown() -> bool:
        wrong = whatif(page).locator("[role=alert]").all_inner_texts()
        if wrong:
            raise AssertionError(f"no receipt: {wrong[0]}")
        return "receipt" in status_text(page).lower()

    wait_until(page, shown, "a receipt was shown", timeout_s)
    return status_text(page)


def slider_latencies(page: Page, control: str, num_moves: int, pause_s: float = 0.4) -> list[float]:
    """Milliseconds from a key press to the frame that shows the changed picture, for single moves.

    Both ends are read inside the page, on the browser's clock: the key event's own time stamp, and the first animation
    frame after the picture's markup changed. In the pause nobody asks the page anything: each move meets it at rest.
    """
    knob = handle(page, control)
    knob.focus()
    at_top = knob.get_attribute("aria-valuenow") == knob.get_attribute("aria-valuemax")
    keys = ("ArrowLeft", "ArrowRight") if at_top else ("ArrowRight", "ArrowLeft")
    whatif(page).locator(".effkit-screen").evaluate(WATCH)
    for move in range(num_moves):
        page.keyboard.press(keys[move % 2])
        page.wait_for_timeout(1000 * pause_s)
        wait_until(page, lambda: page.evaluate("window.sliderMoves.length") > move, "the picture changed", 10)  # noqa: B023
    return page.evaluate("window.sliderMoves")


def first_moves(page: Page, pause_s: float = 0.5) -> dict[str, list[tuple[float, str]]]:
    """For each slider, one step from where it rests: what the sentence said after how many milliseconds.

    Between the steps every slider is put back. Times are taken inside the page, as those of `slider_latencies`.
    """
    screen, seen = whatif(page).locator(".effkit-screen"), {}
    screen.evaluate(LISTEN)
    rest = status_text(page)
    rows = whatif(page).locator(".effkit-control", has=page.locator(".noUi-handle")).all()
    for control in [re.search(r"effkit-control-(\S+)", row.get_attribute("class"))[1] for row in rows]:
        knob = handle(page, control)
        there, back = ("ArrowRight", "ArrowLeft")
        if knob.get_attribute("aria-valuenow") == knob.get_attribute("aria-valuemax"):
            there, back = back, there
        press_key(page, control, there)
        wait_until(page, lambda: status_text(page) not in (rest, COMPUTING), "the sentence followed", 60)
        page.wait_for_timeout(1000 * pause_s)
        seen[control] = [tuple(said) for said in page.evaluate("window.sentences")]
        press_key(page, control, back)
        wait_until(page, lambda: status_text(page) == rest, "the slider was back", 60)
        page.wait_for_timeout(1000 * pause_s)
    return seen


COMPUTING = "Computing the prediction …"
LISTEN = """screen => {
    let pressed = 0, said = null;
    window.sentences = [];
    window.addEventListener("keydown", event => { pressed = event.timeStamp; window.sentences.length = 0; }, true);
    new MutationObserver(() => {
        const now = screen.querySelector("p")?.innerText;
        if (now === undefined || now === said) return;
        said = now;
        requestAnimationFrame(() => window.sentences.push([performance.now() - pressed, now]));
    }).observe(screen, {childList: true, subtree: true, attributes: true, characterData: true});
}"""
WATCH = """screen => {
    if (window.sliderMoves) { window.sliderMoves.length = 0; return; }
    window.sliderMoves = [];
    const picture = () => screen.querySelector("svg")?.outerHTML;
    let shown = picture(), pressed = null;
    window.addEventListener("keydown", event => { pressed = event.timeStamp; }, true);
    new MutationObserver(() => {
        const now = picture(), start = pressed;
        if (now === undefined || now === shown) return;
        [shown, pressed] = [now, null];
        if (start !== null) requestAnimationFrame(() => window.sliderMoves.push(performance.now() - start));
    }).observe(screen, {childList: true, subtree: true, attributes: true, characterData: true});
}"""
