"""One version, in every place that states it."""

import re
import tomllib
from pathlib import Path

import yaml

import eaftdrope

ROOT = Path(__file__).parent.parent


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert eaftdrope.__version__ == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]


def test_the_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["title"] == "eaftdrope"
    assert citation["message"] and all(author.get("name") for author in citation["authors"])
    for reference in citation["references"]:
        assert reference["title"] and reference["url"].startswith("https://arxiv.org/abs/")
        assert all(author["family-names"] and author["given-names"] for author in reference["authors"])
