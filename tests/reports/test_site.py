"""The summary and the front page: said from the data, checked before they are said."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvmx_lab.errors import LabError
from nvmx_lab.notebook_parameters import AcrossWorkloadMixes
from nvmx_lab.reports import site, summary
from nvmx_lab.reports.fragment import BADGES


def record(mix="cpuid", exit_leg=(120, 200, 310), round_trip=(110, 190, 300), **more):
    made = {
        "mix": mix,
        "title": f"Title of {mix}",
        "basis": "executed",
        "source": "a log",
        "pulls_share": 0.0,
        "rare_vmreads_saved_per_exit": 35.0,
        "verdict": "saves",
    }
    for leg, interval in (("exit_leg", exit_leg), ("round_trip", round_trip)):
        for end, value in zip(("p05", "p50", "p95"), interval, strict=True):
            made[f"{leg}_saving_cycles_{end}"] = value
    return made | more


NONE = (None, None, None)
FIVE = [
    record("gains"),
    record("loses", round_trip=(-900, -700, -500), pulls_share=0.44),
    record("either", round_trip=(-5, 10, 20), pulls_share=0.1),
    record("untouched", (0, 0, 0), (0, 0, 0), rare_vmreads_saved_per_exit=0.0),
    record("unpriced", NONE, NONE),
]


def write(out, records, **more):
    rows = summary.rows(records)
    given = {
        "rows": rows,
        "pages": {row.mix: f"01--{row.mix}.html" for row in rows},
        "links": [site.Link("02.html", "All <mixes>", 1.0)],
        "failures": [],
        "before": "5.2",
        "after": "5.2+patch13",
        "provenance": {"Seed": "1"},
    }
    site.write(out, **given | more)
    return (out / "index.html").read_text("utf-8")


def test_front_page(tmp_path, page_of):
    page = page_of(write(tmp_path, FIVE))
    assert page.tags["table"] == page.tags["caption"] == 1
    assert page.tags["tr"] == 6
    links = [link["href"] for link in page.all("a")]
    order = ("gains", "either", "untouched", "loses", "unpriced")
    assert [f"01--{mix}.html" for mix in order] == [link for link in links if "01--" in link]
    assert "02.html" in links
    # no report on the totals among these links: no sentence that leads to it
    assert "are tested" not in page.text["main"][0]
    assert page.text["tbody"][0].count("unknown: a price is missing") == 2
    # the intervals are drawn for who sees them, and written for who does not
    assert page.tags["circle"] == 4
    zero = float(page.all("line")[0]["x1"])
    bars = {
        row: [float(line[end]) for end in ("x1", "x2")]
        for row, line in zip(order, page.all("line")[1::2], strict=False)
    }
    assert bars["loses"][0] < bars["loses"][1] < zero < bars["gains"][0]
    assert bars["either"][0] < zero < bars["either"][1]
    assert all(drawing["aria-hidden"] == "true" for drawing in page.all("svg"))
    assert "(−900 to −500)" in page.text["tbody"][0]


def test_headline_counts_what_the_rows_say():
    said = " ".join(summary.headline(summary.rows(FIVE)))
    assert (
        "Of 5 workload mixes, 1 saves, 1 loses, 1 may go either way, 1 sees no change and 1" in said
    )
    assert "35 VMREADs fewer" in said
    assert "shorter by 200 cycles in the median (intervals from 120 to 310)" in said
    assert "The largest loss is Title of loses: 700 cycles per round trip" in said
    assert "a pull after 44 % of its exits" in said
    assert "changes nothing for Title of untouched" in said


def test_front_page_says_what_its_words_mean(tmp_path, page_of):
    page = page_of(write(tmp_path, FIVE))
    keys = page.text["main"][0].partition("Where a number comes from")[2].partition("Mix by mix")[0]
    for word in BADGES:
        assert word in keys
    assert "seen from their host" in keys


def test_front_page_leads_to_the_test_of_the_totals(tmp_path, page_of):
    link = site.Link(f"{AcrossWorkloadMixes.notebook}.html", "All mixes", 1.0)
    page = page_of(write(tmp_path, FIVE, links=[link]))
    assert [a["href"] for a in page.all("a")].count(link.href) == 2
    assert "how many of them lie inside" in page.text["main"][0]


def test_equal_losses_are_not_ranked():
    def lost(*mixes):
        records = [
            record(mix, round_trip=(-900, -700.2 + 0.1 * k, -500), pulls_share=0.9 + k / 100)
            for k, mix in enumerate(mixes)
        ]
        less = record("less", round_trip=(-90, -70, -50), pulls_share=0.5)
        return " ".join(summary.headline(summary.rows([less, *records])))

    assert "The largest loss is Title of a: 700 cycles per round trip" in lost("a")
    assert (
        "The largest loss, 700 cycles per round trip, is that of Title of a and Title of b, with "
        "a pull after 90 to 91 % of their exits."
    ) in lost("a", "b")
    assert "is that of 3 mixes, with a pull after 90 to 92 %" in lost("a", "b", "c")


def test_untouched_mixes_are_listed():
    rows = [record(mix, (0, 0, 0), (0, 0, 0)) for mix in "abc"]
    said = summary.headline(summary.rows(rows))[-1]
    assert said == "The patch changes nothing for Title of a, Title of b and Title of c."


def test_headline_of_nothing_and_of_one(tmp_path, page_of):
    assert summary.headline([]) == ["No mix has been run yet."]
    page_of(write(tmp_path, []))
    page_of(write(tmp_path, [record("unpriced", NONE, NONE)]))


INTERVALS = st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3).map(sorted).map(tuple)


@given(INTERVALS)
def test_sign_never_claims_what_the_interval_denies(interval):
    sign = summary.sign_of(interval)
    low, _, high = interval
    assert (sign == "gain") == (low > 0 and high > 0.5)
    assert (sign == "loss") == (high < 0 and low < -0.5)


@given(st.lists(INTERVALS, min_size=1, max_size=5))
def test_every_interval_fits_on_the_axis(intervals):
    rows = summary.rows(
        [record(str(i), round_trip=interval) for i, interval in enumerate(intervals)]
    )
    low, high, ticks = site._axis(rows)
    assert 1 <= len(ticks) <= 7
    for row in rows:
        assert (
            0
            <= site._place(row.round_trip[0], low, high)
            <= site._place(row.round_trip[2], low, high)
            <= 240
        )
    assert 0 <= site._place(0.0, low, high) <= 240


def test_text_of_a_mix_is_escaped(tmp_path, page_of):
    evil = record("x", title="<script>alert(1)</script>", verdict="<img src=//x>", basis="<b>")
    page_of(write(tmp_path, [evil], failures=["<script>x</script>"]))


def test_failures_are_on_the_front_page(tmp_path, page_of):
    page = page_of(write(tmp_path, FIVE[:1], failures=["01 (mix='x'): cell 3 failed"]))
    assert "Not made" in page.text["h2"]
    assert "01 (mix='x'): cell 3 failed" in page.text["li"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": None}, "summary of cpuid: verdict"),
        ({"pulls_share": 1.5}, "summary of cpuid: pulls_share"),
        ({"pulls_share": None}, "summary of cpuid: pulls_share"),
        ({"exit_leg_saving_cycles_p50": "many"}, "exit_leg_saving_cycles_p50"),
        ({"exit_leg_saving_cycles_p50": 1e9}, "summary of cpuid: .*out of order"),
    ],
)
def test_bad_record_is_refused(change, message):
    with pytest.raises(LabError, match=message):
        summary.rows([record(**change)])


def test_missing_column_is_refused():
    given = record()
    del given["round_trip_saving_cycles_p95"]
    with pytest.raises(LabError, match="round_trip_saving_cycles_p95"):
        summary.rows([given])


def test_summary_files_agree(tmp_path):
    table = summary.frame(summary.rows([*FIVE, record("more", note="kept")]))
    summary.write(table, tmp_path)
    back = pd.read_parquet(tmp_path / "summary.parquet")
    pd.testing.assert_frame_equal(back, table)
    text = pd.read_csv(tmp_path / "summary.csv")
    assert list(text.columns) == list(back.columns)
    assert list(text["mix"]) == list(back["mix"])
    assert text["round_trip_saving_cycles_p50"].isna().sum() == 1
    assert back["note"].iloc[-1] == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.csv", "summary.parquet"]


def test_a_page_of_someone_else_is_not_removed(tmp_path):
    (tmp_path / "index.html").write_text("<h1>My site</h1>")
    with pytest.raises(LabError, match="not a report's"):
        site.withdraw(tmp_path)
    assert (tmp_path / "index.html").exists()


def test_our_page_is_removed(tmp_path):
    write(tmp_path, FIVE)
    site.withdraw(tmp_path)
    assert list(tmp_path.iterdir()) == []
