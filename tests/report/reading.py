"""A parser of report pages: text by section, tags, and references."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Read(HTMLParser):
    """A parsed page: `problems` are unbalanced tags, `references` the values of src, href, url(...) and the like, `text` the
    visible text, `sections` the same by anchor, and `rows` the cells of every table row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.handlers: list[str] = []
        self.sections: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self._section = ""
        self._cell = False
        self.feed(html)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self._open]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        self._attributes(attributes)
        if tag == "section":
            self._section = dict(attributes)["id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self._attributes(attributes)

    def handle_endtag(self, tag):
        if not self._open or self._open[-1] != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes <{self._open[-1] if self._open else ''}>")
        else:
            self._open.pop()
        if tag == "section":
            self._section = ""
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if "style" in self._open:
            self.references += re.findall(r"(?:url\(|@import\s*)[^;)]*", data)
            return
        self.text += data
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if self._cell:
            self.rows[-1][-1] += data.replace("\u00a0", " ")

    def _attributes(self, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
            if name == "aria-label":
                self.labels.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
            self.references += (
                re.findall(r"url\(([^)]*)\)", value or "") if name in ("style", "clip-path", "fill") else []
            )
