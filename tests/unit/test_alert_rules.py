"""Rules and alerts: Debian's own tools check them, and the registry knows all they name."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cocoa_dist.metrics import METRICS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "ops" / "prometheus"
RULES = FOLDER / "rules.yml"
TESTS = sorted(FOLDER.glob("rules*_test.yml"))
OURS = re.compile(r"(?<![:\w])cocoa_(?!dist|alerts|recording)\w+")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        package = {"promtool": "prometheus", "amtool": "prometheus-alertmanager"}[name]
        pytest.skip(f"{name} is not installed (apt-get install {package})")
    return path


def check(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def declared(name: str) -> bool:
    """Whether a series name belongs to a metric of the registry."""
    if name in METRICS:
        return True
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    return base in METRICS and bool(METRICS[base].buckets)


def test_promtool_accepts_rules_and_configuration() -> None:
    assert "SUCCESS" in check(tool("promtool"), "check", "rules", str(RULES))
    check(tool("promtool"), "check", "config", str(FOLDER / "prometheus.yml"))


def test_amtool_accepts_the_alertmanager_example() -> None:
    check(tool("amtool"), "check-config", str(FOLDER / "alertmanager.yml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", TESTS, ids=[path.stem for path in TESTS])
def test_alerts_fire_when_they_should_and_only_then(path: Path) -> None:
    check(tool("promtool"), "test", "rules", str(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("          and on (run_id) max by (run_id) (cocoa_train_stepping) == 1\n        for: 15s",
         "        for: 15s"),  # a long evaluation would page
        ("* max by (run_id) (cocoa_train_median_step_seconds), 60)", "* vector(0), 60)"),
        ("        for: 5m\n", "        for: 30s\n"),  # a normal end would be a ticket
        ('{reason="crash"}', ""),  # preemptions would page
    ],
    ids=["stepping", "slow_steps", "normal_end", "preemptions"],
)  # fmt: skip
def test_a_rule_made_worse_fails_its_tests(tmp_path: Path, before: str, after: str) -> None:
    text = RULES.read_text()
    assert text.count(before) >= 1
    (tmp_path / "rules.yml").write_text(text.replace(before, after))
    shutil.copy(FOLDER / "rules_test.yml", tmp_path)
    command = [tool("promtool"), "test", "rules", str(tmp_path / "rules_test.yml")]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_every_metric_in_a_rule_is_in_the_registry() -> None:
    used = {name for rule in rules() for name in OURS.findall(rule["expr"])}
    assert len(used) > 15
    assert [name for name in sorted(used) if not declared(name)] == []


def test_every_series_in_a_rule_test_is_in_the_registry() -> None:
    used = {name for path in TESTS for name in OURS.findall(path.read_text())}
    assert [name for name in sorted(used) if not declared(name)] == []


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    fires, silent = set(), set()
    for path in TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test["alert_rule_test"]:
                (fires if case["exp_alerts"] else silent).add(case["alertname"])
    assert set(alerts()) == fires == silent


def test_every_alert_says_what_to_do_and_how_urgent_it_is() -> None:
    page = (ROOT / "docs" / "operators.md").read_text()
    anchors = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
               for line in page.splitlines() if line.startswith("#")}  # fmt: skip
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (file, anchor) == ("docs/operators.md", name.lower())
        assert anchor in anchors, f"docs/operators.md has no section about {name}"


def test_alertmanager_names_only_alerts_that_exist() -> None:
    text = (FOLDER / "alertmanager.yml").read_text()
    named = re.findall(r'alertname=~?"([\w|]+)"', text)
    assert {name for group in named for name in group.split("|")} <= set(alerts())


def test_recording_rules_are_named_by_level_metric_and_operation() -> None:
    for rule in rules():
        if "record" in rule:
            level, metric, operation = rule["record"].split(":")
            assert level
            assert metric.startswith("cocoa_")
            assert operation
