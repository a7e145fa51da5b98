"""The README's badges lead to the repository that pyproject.toml names, or are not there."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "docs"))
from badges import BEGIN, END, FIRST, badges, with_badges  # noqa: E402

NAMED = '[project]\nname = "x"\n[project.urls]\nRepository = "{}"\n'


def test_the_readme_has_the_badges_of_this_project():
    readme = (REPO / "README.md").read_text()
    assert with_badges(readme, (REPO / "pyproject.toml").read_text()) == readme, "run: python docs/badges.py"
    assert len(readme.splitlines()) <= 120


def test_without_an_address_there_is_no_badge():
    assert badges('[project]\nname = "x"\n') == ""
    assert with_badges(f"a\n{BEGIN}old\n{END}\nb", '[project]\nname = "x"\n') == f"a\n{BEGIN}{END}\nb"


@pytest.mark.parametrize("ending", ["", ".git", "/"])
def test_a_badge_opens_the_first_lesson_of_the_named_repository(ending):
    binder, colab = badges(NAMED.format(f"https://github.com/some-one/a.kit{ending}")).splitlines()
    assert binder.endswith(f"](https://mybinder.org/v2/gh/some-one/a.kit/HEAD?urlpath=lab/tree/{FIRST})")
    assert colab.endswith(f"](https://colab.research.google.com/github/some-one/a.kit/blob/HEAD/{FIRST})")
    assert (REPO / FIRST).is_file()
    for line in (binder, colab):
        words, picture = line[3:].split("](")[0], line.split("](")[1].split(")")[0]
        assert words.startswith("Open the first lesson in"), "alternative text"
        assert ElementTree.parse(REPO / picture).getroot().get("role") == "img"


def test_another_host_is_refused():
    with pytest.raises(ValueError, match=r"a repository on GitHub, .*given: https://example\.org/a/b"):
        badges(NAMED.format("https://example.org/a/b"))
