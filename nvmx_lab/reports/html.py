"""One executed notebook as one HTML page that needs nothing else.

nbconvert's own templates load scripts from other sites and pass a notebook's HTML on as it is, so
only its Markdown and its highlighting are used here; the page is a template of this package.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element

import jinja2

from nvmx_lab.errors import LabError
from nvmx_lab.reports import fragment, result

_IMAGES: Final = ("image/svg+xml", "image/png", "image/jpeg")
_NUMBER = re.compile(r"[+\u2212-]?[\d,]*\.?\d+(?:e[+-]?\d+)?\s?%?|\u2013|")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_HEADING = re.compile(r"h[1-6]")


@dataclass(frozen=True)
class Page:
    """What a page says besides the notebook's cells.

    Attributes
    ----------
    name : str
        Name of the report.
    parameters : mapping
        What the notebook was run with.
    provenance : mapping of str to str
        What the foot of the page lists.
    pages : frozenset of str
        Names of the notebooks that have a page of the same name; a link to any other notebook
        leads to the front page.
    """

    name: str
    parameters: Mapping[str, Any]
    provenance: Mapping[str, str]
    pages: frozenset[str] = frozenset()


def render(notebook: Mapping[str, Any], page: Page) -> str:
    """Return an executed notebook as a page of HTML.

    Parameters
    ----------
    notebook : mapping
        The notebook, as nbformat 4 reads it.
    page : Page
        What else the page says.

    Raises
    ------
    LabError
        If a figure has no alternative text, or a shown table has no caption.
    """
    writer = _Writer(page)
    blocks: list[dict[str, Any]] = []
    number = 0
    for cell in notebook["cells"]:
        # Cells are counted as in the notebook that the user has.
        number += not _injected(cell)
        blocks += writer.cell(cell, f"cell {number}")
    title = writer.title or page.name.replace("_", " ")
    # What differs between reports comes first.
    order = sorted(page.parameters, key=lambda name: name not in ("mix", "mixes"))
    shown = [page.parameters["mix"]] if "mix" in page.parameters else []
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            window_title=" \u2013 ".join([*map(str, shown), title]),
            parameters={name: _plain(page.parameters[name]) for name in order},
            blocks=blocks,
            provenance=page.provenance,
        )
    )


@functools.cache
def environment() -> jinja2.Environment:
    """Return the Jinja environment of this package's templates, with escaping on."""
    folder = Path(__file__).parent / "template"
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["style"] = (folder / "report.css").read_text(encoding="utf-8")
    return made


