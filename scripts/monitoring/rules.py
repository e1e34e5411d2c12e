"""Recording and alert rules of Prometheus, with windows that a test can shorten. Pure.

An alert's runbook is its section in docs/monitoring.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from scripts.monitoring.counted import counted

RUNBOOK: Final = "docs/monitoring.md"
_MINUTE: Final = 60.0


@dataclass(frozen=True, slots=True)
class Windows:
    """Turns minutes into PromQL durations.

    Attributes:
        scale: what windows are multiplied by; the rules that are shipped have 1.
        least_s: the shortest window that samples are looked for in, in seconds: a rate needs two.
    """

    scale: float = 1.0
    least_s: float = 0.0

    def __call__(self, minutes: float) -> str:
        """Return the duration of a window."""
        return self._duration(max(minutes * _MINUTE * self.scale, self.least_s))

    def lasting(self, minutes: float) -> str:
        """Return for how long a condition has to hold."""
        return self._duration(minutes * _MINUTE * self.scale)

    @staticmethod
    def _duration(seconds: float) -> str:
        if seconds % 3600 == 0:
            return f"{seconds / 3600:.0f}h"
        return f"{seconds / 60:.0f}m" if seconds % 60 == 0 else f"{max(seconds, 1):.0f}s"


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert.

    Attributes:
        name: its name, and the title of its section in docs/monitoring.md.
        severity: ``page`` if somebody has to look now, else ``ticket``.
        expr: the PromQL expression.
        lasting: how long it has to hold, as a PromQL duration; empty for not at all.
        summary: one sentence, with Prometheus' templates.
        todo: what to do, for docs/monitoring.md.
    """

    name: str
    severity: str
    expr: str
    lasting: str
    summary: str
    todo: str

    def rule(self) -> dict[str, Any]:
        """Return it as in a rules file."""
        return {
            "alert": self.name,
            "expr": self.expr,
            **({"for": self.lasting} if self.lasting else {}),
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "runbook": f"{RUNBOOK}#{self.name.lower()}",
            },
        }


def _counted(counter: str, windows: Windows, minutes: float) -> str:
    return counted(counter, windows(minutes), windows(60))


def _missed(window: str) -> str:
    requests = "ray_frontline_slo_requests_total"
    return (
        f'sum by (model, tier) (rate({requests}{{met="false"}}[{window}])) / '
        f"sum by (model, tier) (rate({requests}[{window}]))"
    )


BURN_MINUTES: Final = (5, 30, 60, 360)


def burn(minutes: int) -> str:
    """Return the recorded name of the burn rate over some minutes."""
    return f"model_tier:frontline_slo_burn:rate{Windows()(minutes)}"


def recording(windows: Windows) -> list[dict[str, str]]:
    """Return the recording rules: how fast each tier's error budget is used up, 1 being as fast as
    the objective allows."""
    budget = "(1 - max by (model, tier) (ray_frontline_slo_objective))"
    return [
        {"record": burn(minutes), "expr": f"({_missed(windows(minutes))}) / {budget}"}
        for minutes in BURN_MINUTES
    ]


def alerts(windows: Windows) -> Iterator[Alert]:
    """Yield all alerts."""
    yield from _slo_alerts(windows)
    yield from _priority_alerts(windows)
    yield from _ledger_alerts(windows)
    yield from _engine_alerts(windows)
    yield from _fault_alerts(windows)


def _slo_alerts(windows: Windows) -> Iterator[Alert]:
    yield Alert(
        "FrontlineSloBurnsFast",
        "page",
        f"{burn(60)} > 14.4 and {burn(5)} > 14.4",
        windows.lasting(2),
        "{{ $labels.tier }} of {{ $labels.model }} uses up its error budget "
        "{{ $value | humanize }} times too fast",
        "Two percent of a month's error budget are gone in an hour. Look at the row *What "
        "customers feel*, then at *The queue*. If priority waits, engines are too few or too "
        "slow. If it does not wait, the engines themselves are slow (row *Engines*).",
    )
    yield Alert(
        "FrontlineSloBurnsSlowly",
        "ticket",
        f"{burn(360)} > 6 and {burn(30)} > 6",
        windows.lasting(15),
        "{{ $labels.tier }} of {{ $labels.model }} uses up its error budget "
        "{{ $value | humanize }} times too fast for hours",
        "Five percent of a month's error budget are gone in six hours. Add replicas, raise "
        "`max_replicas`, or correct the objective.",
    )


def _priority_alerts(windows: Windows) -> Iterator[Alert]:
    shed = 'ray_frontline_sheds_total{tier="priority",reason!="fail_fast"}'
    yield Alert(
        "FrontlinePriorityShed",
        "page",
        f"sum by (model, reason) ({_counted(shed, windows, 5)}) > 0",
        "",
        "priority requests to {{ $labels.model }} were turned away: {{ $labels.reason }}",
        "`queue_full` and `waited_too_long`: more priority than the engines can serve; add "
        "replicas. `no_other_replica`: an engine was lost and there is no second. "
        "`engine_not_offered`: no node can run the engine. `engine_failed`: it does not start.",
    )
    faults = "no_replica_honours_priority|route_does_not_honour_priority"
    lowered = f'ray_frontline_downgrades_total{{requested_tier="priority",reason=~"{faults}"}}'
    yield Alert(
        "FrontlinePriorityDowngraded",
        "ticket",
        f"sum by (model, reason) ({_counted(lowered, windows, 10)}) > 0",
        windows.lasting(5),
        "priority requests to {{ $labels.model }} are served as default: {{ $labels.reason }}",
        "No engine with room has native priority in force, so priority is neither delivered nor "
        "billed. `frontline status` shows which replicas honour it; their logs say why not.",
    )


