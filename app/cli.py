"""The ``frontline`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

main = typer.Typer(no_args_is_help=True, add_completion=False)


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


if __name__ == "__main__":
    main()
