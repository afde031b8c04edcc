"""From a `Page` to one file of HTML that needs nothing beside it: no network, no font, no script.

Puts figures into a folder, and hands them to a page.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

from eaftdrope.files import write_atomically

from .blocks import Page, Picture
from .figures.style import save_figure

# A page that people open from a phone; the lists in it are cut so that it stays below.
MAX_BYTES = 3_000_000
# Control characters are not allowed in HTML; their pictures are.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def render(page: Page) -> str:
    """The whole document."""
    html = _environment().get_template("page.html").render(page=page, css=_asset("page.css"))
    # half of a pair of UTF-16 can be in a JSON file and not in a UTF-8 one
    return html.encode("utf-8", "replace").decode("utf-8")


def write_page(page: Page, path: Path) -> Path:
    """Render into `path`, whole or not at all."""
    html = render(page)
    assert len(html.encode()) <= MAX_BYTES, f"a report of {len(html):,} characters: a list in it is not cut"
    return write_atomically(path, html)


@cache
def _environment():
    from jinja2 import DictLoader, Environment, StrictUndefined

    environment = Environment(
        loader=DictLoader({name: _asset(name) for name in ("page.html", "blocks.html")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_controls,
    )
    return environment


def _without_controls(value: object) -> object:
    return value.translate(_CONTROLS) if type(value) is str else value


def _asset(name: str) -> str:
    return (files("eaftdrope.report") / "assets" / name).read_text(encoding="utf-8")


class Drawer:
    """Writes every figure as PNG and SVG into `folder`, with `prefix` before its name."""

    def __init__(self, folder: Path, prefix: str = ""):
        self.folder, self._prefix = folder, prefix

    def picture(self, name: str, figure: Figure, label: str, caption: str = "", *, wide: bool = False) -> Picture:
        """Draw and close a figure.

        Args:
            label: what is seen, for those who can not see it.
            caption: below it; the label where there is none.
            wide: it has several panels, and scrolls on a phone.
        """
        svg = save_figure(figure, self.folder, self._prefix + name)
        return Picture(self._prefix + name, svg, label, caption or label, wide)
