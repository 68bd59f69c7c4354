"""The notebooks as they are in the tree: tidy, checked, and what they say when run."""

from __future__ import annotations

import ast
import dataclasses
import re

import nbformat
import papermill
import pytest

import nvmx_lab as nx
from nvmx_lab import notebook_parameters
from nvmx_lab.costs.prices import DEFAULT
from nvmx_lab.reports import html, inputs, kernel, result, summary
from nvmx_lab.study import narrative, published

NAMES = tuple(notebook_parameters.NOTEBOOKS)
ONE, ALL, CYCLES, *_, CORRECT = NAMES
STEADY, PULLING, ENLIGHTENED = "cpuid", "pio-user-kstack", "kvm-evmcs"


def read(name):
    return nbformat.read(inputs.notebooks_folder() / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_class(name):
    notebook_parameters.check_notebook(inputs.notebooks_folder() / f"{name}.ipynb")


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_outputs_and_with_stable_ids(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cell.id)
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", NAMES)
def test_asks_first_and_answers_last(name):
    cells = read(name).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert "?" in cells[0].source
    headings = [
        line for cell in cells if cell.cell_type == "markdown" for line in cell.source.split("\n")
    ]
    assert sum(line.startswith("# ") for line in headings) == 1
    assert cells[-2].source == "## Answer"
    assert "narrative.answer" in cells[-1].source


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_define_nothing(name):
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.tags
    assert f'nx.parameters("{name}"' in code[1].source
    for cell in code:
        assert len(cell.source.splitlines()) <= 10
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(
                node,
                ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.For,
            )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that runs a notebook through papermill, each with its parameters once."""
    done = {}

    def ran(name, **parameters):
        key = (name, repr(parameters))
        if key not in done:
            has_exits = "exits" in notebook_parameters.NOTEBOOKS[name].model_fields
            short = {"exits": 300} if has_exits else {}
            folder = tmp_path_factory.mktemp("run")
            kernel.prepare_process(folder)
            done[key] = papermill.execute_notebook(
                read(name),
                None,
                parameters=short | parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                kernel_manager_class=kernel.InterpreterKernelManager,
                resources={"metadata": {"path": str(folder)}},
            )
        return done[key]

    yield ran
    kernel.kill_all()


def page_of(notebook, name):
    return html.render(notebook, html.Page(name, {"exits": 300}, {}))


def text_of(notebook):
    """Return all Markdown that the cells displayed."""
    shown = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            shown.append("".join(output.get("data", {}).get("text/markdown", "")))
    return "\n".join(shown).replace("\N{NO-BREAK SPACE}", " ")


def alts(notebook):
    return [
        output.metadata["image/png"]["alt"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mix", [STEADY, PULLING, ENLIGHTENED])
def test_one_mix(run, page_of_notebook, mix):
    notebook = run(ONE, mix=mix)
    (row,) = summary.rows(result.published(notebook)["summary"])
    assert row.mix == mix
    page_of_notebook(notebook, ONE)
    said = text_of(notebook)
    (alt,) = alts(notebook)
    low, middle, high = (plot_number(value) for value in row.round_trip)
    assert f"round trip {middle} (90 % interval {low} to {high}) cycles" in alt
    if mix == STEADY:
        assert row.verdict == "saves"
        assert f"**It saves.** On `{mix}`" in said
        assert f"takes {middle} (90 % interval {low} to {high}) cycles less" in said
        assert "so it is reproduced, not predicted" in said
        assert "published totals and" in said
    elif mix == PULLING:
        assert row.verdict == "costs"
        assert "**It costs.**" in said
        gain = (plot_number(-value) for value in (row.round_trip[1], *row.round_trip[::-2]))
        assert "takes {} (90 % interval {} to {}) cycles more".format(*gain) in said
        assert "`vmptrld`" in said
        assert "No total is published" in said
    else:
        assert row.verdict == "no difference"
        assert "takes as long" in said
        assert "- published" not in said
        assert "nothing is left to pull" in said


def plot_number(value):
    return f"{value:,.0f}".replace("-0", "0").replace("-", "−")


@pytest.fixture
def page_of_notebook():
    def checked(notebook, name):
        page = page_of(notebook, name)
        assert page.count("<h1>") == 1
        assert "Traceback" not in page
        assert 'class="messages"' not in page
        assert "<figcaption>" in page or "<img" in page
        return page

    return checked


@pytest.mark.slow
def test_all_mixes(run, page_of_notebook):
    chosen = [STEADY, PULLING, ENLIGHTENED]
    notebook = run(ALL, mixes=chosen)
    page_of_notebook(notebook, ALL)
    said = text_of(notebook)
    assert "Of 3 mixes, the change clearly saves on 1, clearly costs on 1" in said
    assert "44.2 %" in said
    assert "A micro-guest that provokes each kind of exit" in said
    assert "other than the patch" not in said
    first, second, third = alts(notebook)
    for mix in chosen:
        assert mix in first
    assert "break-even" in second
    assert "published" in third


@pytest.mark.slow
def test_breakdown(run, page_of_notebook):
    for mix in (STEADY, PULLING, ENLIGHTENED):
        notebook = run(CYCLES, mix=mix)
        page_of_notebook(notebook, CYCLES)
        assert "the rare fields are" in text_of(notebook)
        assert "software of L0 (VMRESUME to L2)" in alts(notebook)[0]
    assert "switch of VMCS about" in alts(run(CYCLES, mix=PULLING))[0]


@pytest.mark.slow
def test_correctness(run, page_of_notebook):
    tried = ["no-pull-in-vmwrite", "pull-at-every-vmread"]
    notebook = run(CORRECT, kvm="5.3", machines=["shadow VMCS"], releases=["5.3"], mutants=tried)
    page_of_notebook(notebook, CORRECT)
    said = text_of(notebook)
    assert "(machines: shadow VMCS)" in said
    assert "**It fails in 2 ways in which eager copying does not**" in said
    assert "mended by `flag-reset`" in said
    assert "mended by `migration-sync`" in said
    assert "of 2 variants made wrong on purpose it catches 1" in said
    assert "L1 executes VMXOFF" in said  # what L1 can do alone
    assert len(alts(notebook)) == 2


@pytest.mark.slow
def test_another_pair_of_releases_and_blind_prices(run, page_of_notebook):
    given = {"kvm_before": "5.3", "kvm_after": "6.1", "cpu": "skylake-2015-blind"}
    said = text_of(run(ONE, mix=STEADY, **given))
    assert "KVM 6.1 (lazy) against KVM 5.3 (lazy)" in said
    assert "What the patch's author measured is about the patch alone" in said
    assert "About 200 cycles" not in said
    page_of_notebook(run(CYCLES, mix=STEADY, **given), CYCLES)
    page_of_notebook(run(ALL, mixes=[STEADY], **given), ALL)


def test_the_claim_is_set_beside_the_patch_alone():
    def shown(before, after):
        kvm = (before, after)
        comparison = nx.compare(STEADY, kvm=kvm, exits=300)
        predicted = narrative.prediction(STEADY, kvm=kvm, cpu=DEFAULT, exits=300, seed=1)
        said = narrative.answer(comparison, predicted, published.against_published([], exits=300))
        return list(predicted["basis"]), said

    basis, said = shown("5.2", "5.2+patch13")
    assert basis == ["simulated", "simulated", "published"]
    assert "About 200 cycles per nested exit" in said
    for pair, why in {
        ("5.2", "5.3"): "differ in 9 features other than the patch",
        ("5.2", "5.2+patch13+ibpb"): "differ in one feature other than the patch",
        ("5.2+patch13", "5.2"): "does not add it",
    }.items():
        basis, said = shown(*pair)
        assert basis == ["simulated", "simulated"]
        assert "About 200 cycles" not in said
        assert "is about the patch alone" in said
        assert why in said


def test_a_pull_without_a_price_is_not_an_enlightened_vmcs():
    pulling = nx.compare(PULLING, exits=300)
    unpriced = dataclasses.replace(pulling, break_even_pull_rate=None)
    said = narrative.of_pulls(unpriced).replace("\N{NO-BREAK SPACE}", " ")
    assert "of this mix. skylake-2015 has no price for some part of a pull" in said
    assert "enlightened" not in said
    assert "enlightened" in narrative.of_pulls(nx.compare(ENLIGHTENED, exits=300))
    frame = nx.sweep([STEADY, PULLING, ENLIGHTENED], cpu=[DEFAULT], exits=300)
    assert list(narrative.groups(frame)["which"]) == [STEADY, PULLING, ENLIGHTENED]
    without = narrative.groups(frame.assign(break_even_pull_rate_p50=None))
    assert without.loc["copies everything at once", "which"] == ENLIGHTENED
    assert PULLING in without.loc["pulls at an unknown price", "which"]


@pytest.mark.parametrize(
    ("mix", "said"), [(STEADY, "cycles, as before."), (PULLING, "cycles instead of 1,")]
)
def test_equal_cycles_are_not_said_twice(mix, said):
    steps = nx.breakdown(mix, exits=300)
    assert said in narrative.answer_for_cycles(steps, published.against_published([], exits=300))


@pytest.mark.slow
def test_a_mistyped_parameter_is_one_clear_error(run):
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="did you mean 'cpuid'"):
        run(ONE, mix="cpuidd")


def test_published_totals_of_a_mix():
    frame = published.against_published(STEADY, exits=300)
    assert list(frame["what"]) == ["before", "after", "saving"]
    before, after, saved = frame["published_cycles"]
    assert (before, after, saved) == (14886, 13142, 1744)
    assert (frame["cycles_p05"] < frame["cycles_p50"]).all()
    between = frame["published_cycles"].between(frame["cycles_p05"], frame["cycles_p95"])
    assert list(frame["inside"]) == list(between)
    assert published.against_published([PULLING], exits=300).empty
    assert published.against_published([], exits=300).empty
    # two exits an iteration: about twice the cycles of one round trip
    two = published.against_published("self-ipi-sti-hlt", exits=300)
    assert two["cycles_p50"].iloc[0] > 1.5 * frame["cycles_p50"].iloc[0]


def test_of_published_says_on_which_side():
    frame = published.against_published(STEADY, exits=300)
    below = frame.assign(cycles_p50=frame["published_cycles"] / 2, inside=False)
    assert "0 of 2 published totals" in narrative.of_published(below)
    assert "does more than the simulated" in narrative.of_published(below)
    above = frame.assign(cycles_p50=frame["published_cycles"] * 2)
    assert "than the median assumed" in narrative.of_published(above)


def test_executed_pulls_are_those_of_the_logs():
    runs = published.executed_pulls().set_index("run")
    assert runs.loc["kvm61_lazy_linux_l2", "exits"] == 7814
    assert runs.loc["kvm61_lazy_linux_l2", "pulls_share"] == pytest.approx(0.442, abs=5e-4)
    assert runs["pulls_share"].is_monotonic_decreasing
    assert not any("evmcs" in name or "eager" in name for name in runs.index)


@pytest.mark.slow
def test_measuring(run, page_of_notebook):
    name = "09_could_you_measure_it"
    notebook = run(name, power=0.8)
    page_of_notebook(notebook, name)
    said, handed = text_of(notebook), result.published(notebook)
    for row in handed["runs needed"]:
        assert row["power"] >= 0.8
        if row["design"] == "unpaired":
            assert f"{row['condition'].capitalize()}: {row['runs']} boots of each kernel" in said
            assert f"{row['runs']}" in alts(notebook)[0]
    assert {row["basis"] for row in handed["recovered prices"]} == {"simulated"}
    assert "What would settle it" in said


@pytest.mark.slow
def test_the_series(run, page_of_notebook):
    name = "05_the_series"
    notebook = run(name, mix="vmcall")
    page_of_notebook(notebook, name)
    said, handed = text_of(notebook), result.published(notebook)
    loops = {row["mix"]: row for row in handed["loops"]}
    own = loops["vmcall"]
    assert len(loops) == 13
    assert own["measured_cycles"] == 14918 - 13189
    spread = [plot_number(own[f"cycles_{q}"]) for q in ("p50", "p05", "p95")]
    assert "saves {} (90 % interval {} to {})".format(*spread) in said
    inside = sum(row["inside"] for row in loops.values())
    assert f"inside the simulated interval on {inside}," in said
    first, second = alts(notebook)
    assert "{1} to {2} as simulated".format(*spread) in first
    assert f"on {inside} of 13 loops" in second
    steps = [row for row in handed["steps"] if row["what"] == "step"]
    for row in steps:
        assert f"patch {row['patches']}: {plot_number(row['cycles_mean'])} (interval" in first
        missed = row["against_claim"] in ("above", "below")
        middle = plot_number(row["cycles_p50"])
        assert (f"{row['patches']} ({middle} simulated, " in said) == missed


@pytest.mark.slow
def test_kernel_stack_randomization(run, page_of_notebook):
    name = "07_kernel_stack_randomization"
    notebook = run(name, cpu="icelake-2021")
    page_of_notebook(notebook, name)
    said, handed = text_of(notebook), result.published(notebook)
    pulls = sum(row["pulls"] for row in handed["executed"] if "linux_l2" in row["run"])
    assert f"{pulls:,} of 7,814 reflected exits made L0 pull (**44.2 %**)" in said
    wrong = {row["fix"] for row in handed["judged"] if not row["holds"]}
    assert wrong == {"unpulled host writes", "unpulled writes"}
    assert all(f"**{fix}** (`" in said for fix in wrong)
    gains = [row for row in handed["fixes"] if row["cpu"] == "icelake-2021"]
    right = [g for g in gains if g["fix"] not in wrong | {"without the write"}]
    best = max(right, key=lambda row: row["closed_p50"])["fix"]
    assert f"correct fixes **{best}** closes most of the gap" in said
    for row in handed["write"]:
        if row["cpu"] == "icelake-2021" and row["part"] == "all":
            assert f"The write itself costs {plot_number(row['cycles_p50'])} (90 %" in said
    assert all(f"{fix} (wrong)" in alts(notebook)[2] for fix in wrong)


@pytest.mark.slow
def test_break_even(run, page_of_notebook):
    name = "06_break_even"
    notebook = run(name)
    page_of_notebook(notebook, name)
    said, handed = text_of(notebook), result.published(notebook)
    plain, ibpb = (row for row in handed["break_even_rates"] if row["cpu"] == DEFAULT)
    assert (plain["ibpb"], ibpb["ibpb"]) == (False, True)
    assert f"**{100 * plain['break_even_rate_p50']:.1f} % of the exits** pull" in said
    assert f"**{100 * ibpb['break_even_rate_p50']:.1f} %** (" in said
    at, beside = alts(notebook)[1:]
    for host, alt, where in ((False, at, "Without"), (True, beside, "With")):
        on_line = [row for row in handed["mixes"] if row["ibpb"] == host and not row["evmcs"]]
        beyond = [row for row in on_line if row["pulls_share"] > row["break_even_rate_p50"]]
        assert f"{where} IBPB, {len(beyond)} of {len(on_line)} mixes are beyond" in said
        assert f"{len(beyond)} of {len(on_line)} mixes and" in alt
        for row in on_line:
            rate, even = row["pulls_share"], row["break_even_rate_p50"]
            # Medians of a ratio and of a difference need not agree close to break-even.
            if not 0.8 < rate / even < 1.25:
                assert (row["round_trip_saving_cycles_p50"] > 0) == (rate < even), row["mix"]
    for row in handed["executed"]:
        assert (
            f"{row['run']} pulls after {100 * row['pulls_share']:.1f} %"
            in (at, beside)[row["ibpb"]]
        )


@pytest.mark.slow
def test_better_policies(run, page_of_notebook):
    name = "08_better_policies"
    notebook = run(name)
    page_of_notebook(notebook, name)
    rows = result.published(notebook)["policies"]
    whole = {(r["kind"], r["policy"]): r for r in rows if r["group"] == "all"}
    said = text_of(notebook)
    for kind, plural in (("mix", "mixes"), ("executed run", "executed runs")):
        able = [r for (k, p), r in whole.items() if k == kind and p not in ("lazy", "oracle")]
        best = min(able, key=lambda row: row["over_lazy_cycles_p50"])
        less = plot_number(-best["over_lazy_cycles_p50"])
        assert f"{plural} `{best['policy']}` takes {less} (" in said
        assert f"less with {best['policy']} over all {plural}" in alts(notebook)[1]
    assert "`last-exit`: every reachable state visited" in said
    assert "class LastExit(Predictor):" in said
    assert "**Nobody has tried any of these policies but eager and lazy on a kernel.**" in said


@pytest.mark.slow
def test_how_sure(run, page_of_notebook):
    """The sampler is cut short, so the page must say that it has not converged."""
    notebook = run("04_how_sure", steps=100)
    page_of_notebook(notebook, "04_how_sure")
    said = text_of(notebook)
    claims = {(r["fit"], r["claim"]): r for r in result.published(notebook)["claims"]}
    held = [r for (fit, _), r in claims.items() if fit == "with-claim" and not r["used"]]
    outside = [r["claim"] for r in held if r["verdict"] == "outside"]
    told = [r for r in held if r["verdict"] not in ("no prediction", "prior alone")]
    assert f"Of {len(told)} claims held out" in said
    assert f"{len(outside)} contradict**" in said
    assert "**What would settle it:** time 1 and 35 back-to-back VMREADs" in said
    assert "on one named Intel host" in said
    assert "has not converged" in said
    assert f"{claims['blind', 'A']['cycles_p50']:,.0f}" in said
    assert len(alts(notebook)) == 4
