"""What each table of the data folder must look like. Declarations only."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from nvmx_lab.costs.claims import PARTS
from nvmx_lab.nested.ops import Kind
from nvmx_lab.nested.paths import INSTRUCTIONS
from nvmx_lab.tables import whole
from nvmx_lab.tables.csvfile import Table
from nvmx_lab.tables.rules import Flag, Known, ListOf, Number, OneOf, Rule, Text
from nvmx_lab.tables.runs import RUN
from nvmx_lab.tables.tomlfile import Section

CYCLES: Final = "TSC cycles"
SOURCE: Final = Text()
MAYBE_TEXT: Final = Text(blank=True)
MAYBE_URL: Final = Text(blank=True, pattern=r"https?://\S+( ; https?://\S+)*.*", form="a URL")
COUNT: Final = Number(low=0, high=1e12, whole=True)
MAYBE_COUNT: Final = Number(low=0, high=1e12, whole=True, blank=True)
# A billion cycles is a third of a second: no cost here is that large.
AMOUNT: Final = Number(low=0, high=1e9)
MAYBE_AMOUNT: Final = Number(low=0, high=1e9, blank=True)
SHARE: Final = Number(low=0, high=1)
MAYBE_SHARE: Final = Number(low=0, high=1, blank=True)
SHADOW: Final = OneOf(words=("none", "ro", "rw"))
MAYBE_FLAG: Final = Flag(blank=True)
UNIT: Final = OneOf(words=(CYCLES,))
PUBLISHED: Final = OneOf(words=("published",))
BASIS: Final = OneOf(words=("simulated", "executed", "published", "published-code", "assumed"))
SLUG: Final = Text(pattern=r"[a-z0-9]+([._-][a-z0-9]+)*", form="lower-case words with hyphens")
WORD: Final = Text(pattern=r"[a-z][a-z0-9_]*", form="lower-case words with underscores")
SYMBOL: Final = Text(pattern=r"[A-Z][A-Za-z0-9_]*", form="a name in capitals")
L0_PATH_FORM: Final = r"[a-z][A-Za-z0-9_]*(\.[A-Za-z0-9_+]+)*"

_FIELD_ACCESS: Final = Table(
    columns={
        "exit_reason": Known(kind="exit reason", before=":"),
        "seq": Number(low=1, whole=True),
        "op": OneOf(words=("VMREAD", "VMWRITE")),
        "field_encoding_hex": Text(
            pattern=r"0x[0-9a-f]{4}", form="four hexadecimal digits, 0x6808"
        ),
        "field_name": Known(kind="field"),
        "count": COUNT,
        "n_exits": COUNT,
    },
    key=("exit_reason", "seq"),
    also=(whole.seq_counts_from(1, "exit_reason"),),
)

_L1_HANDLERS: Final = Table(
    columns={
        "l1": SLUG,
        "handler": WORD,
        "seq": Number(low=0, whole=True),
        "op": OneOf(words=tuple(str(kind) for kind in Kind)),
        "arg": MAYBE_TEXT,
        "condition": Known(kind="L1 condition", blank=True),
        "probability": MAYBE_SHARE,
        "stage": OneOf(words=("exit", "entry")),
        "source_function": MAYBE_TEXT,
        "basis": BASIS,
        "source": SOURCE,
    },
    key=("handler", "seq"),
    also=(
        whole.seq_counts_from(0, "handler"),
        whole.l1_is_file_name,
        whole.arguments,
        whole.one_draw_each,
    ),
)

_L1_HANDLER_LOGS: Final = Table(
    columns={
        "l1": SLUG,
        "variant": SLUG,
        "handler": WORD,
        "weight": Number(low=0, high=1e12),
        "operations": whole.RoundTrip(),
        "source": SOURCE,
    },
    key=("variant", "handler", "operations"),
    also=(whole.l1_is_file_name,),
)

TIMED: Final = {
    "overhead": "nothing: the fences and reads of the clock alone",
    "vmread": "n VMREADs of different fields, back to back",
    "vmread-same-field": "n VMREADs of one field, back to back",
    "vmwrite": "n VMWRITEs of different fields, back to back",
    "vmwrite-same-field": "n VMWRITEs of one field, back to back",
    "vmptrld": "n VMPTRLDs, in turn of two VMCSs that are both hot",
    "vmptrld-cold": "n VMPTRLDs, each of a VMCS that was evicted before",
    "vmclear-vmptrld": "n times VMCLEAR of the current VMCS and VMPTRLD of it",
    "transition": "n VM-entries, each with the exit of a CPUID",
    "vmptrld-transition": "n times VMPTRLD of the other VMCS, VM-entry and exit of a CPUID",
}
"""What a line of measurements may have timed (`data/protocol/README.md`)."""

_TIMED_CYCLES: Final = Number(low=0.001, high=1e9)

MEASUREMENTS: Final = Table(
    columns={
        "cpu_model": Text(),
        "microcode": Text(),
        "tsc_hz": Number(low=1e8, high=1e10),
        "core_hz": Number(low=1e8, high=1e10),
        "clock": OneOf(words=("TSC", "core")),
        "basis": OneOf(words=("measured", "simulated")),
        "primitive": OneOf(words=tuple(TIMED)),
        "n": Number(low=0, high=4096, whole=True),
        "boot": Number(low=1, high=1e6, whole=True),
        "repetitions": Number(low=1000, high=1e12, whole=True),
        "cycles_p05": _TIMED_CYCLES,
        "cycles_p50": _TIMED_CYCLES,
        "cycles_p95": _TIMED_CYCLES,
    },
    key=("primitive", "n", "boot"),
    ascending=(("cycles_p05", "cycles_p50", "cycles_p95"),),
)
"""Timings of single primitives, as `nvmx_lab.costs.measured` turns into a price list."""

# What whoever measures fills in is still empty.
_TO_FILL_IN: Final = replace(
    MEASUREMENTS,
    columns={
        name: rule if name in ("clock", "basis", "primitive", "n") else replace(rule, blank=True)
        for name, rule in MEASUREMENTS.columns.items()
    },
)

CSV: Final[dict[str, Table]] = {
    "vmcs_fields.csv": Table(
        columns={
            "name": SYMBOL,
            "encoding": Text(pattern=r"0x[0-9a-f]{4}", form="four hexadecimal digits, 0x6808"),
            "width": OneOf(words=("16", "32", "64", "natural")),
            "group": OneOf(words=("control", "guest", "host", "exit-info(read-only)")),
            "access_type": OneOf(words=("full",)),
            "vmcs12_member": Text(blank=True, pattern=r"[a-z][a-z0-9_]*", form="a member of C"),
            "vmcs12_offset": Number(low=0, high=4095, whole=True, blank=True),
            "in_vmcs12": Flag(),
            "rare": Flag(),
            "rare_order": Number(low=1, high=36, whole=True, blank=True),
            "shadow_v52": SHADOW,
            "shadow_at_patch13": SHADOW,
            "shadow_v53": SHADOW,
            "requires": OneOf(words=("pml", "preemption_timer", "apicv", "mpx"), blank=True),
            "synced_at_exit_before": Flag(),
            "synced_at_exit_after": Flag(),
            "synced_at_exit_v53_final": Flag(),
            "read_by": MAYBE_TEXT,
            "n_vmread_x86_64": Number(low=0, high=2, whole=True, blank=True),
            "condition": MAYBE_TEXT,
            "updated_in_prepare_vmcs12": Flag(),
            "l1_vmread_traps_v53": MAYBE_FLAG,
            "l1_vmwrite_traps_v53": MAYBE_FLAG,
            "l1_vmwrite_dirties_vmcs12_v53": MAYBE_FLAG,
            "l1_vmread_triggers_rare_sync": MAYBE_FLAG,
            "l1_vmwrite_triggers_rare_sync": MAYBE_FLAG,
            "vmcs02_write_at_entry_v53": MAYBE_TEXT,
            "evmcs_clean_group": MAYBE_TEXT,
            "source": SOURCE,
        },
        key=("name",),
        also=(
            whole.unique("encoding"),
            whole.unique("vmcs12_member"),
            whole.unique("vmcs12_offset"),
            whole.unique("rare_order"),
            whole.encoding_agrees,
            whole.shadow_sets,
            whole.rare_set,
            whole.derived_columns,
        ),
    ),
    "exit_reasons.csv": Table(
        columns={
            "name": SYMBOL,
            "number": Number(low=0, high=65535, whole=True),
            "linux_name": Text(pattern=r"EXIT_REASON_[A-Z0-9_]+", form="EXIT_REASON_..."),
            "source": SOURCE,
        },
        key=("name",),
        also=(whole.unique("number"), whole.unique("linux_name")),
    ),
    "claims.csv": Table(
        columns={
            "id": Text(pattern=r"[A-Z][0-9]?", form="a letter, then perhaps a digit"),
            "description": Text(),
            "detail": MAYBE_TEXT,
            "role": OneOf(words=("target", "fit", "check", "hold-out")),
            "bound": OneOf(words=("about", "at least", "no number")),
            "claimed_cycles": MAYBE_AMOUNT,
            "claimed_low_cycles": MAYBE_AMOUNT,
            "claimed_high_cycles": MAYBE_AMOUNT,
            "unit": UNIT,
            "per": Text(),
            "vmread_low": MAYBE_COUNT,
            "vmread_high": MAYBE_COUNT,
            "vmwrite_low": MAYBE_COUNT,
            "vmwrite_high": MAYBE_COUNT,
            "vmptrld": MAYBE_COUNT,
            "observation_sd_cycles": MAYBE_AMOUNT,
            "observation_sd_high_cycles": MAYBE_AMOUNT,
            "model_before": MAYBE_TEXT,
            "model_after": MAYBE_TEXT,
            "model_part": OneOf(words=PARTS, blank=True),
            "model_operations": MAYBE_TEXT,
            "counts": Text(
                pattern=r"([a-z0-9_]+=\d+( [a-z0-9_]+=\d+)*)?",
                form="words like vmread_first=1",
                blank=True,
            ),
            "counts_note": Text(),
            "microarchitecture": Text(),
            "year": Number(low=2005, high=2100, whole=True),
            "basis": PUBLISHED,
            "source": SOURCE,
            "source_ref": MAYBE_TEXT,
            "claimed_text": Text(),
            "vmread_text": MAYBE_TEXT,
            "vmwrite_text": MAYBE_TEXT,
            "vmptrld_text": MAYBE_TEXT,
            "other_text": MAYBE_TEXT,
            "observation_sd_text": MAYBE_TEXT,
            "role_text": Text(),
        },
        key=("id",),
        ascending=(
            ("claimed_low_cycles", "claimed_cycles", "claimed_high_cycles"),
            ("vmread_low", "vmread_high"),
            ("vmwrite_low", "vmwrite_high"),
            ("observation_sd_cycles", "observation_sd_high_cycles"),
        ),
        also=(whole.bound_agrees,),
    ),
    "hw_round_trips.csv": Table(
        columns={
            "microarchitecture": Text(),
            "cpu": Text(),
            "first_cycles": AMOUNT,
            "min_cycles": AMOUNT,
            "median_cycles": AMOUNT,
            "last_cycles": AMOUNT,
            "spread_ratio": Number(low=1, high=1000),
            "unit": UNIT,
            "basis": PUBLISHED,
            "source": SOURCE,
            "source_url": MAYBE_URL,
        },
        key=("cpu",),
        ascending=(
            ("min_cycles", "median_cycles"),
            ("min_cycles", "first_cycles"),
            ("min_cycles", "last_cycles"),
        ),
    ),
    "published_loops.csv": Table(
        columns={
            "test": WORD,
            "before_cycles": AMOUNT,
            "after_cycles": AMOUNT,
            "unit": UNIT,
            "basis": PUBLISHED,
            "source": SOURCE,
            "message_id": Text(pattern=r"<\S+@\S+>", form="a Message-Id between < and >"),
        },
        key=("test",),
    ),
    "series.csv": Table(
        columns={
            "patches": Text(pattern=r"[1-9]\d?(-[1-9]\d?)?", form="a number, or two with a hyphen"),
            "feature": Known(kind="feature", blank=True),
            "subject": Text(),
            "effect": OneOf(words=("saves", "adds", "none", "not known")),
            "claimed_low_cycles": MAYBE_AMOUNT,
            "claimed_high_cycles": MAYBE_AMOUNT,
            "unit": UNIT,
            "claimed_text": MAYBE_TEXT,
            "per": MAYBE_TEXT,
            "left_out": MAYBE_TEXT,
            "claims": ListOf(item=Known(kind="claim"), blank=True),
            "basis": PUBLISHED,
            "source": SOURCE,
            "message_id": Text(pattern=r"<\S+@\S+>", form="a Message-Id between < and >"),
        },
        key=("patches",),
        ascending=(("claimed_low_cycles", "claimed_high_cycles"),),
        also=(whole.unique("feature"), whole.unique("message_id"), whole.patches_follow_on),
    ),
    "repeatability.csv": Table(
        columns={
            "condition": WORD,
            "run_to_run_percent": Number(low=0, high=100),
            "bound": OneOf(words=("about", "at most")),
            "meaning": Text(),
            "year": Number(low=2005, high=2100, whole=True),
            "basis": PUBLISHED,
            "source": SOURCE,
            "source_ref": MAYBE_TEXT,
            "text": Text(),
        },
        key=("condition",),
    ),
    "exit_mixes.csv": Table(
        columns={
            "id": SLUG,
            "workload": Text(),
            "seen_from": OneOf(words=("host of one VM", "L0, exits of L1")),
            "vendor": OneOf(words=("intel", "amd", "pvm")),
            "exit_reason": Known(kind="exit reason", blank=True),
            "exit_reason_text": Text(),
            "fraction": MAYBE_SHARE,
            "rate_per_s": MAYBE_AMOUNT,
            "count": MAYBE_COUNT,
            "total_count": MAYBE_COUNT,
            "average_us": MAYBE_AMOUNT,
            "time_percent": Number(low=0, high=100, blank=True),
            "basis": PUBLISHED,
            "source": SOURCE,
            "source_url": MAYBE_URL,
            "notes": MAYBE_TEXT,
        },
        key=("id", "exit_reason_text"),
        ascending=(("count", "total_count"),),
        also=(whole.fractions_agree("id"), whole.one_each("id", "workload")),
    ),
    "vmcs_field_use.csv": Table(
        columns={
            "l1": Text(),
            "workload": Text(),
            "access": OneOf(words=("VMREAD", "VMWRITE")),
            "field": Known(kind="field", blank=True),
            "field_text": Text(),
            "fraction": MAYBE_SHARE,
            "count": MAYBE_COUNT,
            "total_count": MAYBE_COUNT,
            "per_exit_low": MAYBE_COUNT,
            "per_exit_high": MAYBE_COUNT,
            "basis": PUBLISHED,
            "source": SOURCE,
            "source_url": MAYBE_URL,
        },
        key=("l1", "workload", "access", "field_text"),
        ascending=(("count", "total_count"), ("per_exit_low", "per_exit_high")),
    ),
    "l0_conditions.csv": Table(
        columns={
            "name": WORD,
            "kind": OneOf(words=("option", "state")),
            "meaning": Text(),
            "source": SOURCE,
        },
        key=("name",),
    ),
    "l0_paths.csv": Table(
        columns={
            "path": Text(pattern=L0_PATH_FORM, form="words with dots"),
            "op": OneOf(words=INSTRUCTIONS),
            "fields": whole.Fields(blank=True),
            "copy": OneOf(words=("vmcs12",), blank=True),
            "condition": whole.Conditions(blank=True),
            "function": Text(),
            "source": SOURCE,
        },
        # The same access may be made twice in a path: no column names a row.
        key=(),
        also=(whole.fields_where_needed,),
    ),
    "l0_lengths.csv": Table(
        columns={
            "stretch": Text(),
            "condition": whole.Conditions(blank=True),
            "instructions": Number(low=0, high=1e6),
            "stretches": COUNT,
            "run": Known(kind="run", blank=True),
            "source": SOURCE,
        },
        key=("stretch", "condition"),
    ),
    "l1_instructions.csv": Table(
        columns={
            "l1": Known(kind="L1"),
            "variant": Text(blank=True, pattern=SLUG.pattern, form=SLUG.form),
            "handler": WORD,
            "exit_reason": Known(kind="exit reason", blank=True),
            "instructions": Number(low=0, high=1e9),
            "basis": BASIS,
            "source": SOURCE,
        },
        key=("l1", "variant", "handler", "exit_reason"),
        also=(whole.handler_exists,),
    ),
    "executed/l1_kvm61_bare_field_access.csv": _FIELD_ACCESS,
    "executed/l1_kvm61_nested_field_access.csv": _FIELD_ACCESS,
    "executed/l1_xen417_bare_field_access.csv": _FIELD_ACCESS,
}
"""Tables by name."""

CSV_PATTERNS: Final[dict[str, tuple[Table, ...]]] = {
    "l1_handlers/*.csv": (_L1_HANDLERS, _L1_HANDLER_LOGS),
    "protocol/*.template.csv": (_TO_FILL_IN,),
    "protocol/*.csv": (MEASUREMENTS,),
}
"""Tables by pattern of their name; of several the one whose columns are nearest to the header's."""

