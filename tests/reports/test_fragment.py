"""HTML from notebooks: what survives, and that nothing dangerous does."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvmx_lab.reports import fragment

PIXEL = "data:image/png;base64,iVBORw0KGgo="


def clean(html):
    return fragment.serialise(fragment.parse(html))


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("a <b>b</b> &amp; c", "a <b>b</b> &amp; c"),
        ("1 < 2 > 0 & x", "1 &lt; 2 &gt; 0 &amp; x"),
        ("<p>a<script>alert(1)</script>b</p>", "<p>ab</p>"),
        ("<script/>alert(1)", ""),
        ("<SCRIPT SRC=//x></SCRIPT>ok", "ok"),
        ("<style>p {}</style><p>ok</p>", "<p>ok</p>"),
        ("<svg onload=alert(1)><p>x</p></svg>ok", "ok"),
        ("<math><mtext></mtext></math>ok", "ok"),
        ("<iframe src=x></iframe>ok", "ok"),
        ("<form><input autofocus onfocus=alert(1)>ok</form>", "ok"),
        ("<!-- <p>x</p> -->ok", "ok"),
        ('<p style="x" onclick="y" id="z">ok</p>', "<p>ok</p>"),
        ('<a href="javascript:alert(1)">x</a>', "<a>x</a>"),
        ('<a href=" java&#10;script:alert(1)">x</a>', "<a>x</a>"),
        ('<a href="data:text/html,x">x</a>', "<a>x</a>"),
        ('<a href="../x.html">x</a>', "<a>x</a>"),
        ('<a href="x.html#y">x</a>', '<a href="x.html#y">x</a>'),
        ('<a href="https://h/p?q">x</a>', "<span>x<small> (h/p?q)</small></span>"),
        ('<a href="//h/p">h/p</a>', "<span>h/p</span>"),
        ('<a href="https://h/<script>">x</a>', "<span>x<small> (h/&lt;script&gt;)</small></span>"),
        (f'<img src="{PIXEL}" alt="dot">', f'<img src="{PIXEL}" alt="dot">'),
        ('<img src="https://h/i.png" alt="dot">', "[image: dot]"),
        ('<img src="data:image/svg+xml;base64,AA" alt="dot">', "[image: dot]"),
        ('<span class="badge assumed evil">x</span>', '<span class="badge assumed">x</span>'),
        ("<td colspan=2 rowspan=99999>x", '<td colspan="2">x</td>'),
        ("<table><tr><td>x</div></b></td></tr></table>", "<table><tr><td>x</td></tr></table>"),
        ("a\x00\x1b[1mb", "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[1mb"),
    ],
)
def test_what_survives(html, expected):
    assert clean(html) == expected


def test_deep_nesting_neither_overflows_nor_loses_text():
    assert fragment.text_of(fragment.parse("<div>" * 50_000 + "deep")) == "deep"
    assert "deep" in clean("<div>" * 50_000 + "deep")


DANGEROUS = (
    "<|>|</|/>|<script>|</script>|<p |<a href='|'|\"|javascript:x|onload=x|<table>|<h1>|<td>|</td>|"
    "<!--|-->|<style>|<img src=|<svg>|</svg>|&lt;|&#60;script&#62;|<![CDATA[|]]>|<textarea>|x| "
)
PIECES = st.lists(st.sampled_from(DANGEROUS.split("|")) | st.text(max_size=5), max_size=30).map(
    "".join
)


class Strict(HTMLParser):
    def handle_starttag(self, tag, attrs):
        assert tag in fragment.ALLOWED
        for name, value in attrs:
            assert name in {
                "class",
                "href",
                "src",
                "alt",
                "scope",
                "start",
                "title",
                "id",
                "open",
            } | {
                "colspan",
                "rowspan",
            }
            if name in ("href", "src"):
                assert ":" not in value or value.startswith("data:image/") or value.startswith("#")

    def handle_comment(self, data):
        raise AssertionError("a comment")

    handle_decl = handle_pi = unknown_decl = handle_comment


@given(PIECES)
def test_only_the_allow_list_comes_out_of_anything(html):
    out = clean(html)
    parser = Strict()
    parser.feed(out)
    parser.close()
    assert clean(out) == out
