"""What a dashboard is: panels as plain values, in rows below a heading.

No Grafana here: build_dashboards.py draws them, the tests take their expressions. `$run` is the run
that was chosen, `$__rate_interval` Grafana's shortest window that holds four scrapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Look(StrEnum):
    """How a panel is drawn."""

    LINES = "lines"
    STACK = "stack"
    NUMBER = "number"
    BARS = "bars"
    TABLE = "table"


@dataclass(frozen=True)
class Panel:
    """One panel: its question is its title, `about` says what to make of the answer."""

    title: str
    about: str
    unit: str  # Grafana's name of it
    queries: Mapping[str, str]  # legend: PromQL
    look: Look = Look.LINES
    width: int = 8  # of 24
    limit: float | None = None  # above it, or below it if `low_is_bad`, the value is red
    low_is_bad: bool = False
    log_scale: bool = False


@dataclass(frozen=True)
class Board:
    """One dashboard; rows are panels below a heading. `one_run`: it has the variable `run`."""

    uid: str
    title: str
    about: str
    one_run: bool
    rows: Mapping[str, tuple[Panel, ...]]


def number(title: str, about: str, unit: str, query: str, **more: Any) -> Panel:
    """Return a panel with one number."""
    return Panel(title, about, unit, {"": query}, look=Look.NUMBER, width=4, **more)


def expressions(board: Board) -> list[str]:
    """Return every PromQL expression of a dashboard, in order."""
    panels = [panel for row in board.rows.values() for panel in row]
    return [query for panel in panels for query in panel.queries.values()]
