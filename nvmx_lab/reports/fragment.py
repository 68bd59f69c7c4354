"""HTML from notebooks, made safe: parsed, stripped to an allow-list, and written anew.

What a notebook shows may hold text from anywhere (a mix's title, a traceback), so none of its HTML
enters a report as it is. Only the elements and attributes below survive, every text is escaped
again, and nothing that could load or run anything is among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html.parser import HTMLParser
from typing import Final
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element

BADGES: Final = (
    *("simulated", "executed", "published", "published-code"),
    *("measured", "calibrated", "assumed"),
)
"""Where a number comes from; a span of class "badge" and one of these is a provenance badge."""

_TABLE = {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"}
_BLOCK = {"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "dl", "dt", "dd"}
_BLOCK |= {"blockquote", "pre", "hr", "details", "summary", "figure", "figcaption"}
_INLINE = {"span", "a", "b", "strong", "i", "em", "code", "kbd", "samp", "var", "sub", "sup"}
_INLINE |= {"br", "small", "abbr", "q", "del", "ins", "mark", "img", "wbr"}
ALLOWED: Final = frozenset(_TABLE | _BLOCK | _INLINE)
_VOID = frozenset({"br", "hr", "img", "wbr"})
# Dropped with everything inside: their content is not text to read.
_DROPPED = frozenset(
    {"script", "style", "template", "noscript", "iframe", "object", "embed", "svg", "math"}
    | {"title", "head", "textarea", "select", "video", "audio", "canvas", "noembed", "xmp"}
)
_ATTRIBUTES: Final = {
    "a": {"href"},
    "img": {"src", "alt"},
    "th": {"colspan", "rowspan", "scope"},
    "td": {"colspan", "rowspan"},
    "ol": {"start"},
    "abbr": {"title"},
    "details": {"open"},
    **{f"h{level}": {"id"} for level in range(1, 7)},
}
# Deeper than any page, and far from Python's recursion limit, which writing the tree would meet.
_DEEPEST: Final = 100
# Pygments' classes are one to three letters; nothing else of ours looks like that.
_CLASS = re.compile(rf"badge|highlight|{'|'.join(BADGES)}|[a-z]{{1,2}}[0-9]?")
_DATA_IMAGE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+\Z")
# A fragment, or a relative path: no scheme, no host, no way up.
_RELATIVE = re.compile(r"(?:[A-Za-z0-9_][\w.+-]*)?(?:#[\w.:=+-]*)?\Z")
_ABSOLUTE = re.compile(r"\s*(?:https?:)?//(.+)", re.DOTALL)


def parse(html: str) -> Element:
    """Return the allowed part of a piece of HTML as a tree under one ``div``.

    Parameters
    ----------
    html : str
        Anything, however broken.

    Notes
    -----
    A link to another site becomes text, with the address in brackets: a report has no outside
    URLs, and reads the same on paper. An image survives only as an embedded bitmap.
    """
    builder = _Builder()
    builder.feed(html)
    builder.close()
    return builder.root


def serialise(root: Element) -> str:
    """Return the inside of a tree as HTML."""
    inside = "".join(ET.tostring(child, encoding="unicode", method="html") for child in root)
    return _escape(root.text or "") + inside


def text_of(element: Element) -> str:
    """Return the text of an element and all inside it, with single spaces."""
    return " ".join("".join(element.itertext()).split())


def parents(root: Element) -> dict[Element, Element]:
    """Return each element's parent; the tree itself does not know."""
    return {child: parent for parent in root.iter() for child in parent}


def known_classes(names: str) -> str:
    """Return those of an element's classes that the report's style sheet knows."""
    return " ".join(name for name in names.split() if _CLASS.fullmatch(name))


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("div")
        self._open = [self.root]
        self._dropping: list[str] = []
        self._addresses: dict[Element, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._dropping or tag in _DROPPED:
            if tag in _DROPPED and tag != "embed":
                self._dropping.append(tag)
            return
        if tag not in ALLOWED:
            return
        kept, address = _attributes(tag, attrs)
        if tag == "img" and "src" not in kept:
            self.handle_data(f"[image: {kept.get('alt', 'no description')}]")
            return
        if len(self._open) > _DEEPEST:
            return
        element = ET.SubElement(self._open[-1], tag, kept)
        if address:
            element.tag = "span"
            self._addresses[element] = address
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # HTML knows no self-closing elements: <script/> opens a script.
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if self._dropping:
            if tag == self._dropping[-1]:
                self._dropping.pop()
            return
        for depth in range(len(self._open) - 1, 0, -1):
            element = self._open[depth]
            if element.tag == tag or (tag == "a" and element in self._addresses):
                self._close(depth)
                return
            if element.tag in ("td", "th", "table") and tag not in _TABLE:
                return  # a stray end tag in a cell does not end the table

    def handle_data(self, data: str) -> None:
        if self._dropping:
            return
        # Control characters are no part of HTML; ElementTree would write them as they are.
        data = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", data)
        parent = self._open[-1]
        if len(parent):
            parent[-1].tail = (parent[-1].tail or "") + data
        else:
            parent.text = (parent.text or "") + data

    def close(self) -> None:
        super().close()
        self._close(1)

    def _close(self, depth: int) -> None:
        for element in self._open[depth:]:
            address = self._addresses.get(element)
            if address and address not in text_of(element):
                ET.SubElement(element, "small").text = f" ({address})"
        del self._open[depth:]


def _attributes(
    tag: str, attrs: Iterable[tuple[str, str | None]]
) -> tuple[dict[str, str], str | None]:
    """Return the attributes to keep, and the address if the element links to another site."""
    kept: dict[str, str] = {}
    address = None
    for name, given in attrs:
        value = given or ""
        if name == "class":
            known = known_classes(value)
            if known:
                kept["class"] = known
        elif name not in _ATTRIBUTES.get(tag, ()):
            continue
        elif name == "href":
            outside = _ABSOLUTE.match(value)
            if outside:
                address = outside[1].strip()
            elif _RELATIVE.fullmatch(value):
                kept["href"] = value
        elif name == "src":
            if _DATA_IMAGE.match(value):
                kept["src"] = value
        elif name in ("colspan", "rowspan", "start"):
            if value.isascii() and value.isdigit() and int(value) <= 1000:
                kept[name] = value
        elif name == "scope":
            if value in ("col", "row", "colgroup", "rowgroup"):
                kept[name] = value
        else:
            kept[name] = value
    return kept, address
