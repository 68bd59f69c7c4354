"""Small notebooks to run, and a reader of pages that knows what a page must have."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

Cell = tuple[str, ...]
PARAMETERS = (
    'kvm_before = "5.2"\nkvm_after = "5.2+patch13"\ncpu = "skylake-2015"\n'
    "exits = 1_000_000\nseed = 1"
)


def notebook(path: Path, *cells: Cell) -> Path:
    """Write a notebook of cells (type, source, tag ...)."""
    made = []
    for number, (kind, source, *tags) in enumerate(cells):
        cell: dict[str, Any] = {
            "cell_type": kind,
            "id": f"cell-{number}",
            "metadata": {"tags": tags},
            "source": source,
        }
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell)
    text = json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    path.write_text(text, encoding="utf-8")
    return path


@dataclass
class Read(HTMLParser):
    """What of a page the tests ask about."""

    tags: Counter[str] = field(default_factory=Counter)
    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    text: dict[str, list[str]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        self.elements.append((tag, given))
        self.text.setdefault(tag, []).append("")
        if "id" in given:
            self.ids.append(given["id"])
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.text[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(html: str) -> Read:
    reader = Read()
    reader.feed(html)
    reader.close()
    return reader


def check_page(html: str) -> Read:
    """Assert what holds of every page of ours."""
    page = read(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert page.tags["h1"] == page.tags["title"] == page.tags["main"] == 1
    assert page.text["title"][0].strip()
    # nothing is loaded, nothing runs
    assert page.tags["script"] == page.tags["iframe"] == page.tags["object"] == 0
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert "//" not in value or value.startswith("data:"), (tag, name, value[:80])
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html
    # what a screen reader and a keyboard need
    assert page.all("a")[0]["href"] == "#content"
    assert "content" in page.ids
    assert len(set(page.ids)) == len(page.ids)
    for image in page.all("img"):
        assert image["alt"].strip()
    for header in page.all("th"):
        assert header["scope"] in ("col", "row", "colgroup", "rowgroup")
    for _, attributes in page.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in page.ids
    regions = [a for a in page.all("div") if a.get("role") == "region"]
    assert len(regions) == page.tags["table"]
    for region in regions:
        assert region["tabindex"] == "0"
        assert "aria-label" in region or "aria-labelledby" in region
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    return page


@pytest.fixture
def make_notebook() -> Callable[..., Path]:
    return notebook


@pytest.fixture
def page_of() -> Callable[[str], Read]:
    return check_page
