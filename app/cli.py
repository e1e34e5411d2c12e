"""The ``frontline`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app import cli_store

main = typer.Typer(no_args_is_help=True, add_completion=False)
main.add_typer(cli_store.keys, name="keys")
main.add_typer(cli_store.ledger, name="ledger")
main.command()(cli_store.usage)


@main.callback()
def frontline() -> None:
    """Tiered serving of language models."""


@main.command()
def check(
    config: Annotated[Path, typer.Argument(help="A Serve config file.", exists=True)],
) -> None:
    """Say what is wrong with a config file, with the key and the line."""
    # Ray is slow to import: commands that do without it should not wait for it.
    from app.check import check_config

    findings = check_config(config.read_text())
    for finding in findings:
        typer.echo(f"{config}:{finding.line}: {finding.problem}", err=True)
    if findings:
        raise typer.Exit(1)
    typer.echo(f"{config}: ok")


@main.command()
def top(
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="The Ray cluster, as host:port. Without it: the one on this machine.",
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one frame as JSON.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.2, help="Seconds from one frame to the next.")
    ] = 1.0,
) -> None:
    """Show every model of a running deployment: line, credits, replicas. Ctrl-C ends it.

    To be run on a node of the cluster. It only looks on: no request waits for it.
    """
    from app.cluster import NothingToShow
    from app.top import run

    try:
        run(address, once=once, as_json=as_json, interval_s=interval)
    except NothingToShow as error:
        typer.echo(f"frontline top: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