@dataclass
class _Writer:
    """Turns cells into blocks; remembers what must be unique or in order on a page."""

    page: Page
    title: str = ""
    heading: str = ""
    level: int = 1
    ids: set[str] = field(default_factory=lambda: {"content", "provenance"})
    texts: int = 0
    codes: int = 0

    def cell(self, cell: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        source = _joined(cell["source"])
        if cell["cell_type"] == "markdown" and source.strip():
            self.texts += 1
            return [{"kind": "html", "html": self.markdown(source, title=self.texts == 1)}]
        if cell["cell_type"] != "code" or not source.strip():
            return []
        self.codes += not _injected(cell)
        label = "Parameters of this run" if _injected(cell) else f"Code {self.codes}"
        code = {"kind": "code", "label": label, "html": _highlight(source)}
        outputs = [self.output(output, where) for output in cell.get("outputs", ())]
        # What a reader came for is above the code that made it.
        return [*(output for output in outputs if output), code]

    def markdown(self, source: str, *, title: bool = False) -> str:
        root = fragment.parse(_markdown(source))
        if title:
            self._take_title(root)
        return self._finish(root)

    def output(self, output: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        kind = output["output_type"]
        if kind == "stream":
            text = _without_ansi(_joined(output["text"]))
            return {"kind": "messages" if output["name"] == "stderr" else "text", "text": text}
        if kind == "error":
            return {"kind": "text", "text": _without_ansi(f"{output['ename']}: {output['evalue']}")}
        data, about = output.get("data", {}), output.get("metadata", {})
        if result.MIME_TYPE in data:
            return None
        for mime in ("text/html", *_IMAGES, "text/markdown", "text/plain"):
            if mime not in data:
                continue
            content = _joined(data[mime])
            if mime in _IMAGES:
                return _image(mime, content, about, where)
            if mime == "text/markdown":
                return {"kind": "html", "html": self.markdown(content)}
            if mime == "text/plain":
                return {"kind": "text", "text": _without_ansi(content)}
            root = fragment.parse(content)
            _require_captions(root, about.get(mime, {}).get("caption"), where)
            return {"kind": "html", "html": self._finish(root)}
        return None

    def _take_title(self, root: Element) -> None:
        """Move the notebook's first heading, if it is one of level 1, into the page's head."""
        first = next(iter(root), None)
        if first is not None and first.tag == "h1" and not (root.text or "").strip():
            self.title = self.heading = fragment.text_of(first)
            root.remove(first)

    def _finish(self, root: Element) -> str:
        for element in list(root.iter()):
            if _HEADING.fullmatch(element.tag):
                # One h1, and no level left out: a screen reader's user walks the headings.
                self.level = min(max(int(element.tag[1]), 2), self.level + 1)
                element.tag = f"h{self.level}"
                self.heading = fragment.text_of(element)
                element.set("id", self._unique(self.heading))
            elif element.tag == "a" and "href" in element.attrib:
                element.set("href", self._link(element.attrib["href"]))
            elif element.tag == "td" and fragment.text_of(element) in fragment.BADGES:
                _badge(element)
            elif element.tag == "table":
                _head_cells(element)
        self._scroll_tables(root)
        return fragment.serialise(root)

    def _scroll_tables(self, root: Element) -> None:
        """Put each table into a region that scrolls, which the keyboard can reach."""
        parents = fragment.parents(root)
        for number, table in enumerate(list(root.iter("table")), start=1):
            region = Element("div", {"class": "scroll", "role": "region", "tabindex": "0"})
            caption = table.find("caption")
            if caption is not None:
                caption.set("id", self._unique(f"table {fragment.text_of(caption)}"[:60]))
                region.set("aria-labelledby", caption.attrib["id"])
            else:  # Markdown has no captions; the section's heading is the next best name
                region.set("aria-label", f"{self.heading or self.page.name}, table {number}")
            parent = parents[table]
            parent[list(parent).index(table)] = region
            region.tail, table.tail = table.tail, None
            region.append(table)

    def _link(self, target: str) -> str:
        stem, dot, anchor = target.partition(".ipynb")
        if not dot:
            return target
        return f"{stem}.html{anchor}" if stem in self.page.pages else "index.html"

    def _unique(self, text: str) -> str:
        wanted = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"
        name, count = wanted, 1
        while name in self.ids:
            count += 1
            name = f"{wanted}-{count}"
        self.ids.add(name)
        return name


def _injected(cell: Mapping[str, Any]) -> bool:
    return "injected-parameters" in cell.get("metadata", {}).get("tags", ())


def _require_captions(root: Element, given: str | None, where: str) -> None:
    for table in root.iter("table"):
        caption = table.find("caption")
        if caption is None and given:
            caption = Element("caption")
            caption.text = given
            table.insert(0, caption)
        if caption is None or not fragment.text_of(caption):
            raise LabError(
                "a table without a caption",
                where=where,
                mend="show it with nvmx_lab.reports.result.table(frame, caption)",
            )


def _head_cells(table: Element) -> None:
    """Say of each header cell what it heads, and mark the cells that are numbers."""
    head = table.find("thead")
    if head is not None:
        _merge_head_rows(head)
    in_head = set(head.iter()) if head is not None else set()
    for cell in table.iter():
        text = fragment.text_of(cell) if cell.tag in ("th", "td") else ""
        if cell.tag == "th" and not text and not len(cell):
            cell.tag = "td"  # the corner: it heads nothing
            cell.attrib.pop("scope", None)
        elif cell.tag == "th" and "scope" not in cell.attrib:
            span = "colspan" if cell in in_head else "rowspan"
            group = "group" if int(cell.get(span, "1")) > 1 else ""
            cell.set("scope", ("col" if cell in in_head else "row") + group)
        elif cell.tag == "td" and _NUMBER.fullmatch(text):
            cell.set("class", "n")
    _align_heads(table, head)


def _align_heads(table: Element, head: Element | None) -> None:
    """Set a column's header above its numbers."""
    body = table.find("tbody")
    if head is None or body is None or not len(body) or not len(head):
        return
    for above, below in zip(head[-1], body[0], strict=False):
        if above.tag == "th" and below.get("class") == "n":
            above.set("class", "n")


def _merge_head_rows(head: Element) -> None:
    """Make one header row of the two that pandas writes where the index has a name."""
    if len(head) != 2 or len(head[0]) != len(head[1]):
        return
    pairs = list(zip(head[0], head[1], strict=True))
    texts = [(fragment.text_of(upper), fragment.text_of(lower)) for upper, lower in pairs]
    if any(bool(upper) == bool(lower) for upper, lower in texts):
        return
    for upper, lower in pairs:
        if not fragment.text_of(upper):
            upper.text = fragment.text_of(lower)
    head.remove(head[1])


def _badge(cell: Element) -> None:
    word = fragment.text_of(cell)
    cell.text = None
    for child in list(cell):
        cell.remove(child)
    ET.SubElement(cell, "span", {"class": f"badge {word}"}).text = word


def _image(mime: str, content: str, about: Mapping[str, Any], where: str) -> dict[str, Any]:
    own = about.get(mime, {})
    alt = str(own.get("alt") or about.get("alt") or "").strip()
    if not alt:
        raise LabError(
            "a figure without alternative text",
            where=where,
            mend=f"display it with metadata {{'{mime}': {{'alt': '...'}}}}",
        )
    try:
        raw = content.encode() if mime == "image/svg+xml" else base64.b64decode(content)
    except binascii.Error:
        raise LabError("a figure that is no base64", where=where) from None
    size = {side: own[side] for side in ("width", "height") if type(own.get(side)) is int}
    source = f"data:{mime};base64,{base64.b64encode(raw).decode()}"
    return {"kind": "image", "source": source, "alt": alt, "size": size}


@functools.cache
def _filters() -> tuple[Any, Any]:
    # Slow to import, and not needed by who only wants the front page.
    from nbconvert.filters.highlight import Highlight2HTML
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    renderer = IPythonRenderer(escape=False, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=renderer).render, Highlight2HTML(pygments_lexer="python3")


def _markdown(source: str) -> str:
    return str(_filters()[0](source))


def _highlight(source: str) -> str:
    return fragment.serialise(fragment.parse(_filters()[1](source)))


def _without_ansi(text: str) -> str:
    return _ANSI.sub("", text).rstrip("\n")


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "all"
    return f"{value:,}" if type(value) is int else str(value)
