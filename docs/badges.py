"""The README's badges, which open the lessons on Binder and on Colab: ``python docs/badges.py`` writes them.

They lead to the repository that ``pyproject.toml`` names (``[project.urls] Repository``, on GitHub). While it names
none, there are none: a badge that leads nowhere is worse than no badge.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FIRST = "notebooks/00_start_here.ipynb"
BEGIN = "<!-- badges: written by docs/badges.py, once pyproject.toml names the repository -->\n"
END = "<!-- /badges -->"
_GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")


def badges(project: str) -> str:
    """Lines of Markdown for a ``pyproject.toml`` of this text. ValueError for a repository that is not on GitHub."""
    address = tomllib.loads(project)["project"].get("urls", {}).get("Repository")
    if address is None:
        return ""
    found = _GITHUB.fullmatch(address)
    if found is None:
        raise ValueError(f"Binder and Colab are given a repository on GitHub, https://github.com/…; given: {address}")
    links = {
        "binder": ("Binder", f"https://mybinder.org/v2/gh/{found[1]}/HEAD?urlpath=lab/tree/{FIRST}"),
        "colab": ("Colab", f"https://colab.research.google.com/github/{found[1]}/blob/HEAD/{FIRST}"),
    }
    return "".join(
        f"[![Open the first lesson in {site}](docs/pictures/{name}.svg)]({link})\n"
        for name, (site, link) in links.items()
    )


def with_badges(readme: str, project: str) -> str:
    """The README with what belongs between its markers."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + badges(project) + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    page = REPO / "README.md"
    text = with_badges(page.read_text(encoding="utf-8"), (REPO / "pyproject.toml").read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
