"""The documentation site, built once: complete, whole, and readable without a network."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from lab_browser import launched, why_no_browser
from playwright.sync_api import sync_playwright

REPO = Path(__file__).resolve().parents[1]
LESSONS = sorted(path.stem for path in (REPO / "notebooks").glob("0*.ipynb"))
MODULES = ("effkit.padding", "effkit.activations", "effkit.moe", "effkit.decoder", "effkit.models", "effkit.advice",
           "effkit.claims", "effkit.view", "effkit")  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Path -> text of every page."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(folder)]
    built = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr[-3000:]
    return {path: path.read_text() for path in folder.rglob("*.html")}


def named(pages, ending):
    found = [text for path, text in pages.items() if path.as_posix().endswith(ending)]
    assert len(found) == 1, ending
    return found[0]


def test_every_public_name_has_a_page_of_its_own(pages):
    for module in MODULES:
        for name in import_module(module).__all__:
            if f"{module}.{name}" not in MODULES:
                assert f'id="{module}.{name}"' in named(pages, f"/names/{module}.{name}.html"), name


def test_every_lesson_is_there_with_its_outputs_and_pictures(pages):
    for lesson in LESSONS:
        text = named(pages, f"/notebooks/{lesson}.html")
        assert text.count('class="cell_output') > 5
        assert "<img" in text or lesson == "06e_cluster_on_paper"


def test_formulas_are_written_for_the_browser_itself(pages):
    assert named(pages, "/notebooks/01_padding.html").count("<math") > 3


def test_every_picture_says_what_it_shows(pages):
    pictures = [tag for text in pages.values() for tag in re.findall(r"<img[^>]*>", text)]
    assert len(pictures) > 40
    for tag in pictures:
        said = re.search(r'alt="([^"]*)"', tag)
        assert said, tag
        assert len(said[1]) > 20, tag
        assert not re.search(r"\.(png|svg)$", said[1]), tag


def test_nothing_is_fetched_from_elsewhere(pages):
    for path, text in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"|<link[^>]*\bhref="([^"]+)"', text)
        assert not [url for pair in loaded for url in pair if urlsplit(url).netloc], path.name


def test_no_link_within_the_site_is_broken(pages):
    broken = []
    for path, text in pages.items():
        for link in re.findall(r'<a [^>]*href="([^"]+)"', text):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not parts.path:
                continue
            if not (path.parent / unquote(parts.path)).exists():
                broken.append((path.name, link))
    assert not broken


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page that a report is."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    recorded = REPO / "data" / "captures" / "text_amd-epyc.zip"
    subprocess.run([sys.executable, "-m", "effkit", "report", recorded, "-o", path], cwd=REPO, check=True)
    return path


@pytest.mark.browser
@pytest.mark.skipif(bool(why_no_browser()), reason=str(why_no_browser()))
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(pages, report, scheme):
    lessons = [path for path in pages if path.stem in (*LESSONS, "effkit.Account", "accuracy", "README")]
    assert len(lessons) >= len(LESSONS) + 3
    script = (Path(__file__).parent / "contrast.js").read_text()
    with sync_playwright() as playwright:
        browser = launched(playwright)
        page = browser.new_context(color_scheme=scheme).new_page()
        for path in (report, *lessons):
            page.goto(path.as_uri())
            assert page.evaluate(script) == {}, path.name
        browser.close()
