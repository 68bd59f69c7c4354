"""Pages: self-contained, accessible, and safe whatever the notebook shows."""

from __future__ import annotations

import base64

import pytest

from nvmx_lab.errors import LabError
from nvmx_lab.reports import html, result

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
EVIL = (
    "<script>alert('evil')</script><img src=x onerror=alert('evil')>"
    "<a href='javascript:alert(1)'>evil</a><iframe src='https://evil'></iframe>"
)
TABLE = """<div><style scoped>.dataframe { evil }</style><table border="1" class="dataframe">
<thead><tr style="text-align: right;"><th></th><th>cycles</th><th>basis</th></tr>
<tr><th>instruction</th><th></th><th></th></tr></thead>
<tbody><tr><th>vmread</th><td>1,200.5</td><td>assumed</td></tr></tbody></table></div>"""


def data(mime, content, **about):
    metadata = {mime: about} if about else {}
    return {"output_type": "display_data", "data": {mime: content}, "metadata": metadata}


def code(*outputs, source="x = 1", tags=()):
    return {"cell_type": "code", "source": source, "metadata": {"tags": tags}, "outputs": outputs}


def text(source):
    return {"cell_type": "markdown", "source": source, "metadata": {}}


def render(*cells, pages=frozenset(), **parameters):
    page = html.Page("a_report", parameters, {"Report id": "<i>0</i>"}, pages)
    return html.render({"cells": cells}, page)


def test_a_whole_page(page_of):
    made = render(
        text(
            "# A question?\n\nWhy `vmread`?\n\n# Another\n\n#### Deep\n\n## Another\n\n"
            "|a|b|\n|-|-|\n|1|x|"
        ),
        code(source="mix = 'b'", tags=["injected-parameters"]),
        code(data("image/png", PIXEL, alt='Two bars, "a" < b', width=300)),
        code(data("text/html", TABLE, caption="Cycles & more")),
        code(
            {"output_type": "stream", "name": "stdout", "text": ["\x1b[1mone\x1b[0m\n", "<two>\n"]}
        ),
        code({"output_type": "stream", "name": "stderr", "text": "a warning"}),
        code({**data("text/plain", "array([1])"), "output_type": "execute_result"}),
        mix="cpuid",
        exits=20_000,
        mixes=[],
    )
    page = page_of(made)
    assert page.text["h1"] == ["A question?"]
    assert page.text["h2"][:2] == ["Another", "Another"]
    assert page.text["h3"] == ["Deep"]
    assert page.text["title"] == ["cpuid – A question?"]
    assert [image["alt"] for image in page.all("img")] == ['Two bars, "a" < b']
    assert page.all("img")[0]["src"] == f"data:image/png;base64,{PIXEL}"
    assert page.text["caption"] == ["Cycles & more"]
    assert "one\n<two>" in page.text["pre"]
    assert "20,000" in page.text["dd"]
    assert "<i>0</i>" in page.text["dd"]
    # code is folded away, and there
    assert "Parameters of this run" in page.text["summary"]
    assert sum("x = 1" in block for block in page.text["details"]) == 5
    assert "a warning" in "".join(page.text["details"])


def test_pandas_tables_survive_with_scopes(page_of):
    page = page_of(render(code(data("text/html", TABLE, caption="Cycles"))))
    assert page.text["th"] == ["instruction", "cycles", "basis", "vmread"]
    assert [cell["scope"] for cell in page.all("th")] == ["col", "col", "col", "row"]
    assert page.text["td"] == ["1,200.5", "assumed"]
    assert page.all("td")[0]["class"] == "n"
    assert {"class": "badge assumed"} in page.all("span")


def test_page_without_a_heading_is_named_after_the_notebook(page_of):
    page = page_of(render(text("Just text.\n\n# Late")))
    assert page.text["h1"] == ["a report"]
    assert "Late" in page.text["h2"]


@pytest.mark.parametrize(
    "cell",
    [
        text(f"# x\n\n{EVIL}\n\n[evil](javascript:alert(1)) ![evil](https://evil/x.png)"),
        text(f"# {EVIL}"),
        text(f"```python\n{EVIL}\n```"),
        code(data("text/html", EVIL)),
        code(data("text/markdown", EVIL)),
        code(data("text/plain", EVIL)),
        code({"output_type": "stream", "name": "stdout", "text": EVIL}),
        code(data("application/javascript", "alert('evil')")),
        code(
            data("text/html", f"<table><caption>{EVIL}</caption><tr><td>{EVIL}</td></tr></table>")
        ),
        code(data("image/png", PIXEL, alt=f'">{EVIL}')),
        code(source=EVIL),
        code({"output_type": "error", "ename": EVIL, "evalue": EVIL, "traceback": []}),
    ],
)
def test_malicious_cells_are_harmless(cell, page_of):
    page = page_of(render(cell, mix=EVIL))
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert not any("javascript" in link.get("href", "") for link in page.all("a"))


def test_svg_is_an_image_not_markup(page_of):
    svg = "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    page = page_of(render(code(data("image/svg+xml", svg, alt="a chart"))))
    assert page.tags["svg"] == 0
    assert page.all("img")[0]["alt"] == "a chart"


@pytest.mark.parametrize("alt", [None, "", "  \n"])
@pytest.mark.parametrize("mime", ["image/png", "image/jpeg", "image/svg+xml"])
def test_figure_without_alt_text_is_refused(mime, alt):
    with pytest.raises(LabError, match=r"cell 2: a figure without alternative text.*'alt'"):
        render(text("x"), code(data(mime, PIXEL, alt=alt)))


def test_table_without_caption_is_refused():
    with pytest.raises(LabError, match=r"cell 1: a table without a caption"):
        render(code(data("text/html", TABLE)))


def test_figure_that_is_no_base64_is_refused():
    with pytest.raises(LabError, match="no base64"):
        render(code(data("image/png", "x", alt="y")))


def test_links_between_notebooks_become_links_between_pages(page_of):
    page = page_of(
        render(text("[a](02_x.ipynb) [b](01_y.ipynb#part) [c](#here)"), pages=frozenset({"02_x"}))
    )
    assert [link["href"] for link in page.all("a")[2:]] == ["02_x.html", "index.html", "#here"]


def test_published_results_are_not_shown(page_of):
    output = data(result.MIME_TYPE, {"name": "summary", "records": []})
    output["data"]["text/plain"] = "secret"
    page = page_of(render(code(output)))
    assert "secret" not in "".join(page.text["main"])


def test_the_same_notebook_gives_the_same_bytes():
    cells = [text("# x\n\n## y\n\n## y"), code(data("text/html", TABLE, caption="z"))]
    assert render(*cells) == render(*cells)
