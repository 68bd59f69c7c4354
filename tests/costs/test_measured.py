"""Price lists made of timings: what goes in comes out, and nonsense is refused where it stands."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmx_lab import data
from nvmx_lab.cli import cli
from nvmx_lab.costs import measured, prices
from nvmx_lab.costs.simulated_timings import KNOWN, OVERHEAD, timings
from nvmx_lab.errors import LabError
from nvmx_lab.tables.schema import MEASUREMENTS

TEXT = timings()
LINES = len(TEXT.splitlines())


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def as_text(rows):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(MEASUREMENTS.columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def changed(where, **cells):
    """Return the example with other cells in the rows for which `where` holds."""
    return as_text([row | (cells if where(row) else {}) for row in rows_of(TEXT)])


def line_of(primitive, n, boot):
    return 2 + next(
        i
        for i, row in enumerate(rows_of(TEXT))
        if (row["primitive"], row["n"], row["boot"]) == (primitive, str(n), str(boot))
    )


def is_row(primitive, n, boot):
    return lambda r: (r["primitive"], r["n"], r["boot"]) == (primitive, str(n), str(boot))


@pytest.fixture
def imported(tmp_path):
    def run(text, **options):
        file = tmp_path / "timings.csv"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        given_ = {"id": "mine", "out": tmp_path / "mine.toml"} | options
        try:
            return measured.import_csv(file, **given_)
        except LabError:
            # Nothing half-written, and nothing of an earlier import touched.
            assert [path.name for path in tmp_path.iterdir()] == ["timings.csv"]
            raise

    return run


# ---- round trip ---------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    first=st.floats(10, 200),
    share=st.floats(0.1, 1.0),
    vmptrld=st.floats(50, 1000),
    vmclear=st.floats(50, 2000),
    clock=st.sampled_from(["TSC", "core"]),
    core_per_tsc=st.floats(0.5, 2.0),
    seed=st.integers(0, 1000),
)
def test_known_prices_come_back(
    tmp_path_factory, first, share, vmptrld, vmclear, clock, core_per_tsc, seed
):
    known = {"vmread_first": first, "vmread_next": share * first}
    known |= {"vmptrld": vmptrld, "vmclear": vmclear}
    folder = tmp_path_factory.getbasetemp()
    file = folder / "round-trip.csv"
    file.write_text(timings(known, seed=seed, clock=clock, core_per_tsc=core_per_tsc))
    result = measured.import_csv(file, id="round-trip", out=folder / "round-trip.toml")
    found = prices.load(folder / "round-trip.toml").parameters
    assert set(found) == set(known)
    # Whole cycles of the clock that counts, and 1 % between boots.
    step = 1.5 / (core_per_tsc if clock == "core" else 1.0)
    for name, true in known.items():
        part = vmptrld if name == "vmclear" else 0.0  # what it is told from has its noise too
        assert found[name].p50 == pytest.approx(true, abs=step + 0.02 * (true + part))
        assert found[name].includes_instructions == 0
        assert found[name].basis == "simulated"
    warned = any("times the TSC's frequency" in text for text in result.warnings)
    assert warned == (abs(round(2.1e9 * core_per_tsc) / 2.1e9 - 1) > 0.01)


def test_a_fit_is_that_of_a_naive_twin(imported):
    rows = [row for row in rows_of(TEXT) if row["primitive"] in ("overhead", "vmread")]
    result = imported(as_text(rows))
    found = {"vmread_first": [], "vmread_next": []}
    for boot in sorted({row["boot"] for row in rows}):
        of_boot = {int(row["n"]): float(row["cycles_p50"]) for row in rows if row["boot"] == boot}
        net = {n: cycles - of_boot[0] for n, cycles in of_boot.items() if n}
        slopes = sorted((net[b] - net[a]) / (b - a) for a in net for b in net if a < b)
        slope = slopes[len(slopes) // 2]  # 7 sizes have 21 pairs
        rest = sorted(net[n] - slope * (n - 1) for n in net)
        found["vmread_next"].append(slope)
        found["vmread_first"].append(rest[len(rest) // 2])
    for name, values in found.items():
        price = result.price_list.parameters[name]
        expected = np.quantile(values, (0.05, 0.5, 0.95))
        assert (price.p05, price.p50, price.p95) == pytest.approx(expected, abs=0.006)


def test_one_wild_boot_and_one_wild_row_move_little(imported):
    def wild(row):
        return row["boot"] == "3" or (row["primitive"], row["n"]) == ("vmread", "16")

    rows = rows_of(TEXT)
    for row in rows:
        if wild(row) and row["primitive"] == "vmread":
            for name in ("cycles_p50", "cycles_p95"):
                row[name] = round(float(row[name]) * 1.08)
    found = imported(as_text(rows)).price_list.parameters
    for name in ("vmread_first", "vmread_next"):
        assert found[name].p50 == pytest.approx(KNOWN[name], rel=0.06)


def test_the_price_list_says_what_it_is(imported, tmp_path):
    result = imported(TEXT, base="skylake-2015")
    found, base = result.price_list, prices.load("skylake-2015")
    assert "7 simulated" in found.basis
    assert not found.unknown
    assert found.parameters["wrmsr"] == base.parameters["wrmsr"]
    assert found.name.startswith("SIMULATED")
    assert found.note.startswith("SIMULATED")
    head = (tmp_path / "mine.toml").read_text()
    assert "(includes_instructions = 0)" in head
    assert "how much boots differ" in found.note
    assert "vmptrld-cold 6" in head  # timed, no price
    measured_ = imported(TEXT.replace(",simulated,", ",measured,").replace("SIMULATED ", "A "))
    assert measured_.price_list.basis == f"7 measured, {len(measured_.price_list.unknown)} unknown"
    assert "SIMULATED" not in str(measured_)
    frame = measured_.frame().set_index("quantity")
    assert list(frame.index[frame["price"]]) == [
        *("vmread_first", "vmread_next", "vmwrite_first", "vmwrite_next"),
        *("vmptrld", "transition", "vmclear"),
    ]
    more = frame.loc["VM-entry after a switch, more", "p50"]
    assert more == pytest.approx(KNOWN["after_switch"], abs=4)


def test_no_cheaper_back_to_back_is_a_finding_and_no_error(imported):
    text = timings({"vmread_first": 25.0, "vmread_next": 25.0})
    result = imported(text)
    found = result.price_list.parameters
    assert found["vmread_next"].p50 == pytest.approx(25, abs=1)
    assert any("cut at vmread_first" in text for text in result.warnings)


def test_a_bent_line_is_a_warning_then_an_error(imported):
    def bent(by):
        rows = rows_of(timings({"vmread_first": 40.0, "vmread_next": 10.0}))
        for row in rows:
            n = int(row["n"])
            if n > 16:
                for name in ("cycles_p05", "cycles_p50", "cycles_p95"):
                    row[name] = round(float(row[name]) * by)
        return as_text(rows)

    assert not imported(bent(1.0)).warnings
    result = imported(bent(1.15))
    (warning,) = (text for text in result.warnings if text.startswith("vmread is not linear"))
    assert f"# Warning: {warning}" in result.out.read_text()
    result.out.unlink()
    with pytest.raises(LabError, match=r"vmread is not linear in n: at n = \d+ it took"):
        imported(bent(1.8))


# ---- nonsense -----------------------------------------------------------------------------------


ALL = lambda row: True  # noqa: E731
LAST = is_row("vmread", 64, 12)
AT = line_of("vmread", 64, 12)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"timings\.csv:1: no header"),
        (TEXT.splitlines()[0] + "\n", r"timings\.csv:1: no rows"),
        (TEXT.replace("microcode,", "microcod,", 1), r"csv:1: microcode: column missing"),
        (TEXT.replace(",", ";"), "commas, not semicolons"),
        (TEXT.encode("utf-16"), "byte order mark"),
        (TEXT.encode("utf-8-sig"), "byte order mark"),
        (
            TEXT.replace("(no", "(n\N{LATIN SMALL LETTER E WITH ACUTE}").encode("cp1252"),
            "not UTF-8",
        ),
        (changed(LAST, cycles_p50="nan"), rf"csv:{AT}: cycles_p50: not a number; got 'nan'"),
        (changed(LAST, cycles_p50="0"), rf"csv:{AT}: cycles_p50: out of range"),
        (changed(LAST, cycles_p50="-5"), rf"csv:{AT}: cycles_p50: out of range"),
        (changed(LAST, cycles_p50=""), rf"csv:{AT}: cycles_p50: empty"),
        (changed(LAST, cycles_p95="1"), rf"csv:{AT}: cycles_p95: less than cycles_p50"),
        (changed(LAST, primitive="vmraed"), rf"csv:{AT}: primitive: .*did you mean 'vmread'"),
        (changed(LAST, repetitions="10"), rf"csv:{AT}: repetitions: out of range.*at least 1000"),
        (changed(LAST, n="1.5"), rf"csv:{AT}: n: not whole"),
        (changed(LAST, n="0"), rf"csv:{AT}: n: n does not fit vmread"),
        (changed(LAST, clock="core"), rf"csv:{AT}: clock: another clock than in line 2"),
        (changed(LAST, basis="measured"), rf"csv:{AT}: basis: another basis"),
        (changed(LAST, cpu_model="another"), rf"csv:{AT}: cpu_model: another cpu_model"),
        (changed(LAST, core_hz="2300000000"), rf"csv:{AT}: core_hz: the frequency is not"),
        (changed(LAST, tsc_hz="2110000000"), rf"csv:{AT}: tsc_hz: the frequency is not"),
        (changed(ALL, core_hz="100000000"), r"csv:2: core_hz: core and TSC frequency do not fit"),
        (TEXT + TEXT.splitlines()[-1] + "\n", rf"csv:{LINES + 1}: primitive, n, boot: row again"),
        (timings(boots=9), r"csv: boot: too few boots.*got 9; allowed: at least 10"),
        (
            as_text([r for r in rows_of(TEXT) if not LAST(r)]),
            r"boot 12 has no row of vmread with n = 64",
        ),
        (
            as_text([r for r in rows_of(TEXT) if (r["primitive"], r["n"]) != ("vmread", "1")]),
            "vmread was not timed alone",
        ),
        (
            as_text([r for r in rows_of(TEXT) if r["primitive"] != "vmread" or int(r["n"]) < 8]),
            r"too few different n of vmread.*got '1, 2, 4'",
        ),
        (as_text([r for r in rows_of(TEXT) if r["primitive"] != "overhead"]), "no rows of the ove"),
        (as_text([r for r in rows_of(TEXT) if r["primitive"] == "overhead"]), "nothing but overhe"),
        (
            as_text([r for r in rows_of(TEXT) if r["primitive"] != "vmptrld"]),
            "vmclear-vmptrld needs rows of vmptrld too",
        ),
        (
            as_text([r for r in rows_of(TEXT) if r["primitive"] in ("overhead", "vmptrld-cold")]),
            "nothing that has a price",
        ),
        (
            changed(is_row("vmread", 1, 2), cycles_p05="20", cycles_p50="30"),
            rf"csv:{line_of('vmread', 1, 2)}: cycles_p50: nothing is left",
        ),
        (timings({"vmread_first": 20.0, "vmread_next": 30.0}), "a further vmread takes more than"),
        (timings({"vmread_first": 900.0, "vmread_next": 0.0}), "do not grow with n|not linear"),
        (
            changed(
                lambda r: r["primitive"] == "vmclear-vmptrld",
                **dict.fromkeys(("cycles_p05", "cycles_p50", "cycles_p95"), str(OVERHEAD + 200)),
            ),
            "no longer than a VMPTRLD alone|not linear",
        ),
    ],
)
def test_nonsense_is_refused_where_it_stands(imported, text, said):
    assert text != TEXT
    with pytest.raises(LabError, match=said):
        imported(text)


def test_all_faults_are_counted(imported):
    with pytest.raises(LabError, match=r"csv:2: cycles_p50: .*and 503 more faults"):
        imported(changed(ALL, cycles_p50="x"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"id": "skylake-2015"}, "the id of a shipped price list"),
        ({"id": "My CPU"}, "id: .*pattern"),
        ({"out": "mine.csv"}, r"a price list ends in \.toml"),
        ({"base": "skylake-2016"}, "did you mean 'skylake-2015'"),
    ],
)
def test_bad_options(imported, options, said):
    with pytest.raises(LabError, match=said):
        imported(TEXT, **options)


def test_places_that_cannot_be_read_or_written(imported, tmp_path):
    with pytest.raises(LabError, match="cannot be written"):
        imported(TEXT, out=tmp_path / "no" / "folder.toml")
    with pytest.raises(LabError, match="cannot be read"):
        measured.read(tmp_path / "none.csv")


@settings(max_examples=30)
@given(draw=st.data())
def test_a_damaged_file_gives_a_price_list_or_one_clear_error(tmp_path_factory, draw):
    content = bytearray(TEXT.encode())
    for _ in range(draw.draw(st.integers(1, 3))):
        place = draw.draw(st.integers(0, len(content) - 1))
        content[place : place + 1] = draw.draw(st.binary(max_size=3))
    file = tmp_path_factory.getbasetemp() / "damaged.csv"
    file.write_bytes(bytes(content))
    try:
        estimates, _ = measured.fit(measured.read(file))
    except LabError as error:
        assert "damaged.csv" in str(error)
    else:
        assert all(math.isfinite(value) for one in estimates for value in one.quantiles())


def test_an_unknown_known_price():
    with pytest.raises(LabError, match="did you mean 'vmread_first'"):
        timings({"vmread_frist": 1.0})


# ---- what is shipped ----------------------------------------------------------------------------


def test_the_shipped_example_is_the_simulated_one():
    rows = data.read_rows(data.path("protocol", "example-simulated.csv"))
    made = rows_of(TEXT)
    assert len(rows) == len(made)
    for shipped, row in zip(rows, made, strict=True):
        numbers = ("cycles_p05", "cycles_p50", "cycles_p95")
        assert {k: v for k, v in shipped.items() if k not in numbers} == {
            k: v for k, v in row.items() if k not in numbers
        }
        for name in numbers:  # the generator's stream may change with numpy's version
            assert float(shipped[name]) == pytest.approx(float(row[name]), rel=0.15)
        assert shipped["basis"] == "simulated"
        assert shipped["cpu_model"].startswith("SIMULATED")


def test_the_template_has_the_rows_of_a_boot_and_no_number():
    rows = data.read_rows(data.path("protocol", "measurements.template.csv"))
    one_boot = [(r["primitive"], r["n"]) for r in rows_of(TEXT) if r["boot"] == "1"]
    assert [(r["primitive"], r["n"]) for r in rows] == one_boot
    assert not any(row["cycles_p50"] or row["cpu_model"] for row in rows)
    with pytest.raises(LabError, match=r"template\.csv:2: cpu_model: empty"):
        measured.read(data.path("protocol", "measurements.template.csv"))


# ---- the command --------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_cpus_lists_and_shows_as_before():
    listed = command("cpus")
    assert listed.exit_code == 0
    assert all(name in listed.output for name in prices.names())
    assert json.loads(command("cpus", "--format", "json").output)[0]["cpu"] == prices.DEFAULT
    one = command("cpus", "skylake-2015", "--format", "csv").output
    assert one.startswith("parameter,p05")
    assert one == command("cpus", "--format", "csv", "skylake-2015").output
    assert one == command("cpus", "show", "skylake-2015", "--format", "csv").output
    assert "did you mean 'skylake-2015'" in str(command("cpus", "skylke-2015").exception)


def test_cpus_import_makes_a_list_that_cpu_takes(tmp_path):
    out = tmp_path / "example.toml"
    example = data.path("protocol", "example-simulated.csv")
    options = ("--id", "example", "--out", out, "--base", "skylake-2015")
    result = command("cpus", "import", example, *options)
    assert result.exit_code == 0, result.output
    assert "SIMULATED" in result.output
    as_json = json.loads(command("cpus", "import", example, *options, "--format", "json").output)
    assert as_json[0]["quantity"] == "vmread_first"
    assert "simulated" in command("cpus", out).output
    priced = command("compare", "--mix", "cpuid", "--cpu", out, "--exits", 300)
    assert priced.exit_code == 0
    assert "7 simulated" in priced.output
    refused = command("cpus", "import", tmp_path / "none.csv", "--id", "x", "--out", out)
    assert isinstance(refused.exception, LabError)
    assert "none.csv: cannot be read" in str(refused.exception)
