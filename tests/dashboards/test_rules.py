"""The alerts fire when they should, and not just below."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "dashboards" / "rules" / "moescope.yml"
CASES = (Path(__file__).parent / "rules_test.yml").read_text()
TEXT = RULES.read_text()


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(TEXT)["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = [rule["alert"] for rule in rules() if "alert" in rule]


def shifted() -> dict[str, str]:
    """Return the rules with one threshold or one ``for`` moved a little, by what was moved."""
    found = {}
    for threshold in re.finditer(r"> (0|0\.3|1000|10000)$", TEXT, re.MULTILINE):
        value, line = threshold[1], TEXT[: threshold.start()].count("\n") + 1
        moves = (">= 0",) if value == "0" else (f"> {value} * 1.003", f"> {value} * 0.997")
        for move in moves:
            text = TEXT[: threshold.start()] + move + TEXT[threshold.end() :]
            found[f"line {line}: {move}"] = text
    for wait in re.finditer(r"for: (\d+)m$", TEXT, re.MULTILINE):
        line = TEXT[: wait.start()].count("\n") + 1
        for move in (f"for: {int(wait[1]) + 1}m", f"for: {60 * int(wait[1]) - 59}s"):
            found[f"line {line}: {move}"] = TEXT[: wait.start()] + move + TEXT[wait.end() :]
    return found


SHIFTED = shifted()


def promtool(rules_text: str, directory: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    (directory / "rules.yml").write_text(rules_text)
    (directory / "tests.yml").write_text(CASES.replace("RULES", str(directory / "rules.yml")))
    command = ["promtool", "test", "rules", str(directory / "tests.yml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_every_alert_says_what_to_do() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"info", "warning"}
            assert {"summary", "description"} == rule["annotations"].keys()
            assert len(rule["annotations"]["description"]) > 80


def test_servers_of_one_model_are_kept_apart() -> None:
    for rule in rules():
        labels = re.findall(r"\bby \(([^)]*)\)", rule["expr"])
        if "worst_layer" in rule["expr"] + rule.get("record", ""):  # of all servers of a model
            assert labels == ["model_name"]
        else:
            assert all({"model_name", "instance"} <= {*one.split(", ")} for one in labels), rule


def test_the_rules_fire_when_they_should(tmp_path: Path) -> None:
    done = promtool(TEXT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_is_expected_and_expected_not_to_fire(alert: str) -> None:
    fires, silent = False, False
    for group in yaml.safe_load(CASES)["tests"]:
        for case in group.get("alert_rule_test", []):
            if case["alertname"] == alert:
                fires |= bool(case["exp_alerts"])
                silent |= not case["exp_alerts"]
        for case in group.get("promql_expr_test", []):
            if f'alertname="{alert}"' in case["expr"]:
                fires |= any(sample["value"] > 0 for sample in case["exp_samples"])
                silent |= any(sample["value"] == 0 for sample in case["exp_samples"])
    assert fires
    assert silent


def test_there_is_something_to_shift() -> None:
    assert len(SHIFTED) >= 2 * len(ALERTS)


@pytest.mark.parametrize("what", SHIFTED)
def test_a_shifted_threshold_is_noticed(what: str, tmp_path: Path) -> None:
    done = promtool(SHIFTED[what], tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout + done.stderr
