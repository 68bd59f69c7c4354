"""Break-even: the formula against the simulation, executed runs and prices done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nvmx_lab as nx
from nvmx_lab.costs import prices
from nvmx_lab.errors import LabError
from nvmx_lab.nested.config import Config, release
from nvmx_lab.study import break_even, published, pulls
from nvmx_lab.study import break_even_narrative as narrative
from nvmx_lab.study.compare import QUANTILES
from nvmx_lab.study.simulate import P, config_of, reader_and_pull_counts, simulate
from nvmx_lab.workload import executed, mixes

SMALL = {"exits": 2_000, "draws": 300}
PULLING = ["pio-user-kstack", "xen-emulation", "linux-boot-kstack", "thread-churn", "inl-from-qemu"]
WITH_IO = ("inl-from-qemu", "xen-emulation", "thread-churn")
STEADY = ["cpuid", "pio-user-nokstack", "kvm-evmcs"]
RELEASES = ["5.2", "5.2+patch13", "5.3", "5.3+ibpb", "5.8", "6.1"]
PRICED = ["skylake-2015", "haswell-2013", "icelake-2021", "skylake-2015-blind"]
# One instruction, at the dearest cycles per instruction that a few hundred draws hold.
ROUNDING_CYCLES = 4.0

BY_HAND = """
id = "by-hand"
name = "Round numbers"
generation = "none"
years = "2026"
note = "for tests"
"""


def by_hand(folder, **amounts):
    """Write a price list without uncertainty."""
    text = BY_HAND
    for name, amount in amounts.items():
        unit = "TSC cycles per instruction" if name == "cpi" else "TSC cycles"
        text += f'[{name}]\np05 = {amount}\np50 = {amount}\np95 = {amount}\nunit = "{unit}"\n'
        text += 'basis = "assumed"\nsource = "a test"\n'
    file = folder / "by-hand.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("kvm", "mpx", "fields", "rdmsrs", "ibpbs"),
    [
        ("5.3", True, 36, 2, 0),
        ("5.3", False, 35, 2, 0),
        ("5.3+ibpb", True, 36, 2, 2),
        ("5.8+ibpb", True, 36, 0, 0),
        ("6.1", True, 35, 0, 0),
    ],
)
def test_prices_by_hand(tmp_path, kvm, mpx, fields, rdmsrs, ibpbs):
    """As the patch describes a pull: switch, read all rare fields, switch back."""
    first, following, vmptrld, rdmsr, ibpb = 20, 5, 100, 50, 1000
    file = by_hand(
        tmp_path,
        vmread_first=first,
        vmread_next=following,
        vmptrld=vmptrld,
        rdmsr=rdmsr,
        ibpb=ibpb,
        cpi=0,
    )
    weighed = pulls.weigh(Config.of(kvm, "lazy", mpx=mpx), prices.load(file).draw(3, 1))
    reader, reads = fields * following, first + (fields - 1) * following
    switch = vmptrld + rdmsrs / 2 * rdmsr + ibpbs / 2 * ibpb
    np.testing.assert_allclose(weighed.reader, reader)
    np.testing.assert_allclose(weighed.reads, reads)
    np.testing.assert_allclose(weighed.switch, switch)
    np.testing.assert_allclose(weighed.break_even_rate, reader / (reads + 2 * switch))


@settings(max_examples=25)
@given(
    st.sampled_from(RELEASES),
    st.booleans(),
    st.sampled_from(PRICED),
    st.integers(0, 2**32),
    st.floats(0.001, 1.0),
)
def test_nothing_is_saved_at_break_even(kvm, mpx, cpu, seed, rate):
    weighed = pulls.weigh(Config.of(kvm, "lazy", mpx=mpx), prices.load(cpu).draw(50, seed))
    even = weighed.break_even_rate
    inside = even < 1
    np.testing.assert_allclose((weighed.reader - even * weighed.pull)[inside], 0, atol=1e-9)
    assert (weighed.saving(0.0) > 0).all()
    for draw in np.flatnonzero(inside)[:5]:
        assert weighed.saving(float(even[draw]) * 0.99)[draw] > 0
        assert weighed.saving(float(even[draw]) * 1.01)[draw] < 0
    # The curve over the cost of a switch passes through the host's own switch, draw by draw ...
    np.testing.assert_allclose(np.diag(weighed.break_even_rate_at(weighed.switch)), even)
    # ... and what a rate bears is its inverse.
    bears = weighed.bearable_switch(rate)
    np.testing.assert_allclose(
        weighed.reader, rate * (weighed.reads + weighed.switches * bears), rtol=1e-9
    )


@pytest.mark.parametrize("mix", [*PULLING, "cpuid", "pio-user-nokstack"])
@pytest.mark.parametrize("kvm", ["5.3", "5.3+ibpb", "6.1"])
def test_compared_mixes_lie_on_the_line(mix, kvm):
    result = nx.compare(mix, kvm=kvm, sync=("eager", "lazy"), **SMALL)
    config = config_of(mixes.load(mix), kvm, "lazy")
    weighed = pulls.weigh(config, prices.load(prices.DEFAULT).draw(SMALL["draws"], 1))
    line = np.quantile(weighed.saving(result.results[1].pulls_share), (0.05, 0.5, 0.95))
    simulated = [result.saving["round_trip_cycles"][q] for q in QUANTILES]
    # The eager exit leg of an I/O instruction, rounded, is longer by an instruction on 36 fields.
    rounding = ROUNDING_CYCLES if mix in WITH_IO else 1e-6
    assert simulated == pytest.approx(line, abs=rounding)


def test_placed_mixes_agree_with_comparisons_on_both_hosts():
    frame = break_even.placed("5.3", mixes=[*PULLING, *STEADY], **SMALL)
    assert len(frame) == 2 * len([*PULLING, *STEADY])
    assert (frame["left_over"] == "").all()
    assert frame["instructions_left_over"].abs().max() <= 1
    assert frame["difference_cycles"].max() < ROUNDING_CYCLES
    for ibpb, kvm in enumerate(("5.3", "5.3+ibpb")):
        own = frame[frame["ibpb"] == bool(ibpb)].set_index("mix")
        for mix in own.index:
            result = nx.compare(mix, kvm=kvm, sync=("eager", "lazy"), **SMALL)
            row, after = own.loc[mix], result.results[1]
            assert row["drawn_share"] == after.pulls_share
            even = result.break_even_pull_rate
            if row["evmcs"]:
                assert even is None
                continue
            assert row["break_even_rate_p50"] == pytest.approx(even["p50"])
            # The comparison at the drawn share, moved to the expected one by whole pulls.
            drawn = prices.load(prices.DEFAULT).draw(SMALL["draws"], 1)
            config = config_of(mixes.load(mix), kvm, "lazy")
            moved = np.median(pulls.weigh(config, drawn).saving(row["pulls_share"]))
            assert row["round_trip_saving_cycles_p50"] == pytest.approx(moved, abs=ROUNDING_CYCLES)
            spread = 5 * (row["pulls_share"] / SMALL["exits"]) ** 0.5
            assert abs(row["drawn_share"] - row["pulls_share"]) <= spread + 1e-9


@pytest.mark.parametrize("run", ["kvm61_lazy_two_l2_vcpus", "kvm61_lazy_shadow_nokstack"])
@pytest.mark.parametrize("kvm", ["6.1", "5.3+ibpb"])
def test_executed_runs_lie_on_the_line_too(run, kvm):
    """Replayed in the model they pull as they did when executed, whatever the lazy release."""
    loaded = executed.load(run)
    config = replace(loaded.config, kvm=release(kvm))
    eager, lazy = simulate(
        loaded.stream, [config.with_sync("eager"), config.with_sync("lazy")], allow_unknown=True
    )
    known = published.executed_pulls().set_index("run").loc[run]
    assert lazy.exits == known["exits"]
    assert lazy.exits_that_pull / lazy.exits == pytest.approx(known["pulls_share"], abs=1e-12)
    reader, pull = reader_and_pull_counts(config)
    saved = (eager.round_trip - lazy.round_trip)[:P]
    np.testing.assert_allclose(saved, lazy.exits * reader[:P] - lazy.exits_that_pull * pull[:P])
    placed = break_even.executed("5.3", draws=50)
    own = placed[placed["run"] == run]
    assert list(own["pulls_share"]) == [known["pulls_share"]] * 2


def test_rates_say_what_has_no_price_and_which_pulls_are_light():
    frame = break_even.rates(["5.3", "5.8"], cpu=prices.names(), draws=200)
    of = frame.set_index(["kvm", "ibpb", "cpu"])
    assert of.loc[("5.3", False, "netburst-2005"), "unpriced"] == "vmptrld"
    assert of.loc[("5.3", False, "core2-2006"), "unpriced"] == ""
    assert of.loc[("5.3", True, "core2-2006"), "unpriced"] == "ibpb"
    assert (of["break_even_rate_p50"].isna() == (of["unpriced"] != "")).all()
    ratio = of["break_even_rate_p50"].unstack("ibpb")
    light = of["light_pull"].groupby(level=["kvm", "cpu"]).all()
    assert list(light.groupby("kvm").all().items()) == [("5.3", False), ("5.8", True)]
    known = ratio.notna().all(axis=1)
    assert (ratio[True] < ratio[False] / 5)[known & ~light].all()
    assert (ratio[True] == ratio[False])[known & light].all()
    assert release("5.2").name not in break_even.lazy_releases()
    assert set(break_even.lazy_releases()) >= {"5.3", "5.8", "6.1"}


def test_a_curve_needs_no_price_of_a_switch_and_meets_the_rates():
    curve = break_even.curves(cpu=["netburst-2005", "skylake-2015"], draws=200)
    for _, own in curve.groupby("cpu"):
        assert own["break_even_rate_p50"].is_monotonic_decreasing
        assert (own["break_even_rate_p05"] <= own["break_even_rate_p95"]).all()
    # For one draw the curve is the rate exactly, so its medians must enclose that of the host.
    host = break_even.rates(draws=200).iloc[0]
    cost = [host["switch_cycles_p05"], host["switch_cycles_p95"]]
    low, high = break_even.curves(switch_cycles=cost, draws=200)["break_even_rate_p50"]
    assert high < host["break_even_rate_p50"] < low


def test_line_meets_the_rates():
    line = break_even.line(draws=300, pull_rates=[0.0, 0.5, 1.0])
    host = break_even.rates(draws=300)
    for ibpb, own in line.groupby("ibpb"):
        weighed = host[host["ibpb"] == ibpb].iloc[0]
        at = own.set_index("pulls_share")["round_trip_saving_cycles_p50"]
        assert at[0.0] == pytest.approx(weighed["reader_cycles_p50"])
        assert at[1.0] == pytest.approx(
            weighed["reader_cycles_p50"] - weighed["pull_cycles_p50"], rel=0.1
        )


def test_another_seed_moves_no_rate_and_no_verdict():
    one, other = (break_even.rates(cpu=PRICED, seed=seed) for seed in (1, 2))
    np.testing.assert_allclose(one["break_even_rate_p50"], other["break_even_rate_p50"], rtol=0.02)
    some = [*PULLING, "cpuid", "self-ipi-sti-hlt"]
    one, other = (break_even.placed(mixes=some, exits=500, seed=seed) for seed in (1, 2))
    assert list(one["verdict"]) == list(other["verdict"])
    assert list(one["pulls_share"]) == list(other["pulls_share"])
    medians = [frame["round_trip_saving_cycles_p50"] for frame in (one, other)]
    assert ((medians[0] - medians[1]).abs() < 0.02 * medians[0].abs()).all()


@pytest.mark.parametrize(
    ("kvm", "plain", "ibpb"),
    [
        ("5.3", "5.3", "5.3+ibpb"),
        ("5.3+ibpb", "5.3", "5.3+ibpb"),
        ("5.2+ibpb+patch13", "5.2+patch13", "5.2+ibpb+patch13"),
        ("5.8-no-ibpb-switch", "5.8-no-ibpb-switch", "5.8-no-ibpb-switch+ibpb"),
    ],
)
def test_hosts_differ_in_the_ibpb_alone(kvm, plain, ibpb):
    assert break_even.hosts(kvm) == (plain, ibpb)
    assert release(ibpb).features - release(plain).features == {"ibpb"}


def test_refuses_what_has_no_price():
    with pytest.raises(LabError, match="vmptrld"):
        break_even.placed(cpu="netburst-2005", mixes=["cpuid", "kvm-evmcs"], **SMALL)
    assert break_even.line(cpu="netburst-2005", draws=50).empty
    drawn = prices.load(prices.DEFAULT).draw(10, 1)
    with pytest.raises(LabError, match="ever pulled"):
        pulls.weigh(Config.of("5.3", evmcs=True), drawn)


# -- what is said --------------------


@pytest.mark.parametrize(
    ("kvm", "cpu", "said"),
    [
        ("5.3", "skylake-2015", "is all that the saving bears"),
        ("5.8", "skylake-2015", "changes nothing: pulls of this release skip it"),
        ("5.3", "core2-2006", "An IBPB has no price there"),
    ],
)
def test_answer_says_what_the_numbers_say(kvm, cpu, said):
    rates = break_even.rates(kvm, cpu=[cpu, "netburst-2005"], draws=300)
    placed = break_even.placed(kvm, cpu=cpu, mixes=["pio-user-kstack", *STEADY], **SMALL)
    runs = break_even.executed(kvm, cpu=cpu, draws=300)
    releases = break_even.rates(break_even.lazy_releases(), cpu=[cpu], draws=300)
    text = narrative.answer(kvm, cpu, rates, placed, runs, releases)
    plain = text.replace("\N{NO-BREAK SPACE}", " ")
    assert said in plain
    row = rates.iloc[0]
    assert f"**{100 * row['break_even_rate_p50']:.1f} % of the exits**" in plain
    assert "Without IBPB, 1 of 3 mixes are beyond break-even (medians) (1 more never pull" in plain
    differ = (kvm, cpu) == ("5.3", "skylake-2015")
    assert ("With IBPB, 1 of 3" in plain) == differ == ("With IBPB," in plain)
    assert "Without a price of a pull: netburst-2005 (vmptrld)." in plain
    assert ("`kvm61_lazy_linux_l2`" in plain) == (row["break_even_rate_p50"] < 0.44)
    assert len(narrative.mixes(placed)) == 4
    assert list(narrative.mixes(placed).iloc[:, -1])[-3:].count("never pulls") == 2
    assert "no price of ibpb" in narrative.weights(rates).to_string() or cpu != "core2-2006"
    assert list(narrative.by_release(releases)["light pull"]) == ["no", *["yes"] * 3]
    assert ("issue none" in narrative.of_ibpb(cpu, rates)) == (kvm == "5.8")
    assert len(narrative.runs(runs)) == runs["run"].nunique()


def test_agreement_is_not_claimed_where_there_is_none():
    frame = break_even.placed(mixes=["pio-user-kstack", "inl-from-kernel"], **SMALL)
    text = narrative.of_agreement(frame)
    assert "2 of 4 simulations give exactly" in text
    assert "Only retired instructions of L0 differ, by 1 per exit at most" in text
    assert "Nothing else is at work" in text
    wrong = frame.assign(left_over="vmwrite_first, rdmsr")
    assert "does not explain" in narrative.of_agreement(wrong)
    assert "Nothing else" not in narrative.of_agreement(wrong)
    exact = frame[frame["mix"] == "pio-user-kstack"]
    assert "2 of 2 simulations" in narrative.of_agreement(exact)
    assert "largest difference" not in narrative.of_agreement(exact)


def test_about_says_whose_sync_it_is():
    assert "own sync is eager" in narrative.about("5.2")
    assert "Its pulls are light" in narrative.about("5.8")
    assert "own sync" not in narrative.about("5.3")
