"""Puts figures into a folder, and hands them to a page."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from .blocks import Picture
from .style import save_figure


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
