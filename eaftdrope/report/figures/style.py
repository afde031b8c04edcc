"""The look of figures and their output: PNG and SVG files, and the same SVG inline in a light or dark page.

A figure is drawn once, in the colours of a white page. In the inline copy each of these colours becomes a variable of
page.css, which has a light and a dark value for it; text stays text, in the page's font. Figures are narrow: on a phone
they fill the width of the screen, and their text must stay legible.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

# no display is needed
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eaftdrope.files import replacing, write_atomically

INK, MUTED, RULE = "#1b1f24", "#5b6470", "#d9dee4"
# Okabe and Ito's palette: distinguishable with any colour vision
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
SERIES = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, INK)
MARKERS = "osD^vXP"
# almost white; becomes transparent in a page
_PAPER = "#fffffe"
_VARIABLES = {
    INK: "var(--ink)",
    "#000000": "var(--ink)",
    MUTED: "var(--muted)",
    "#555555": "var(--muted)",
    "#777777": "var(--muted)",
    "#999999": "var(--muted)",
    RULE: "var(--rule)",
    "#dddddd": "var(--rule)",
    _PAPER: "none",
    BLUE: "var(--blue)",
    VERMILION: "var(--vermilion)",
    GREEN: "var(--green)",
    PINK: "var(--pink)",
    ORANGE: "var(--orange)",
    SKY: "var(--sky)",
}
_SETTINGS = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.5,
    # a dollar sign in a name is not a formula
    "text.parse_math": False,
    "svg.fonttype": "none",
    # the same figure gives the same bytes
    "svg.hashsalt": "eaftdrope",
}
WIDTH = 4.6
"""Width in inches of a figure that fills the screen of a phone, and half of a desktop's."""


@contextmanager
def styled() -> Iterator[None]:
    """Apply the settings of matplotlib to figures drawn inside this context."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(height: float = 2.9, width: float = WIDTH) -> tuple[Figure, Axes]:
    """Return an empty figure with one panel; sizes in inches. Call it inside `styled`."""
    return plt.subplots(figsize=(width, height), layout="constrained")


def legend_above(axes: Axes, columns: int = 3) -> None:
    """Place the legend above the panel, where it covers no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.2)


def save_figure(figure: Figure, folder: Path, name: str) -> str:
    """Write `folder`/`name`.png and .svg, close the figure, and return the SVG for a page."""
    folder.mkdir(parents=True, exist_ok=True)
    svg = io.StringIO()
    with styled(), warnings.catch_warnings():
        # the browser has fonts that matplotlib lacks
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(svg, format="svg", metadata=nothing)
        # keep the layout of the SVG
        figure.set_layout_engine("none")
        with replacing(folder / f"{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    write_atomically(folder / f"{name}.svg", svg.getvalue().encode("utf-8", "replace"))
    return inline_svg(svg.getvalue(), name)


def inline_svg(svg: str, name: str) -> str:
    """Return matplotlib's SVG as an element of a page: sized by the page, in its colours and font, with unique ids."""
    root = ET.fromstring(svg)
    needed = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.get("id") not in needed:
            element.attrib.pop("id", None)
        element.attrib = {key.rpartition("}")[2]: _in_page(key, value, name) for key, value in element.attrib.items()}
    for parent in list(root.iter("defs")):
        for sheet in parent.findall("style"):
            # would apply to the whole page
            parent.remove(sheet)
    view = root.attrib["viewBox"]
    root.attrib = {"viewBox": view, "style": f"--width:{view.split()[2]}", "aria-hidden": "true"}
    return ET.tostring(root, encoding="unicode")


def _in_page(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    if key != "style":
        return value
    value = re.sub(r"font-family: [^;]*;? ?", "", value)
    # matplotlib before 3.11 uses the shorthand
    value = re.sub(r"font: (?:(bold) )?([\d.]+px) [^;]*", lambda found: _font(*found.groups()), value)
    return re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), value)


def _font(weight: str | None, size: str) -> str:
    return f"font-size: {size}" + (f"; font-weight: {weight}" if weight else "")
