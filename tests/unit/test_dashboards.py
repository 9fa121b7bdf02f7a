"""Dashboards: promtool reads every expression, the registry knows all they name, Grafana's own
types take the files. Whether each returns data: tests/distributed/test_live_dashboards.py."""

import enum
import itertools
import json
import re
import shutil
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import yaml

from cocoa_dist.exporter import target_labels
from cocoa_dist.metrics import METRICS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from dashboard_board import Look, expressions  # noqa: E402
from dashboard_panels import BOARDS  # noqa: E402

FOLDER = ROOT / "ops" / "grafana"
NAMES = sorted(BOARDS)
ALL = [(name, query) for name in NAMES for query in expressions(BOARDS[name])]
# Added by Prometheus itself, and `le` of histograms.
OTHER_LABELS = {"job", "alertstate", "alertname", "severity", "le"}


def recordings() -> dict[str, str]:
    groups = yaml.safe_load((ROOT / "ops" / "prometheus" / "rules.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    return {rule["record"]: rule["expr"] for rule in rules if "record" in rule}


def filled_in(query: str) -> str:
    return query.replace("$__rate_interval", "1m").replace("$run", "a")


def series_of(query: str) -> set[str]:
    """Names of series in an expression: ours, recorded ones, `up` and ALERTS."""
    return set(re.findall(r"(?:\w+:)?cocoa_\w+(?::\w+)?|\bup\b|\bALERTS\b", query))


def metric_of(series: str) -> str:
    base = re.sub(r"_(bucket|sum|count)$", "", series)
    return base if base in METRICS and METRICS[base].buckets else series


def labels_of(query: str) -> set[str]:
    grouped = re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", query)
    matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
    return {word for group in grouped for word in re.findall(r"\w+", group)} | set(matched)


def json_of(name: str) -> dict[str, typing.Any]:
    found: dict[str, typing.Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def promtool_says(tmp_path: Path, queries: list[str]) -> "subprocess.CompletedProcess[str]":
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    rules = [{"record": f"check:query:{i}", "expr": q} for i, q in enumerate(queries)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "check", "rules": rules}]}))
    command = [promtool, "check", "rules", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_promtool_reads_every_expression(tmp_path: Path) -> None:
    assert len(ALL) > 60
    done = promtool_says(tmp_path, [filled_in(query) for _, query in ALL])
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_would_not_read_a_broken_one(tmp_path: Path) -> None:
    broken = ALL[0][1].removesuffix(")") + " or"
    assert promtool_says(tmp_path, [filled_in(broken)]).returncode != 0


@pytest.mark.parametrize("name", NAMES)
def test_every_series_is_in_the_registry_or_recorded_by_a_rule(name: str) -> None:
    known = {*METRICS, *recordings(), "up", "ALERTS"}
    for query in expressions(BOARDS[name]):
        assert series_of(query), query
        assert {metric_of(series) for series in series_of(query)} <= known, query


@pytest.mark.parametrize("name", NAMES)
def test_every_label_is_one_that_its_series_have(name: str) -> None:
    targets = set(target_labels(Path("a"), who="r0"))
    for query in expressions(BOARDS[name]):
        metrics = [METRICS[m] for s in series_of(query) if (m := metric_of(s)) in METRICS]
        own = {label for metric in metrics for label in metric.labels}
        recorded = {"cause"} if "run_id_cause:" in query else set()
        assert labels_of(query) <= own | targets | OTHER_LABELS | recorded, query


def test_every_metric_is_on_a_dashboard() -> None:
    used = {metric_of(series) for _, query in ALL for series in series_of(query)}
    through = [rule for record, rule in recordings().items() if record in used]
    used |= {metric_of(series) for rule in through for series in series_of(rule)}
    assert set(METRICS) - used == set()


def test_every_recording_rule_is_on_a_dashboard() -> None:
    assert set(recordings()) <= {series for _, query in ALL for series in series_of(query)}


@pytest.mark.parametrize("name", NAMES)
def test_only_dashboards_of_one_run_ask_for_a_run(name: str) -> None:
    board = BOARDS[name]
    for query in expressions(board):
        assert ("$run" in query) == board.one_run, query


@pytest.mark.parametrize("name", NAMES)
def test_panels_are_named_explained_and_have_series_to_tell_apart(name: str) -> None:
    for panel in (panel for row in BOARDS[name].rows.values() for panel in row):
        assert panel.title, panel
        assert panel.about.endswith("."), panel
        assert len(panel.queries) == 1 or all(panel.queries), panel.title
        assert panel.look is not Look.TABLE or len(panel.queries) == 1, panel.title


@pytest.mark.parametrize("name", NAMES)
def test_the_file_holds_the_panels_expressions(name: str) -> None:
    panels = [panel for panel in json_of(name)["panels"] if panel["type"] != "row"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    assert found == expressions(BOARDS[name])


@pytest.mark.parametrize("name", NAMES)
def test_panels_lie_side_by_side_on_24_columns(name: str) -> None:
    cells: set[tuple[int, int]] = set()
    for panel in json_of(name)["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        area = set(itertools.product(range(at["x"], at["x"] + at["w"]),
                                     range(at["y"], at["y"] + at["h"])))  # fmt: skip
        assert not area & cells, panel["title"]
        cells |= area


def test_numbers_of_panels_and_names_of_dashboards_are_given_once() -> None:
    for name in NAMES:
        numbers = [panel["id"] for panel in json_of(name)["panels"]]
        assert len(set(numbers)) == len(numbers)
    assert len({json_of(name)["uid"] for name in NAMES}) == len(NAMES)


def builder() -> types.ModuleType:
    pytest.importorskip("grafana_foundation_sdk", reason="comes with the extra `dev`")
    import build_dashboards

    return build_dashboards


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_what_the_panels_say(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == builder().render(BOARDS[name])


def test_check_names_the_file_that_is_stale(tmp_path: Path, monkeypatch, capsys) -> None:
    tool = builder()
    monkeypatch.setattr(tool, "FOLDER", tmp_path / "new")
    monkeypatch.setattr(sys, "argv", ["build"])
    assert tool.main() == 0
    monkeypatch.setattr(sys, "argv", ["build", "--check"])
    assert tool.main() == 0
    (tmp_path / "new" / "data.json").write_text("{}")
    assert tool.main() == 1
    assert capsys.readouterr().out.startswith("data.json: not what the panels say")


def faults(value: object, declared: object, where: str) -> list[str]:
    """What of a value is not of the type that the library declares for it."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if declared in (typing.Any, object):
        return faults(value, type(value), where) if hasattr(value, "to_json") else []
    if origin in (typing.Union, types.UnionType):
        found = [faults(value, one, where) for one in inner]
        return [] if [] in found else min(found, key=len)
    if origin is typing.Literal:
        return [] if value in inner else [f"{where}: {value!r} is none of {inner}"]
    if origin is list and isinstance(value, list):
        return [f for i, one in enumerate(value) for f in faults(one, inner[0], f"{where}[{i}]")]
    if origin is dict and isinstance(value, dict):
        return [f for key, one in value.items() for f in faults(one, inner[1], f"{where}.{key}")]
    if origin is not None or not isinstance(declared, type):
        return [f"{where}: {value!r} is no {declared}"]
    if issubclass(declared, enum.Enum):
        values = [one.value for one in declared]
        return [] if value in values else [f"{where}: {value!r} is none of {values}"]
    if declared is float and isinstance(value, int) and not isinstance(value, bool):
        return []
    if not isinstance(value, declared) or (declared is int and isinstance(value, bool)):
        return [f"{where}: {value!r} is no {declared.__name__}"]
    if not hasattr(value, "to_json"):
        return []
    fields = typing.get_type_hints(type(value))
    return [f for n, t in fields.items() for f in faults(getattr(value, n), t, f"{where}.{n}")]


def read_by_grafana_types(content: dict[str, typing.Any]) -> tuple[typing.Any, list[str]]:
    """The file as the library reads it, and what in it is not of the declared type."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    read = Dashboard.from_json(content)
    return json.loads(JSONEncoder().encode(read)), faults(read, Dashboard, "dashboard")


@pytest.mark.parametrize("name", NAMES)
def test_grafanas_types_take_the_file_and_lose_nothing(name: str) -> None:
    builder()
    again, wrong = read_by_grafana_types(json_of(name))
    assert wrong == []
    assert again == json_of(name)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("refresh",), 30, "dashboard.refresh: 30 is no str"),
        (("panels", 1, "gridPos", "w"), "8", "grid_pos.w: '8' is no int"),
        (("panels", 1, "title"), ["a"], "title"),
        (("graphTooltip",), 7, "graph_tooltip: 7 is none of"),
        (("panels", 1, "targets", 0, "expr"), None, "expr: None is no str"),
    ],
)
def test_a_wrong_type_would_be_found(
    path: tuple[str | int, ...], value: object, complaint: str
) -> None:
    builder()
    content = place = json_of("fleet")
    for key in path[:-1]:
        place = place[key]  # type: ignore[index]
    place[path[-1]] = value  # type: ignore[index]
    _, wrong = read_by_grafana_types(content)
    assert any(complaint in one for one in wrong), wrong