_MEANING: Final[dict[str, Rule]] = {"meaning": Text(), "source": SOURCE}

_L1_CONDITION: Final = Known(kind="L1 condition")
_OVERRIDE: Final = Section(
    keys={"p": SHARE, "low": SHARE, "high": SHARE, "basis": BASIS, "source": MAYBE_TEXT},
    optional=frozenset({"low", "high", "basis", "source"}),
    ascending=(("low", "p", "high"),),
)

_PRICE: Final = Section(
    keys={
        "p05": AMOUNT,
        "p50": AMOUNT,
        "p95": AMOUNT,
        "unit": OneOf(
            words=(
                CYCLES,
                "TSC cycles per instruction",
                "fraction of vmread_first",
                "fraction of vmwrite_first",
            )
        ),
        "basis": OneOf(words=("published", "measured", "calibrated", "assumed")),
        "claims": ListOf(item=Known(kind="claim")),
        "includes_instructions": Number(low=0, high=1000),
        "source": SOURCE,
    },
    optional=frozenset({"claims", "includes_instructions"}),
    ascending=(("p05", "p50", "p95"),),
)

_PRICE_LIST: Final = Section(
    keys={
        "id": SLUG,
        "name": Text(),
        "generation": Text(),
        "years": Text(pattern=r"\d{4}(-(\d{4})?)?", form='years, "2015-2019"'),
        "note": Text(),
        "base": Known(kind="cpu"),
    },
    optional=frozenset({"base"}),
    each=_PRICE,
    each_name=Known(kind="price"),
)