def _ledger_alerts(windows: Windows) -> Iterator[Alert]:
    yield Alert(
        "FrontlineLedgerBehind",
        "ticket",
        f"ray_frontline_ledger_lag_seconds > 60 * {windows.scale:g}",
        windows.lasting(2),
        "records wait in the journal of an ingress for {{ $value | humanizeDuration }}",
        "The ledger's database is away or too slow. Service goes on and nothing is lost until the "
        "journal is full. See the ingress's log for the error.",
    )
    yield Alert(
        "FrontlineJournalGrows",
        "page",
        f"deriv(ray_frontline_journal_pending_bytes[{windows(10)}]) > 0 and "
        f"ray_frontline_journal_pending_bytes > 0.25 * ray_frontline_journal_limit_bytes",
        windows.lasting(5),
        "the journal of an ingress grows and takes a quarter of its disk space or more",
        "Once the journals of a node are full, requests are refused with 503 "
        "`ledger_unavailable`. Bring the database back, or raise `journal.max_mb`.",
    )
    yield Alert(
        "FrontlineJournalsStuck",
        "ticket",
        "max by (state) (ray_frontline_journals_stuck) > 0",
        windows.lasting(5),
        "journals on a node are {{ $labels.state }}",
        "Records in them may not be on the bill yet. The ingress's log names the files; "
        "docs/billing.md (*When it is durable*) says what to do with them.",
    )
    otherwise = 'ray_frontline_alarms_total{name="billed otherwise than echoed"}'
    yield Alert(
        "FrontlineBilledNotEchoed",
        "page",
        f"sum({_counted(otherwise, windows, 60)}) > 0",
        "",
        "a client was billed for another tier than it was told",
        "This is a bug. The ingress's log has the request id; please report it with that line.",
    )
    unknown = f"sum by (model) (rate(ray_frontline_answers_without_usage_total[{windows(30)}]))"
    ended = f'sum by (model) (rate(ray_frontline_requests_total{{served_tier!=""}}[{windows(30)}]))'
    yield Alert(
        "FrontlineUsageEstimated",
        "ticket",
        f"{unknown} / {ended} > 0.01",
        windows.lasting(15),
        "{{ $value | humanizePercentage }} of the answers of {{ $labels.model }} are billed by "
        "estimated tokens",
        "Engines sent no usable count of tokens, or streams broke off. Look for alarms `odd usage` "
        "and for lost engines.",
    )


def _engine_alerts(windows: Windows) -> Iterator[Alert]:
    losses = "ray_frontline_replica_losses_total"
    yield Alert(
        "FrontlineEngineRestarting",
        "page",
        f"sum by (model, pool) ({_counted(losses, windows, 15)}) >= 2",
        "",
        "engines of {{ $labels.pool }} of {{ $labels.model }} end or hang again and again",
        "The replica's log has the engine's last lines: out of memory, a driver error, or a hang "
        "that the probe found.",
    )
    waiting = "sum by (model) (ray_frontline_queue_length)"
    yield Alert(
        "FrontlineNoEngine",
        "page",
        f"sum by (model) (ray_frontline_replicas_ready) == 0 and {waiting} > 0",
        windows.lasting(5),
        "requests to {{ $labels.model }} wait and no engine is ready",
        "An engine takes longer to start than usual, or cannot be placed. `frontline status` says "
        "which resources are missing.",
    )


def _fault_alerts(windows: Windows) -> Iterator[Alert]:
    failures = _counted("ray_frontline_background_failures_total", windows, 10)
    yield Alert(
        "FrontlineBackgroundFailure",
        "ticket",
        f"sum by (deployment, name) ({failures}) > 0",
        "",
        "{{ $labels.name }} failed in {{ $labels.deployment }}",
        "It is restarted by itself. The log has the traceback. If it goes on, that part of "
        "Frontline does not work.",
    )
    alarms = 'ray_frontline_alarms_total{name!~"refused for .*"}'
    raised = _counted(alarms, windows, 10)
    yield Alert(
        "FrontlineAlarm",
        "ticket",
        f"sum by (deployment, name) ({raised}) > 0",
        "",
        "alarm in {{ $labels.deployment }}: {{ $labels.name }}",
        "Something happened that should not, and service goes on. The log has the details under "
        "the alarm's name.",
    )
    ignored = "no_model_ready|starting|draining"
    yield Alert(
        "FrontlineIngressDegraded",
        "ticket",
        f'max by (reason) (ray_frontline_ingress_problem{{reason!~"{ignored}"}}) == 1',
        windows.lasting(5),
        "an ingress reports {{ $labels.reason }}",
        "docs/api.md explains each reason of `GET /health`, and what to do.",
    )
    yield Alert(
        "FrontlineAbsent",
        "page",
        "absent(ray_frontline_ingress_problem)",
        windows.lasting(5),
        "no ingress of Frontline exports metrics",
        "Prometheus does not reach Ray's metrics port, or no ingress runs.",
    )


def rules_file(windows: Windows) -> dict[str, Any]:
    """Return the contents of a rules file."""
    return {
        "groups": [
            {"name": "frontline-slo", "rules": recording(windows)},
            {"name": "frontline", "rules": [alert.rule() for alert in alerts(windows)]},
        ]
    }
