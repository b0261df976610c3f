"""What a release says of itself: one version, a changelog in its form, a citation that others' tools read."""

import re
import tomllib
from pathlib import Path
from typing import Any

import ncollapse

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_version_stands_in_pyproject_alone() -> None:
    """The installed metadata and the citation repeat it."""
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited[1] == PROJECT["version"] == ncollapse.__version__


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions[1:])
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for section in text.split("\n## ")[1:]:
        found = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert found == [kind for kind in kinds if kind in found]


def test_every_extra_has_lower_bounds() -> None:
    """`make lowest` installs them: a requirement without a bound would be tested with its oldest version."""
    for requirements in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]:
        for requirement in requirements:
            assert ">=" in requirement or requirement.startswith("ncollapse["), requirement
