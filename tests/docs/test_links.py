"""Links between the documents lead to files and headings that exist, and the site has every page."""

import re
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import ROOT, generator

GENERATE = generator()
PAGES = [path for path in GENERATE.reached() if path.suffix == ".md"]
WRITTEN = sorted((ROOT / "docs").glob("*.md"))


def _headings(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {GENERATE.anchor(line) for line in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}


def _broken(path: Path, link: str) -> str | None:
    """Why a link of the document `path` leads nowhere."""
    if re.match(r"https?://", link):
        return None
    name, _, heading = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    if not target.is_file():
        return f"{link}: no such file"
    if not target.is_relative_to(ROOT):
        return f"{link}: outside of the repository"
    return f"{link}: no such heading" if heading and heading not in _headings(target) else None


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    assert [problem for link in GENERATE.links(path.read_text()) if (problem := _broken(path, link))] == []


def test_a_broken_link_is_found(tmp_path):
    page = ROOT / "docs/quickstart.md"
    assert _broken(page, "nowhere.md") == "nowhere.md: no such file"
    assert _broken(page, "probes.md#nothing") == "probes.md#nothing: no such heading"
    assert _broken(page, "../examples") == "../examples: no such file"
    assert _broken(page, "probes.md#during-training") is None
    text = "[a](one.md) ![b](two.png) `[c](code.md)`\n```\n[d](block.md)\n```\n[e](https://example.org/x)"
    assert GENERATE.links(text) == ["one.md", "two.png", "https://example.org/x"]


def _in_navigation(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [path for below in (entry.values() if isinstance(entry, dict) else entry) for path in _in_navigation(below)]


def test_the_navigation_has_every_page_that_the_readme_leads_to():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(_in_navigation(site["nav"])) == sorted(str(path.relative_to(ROOT)) for path in PAGES)
    assert set(WRITTEN) <= set(PAGES), "a page of docs/ to which no page leads"
    assert site["validation"]["links"]["anchors"] == site["validation"]["links"]["not_found"] == "warn"


def test_the_site_is_laid_out_as_the_repository_is(tmp_path):
    GENERATE.lay_out(tmp_path / "site")
    for name in ("README.md", "docs/gates.md", "docs/site.css", "docs/images/before_after.png", "examples/own_loop.py"):
        assert (tmp_path / "site" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (tmp_path / "site" / "docs/generate.py").exists()


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    text = "\n".join(lines)
    for needed in ("git clone", "make quickstart", "make test", "docs/images/before_after.png", "no difference beyond"):
        assert needed in text
    assert "pip install eaftdrope" not in text, "no package is published"
