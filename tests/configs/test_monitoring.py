"""configs/monitoring is what its code makes, and asks only for metrics that there are."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from app.core.shed_reason import ShedReason
from app.core.tiers import TierReason
from app.gateway.health import HealthReason
from app.observe.catalogue import METRICS
from scripts.monitoring import write
from scripts.monitoring.dashboard import ROWS
from scripts.monitoring.rules import Windows, alerts, recording, rules_file
from tests.support.promql import names, tool
from tests.support.waiting import SLOWEST

pytestmark = pytest.mark.unit

EXPORTED = {name for one in (*METRICS, *write.engine_metrics()) for name in one.series}
QUERIES = {
    f"{row.title}: {panel.title}: {legend}": expr
    for row in ROWS
    for panel in row.panels
    for legend, expr in panel.queries.items()
}
RECORDED = {rule["record"]: rule["expr"] for rule in recording(Windows())}
ALERTS = {alert.name: alert for alert in alerts(Windows())}


def test_the_files_are_what_the_code_makes():
    found = {
        str(path.relative_to(write.FOLDER)): path.read_text()
        for path in write.FOLDER.rglob("*")
        if path.is_file()
    }
    assert found == write.files(), "run: python scripts/monitoring/write.py"


def test_the_page_has_every_metric_and_every_alert():
    text = write.PAGE.read_text()
    assert text == write.page(text), "run: python scripts/monitoring/write.py"
    for metric in (*METRICS, *write.engine_metrics()):
        assert f"| `{metric.name}` |" in text
    for name in ALERTS:
        assert f"### {name}\n" in text


@pytest.mark.parametrize(
    ("where", "expr"),
    [*QUERIES.items(), *RECORDED.items(), *((name, a.expr) for name, a in ALERTS.items())],
)
def test_only_metrics_are_asked_for_that_there_are(where, expr):
    assert names(expr), where
    assert names(expr) <= EXPORTED | RECORDED.keys(), where


def test_every_metric_of_ours_is_on_the_dashboard_or_in_an_alert():
    asked = set().union(*map(names, [*QUERIES.values(), *(a.expr for a in ALERTS.values())]))
    for metric in METRICS:
        assert asked & set(metric.series), f"nothing shows {metric.name}"


def test_every_metric_that_is_relayed_is_on_the_dashboard():
    asked = set().union(*map(names, QUERIES.values()))
    for metric in write.engine_metrics():
        assert asked & set(metric.series), f"nothing shows {metric.name}"


def test_every_reason_in_a_selector_is_one():
    """A misspelt label value matches nothing, and nobody would notice."""
    reasons = {r.value for kind in (ShedReason, TierReason, HealthReason) for r in kind}
    for name, alert in ALERTS.items():
        for values in re.findall(r'reason!?=~?"([^"]*)"', alert.expr):
            assert set(values.split("|")) <= reasons, name


def test_the_dashboard_is_laid_out_without_overlap():
    dashboard = json.loads(write.files()["grafana/frontline.json"])
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def promtool(*arguments, cwd=None):
    ended = subprocess.run(
        [tool("promtool"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=SLOWEST * 60,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture
def home(monkeypatch):
    default = Path.home() / ".cache/frontline"
    monkeypatch.setenv("FRONTLINE_HOME", os.environ.get("FRONTLINE_HOME", str(default)))


def test_promtool_accepts_the_files(home):
    promtool("check", "config", "prometheus.yml", cwd=write.FOLDER)
    promtool("check", "rules", "rules.yml", cwd=write.FOLDER)


def steady(series, per_minute, minutes):
    return {"series": series, "values": f"0+{per_minute}x{minutes}"}


def flat(series, value, minutes):
    return {"series": series, "values": f"{value}x{minutes}"}


M, LONG = 'model="m"', 400
PRIORITY = f'{M},tier="priority"'
CASES = {
    "FrontlineSloBurnsFast": [
        flat(f"ray_frontline_slo_objective{{{PRIORITY}}}", 0.99, LONG),
        steady(f'ray_frontline_slo_requests_total{{{PRIORITY},met="true"}}', 80, LONG),
        steady(f'ray_frontline_slo_requests_total{{{PRIORITY},met="false"}}', 20, LONG),
    ],
    "FrontlineSloBurnsSlowly": [
        flat(f"ray_frontline_slo_objective{{{PRIORITY}}}", 0.99, LONG),
        steady(f'ray_frontline_slo_requests_total{{{PRIORITY},met="true"}}', 90, LONG),
        steady(f'ray_frontline_slo_requests_total{{{PRIORITY},met="false"}}', 10, LONG),
    ],
    "FrontlinePriorityShed": [
        steady(f'ray_frontline_sheds_total{{{PRIORITY},reason="queue_full"}}', 1, LONG)
    ],
    "FrontlinePriorityDowngraded": [
        steady(
            f'ray_frontline_downgrades_total{{{M},requested_tier="priority",'
            'reason="no_replica_honours_priority"}',
            1,
            LONG,
        )
    ],
    "FrontlineLedgerBehind": [flat("ray_frontline_ledger_lag_seconds", 90, LONG)],
    "FrontlineJournalGrows": [
        flat("ray_frontline_journal_limit_bytes", 1000, LONG),
        steady("ray_frontline_journal_pending_bytes", 2, LONG),
    ],
    "FrontlineJournalsStuck": [flat('ray_frontline_journals_stuck{state="set_aside"}', 1, LONG)],
    "FrontlineBilledNotEchoed": [
        steady('ray_frontline_alarms_total{name="billed otherwise than echoed"}', 1, LONG)
    ],
    "FrontlineUsageEstimated": [
        steady(f"ray_frontline_answers_without_usage_total{{{PRIORITY}}}", 2, LONG),
        steady(f'ray_frontline_requests_total{{{M},served_tier="priority"}}', 100, LONG),
    ],
    "FrontlineEngineRestarting": [
        steady(f'ray_frontline_replica_losses_total{{{M},pool="p"}}', 1, LONG)
    ],
    "FrontlineNoEngine": [
        flat(f'ray_frontline_replicas_ready{{{M},pool="p"}}', 0, LONG),
        flat(f"ray_frontline_queue_length{{{PRIORITY}}}", 3, LONG),
    ],
    "FrontlineBackgroundFailure": [
        steady('ray_frontline_background_failures_total{name="limits"}', 1, LONG)
    ],
    "FrontlineAlarm": [steady('ray_frontline_alarms_total{name="odd usage"}', 1, LONG)],
    "FrontlineIngressDegraded": [
        flat('ray_frontline_ingress_problem{reason="keys_away"}', 1, LONG)
    ],
    "FrontlineAbsent": [],
}
QUIET = [
    flat('ray_frontline_ingress_problem{reason="keys_away"}', 0, LONG),
    flat(f"ray_frontline_slo_objective{{{PRIORITY}}}", 0.99, LONG),
    steady(f'ray_frontline_slo_requests_total{{{PRIORITY},met="true"}}', 1000, LONG),
    steady(f'ray_frontline_slo_requests_total{{{PRIORITY},met="false"}}', 5, LONG),
    flat(f'ray_frontline_sheds_total{{{PRIORITY},reason="queue_full"}}', 7, LONG),
    steady(f'ray_frontline_sheds_total{{{M},tier="flex",reason="queue_full"}}', 5, LONG),
    steady(f'ray_frontline_sheds_total{{{PRIORITY},reason="fail_fast"}}', 5, LONG),
    steady(
        f'ray_frontline_downgrades_total{{{M},requested_tier="priority",'
        'reason="key_may_not_use_tier"}',
        5,
        LONG,
    ),
    flat("ray_frontline_ledger_lag_seconds", 2, LONG),
    flat("ray_frontline_journal_limit_bytes", 1000, LONG),
    flat("ray_frontline_journal_pending_bytes", 500, LONG),
    flat('ray_frontline_journals_stuck{state="failing"}', 0, LONG),
    flat('ray_frontline_background_failures_total{name="limits"}', 3, LONG),
    flat('ray_frontline_alarms_total{name="odd usage"}', 3, LONG),
    flat('ray_frontline_alarms_total{name="billed otherwise than echoed"}', 0, LONG),
    steady('ray_frontline_alarms_total{name="refused for too_large"}', 3, LONG),
    flat(f'ray_frontline_replicas_ready{{{M},pool="p"}}', 2, LONG),
    flat(f"ray_frontline_queue_length{{{PRIORITY}}}", 3, LONG),
    flat(f'ray_frontline_replica_losses_total{{{M},pool="p"}}', 4, LONG),
]
"""Everything is as it should be, or somebody else's fault."""


