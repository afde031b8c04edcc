"""Take the pictures of the documentation: the table at the top of a run's report, and pages of the built site.

python docs/screenshots.py --run runs/quickstart     images/before_after.png (needs chromium)
python docs/screenshots.py --journal run.jsonl       images/rlm_run.png, of the journal that examples/rlm_ask.py keeps
python docs/screenshots.py --site build/site         images/site_*.png at 390 and 1280 pixels
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
sys.path.insert(0, str(DOCS.parent))

from eaftdrope.report.page import write_report  # noqa: E402
from tests.report.browser import Browser, Page  # noqa: E402

PAGES = {"home": "index.html", "gates": "docs/gates.html", "recipes": "docs/recipe_reference.html"}
WIDTHS = (390, 1280)
# The first section of a run's report: the table and the figure below it.
_OUTCOME = """
(() => {
  const section = document.querySelector("section");
  const first = section.getBoundingClientRect(), last = section.querySelector("figure").getBoundingClientRect();
  return [first.top + window.scrollY, last.bottom - first.top];
})()
"""


def picture_of_run(browser: Browser, run: Path) -> None:
    page = browser.open(run / "report.html", width=1000)
    top, height = page.evaluate(_OUTCOME)
    clip = {"x": 0, "y": top, "width": 1000, "height": height + 16, "scale": 1}
    image = page.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    (IMAGES / "before_after.png").write_bytes(base64.b64decode(image["data"]))


def picture_of_journal(browser: Browser, journal: Path) -> None:
    page = browser.open(write_report(journal, journal.with_suffix(".html")), width=1000)
    # the first turns, with the first calls of the last one
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    top = page.evaluate("document.querySelector('#strategies').getBoundingClientRect().top + window.scrollY")
    clip = {"x": 0, "y": top - 16, "width": 1000, "height": 1040, "scale": 1}
    image = page.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    (IMAGES / "rlm_run.png").write_bytes(base64.b64decode(image["data"]))


def pictures_of_site(browser: Browser, site: Path) -> None:
    for name, path in PAGES.items():
        for width in WIDTHS:
            page = browser.open(site / path, width=width)
            assert overflow(page) == 0, f"{path} is {overflow(page)} px wider than {width}"
            page.screenshot(IMAGES / f"site_{name}_{width}.png", most=1600)


def overflow(page: Page) -> int:
    """Pixels by which a page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--journal", type=Path, help="journal of an RLM run")
    parser.add_argument("--site", type=Path, help="folder of the built site")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        if arguments.run:
            picture_of_run(browser, arguments.run)
        if arguments.journal:
            picture_of_journal(browser, arguments.journal)
        if arguments.site:
            pictures_of_site(browser, arguments.site)


if __name__ == "__main__":
    main()