TOML: Final[dict[str, Section]] = {
    "l0_releases.toml": Section(
        tables={
            "features": Section(
                each=Section(
                    keys={**_MEANING, "off": Flag(), "mends": Text(), "evidence": Text()},
                    optional=frozenset({"off", "mends", "evidence"}),
                ),
                each_name=SLUG,
            ),
            "releases": Section(
                each=Section(
                    keys={
                        "extends": Known(kind="KVM release"),
                        "features": ListOf(item=Known(kind="feature")),
                        "source": SOURCE,
                    },
                    optional=frozenset({"extends"}),
                ),
                each_name=Text(pattern=r"\d+\.\d+", form='a kernel release, "5.3"'),
            ),
        }
    ),
    "l1_conditions.toml": Section(
        each=Section(
            keys={
                **_MEANING,
                "probability": SHARE,
                "low": SHARE,
                "high": SHARE,
                "requires": Known(kind="L1 condition"),
                "excludes": Known(kind="L1 condition"),
                "basis": BASIS,
            },
            optional=frozenset({"low", "high", "requires", "excludes"}),
            ascending=(("low", "probability", "high"),),
        ),
        each_name=WORD,
    ),
}
"""TOML files by name."""

TOML_PATTERNS: Final[dict[str, Section]] = {
    "executed/*.toml": RUN,
    "mixes/*.toml": Section(
        keys={
            "name": SLUG,
            "title": Text(),
            "question": Text(),
            "basis": BASIS,
            "source": SOURCE,
            "assumes": MAYBE_TEXT,
            "l1": Known(kind="L1"),
            "variant": MAYBE_TEXT,
            "without": ListOf(item=whole.OneOperation()),
        },
        tables={
            "exits": Section(others=Number(low=0, high=1e15)),
            "conditions": Section(each=_OVERRIDE, others=SHARE, each_name=_L1_CONDITION),
            "host": Section(
                keys={
                    "shadow_vmcs": Flag(),
                    "evmcs": Flag(),
                    "mpx": Flag(),
                    "l2_mode": OneOf(words=("long", "legacy")),
                },
                optional=frozenset({"shadow_vmcs", "evmcs", "mpx", "l2_mode"}),
            ),
            "published": Section(
                keys={
                    "before_cycles": AMOUNT,
                    "after_cycles": AMOUNT,
                    "exits_per_iteration": Number(low=1, high=1e6, whole=True),
                    "source": SOURCE,
                },
                optional=frozenset({"exits_per_iteration"}),
            ),
        },
        optional=frozenset({"assumes", "variant", "without", "conditions", "host", "published"}),
    ),
    "cpus/*.toml": _PRICE_LIST,
    "calibration/*.toml": _PRICE_LIST,
}
"""TOML files by pattern of their name."""
