"""The ``frontline`` command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from app.cli import billing

main = typer.Typer(no_args_is_help=True, add_completion=False)
main.add_typer(billing.keys, name="keys")
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
) -> None:
    """Show what a config file would start: command lines, resources, replicas, priority.

    It starts nothing and needs no cluster and no GPU. Secrets are not shown.
    """
    text = _checked(config)
    from app.cli.plan import make_plan, plan_front
    from app.cli.plan_view import to_json, to_text

    models = make_plan(text)
    here = os.environ.get("RAY_SERVE_HAPROXY_MAXCONN")
    front = plan_front(text, models, int(here) if here else None)
    shown = json.dumps(to_json(models, front), indent=2) if as_json else to_text(models, front)
    typer.echo(shown)


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
def doctor() -> None:
    """Show the listening ports of this machine, and report those that are open needlessly.

    Exits with status 1 if it finds any. It only reads: it starts and changes nothing.
    """
    from app.cli.doctor import run

    if not run():
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
