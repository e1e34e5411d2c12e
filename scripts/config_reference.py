"""Write docs/configuration.md from the types of the settings: python scripts/config_reference.py"""

from __future__ import annotations

import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

from app.config.access_log import AccessLogSettings  # noqa: E402
from app.config.budget_webhook import BudgetWebhookSettings  # noqa: E402
from app.config.ingress import IngressSettings  # noqa: E402
from app.config.journal import JournalSettings  # noqa: E402
from app.config.model import (  # noqa: E402
    AdapterSettings,
    LaterAdapterSettings,
    ModelArgs,
    ModelSettings,
    PoolSettings,
    TierSettings,
)
from app.config.queue import QueueSettings, TierQueue  # noqa: E402
from app.config.scaling import ScalingSettings  # noqa: E402
from app.config.slo import SloSettings, TierSlo  # noqa: E402
from app.config.usage_reads import UsageSettings  # noqa: E402
from app.core.pricing import LongContext, Multipliers, RateCard, TierPrices  # noqa: E402
from app.core.settings import Settings  # noqa: E402

TARGET = REPO / "docs" / "configuration.md"
HEAD = """\
# Configuration

Frontline is configured by Ray Serve's own config files; nothing of Serve's is renamed or hidden.
Unknown keys are refused. `scripts/frontline check FILE` says what is wrong with a file, with the
key and the line. This page is made from the types of the settings by
`python scripts/config_reference.py`.
"""
SECTIONS: list[tuple[str, type[Settings], str]] = [
    ("The ingress: `user_config` of the deployment `Ingress`", IngressSettings, ""),
    ("`journal`", JournalSettings, "In the `user_config` of `Ingress`; read when it starts."),
    (
        "`access_log`",
        AccessLogSettings,
        "In the `user_config` of `Ingress`. [logs-and-traces.md](logs-and-traces.md) describes "
        "the lines.",
    ),
    ("`usage`", UsageSettings, "In the `user_config` of `Ingress`, for each ingress."),
    (
        "`budget_alert_webhook`",
        BudgetWebhookSettings,
        "In the `user_config` of `Ingress`. [billing.md](billing.md#a-webhook-for-alerts) has the "
        "messages.",
    ),
    ("A model: `args` of its application", ModelArgs, ""),
    ("A pool: an entry of `args.pools`", PoolSettings, ""),
    (
        "A LoRA adapter: an entry of a pool's `adapters`",
        AdapterSettings,
        "[engines.md](engines.md#lora-adapters) says what engines do with it.",
    ),
    ("A model: `user_config` of the deployment `Model`", ModelSettings, ""),
    (
        "A later LoRA adapter: an entry of `adapters` in the `user_config` of `Model`",
        LaterAdapterSettings,
        "[engines.md](engines.md#adapters-without-a-restart) says what engines do with it.",
    ),
    (
        "`queue`",
        QueueSettings,
        "In the `user_config` of `Model`. Changes hold for requests that wait already.",
    ),
    (
        "`queue.priority`, `queue.default`, `queue.flex`",
        TierQueue,
        "The defaults are those of `priority` and `default`; `flex` waits up to 600 s and starves "
        "after 150 s.",
    ),
    ("`tiers`", TierSettings, "In the `user_config` of `Model`."),
    (
        "`rate_card`",
        RateCard,
        "In the `user_config` of `Model`. Prices are in USD for a million tokens where no other "
        "unit is named. A request is priced by the card in force when its tier was decided.",
    ),
    (
        "`scaling`",
        ScalingSettings,
        "In the `user_config` of `Model`, for an application with `autoscaling_policy: "
        '{policy_function: "app.autoscaling:priority_aware"}`; see [autoscaling.md]'
        "(autoscaling.md). Each pool's bounds are Serve's own `min_replicas` and `max_replicas`.",
    ),
    ("`slo`", SloSettings, "In the `user_config` of `Model`; see [monitoring.md](monitoring.md)."),
    ("`slo.priority`, `slo.default`, `slo.flex`", TierSlo, ""),
    ("`rate_card.multipliers`", Multipliers, "On every price; `default` is always 1."),
    (
        "`rate_card.priority`, `rate_card.flex`",
        TierPrices,
        "Own prices of a tier, in USD for a million tokens. They replace its multiplier and the "
        "card's `long_context`.",
    ),
    (
        "`rate_card.long_context`",
        LongContext,
        "The prices of requests with long prompts. Multipliers apply to them; those in "
        "`rate_card.priority` and `rate_card.flex` have none.",
    ),
]


def render() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for title, settings, text in SECTIONS:
        parts.append(f"## {title}\n")
        parts.append(f"{text or first_paragraph(settings)}\n")
        parts.append("| setting | type | default | meaning |\n|---|---|---|---|")
        fields = settings.model_fields.items()
        parts.append("\n".join(row(name, field) for name, field in fields) + "\n")
    return "\n".join(parts)


def first_paragraph(settings: type[Settings]) -> str:
    return (settings.__doc__ or "").strip().split("\n\n")[0].replace("``", "`")


def row(name: str, field: FieldInfo) -> str:
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{name}` | {type_name(field.annotation)} | {default(field)} | {meaning} |"


def type_name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0])
    if origin is tuple:
        return f"list of {type_name(inner[0])}"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if annotation is NoneType:
        return "None"
    if isinstance(annotation, type) and not get_args(annotation):
        values = getattr(annotation, "__members__", None)
        if values:
            return " or ".join(f"`{member.value}`" for member in values.values())
        if issubclass(annotation, SecretStr):
            return "str, never shown"
        return "section" if issubclass(annotation, Settings) else annotation.__name__
    if origin in (UnionType, Union):
        return " or ".join(map(type_name, inner))
    return str(annotation).replace("typing.", "").replace("|", "or")


def default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be set"
    if isinstance(field.default, Settings):
        return "see below"
    value = getattr(field.default, "value", field.default)
    if isinstance(value, SecretStr):
        # A default is no secret.
        value = value.get_secret_value()
    return "none" if value is None else f"`{value}`" if value != () else "none"


if __name__ == "__main__":
    TARGET.write_text(render())
