"""The what-if page as a class meets it: `make app`'s command, a real browser, no code, nothing off loopback.

Pictures of what the reader saw are left in tests/screenshots/.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from lab_browser import (
    OUTSIDE,
    REPO,
    click_measure,
    first_slider,
    launched,
    press_key,
    status_text,
    svg_markup,
    wait_for_receipt,
    wait_until,
    whatif,
    why_no_browser,
)
from lab_processes import left_by_a_killed_test, serving, started_by, still_there
from playwright.sync_api import Page, sync_playwright
from test_browser import SCREENSHOTS

sys.path.insert(0, str(REPO / "notebooks"))

import canonical

APP = REPO / "notebooks" / "app"
ADDRESS = re.compile(r"(http://127\.0\.0\.1:\d+/)\?token=(\w+)")

in_a_browser = pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))


@dataclass(frozen=True)
class Served:
    """The running app: where it answers, its process, and the file with what it has said."""

    url: str
    token: str
    process: psutil.Process
    log: Path

    @property
    def address(self) -> str:
        return f"{self.url}?token={self.token}"


@contextmanager
def served(app: Path = APP) -> Iterator[Served]:
    """Serve the page as `make app` does, on a free port; whatever happens, it ends with its kernels."""
    with tempfile.TemporaryDirectory(prefix="app_", ignore_cleanup_errors=True) as temp:
        home = Path(temp)
        log = home / "app.log"
        with socket.socket() as free:  # should another take it meanwhile, Voilà goes on to the next
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, str(app), f"--port={port}", "--no-browser"]
        with serving(command, home, home, log) as server:
            url, token = printed_address(server, log)
            yield Served(url, token, psutil.Process(server.pid), log)


def printed_address(server: subprocess.Popen[bytes], log: Path, timeout_s: float = 60) -> tuple[str, str]:
    """Address and token as they are printed for those who have to paste them."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and server.poll() is None:
        if found := ADDRESS.search(log.read_text()):
            return found[1], found[2]
        time.sleep(0.1)
    raise RuntimeError(f"the app did not start in {timeout_s:.0f} s; it said:\n{log.read_text()[-3000:]}")


@contextmanager
def app_page(app: Served, asked: list[str] | None = None) -> Iterator[Page]:
    """The page, open and with its buttons. Every address that it asks for is noted in `asked`."""
    asked = [] if asked is None else asked
    with sync_playwright() as playwright:
        browser = launched(playwright)
        page = browser.new_context(viewport={"width": 1280, "height": 1000}, service_workers="block").new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        try:
            page.goto(app.address)
            page.locator(".effkit-labs button").first.wait_for(timeout=90_000)
            yield page
        finally:
            browser.close()


def choose(page: Page, lab: str) -> None:
    page.locator(".effkit-labs").get_by_role("button", name=lab, exact=True).click()


def said(page: Page) -> str:
    """The sentence under the buttons."""
    return page.locator(".effkit-sentence").inner_text().strip()


def answer(url: str) -> tuple[int, str, str]:
    """Status, final address and text of what a visitor gets."""
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return reply.status, reply.url, reply.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, url, error.read().decode("utf-8", "replace")


def test_the_page_is_a_canonical_notebook():
    assert not canonical.problems(APP / "whatif.ipynb")