def fires(name, minutes, expected):
    labels = f'{{alertname="{name}"}}'
    return {
        "expr": f'count by (alertname) (ALERTS{{alertname="{name}",alertstate="firing"}})',
        "eval_time": f"{minutes}m",
        "exp_samples": [{"labels": labels, "value": 1}] if expected else [],
    }


def try_rules(folder, interval, cases):
    (folder / "rules.yml").write_text(yaml.safe_dump(rules_file(Windows())))
    tests = {"rule_files": ["rules.yml"], "evaluation_interval": interval, "tests": cases}
    (folder / "tests.yml").write_text(yaml.safe_dump(tests))
    promtool("test", "rules", "tests.yml", cwd=folder)


def test_each_alert_fires_for_its_fault_and_none_for_anything_else(home, tmp_path):
    assert CASES.keys() == ALERTS.keys()
    cases = [
        {
            "name": f"{name} fires",
            "interval": "1m",
            "input_series": series,
            "promql_expr_test": [fires(name, 390, True)],
        }
        for name, series in CASES.items()
    ]
    cases.append(
        {
            "name": "quiet",
            "interval": "1m",
            "input_series": QUIET,
            "promql_expr_test": [
                {"expr": "ALERTS", "eval_time": f"{minute}m", "exp_samples": []}
                for minute in (30, 390)
            ],
        }
    )
    try_rules(tmp_path, "1m", cases)


EVENTS = sorted(name for name, alert in ALERTS.items() if "increase(" in alert.expr)


def counts(name, values):
    """The series of an alert that counts events, with these values every 15 s."""
    [series] = CASES[name]
    return [{"series": series["series"], "values": values}]


@pytest.mark.parametrize("name", EVENTS)
def test_what_a_process_counts_before_the_first_scrape_fires_too(home, tmp_path, name):
    """Once, and never again, whatever scrapes are missed: Prometheus itself says so."""
    many = 1 + len(re.findall(">= 2", ALERTS[name].expr))
    lasting = int((ALERTS[name].lasting or "0m").removesuffix("m"))
    # The process is there after 20 minutes, and has counted already.
    early = counts(name, f"_x80 {many}x400")
    soon = [fires(name, 19, False), fires(name, 21 + lasting, True), fires(name, 110, False)]
    # A scrape fails after an hour, and a whole quarter of an hour is missed later.
    gaps = counts(name, f"{many}x240 stale {many}x100 stale _x60 {many}x400")
    never = [fires(name, minutes, False) for minutes in range(65, 180)]
    cases = [
        {"interval": "15s", "input_series": series, "promql_expr_test": expected}
        for series, expected in ((early, soon), (gaps, never))
    ]
    try_rules(tmp_path, "15s", cases)
