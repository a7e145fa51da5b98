"""What is installed is what is pinned, the same way everywhere, and the repository names no particular machine."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NAMED = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
LINES = [line for line in (REPO / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
ENVIRONMENT = REPO / "environment.yml"


def pins() -> dict[str, Version]:
    pairs = [line.split(";")[0].split("==") for line in LINES]
    return {canonicalize_name(name.strip()): Version(version.strip()) for name, version in pairs}


def repository_files() -> list[Path]:
    """Everything that is, or could be, committed."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.split("\0")
    return [REPO / name for name in names if name and (REPO / name).is_file()]


def test_every_constraint_is_one_exact_public_version():
    exact = re.compile(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*(\s*;.*)?")
    assert not [line for line in LINES if not exact.fullmatch(line)], "no local build (+cpu), path or address"


def test_no_package_is_pinned_twice():
    assert len(pins()) == len(LINES)


def test_every_requirement_is_pinned_within_its_range():
    requirements = [Requirement(line) for line in NAMED]
    assert not [str(requirement) for requirement in requirements if requirement.url]
    versions = {str(requirement): pins().get(canonicalize_name(requirement.name)) for requirement in requirements}
    assert not [line for line, version in versions.items() if version is None], "constraints.txt lacks these"
    allowed = {str(one): one.specifier.contains(versions[str(one)], prereleases=False) for one in requirements}
    assert not [line for line, allows in allowed.items() if not allows]


def test_torch_is_resolved_first():
    assert Requirement(PROJECT["dependencies"][0]).name == "torch"


def test_environment_yml_installs_the_same_as_make_lab():
    content = yaml.safe_load(ENVIRONMENT.read_text())
    assert content["name"] == PROJECT["name"] == "effkit"
    assert content["channels"] == ["conda-forge"]
    python, pip, requirements = content["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert pip == "pip"
    assert requirements == {"pip": ["-c constraints.txt", "-e ."]}
    assert set(EXTRAS) == {"app", "fleet", "test", "dev", "docs"}
    assert set(EXTRAS["fleet"]) <= set(EXTRAS["test"])


def test_files_that_the_package_names_are_there():
    for name in (PROJECT["readme"], *PROJECT["license-files"]):
        assert (REPO / name).is_file()


def test_ci_only_calls_make_test():
    script = REPO / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line.strip() for line in script.read_text().splitlines()]
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["exec make test"]


# a mirror, an index option, or somebody's home: written so that these lines do not match themselves
ELSEWHERE = {
    "a package registry": r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|conda\.anaconda\.org"
    r"|--(?:extra-)?index-ur[l]|--find-link[s]|--trusted-hos[t]",
    "a path of one machine": r"(?<![\w.])/(?:wor[k]|roo[t]|User[s])/",
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_no_file_names(what):
    found = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if match := re.search(ELSEWHERE[what], line):
                found.append(f"{path.relative_to(REPO)}:{number}: {match.group()}")
    assert not found


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a package registry", "pip install --index-" + "url https://x"),
        ("a package registry", "https://files.python" + "hosted.org/x"),
        ("a path of one machine", '"/wo' + 'rk/main/x"'),
        ("a path of one machine", "cd /ro" + "ot/.cache"),
    ],
)
def test_the_check_for_names_notices_them(what, line):
    assert re.search(ELSEWHERE[what], line)


PAGES = [*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_text("utf-8").splitlines()) <= 120