def test_make_serves_what_is_tested_here():
    assert re.search(r"^app:.*\n\t\$\(BIN\)/python notebooks/app$", (REPO / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.browser
@pytest.mark.slow
@in_a_browser
def test_a_class_opens_the_page_moves_a_slider_and_gets_a_receipt(capsys):
    SCREENSHOTS.mkdir(exist_ok=True)
    before, asked, start = started_by(os.getpid()), [], time.perf_counter()
    with served() as app:
        up_s = time.perf_counter() - start
        with app_page(app, asked) as page:
            shown_s = time.perf_counter() - start
            page.screenshot(path=SCREENSHOTS / "app_start.png")
            try:
                choose(page, "Padding")
                wait_until(page, lambda: "Measuring" in said(page), "the page said that it measures", 20)
                wait_until(page, whatif(page).count, "the sliders were there", 120)
                usable_s = time.perf_counter() - start
                slider, sentence, picture = first_slider(page), status_text(page), svg_markup(page)
                press_key(page, slider, "ArrowRight")
                wait_until(page, lambda: status_text(page) != sentence, "the sentence followed the slider", 10)
                wait_until(page, lambda: svg_markup(page) != picture, "the picture followed the slider", 10)
                assert "receipt" not in status_text(page).lower(), "a receipt for a setting that nobody has run"
                click_measure(page)
                assert any(sign.isdigit() for sign in wait_for_receipt(page))
                assert "Measuring" not in said(page)
            finally:  # after a failure this is what the reader would be looking at
                page.screenshot(path=SCREENSHOTS / "app_receipt.png")

            for lab, knob in (("Activation memory", "checkpoint_every"), ("Decoder", "decoder_layers")):
                choose(page, lab)
                page.locator(f".effkit-control-{knob}").wait_for(timeout=120_000)
                page.screenshot(path=SCREENSHOTS / f"app_{knob}.png")
            choose(page, "Padding")
            page.locator(".effkit-control-strategy").wait_for(timeout=20_000)
            assert "receipt" in status_text(page).lower(), "what was measured before is still there"

            assert page.locator(".jp-CodeCell .jp-InputArea, .jp-CodeMirrorEditor, .cm-editor, .highlight").count() == 0
            for code in ("padding_lab", "import effkit", "set_num_threads"):
                assert code not in page.content(), "the page is without its code"
            widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
            assert widths[0] <= widths[1], "nothing hangs over the edge"
            assert len(asked) > 10
            assert [url for url in asked if OUTSIDE.match(url)] == [], "nothing may be asked of the network"
            assert page.evaluate(REFUSED).startswith("connect-src"), "and the browser would refuse"

            family = started_by(os.getpid()) - before
            assert app.process in family
            assert started_by(app.process.pid), "no kernel was seen, so its end would prove nothing"
            assert "Traceback" not in app.log.read_text()
    assert still_there(family) == []
    with capsys.disabled():
        print(f"\nserver up after {up_s:.1f} s, page after {shown_s:.1f} s, sliders after {usable_s:.1f} s")


REFUSED = """() => new Promise(resolve => {
    document.addEventListener("securitypolicyviolation", event => resolve(event.violatedDirective), {once: true});
    fetch("https://outside.invalid/").catch(() => setTimeout(() => resolve("nothing refused it"), 500));
})"""


@pytest.mark.slow
def test_nobody_gets_in_without_the_token():
    with served() as app:
        listening = [one.laddr.ip for one in app.process.net_connections() if one.status == psutil.CONN_LISTEN]
        assert set(listening) == {"127.0.0.1"}
        _, url, text = answer(app.url)
        assert "/login" in url
        assert "effkit" not in text
        assert answer(f"{app.url}?token=wrong")[1] != f"{app.url}?token=wrong"
        for file in ("whatif.ipynb", "__main__.py", "template/index.html.j2"):
            assert answer(f"{app.url}voila/files/{file}?token={app.token}")[0] in (403, 404), "no file is handed out"
        stranger = urllib.request.Request(app.address, headers={"Host": "elsewhere.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(stranger, timeout=20)
        assert started_by(app.process.pid) == set(), "a kernel for nobody"


@pytest.mark.browser
@pytest.mark.slow
@in_a_browser
def test_what_goes_wrong_is_said_on_the_page(tmp_path):
    folder = tmp_path / "notebooks"  # without the data beside it
    shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(REPO / "notebooks" / "jupyter_server_config.py", folder)
    with served(folder / "app") as app, app_page(app) as page:
        choose(page, "Padding")
        alert = page.locator(".effkit-sentence [role=alert]")
        alert.wait_for(timeout=60_000)
        assert "spoken_docs.csv" in alert.inner_text()
        choose(page, "Activation memory")
        wait_until(page, whatif(page).count, "another lab opened all the same", 120)
        assert alert.count() == 0


KILLED = """
import sys
from test_app import app_page, served
with served() as app, app_page(app):
    print(app.process.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.browser
@pytest.mark.slow
@in_a_browser
def test_nothing_is_left_running_when_the_test_itself_is_killed():
    assert left_by_a_killed_test(KILLED) == []
