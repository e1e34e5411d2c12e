"""The Grafana dashboard: rows of panels as values, turned into Grafana's JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from scripts.monitoring.counted import counted

UID: Final = "frontline"
_COLUMNS: Final = 3
_WIDTH: Final = 24 // _COLUMNS
_HEIGHT: Final = 8
_RATE: Final = "$__rate_interval"
_OWN: Final = 'model=~"$model"'
_OTEL: Final = 'gen_ai_request_model=~"$model"'
_ENGINE: Final = 'model_name=~"$model"'
_DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel of time series.

    Attributes:
        title: its title.
        unit: Grafana's name of the unit.
        queries: PromQL by the legend of its series.
        text: what to look for.
    """

    title: str
    unit: str
    queries: Mapping[str, str]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of panels."""

    title: str
    panels: tuple[Panel, ...]


def _quantile(share: float, metric: str, by: str, selector: str) -> str:
    rates = f"sum by (le, {by}) (rate(ray_{metric}_bucket{{{selector}}}[{_RATE}]))"
    return f"histogram_quantile({share}, {rates})"


def _rate(metric: str, by: str, selector: str = _OWN) -> str:
    return f"sum by ({by}) (rate(ray_{metric}{{{selector}}}[{_RATE}]))"


def _per_hour(metric: str, by: str, selector: str = "") -> str:
    counter = f"ray_{metric}{{{selector}}}" if selector else f"ray_{metric}"
    return f"sum by ({by}) ({counted(counter, '1h')})"


_SERVED: Final = "openai_response_service_tier"
_TTFT: Final = "gen_ai_server_time_to_first_token_seconds"
_SLO: Final = "ray_frontline_slo_requests_total"

CUSTOMERS: Final = Row(
    "What customers feel, by tier",
    (
        Panel(
            "Time to first token",
            "s",
            {
                f"{{{{{_SERVED}}}}} p50": _quantile(0.5, _TTFT, _SERVED, _OTEL),
                f"{{{{{_SERVED}}}}} p99": _quantile(0.99, _TTFT, _SERVED, _OTEL),
                "{{tier}} objective": f"min by (tier) (ray_frontline_slo_ttft_seconds{{{_OWN}}})",
            },
            "Priority stays flat while the others rise: that is what it is for.",
        ),
        Panel(
            "Seconds per output token, p50",
            "s",
            {
                f"{{{{{_SERVED}}}}}": _quantile(
                    0.5, "gen_ai_server_time_per_output_token_seconds", _SERVED, _OTEL
                )
            },
        ),
        Panel(
            "Whole request, p99",
            "s",
            {
                f"{{{{{_SERVED}}}}}": _quantile(
                    0.99, "gen_ai_server_request_duration_seconds", _SERVED, _OTEL
                )
            },
        ),
        Panel(
            "Requests per second",
            "reqps",
            {
                "{{requested_tier}} as {{served_tier}}: {{state}}": _rate(
                    "frontline_requests_total", "requested_tier, served_tier, state"
                )
            },
        ),
        Panel(
            "Objective met",
            "percentunit",
            {
                "{{tier}}": f'sum by (tier) (rate({_SLO}{{{_OWN},met="true"}}[{_RATE}])) / '
                f"sum by (tier) (rate({_SLO}{{{_OWN}}}[{_RATE}]))",
                "{{tier}} objective": f"min by (tier) (ray_frontline_slo_objective{{{_OWN}}})",
            },
        ),
        Panel(
            "Downgrades per second",
            "reqps",
            {"{{requested_tier}}: {{reason}}": _rate(
                "frontline_downgrades_total", "requested_tier, reason"
            )},
        ),
    ),
)  # fmt: skip
QUEUE: Final = Row(
    "The queue",
    (
        Panel(
            "Waiting",
            "short",
            {"{{tier}}": f"sum by (tier) (ray_frontline_queue_length{{{_OWN}}})"},
        ),
        Panel(
            "Oldest wait",
            "s",
            {
                "{{tier}}": f"max by (tier) (ray_frontline_queue_oldest_wait_seconds{{{_OWN}}})",
                "{{tier}} suspended": "max by (tier) "
                f"(ray_frontline_suspended_oldest_seconds{{{_OWN}}})",
            },
        ),
        Panel(
            "Time in the queue, p99",
            "s",
            {"{{tier}}": _quantile(0.99, "frontline_queue_wait_seconds", "tier", _OWN)},
        ),
        Panel(
            "Sheds per second",
            "reqps",
            {
                "{{tier}}: {{reason}}": _rate("frontline_sheds_total", "tier, reason"),
                "{{tier}} displaced": _rate("frontline_displacements_total", "tier"),
            },
        ),
        Panel(
            "Running and suspended slots",
            "short",
            {
                "{{tier}} running": f"sum by (tier) (ray_frontline_running{{{_OWN}}})",
                "{{tier}} suspended": f"sum by (tier) (ray_frontline_suspended{{{_OWN}}})",
                "slots": f"sum(ray_frontline_replica_slots{{{_OWN}}})",
            },
        ),
        Panel(
            "Preemptions per second",
            "reqps",
            {
                "for {{tier}}": _rate("frontline_preemptions_total", "tier"),
            },
        ),
    ),
)
ENGINES: Final = Row(
    "Engines",
    (
        Panel(
            "Ready replicas, and credits",
            "short",
            {
                "{{pool}} ready": f"sum by (pool) (ray_frontline_replicas_ready{{{_OWN}}})",
                "{{pool}} credits": f"sum by (pool) (ray_frontline_credits{{{_OWN}}})",
                "{{pool}} {{state}}": f"sum by (pool, state) (ray_frontline_slots{{{_OWN}}})",
            },
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            {
                "{{pool}} {{replica}} vLLM": f"ray_vllm_kv_cache_usage_perc{{{_ENGINE}}}",
                "{{pool}} {{replica}} SGLang": f"ray_sglang_token_usage{{{_ENGINE}}}",
                "{{pool}} {{replica}} TRT-LLM": f"ray_trtllm_kv_cache_utilization{{{_ENGINE}}}",
            },
        ),
        Panel(
            "Running and waiting inside",
            "short",
            {
                "{{pool}} vLLM run": f"sum by (pool) (ray_vllm_num_requests_running{{{_ENGINE}}})",
                "{{pool}} vLLM wait": f"sum by (pool) (ray_vllm_num_requests_waiting{{{_ENGINE}}})",
                "{{pool}} SGLang run": f"sum by (pool) (ray_sglang_num_running_reqs{{{_ENGINE}}})",
                "{{pool}} SGLang wait": f"sum by (pool) (ray_sglang_num_queue_reqs{{{_ENGINE}}})",
                "{{pool}} TRT-LLM run": "sum by (pool) "
                f"(ray_trtllm_num_requests_running{{{_ENGINE}}})",
                "{{pool}} TRT-LLM wait": "sum by (pool) "
                f"(ray_trtllm_num_requests_waiting{{{_ENGINE}}})",
                "{{pool}} TRT-LLM paused": "sum by (pool) "
                f"(ray_trtllm_num_paused_requests{{{_ENGINE}}})",
            },
        ),
        Panel(
            "Preemptions per second inside",
            "reqps",
            {
                "{{pool}} vLLM": _rate("vllm_num_preemptions_total", "pool", _ENGINE),
                "{{pool}} SGLang": _rate("sglang_num_retracted_requests_total", "pool", _ENGINE),
            },
        ),
        Panel(
            "Prompt tokens found in the prefix cache",
            "percentunit",
            {
                "{{pool}} vLLM": f"{_rate('vllm_prefix_cache_hits_total', 'pool', _ENGINE)} / "
                f"{_rate('vllm_prefix_cache_queries_total', 'pool', _ENGINE)}",
                "{{pool}} SGLang": f"{_rate('sglang_cached_tokens_total', 'pool', _ENGINE)} / "
                f"{_rate('sglang_prompt_tokens_total', 'pool', _ENGINE)}",
                "{{pool}} TRT-LLM": f"max by (pool) (ray_trtllm_kv_cache_hit_rate{{{_ENGINE}}})",
            },
        ),
        Panel(
            "Time to first token inside the engine, p99",
            "s",
            {
                "{{pool}} vLLM": _quantile(
                    0.99, "vllm_time_to_first_token_seconds", "pool", _ENGINE
                ),
                "{{pool}} SGLang": _quantile(
                    0.99, "sglang_time_to_first_token_seconds", "pool", _ENGINE
                ),
                "{{pool}} TRT-LLM": _quantile(
                    0.99, "trtllm_time_to_first_token_seconds", "pool", _ENGINE
                ),
            },
            "What customers feel in addition is the time in Frontline's queue.",
        ),
        Panel(
            "Time in the engine's own queue, p99",
            "s",
            {
                "{{pool}} vLLM": _quantile(
                    0.99, "vllm_request_queue_time_seconds", "pool", _ENGINE
                ),
                "{{pool}} SGLang": _quantile(0.99, "sglang_queue_time_seconds", "pool", _ENGINE),
                "{{pool}} TRT-LLM": _quantile(
                    0.99, "trtllm_request_queue_time_seconds", "pool", _ENGINE
                ),
            },
            "Nearly 0: requests wait in Frontline's queue, which knows tiers.",
        ),
    ),
)
SCALING: Final = Row(
    "Autoscaling",
    (
        Panel(
            "Replicas wanted, and why",
            "short",
            {
                "{{application}} {{pool}}: {{reason}}": "sum by (application, pool, reason) "
                "(ray_frontline_scaling_replicas)"
            },
        ),
        Panel(
            "Changes per hour",
            "short",
            {
                "{{application}} {{pool}} {{direction}}: {{reason}}": _per_hour(
                    "frontline_scaling_changes_total", "application, pool, direction, reason"
                )
            },
        ),
        Panel(
            "Replicas started and lost per hour",
            "short",
            {
                "{{pool}} started": _per_hour("frontline_replica_starts_total", "pool", _OWN),
                "{{pool}} lost": _per_hour("frontline_replica_losses_total", "pool", _OWN),
            },
        ),
    ),
)
MONEY: Final = Row(
    "Money",
    (
        Panel(
            "USD per hour",
            "currencyUSD",
            {"{{tier}}": f"3600 * {_rate('frontline_cost_usd_total', 'tier')}"},
            "For orientation; bills come from the ledger.",
        ),
        Panel(
            "Tokens per second",
            "short",
            {"{{tier}} {{kind}}": _rate("frontline_tokens_total", "tier, kind")},
        ),
        Panel(
            "Images and seconds of recordings per second",
            "short",
            {
                "{{tier}} images": _rate("frontline_images_total", "tier"),
                "{{tier}} seconds": _rate("frontline_audio_seconds_total", "tier"),
            },
            "What prompts have besides tokens. Images are counted where they have a price.",
        ),
        Panel(
            "Answers with estimated tokens per second",
            "reqps",
            {"{{tier}}": _rate("frontline_answers_without_usage_total", "tier")},
        ),
        Panel(
            "Ledger behind",
            "s",
            {"oldest record": "max(ray_frontline_ledger_lag_seconds)"},
        ),
        Panel(
            "Journal",
            "bytes",
            {
                "to be moved": "max(ray_frontline_journal_pending_bytes)",
                "limit": "min(ray_frontline_journal_limit_bytes)",
            },
        ),
        Panel(
            "Refused for limits, keys and requests",
            "reqps",
            {
                "{{reason}}": _rate("frontline_limits_refused_total", "reason"),
                "no valid key": f"sum(rate(ray_frontline_keys_refused_total[{_RATE}]))",
                "{{status}} {{reason}}": "sum by (status, reason) "
                f"(rate(ray_frontline_refused_requests_total[{_RATE}]))",
            },
        ),
        Panel(
            "Budget alerts per hour",
            "short",
            {
                "{{percent}} % of a {{mode}} budget": _per_hour(
                    "frontline_budget_alerts_total", "percent, mode"
                ),
                "webhook: {{outcome}}": _per_hour("frontline_budget_webhook_total", "outcome"),
            },
        ),
    ),
)
FAULTS: Final = Row(
    "Faults",
    (
        Panel(
            "Health of ingresses",
            "short",
            {"{{reason}}": "max by (reason) (ray_frontline_ingress_problem)"},
        ),
        Panel(
            "Failures of background work per hour",
            "short",
            {
                "{{deployment}}: {{name}}": _per_hour(
                    "frontline_background_failures_total", "deployment, name"
                ),
                "{{deployment}}: {{name}} restarted": _per_hour(
                    "frontline_background_restarts_total", "deployment, name"
                ),
            },
        ),
        Panel(
            "Alarms per hour",
            "short",
            {"{{deployment}}: {{name}}": _per_hour("frontline_alarms_total", "deployment, name")},
        ),
        Panel(
            "Errors per second",
            "reqps",
            {
                "{{error_type}}": "sum by (error_type) "
                "(rate(ray_gen_ai_server_request_duration_seconds_count"
                f'{{{_OTEL},error_type!=""}}[{_RATE}]))'
            },
        ),
        Panel(
            "Journals that need an operator",
            "short",
            {
                "{{state}}": "max by (state) (ray_frontline_journals_stuck)",
                "requests without a record": "sum(ray_frontline_ledger_uncounted_total)",
            },
        ),
        Panel(
            "Engines' metrics not read, per hour",
            "short",
            {
                "{{pool}} {{replica}}": _per_hour(
                    "frontline_engine_scrapes_failed_total", "pool, replica", _ENGINE
                )
            },
        ),
    ),
)
ROWS: Final = (CUSTOMERS, QUEUE, ENGINES, SCALING, MONEY, FAULTS)


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    return {
        "uid": UID,
        "title": "Frontline",
        "tags": ["frontline", "ray", "llm"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": list(_panels()),
    }


def _variables() -> list[dict[str, Any]]:
    names = "label_values(ray_frontline_queue_length, model)"
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "model",
            "label": "Model",
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": names, "refId": "models"},
            "definition": names,
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _panels() -> Iterator[dict[str, Any]]:
    number = y = 0
    for row in ROWS:
        number += 1
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "gridPos": place,
            "collapsed": False,
            "panels": [],
        }
        y += 1
        for index, panel in enumerate(row.panels):
            number += 1
            yield _panel(number, panel, index % _COLUMNS, y + index // _COLUMNS * _HEIGHT)
        y += -(-len(row.panels) // _COLUMNS) * _HEIGHT


def _panel(number: int, panel: Panel, column: int, y: int) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _DATASOURCE,
            "expr": expr,
            "legendFormat": legend,
            "range": True,
        }
        for index, (legend, expr) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _DATASOURCE,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": column * _WIDTH, "y": y},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": {"showPoints": "never"}},
            "overrides": [],
        },
        "options": {
            "legend": {
                "displayMode": "list",
                "placement": "bottom",
                "showLegend": True,
                "calcs": [],
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }
