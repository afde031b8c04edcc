"""Render a `Page` as one self-contained HTML file, without network, fonts or scripts, and write its figures."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

from eaftdrope.files import write_atomically

from .blocks import Page, Picture
from .figures.style import save_figure

# The page must open on a phone. Lists in it are truncated, so its size stays below this.
MAX_BYTES = 3_000_000
# HTML does not allow control characters; their Unicode pictures are shown instead.
_CONTROLS: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
# these would reorder the text around them, so that code could be read as other code
_CONTROLS |= {code: f"⟨U+{code:04X}⟩" for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def render(page: Page) -> str:
    """Return the HTML document."""
    html = _environment().get_template("page.html").render(page=page, css=_asset("page.css"))
    # JSON can contain an unpaired UTF-16 surrogate, UTF-8 cannot
    return html.encode("utf-8", "replace").decode("utf-8")


def write_page(page: Page, path: Path) -> Path:
    """Write the rendered page to `path` atomically, and return the path."""
    html = render(page)
    assert len(html.encode()) <= MAX_BYTES, f"a report of {len(html):,} characters: one of its lists is not truncated"
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


class FigureWriter:
    """Write the figures of a page as PNG and SVG into `folder`, with `prefix` before each name."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self._prefix = folder, prefix

    def picture(self, name: str, figure: Figure, label: str, caption: str = "", *, wide: bool = False) -> Picture:
        """Write and close a figure, and return it as a block of the page.

        Args:
            label: description for readers who cannot see the figure.
            caption: text below it; the label by default.
            wide: the figure has several panels and scrolls on a phone.
        """
        svg = save_figure(figure, self.folder, self._prefix + name)
        return Picture(self._prefix + name, svg, label, caption or label, wide)
