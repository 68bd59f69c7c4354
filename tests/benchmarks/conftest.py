"""The table of goals that `make bench` ends with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest


@dataclass
class Scoreboard:
    """What was measured, with the goal beside it where there is one."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def record(
        self,
        what: str,
        value: float,
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """Add a row. A goal that is missed is said, and fails nothing: machines differ."""
        goal, verdict = "", ""
        if at_most is not None:
            goal, verdict = f"at most {at_most:g}", "held" if value <= at_most else "MISSED"
        if at_least is not None:
            goal, verdict = f"at least {at_least:g}", "held" if value >= at_least else "MISSED"
        self.rows.append((what, f"{value:.3g} {unit}".strip(), goal, verdict))


_BOARD = pytest.StashKey[Scoreboard]()


def pytest_configure(config: pytest.Config) -> None:
    """Start an empty scoreboard."""
    config.stash[_BOARD] = Scoreboard()


@pytest.fixture
def scoreboard(pytestconfig: pytest.Config) -> Iterator[Scoreboard]:
    """Return the scoreboard of this run."""
    yield pytestconfig.stash[_BOARD]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the scoreboard."""
    rows = config.stash[_BOARD].rows
    if not rows:
        return
    table = [("what", "measured", "goal", ""), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    terminalreporter.section("goals")
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
