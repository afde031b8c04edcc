"""The pages in a real browser: no console messages, no requests, and no overflow at the width of a phone or a desktop."""

import pytest

from tests.report.browser import CHROMIUM, Browser
from tests.report.planted import FOLDERS
from tests.report.planted_rlm import RLM_FOLDERS

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not on PATH, so the report is not checked in a browser"
)
KINDS = [*FOLDERS, *RLM_FOLDERS, "side by side"]
WIDTHS = (390, 1280)

# Elements that overflow the right edge, or whose text does, except those that scroll.
_OVER_THE_EDGE = """
[...document.querySelectorAll('body *')].filter(element =>
    !element.closest('.scroll, .wide, pre, svg, .unseen, .stack thead')
    && (element.getBoundingClientRect().right > innerWidth + 1
        || (getComputedStyle(element).display !== 'inline' && element.scrollWidth > element.clientWidth + 1))
).map(element => element.tagName + '.' + element.className + ': ' + element.textContent.slice(0, 40))
"""
# Size in pixels of the smallest text in the figures that fill the page.
_SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('figure:not(.wide) svg')].flatMap(svg => {
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    return [...svg.querySelectorAll('text')].map(text => scale * parseFloat(getComputedStyle(text).fontSize));
}))
"""
_LOADED = "(() => { const n = performance.getEntriesByType('navigation')[0]; return n.loadEventEnd - n.startTime })()"
# The colours of the page's background, its text, and the text and lines of its figures.
_COLOURS = """
(() => {
    const of = (query, name) => getComputedStyle(document.querySelector(query))[name].match(/\\d+/g).slice(0, 3).map(Number);
    const ground = of('body', 'backgroundColor');
    return {ground, text: of('p.summary', 'color'), figure: of('svg text', 'fill'), note: of('.note', 'color')};
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_and_is_silent(browser, reports, kind, width):
    page = browser.open(reports[kind], width=width)
    assert page.complaints == []
    assert [url[:40] for url in page.requests if not url.startswith(("file:", "data:image/png"))] == []
    assert sum(url.startswith("file:") for url in page.requests) == 1
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert page.evaluate(_OVER_THE_EDGE) == []
    if page.evaluate("document.querySelectorAll('figure:not(.wide)').length"):
        assert page.evaluate(_SMALLEST_TEXT) >= 8


def test_what_is_over_the_edge_is_seen(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><body><p style="white-space: nowrap">' + "wide " * 200
    )
    assert browser.open(page, width=390).evaluate(_OVER_THE_EDGE)
    page.write_text('<body><img src="missing.png"><script>throw new Error("x")</script>')
    assert len(browser.open(page, width=390).complaints) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_in_under_a_second(browser, reports, kind):
    # the machine may be busy with something else
    assert min(browser.open(reports[kind], width=390).evaluate(_LOADED) for _ in range(3)) < 1000


def contrast(one, other):
    """WCAG 2's ratio of two colours."""

    def luminance(colour):
        parts = [part / 255 for part in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_can_be_read_in_light_and_dark(browser, reports, dark):
    colours = browser.open(reports["run"], width=1280, dark=dark).evaluate(_COLOURS)
    assert (sum(colours["ground"]) < 150) == dark
    for what in ("text", "figure", "note"):
        assert contrast(colours[what], colours["ground"]) > 4.5, what


def test_nothing_scrolls_away_on_paper(browser, reports):
    page = browser.open(reports["inspect"], width=1280)
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
