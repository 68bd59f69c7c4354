"""nvmx_lab: the cost of nested virtualization, and what one KVM patch saves of it.

>>> import nvmx_lab as nx
>>> nx.compare("pio-user-kstack", kvm=["5.2", "5.3"])  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nvmx_lab.notebook_parameters import validated as parameters
    from nvmx_lab.reports.result import publish, table
    from nvmx_lab.study.breakdown import breakdown
    from nvmx_lab.study.compare import Comparison, compare
    from nvmx_lab.study.correctness import Correctness, check
    from nvmx_lab.study.sweep import sweep
    from nvmx_lab.study.validate import validate

# Name -> module and attribute. Loaded on first use: importing the package stays fast.
_PUBLIC = {
    "Comparison": ("nvmx_lab.study.compare", "Comparison"),
    "compare": ("nvmx_lab.study.compare", "compare"),
    "Correctness": ("nvmx_lab.study.correctness", "Correctness"),
    "check": ("nvmx_lab.study.correctness", "check"),
    "breakdown": ("nvmx_lab.study.breakdown", "breakdown"),
    "sweep": ("nvmx_lab.study.sweep", "sweep"),
    "validate": ("nvmx_lab.study.validate", "validate"),
    "parameters": ("nvmx_lab.notebook_parameters", "validated"),
    "publish": ("nvmx_lab.reports.result", "publish"),
    "table": ("nvmx_lab.reports.result", "table"),
}
_MODULES = ("costs", "nested", "plots", "reports", "study", "vmcs", "workload")

__all__ = [
    "Comparison",
    "Correctness",
    "__version__",
    "breakdown",
    "check",
    "compare",
    "parameters",
    "publish",
    "sweep",
    "table",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module, attribute = _PUBLIC[name]
        return getattr(importlib.import_module(module), attribute)
    if name in _MODULES:
        return importlib.import_module(f"nvmx_lab.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
