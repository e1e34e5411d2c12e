"""``frontline top``: shows every model of a running deployment in the terminal.

It queries each Model for the ingresses' reports (``app.contracts.stats``). It only reads, and no
request ever waits for it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import ray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from app.cli.board import ModelFrame, ReplicaRow, Sheds, TierRow, make_frame
from app.cli.cluster import Cluster, NothingToShow, connect, silence_ray
from app.contracts.slo import TierAttainment
from app.contracts.stats import REPORT_S
from app.contracts.status import Preempted
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier

_RATE_S: Final = 5.0
"""The period over which the live view measures rates: steady enough to read, short enough to
follow changes."""
_APART_S: Final = REPORT_S + 0.5
"""Time between the two polls of a single frame: every ingress sends a new report in between."""
_MOST_REPLICAS: Final = 8


def run(address: str | None, *, once: bool, as_json: bool, interval_s: float) -> None:
    """Show the models of a cluster: one frame, or frame after frame until Ctrl-C.

    Args:
        address: the cluster's host and port; ``None`` for the cluster on this machine.
        once: print one frame and return, as always without a terminal.
        as_json: print one frame as JSON and return.
        interval_s: seconds between two frames.

    Raises:
        NothingToShow: there is no cluster, or no model on it.
    """
    console = Console()
    silence_ray()
    cluster = connect(address)
    try:
        if once or as_json or not console.is_terminal:
            asyncio.run(show_once(cluster, console, as_json=as_json))
        else:
            asyncio.run(show_live(cluster, console, interval_s=interval_s))
    finally:
        ray.shutdown()


async def show_once(cluster: Cluster, console: Console, *, as_json: bool) -> None:
    """Print one frame.

    Raises:
        NothingToShow: there is no model.
    """
    before = await cluster.look()
    await asyncio.sleep(_APART_S)
    models = make_frame(await cluster.look(), before)
    if as_json:
        print(json.dumps(to_json(cluster.address, models), indent=2))
    else:
        console.print(render(cluster.address, models))


async def show_live(cluster: Cluster, console: Console, *, interval_s: float) -> None:
    """Show frame after frame until the task is cancelled.

    Raises:
        NothingToShow: there is no model.
    """
    looks = deque([await cluster.look()], maxlen=1 + max(1, round(_RATE_S / interval_s)))
    trouble = ""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            frame = render(cluster.address, make_frame(looks[-1], looks[0]), trouble)
            live.update(frame, refresh=True)
            await asyncio.sleep(interval_s)
            try:
                looks.append(await cluster.look())
                trouble = ""
            except NothingToShow as error:
                trouble = str(error)


def to_json(address: str, models: Sequence[ModelFrame]) -> dict[str, Any]:
    """Return a frame as plain values; ``app.cli.board`` explains them."""
    return {"address": address, "models": [asdict(model) for model in models]}


def render(address: str, models: Sequence[ModelFrame], trouble: str = "") -> RenderableType:
    """Return a frame for rich; ``trouble`` is the reason why there is no newer one."""
    count = "1 model" if len(models) == 1 else f"{len(models)} models"
    parts: list[RenderableType] = [Text(f"Ray cluster {address}, {count}", style="dim")]
    if trouble:
        parts.append(Text(trouble, style="red"))
    for model in models:
        parts += [Text(), *render_model(model)]
    return Group(*parts)


def render_model(model: ModelFrame) -> list[RenderableType]:
    """Return the panel of one model: its summary, its queue, its replicas."""
    if model.id is None:
        return [_headline(model)]
    lines = [_objective(tier, one) for tier, one in model.slo.items()]
    if model.downgrades:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in model.downgrades.items())
        lines.append(Text(f" not served as requested: {counts}"))
    return [_headline(model), _tiers(model), *lines, _replicas(model.replicas)]


def _headline(model: ModelFrame) -> Text:
    line = Text(model.id or model.application, style="bold")
    if model.state != "RUNNING":
        line.append(f"  {model.state}", style="yellow")
    if model.id is None:
        return line.append("  its Model does not answer", style="red")
    ingresses = len(model.ingresses)
    summary = f"  {ingresses} ingress{'' if ingresses == 1 else 'es'}"
    summary += f", credits {model.credits}/{model.slots}, headroom {model.headroom}"
    return line.append(summary, style="not bold")


def plain_table(*columns: str, left: Sequence[str] = ()) -> Table:
    """Return an empty table without lines; numbers are right-aligned."""
    table = Table(box=None, pad_edge=True, padding=(0, 1), header_style="dim")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def _tiers(model: ModelFrame) -> Table:
    columns = ("tier", "running", "waiting", "oldest", "queued", "grants/s", "sheds")
    table = plain_table(*columns, left=("tier", "sheds"))
    for tier, row in model.tiers.items():
        waiting = Text(str(row.waiting), style="yellow" if row.waiting else "")
        oldest = _seconds(row.oldest_s if row.waiting else None)
        table.add_row(
            tier.value,
            str(row.running),
            waiting,
            oldest,
            _seconds(row.queued_s),
            f"{row.grants_per_s:.1f}",
            _sheds(row),
        )
    return table


def _objective(tier: Tier, one: TierAttainment) -> Text:
    wanted = f"{_percent(one.objective)} of streams begin within {_seconds(one.ttft_ms / 1000)}"
    line = Text(f" {tier.value} objective: {wanted}. Last hour: ")
    if one.attained is None:
        return line.append("no data", style="dim")
    streams = one.recent.met + one.recent.missed
    line.append(f"{_percent(one.attained)} of {streams:,}, ")
    return line.append(*(("met", "green") if one.kept else ("not met", "red")))


def _percent(share: float) -> str:
    # Rounded down: 99.996 % is not all, and 98.999 % is not 99 %.
    return f"{math.floor(1e4 * share + 1e-6) / 100:g} %"


def _sheds(row: TierRow) -> Text:
    shown = Text()
    for reason, sheds in row.sheds.items():
        shown.append(", " if shown else "")
        shown.append(_shed(reason, sheds), style="red" if sheds.per_s else "")
    return shown or Text("-")


def _shed(reason: ShedReason, sheds: Sheds) -> str:
    rate = f" ({sheds.per_s:.1f}/s)" if sheds.per_s else ""
    return f"{reason.value} {sheds.total}{rate}"


def _replicas(replicas: Sequence[ReplicaRow]) -> RenderableType:
    if not replicas:
        return Text(" no replica is ready", style="yellow")
    columns = ("replica", "pool", "engine", "priority", "running", "credits", "preempted")
    table = plain_table(*columns, left=columns[:4])
    for replica in replicas[:_MOST_REPLICAS]:
        if replica.draining:
            what = Text("draining", style="yellow")
            table.add_row(Text(replica.replica_id), "", what, "", str(replica.running), "", "")
            continue
        words = "native, preempts" if replica.preempts else "native"
        proved = replica.native_priority
        table.add_row(
            # As `Text`, because rich parses brackets in a `str` as markup.
            Text(replica.replica_id),
            Text(replica.pool),
            Text(f"{replica.engine} {replica.engine_version}"),
            Text(words if proved else "none", style="green" if proved else "dim"),
            f"{replica.running}/{replica.slots}",
            str(replica.credits),
            _preempted(replica.preempted),
        )
    if more := replicas[_MOST_REPLICAS:]:
        running, slots = sum(one.running for one in more), sum(one.slots for one in more)
        credits = str(sum(one.credits for one in more))
        table.add_row(f"and {len(more)} more", "", "", "", f"{running}/{slots}", credits, "")
    return table


def _preempted(counts: Preempted | None) -> str:
    if counts is None:
        return "-"
    now = f", {counts.suspended} now" if counts.suspended else ""
    return f"{counts.preemptions}{now}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
