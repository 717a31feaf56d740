"""What ``examples/monitoring`` gives Prometheus and Grafana fits what the package shows."""

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from redis_asgi import metrics_app
from redis_asgi.telemetry import fresh_telemetry

from ..kit.servers import ExternalServer
from .scrapes import scraped, use_every_metric

FOLDER = Path(__file__).parents[2] / "examples" / "monitoring"
ALERTS = (FOLDER / "alerts.yml").read_text("utf-8")
ALERT_TESTS = (FOLDER / "alerts_test.yml").read_text("utf-8")
ALERT_EXPRESSIONS = re.findall(r"expr: (?:\|\n)?(.*?)(?=\n +(?:for|labels|- record|- alert):|\n\n)", ALERTS, re.DOTALL)
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
DASHBOARD_EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
# What Prometheus and Grafana add.
NOT_OURS = {"job", "instance"}


def promtool(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool beside the files."""
    path = shutil.which("promtool")
    if path is None:
        message = "no promtool found: alert rules and dashboard NOT CHECKED. Debian has it in 'prometheus'."
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return subprocess.run(
        [path, *arguments], cwd=FOLDER, input=given, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def _live() -> dict[str, str]:
    return {}


@pytest.fixture
def live(redis_server: ExternalServer, _live: dict[str, str]) -> str:
    """A scrape of an app that has used every metric, with a Redis that is well."""
    if not _live:
        with fresh_telemetry() as counted:
            use_every_metric(counted)
            _live["text"] = asyncio.run(scraped(metrics_app(redis=redis_server.url))).text
    return _live["text"]


def labels_of(text: str) -> dict[str, dict[str, set[str]]]:
    """Every series name of a scrape, with its labels and their values."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                found[sample.name][label].add(value)
            found[sample.name]  # also without labels
    return found


def test_scrape_is_as_prometheus_likes_it(live: str) -> None:
    """``promtool check metrics`` has nothing to say about any name, unit, type or help text."""
    done = promtool("check", "metrics", given=live)

    assert ("", "", 0) == (done.stdout, done.stderr, done.returncode)
    assert promtool("check", "metrics", given="a_milliseconds 1\n").stderr


def test_scrape_configuration_is_valid() -> None:
    """The snippet is a whole configuration, which finds the rules beside it."""
    done = promtool("check", "config", "prometheus.yml")

    assert 0 == done.returncode, done.stderr
    assert "SUCCESS: 19 rules found" in done.stdout


def test_alerts_fire_when_they_should() -> None:
    """The rule tests pass, and there is one that fires for every alert."""
    done = promtool("test", "rules", "alerts_test.yml")

    assert 0 == done.returncode, done.stdout + done.stderr
    alerts = re.findall(r"- alert: (\w+)", ALERTS)
    assert 14 == len(alerts)
    assert 19 == len(ALERT_EXPRESSIONS)
    for alert in alerts:
        assert re.search(rf"alertname: {alert}\n\s+eval_time: \d+m\n\s+exp_alerts:\n", ALERT_TESTS), alert
        assert re.search(rf"- alert: {alert}\n.*?severity: (?:page|warning|info)\n", ALERTS, re.DOTALL), alert


def test_only_what_does_not_pass_by_itself_pages() -> None:
    """Nobody is woken for what the package answers by itself."""
    assert ["RedisAsgiAuthErrors"] == re.findall(r"- alert: (\w+)\n(?:(?!- alert).)*?severity: page", ALERTS, re.DOTALL)


def test_dashboard_expressions_are_valid(tmp_path: Path) -> None:
    """Each is one that Prometheus can evaluate, with Grafana's variables filled in."""
    rules = tmp_path / "rules.yml"
    lines = ["groups:", "- name: dashboard", "  rules:"]
    for n, expression in enumerate(DASHBOARD_EXPRESSIONS):
        filled = expression.replace("$__rate_interval", "5m").replace("$job", ".*")
        assert "$" not in filled, expression
        lines += [f"  - record: panel:{n}", f"    expr: {json.dumps(filled)}"]
    rules.write_text("\n".join(lines))
    done = promtool("check", "rules", str(rules))

    assert len(DASHBOARD_EXPRESSIONS) > 30
    assert 0 == done.returncode, done.stderr
    assert f"{len(DASHBOARD_EXPRESSIONS)} rules found" in done.stdout


@pytest.mark.parametrize(
    "expression", [*DASHBOARD_EXPRESSIONS, *ALERT_EXPRESSIONS], ids=lambda expression: " ".join(expression.split())[:60]
)
def test_what_is_asked_for_is_there(live: str, expression: str) -> None:
    """Every name, label and value of an expression occurs in a live scrape."""
    there = labels_of(live)
    # After a colon it is the name of one of our own rules.
    for name in re.findall(r"(?<![\w:])redis_asgi_\w+", expression):
        assert name in there
    for name, selector in re.findall(r"(redis_asgi_\w+)\{([^}]*)\}", expression):
        for label, operator, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', selector):
            if label not in NOT_OURS:
                assert label in there[name], (name, label)
                if operator != "!=":
                    assert set(value.split("|")) <= there[name][label], (name, label, value)


def test_every_metric_is_on_the_dashboard(live: str) -> None:
    """What is worth counting is worth a look."""
    shown = " ".join(DASHBOARD_EXPRESSIONS) + json.dumps(DASHBOARD["templating"])
    left_out = {"connected_slaves", "mem_fragmentation_ratio", "rdb_last_save_timestamp_seconds", "uptime_in_seconds"}
    left_out |= {"keyspace_hits_total", "keyspace_misses_total"}  # of all of Redis' clients, our reads of counters too
    for name in labels_of(live):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        if name.removeprefix("redis_asgi_server_") not in left_out:
            assert base in shown, name


def test_dashboard_can_be_imported() -> None:
    """It has a fixed id, asks for data source and job, and every panel uses both."""
    assert "redis-asgi" == DASHBOARD["uid"]
    assert ["datasource", "job"] == [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    for panel in PANELS:
        assert {"type": "prometheus", "uid": "${datasource}"} == panel["datasource"]
        for target in panel["targets"]:
            assert panel["datasource"] == target["datasource"]
            assert target["expr"].count("redis_asgi_") == target["expr"].count('job=~"$job"')
            assert "rate(" not in target["expr"] or "[$__rate_interval]" in target["expr"]
    assert len(DASHBOARD["panels"]) == len({panel["id"] for panel in DASHBOARD["panels"]})


def test_panels_do_not_overlap() -> None:
    """Each cell of the grid belongs to one panel."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
