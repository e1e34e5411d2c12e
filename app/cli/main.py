"""The ``frontline`` command."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import billing, budgets, keys

if TYPE_CHECKING:
    from app.cli.plan import ModelPlan

main = typer.Typer(no_args_is_help=True, add_completion=False)
main.add_typer(keys.keys, name="keys")
main.add_typer(budgets.budgets, name="budgets")
main.add_typer(billing.ledger, name="ledger")
main.command()(billing.usage)

_Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS",
        help="The Ray cluster, as host:port. Default: the cluster on this machine.",
    ),
]


@main.callback()
def frontline() -> None:
    """Tiered serving of language models."""


@main.command()
def check(
    config: Annotated[Path, typer.Argument(help="A Serve config file.", exists=True)],
) -> None:
    """Check a config file; report each problem with its key and line."""
    _checked(config)
    typer.echo(f"{config}: ok")


@main.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A Serve config file.", exists=True)],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    replay: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Instead: play usage records (frontline usage --format records-json) to the "
            "autoscaling policy, and show what it would have done, and why.",
        ),
    ] = None,
    start_s: Annotated[
        float, typer.Option(min=0.0, help="With --replay: seconds that a replica takes to start.")
    ] = 120.0,
) -> None:
    """Show what a config file would start: command lines, resources, replicas, priority.

    It starts nothing and needs no cluster and no GPU. Secrets are not shown.
    """
    text = _checked(config)
    from app.cli.plan import make_plan, plan_front
    from app.cli.plan_view import to_json, to_text
    from app.haproxy.config import BadSetting, whole_number

    models = make_plan(text)
    if replay is not None:
        _replay(models, replay, start_s, as_json)
        return
    try:
        here = whole_number(os.environ, "RAY_SERVE_HAPROXY_MAXCONN", default=0, least=1) or None
    except BadSetting as error:
        typer.echo(f"frontline plan: {error}", err=True)
        raise typer.Exit(1) from None
    front = plan_front(text, models, here)
    shown = json.dumps(to_json(models, front), indent=2) if as_json else to_text(models, front)
    typer.echo(shown)


def _replay(models: Sequence[ModelPlan], path: Path, start_s: float, as_json: bool) -> None:
    from app.cli.replay import BadRecords, read_records, replay, to_json, to_text

    try:
        with path.open("rb") as file:
            requests = read_records(file)
    except BadRecords as error:
        typer.echo(f"frontline plan: {path}: {error}", err=True)
        raise typer.Exit(1) from None
    replays = [one for model in models if (one := replay(model, requests, start_s))]
    if not replays:
        typer.echo(f"frontline plan: {path} has no record of a model of this file", err=True)
        raise typer.Exit(1)
    typer.echo(json.dumps(to_json(replays), indent=2) if as_json else to_text(replays))


def _checked(config: Path) -> str:
    """Return the text of a config file, or print its problems and exit."""
    # Imported here because Ray is slow to import, and other commands do not need it.
    from app.cli.check import check_config

    text = config.read_text()
    findings = check_config(text)
    for finding in findings:
        typer.echo(f"{config}:{finding.line}: {finding.problem}", err=True)
    if findings:
        raise typer.Exit(1)
    return text


@main.command()
def status(
    address: _Address = None,
    config: Annotated[
        Path | None,
        typer.Option(exists=True, help="A Serve config file to compare with the deployment."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show nodes, applications, models, pools, replicas and queues of a running deployment.

    Run it on a node of the cluster. It only reads: no request waits for it.
    """
    if config is not None:
        _checked(config)
    from app.cli.cluster import NothingToShow
    from app.cli.status import run

    try:
        run(address, config, as_json=as_json)
    except NothingToShow as error:
        typer.echo(f"frontline status: {error}", err=True)
        raise typer.Exit(1) from None


@main.command()
def top(
    address: _Address = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one frame as JSON.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two frames.")] = 1.0,
) -> None:
    """Show every model of a running deployment: queue, credits, replicas. Ctrl-C ends it.

    Run it on a node of the cluster. It only reads: no request waits for it.
    """
    from app.cli.cluster import NothingToShow
    from app.cli.top import run

    try:
        run(address, once=once, as_json=as_json, interval_s=interval)
    except NothingToShow as error:
        typer.echo(f"frontline top: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        return


@main.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            help="A Serve config file: look whether its engines would start on this machine.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With a config file: print it as JSON.")
    ] = False,
    brief: Annotated[
        bool, typer.Option("--brief", help="With a config file: leave out what is well.")
    ] = False,
) -> None:
    """Look at this machine: whether a config file's engines would start, or what is open.

    With a config file it looks at interpreters, versions, drivers, GPUs, models, memory, ports and
    disks. Without one it shows the listening ports, and those that are open needlessly. It exits
    with status 1 if it finds an error, or an opening. It starts and changes nothing.
    """
    if config is not None:
        text = _checked(config)
        from app.cli import preflight

        if not preflight.run(text, as_json=as_json, brief=brief):
            raise typer.Exit(1)
        return
    from app.cli.doctor import run

    if not run():
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
