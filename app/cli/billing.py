"""The commands that use the database: ``frontline usage`` and ``ledger``; ``keys`` is beside."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from app.cli.progress import counted, counting, working
from app.config.journal import JournalSettings
from app.core.paths import expand_path
from app.core.settings import SettingsError
from app.ledger.usage import (
    Grouping,
    Total,
    add_up,
    cloud_event,
    record_fields,
    write_csv,
    write_json_lines,
)
from app.store.database_url import DEFAULT_URL

if TYPE_CHECKING:
    from app.ledger.dead_letter import RefusedRecord

Member = TypeVar("Member", bound=StrEnum)
ledger = typer.Typer(no_args_is_help=True, help="The database of records and keys.")

Ledger = Annotated[
    str,
    typer.Option(
        "--ledger",
        envvar="FRONTLINE_LEDGER",
        show_default=DEFAULT_URL,
        help="The database, as in `ledger` of the ingress's user_config.",
    ),
]
JournalFolder = Annotated[
    str, typer.Option("--folder", help="As `journal.folder` of the ingress's user_config.")
]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print JSON, one line per entry.")]
_JOURNALS = JournalSettings().folder
_FILE_WIDTH = 240


@contextmanager
def database(url: str) -> Iterator[Any]:
    """Yield an engine for an up-to-date database; print the error and exit if there is none."""
    from app.store.database import StoreAway, connect, migrate
    from app.store.database_url import resolve_url

    try:
        engine = connect(resolve_url(url))
        try:
            with working("bringing the tables up to date"):
                migrate(engine)
            yield engine
        finally:
            engine.dispose()
    except (StoreAway, SettingsError, ValueError, OSError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Print an error and exit with 1."""
    typer.echo(f"frontline: {message}", err=True)
    raise typer.Exit(1)


class Format(StrEnum):
    """The output formats of usage."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    RECORDS_CSV = "records-csv"
    RECORDS_JSON = "records-json"
    CLOUDEVENTS = "cloudevents"


def usage(
    by: Annotated[
        str, typer.Option(help=f"Groups of the totals: any of {', '.join(Grouping)}.")
    ] = "day,model,tier",
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    since: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The first day, in UTC.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The day after the last.")
    ] = None,
    form: Annotated[
        Format,
        typer.Option("--format", help="`table`, `csv` and `json` show totals, others records."),
    ] = Format.TABLE,
    source: Annotated[
        str, typer.Option(help="`source` of CloudEvents; the same for every export.")
    ] = "frontline",
    url: Ledger = DEFAULT_URL,
) -> None:
    """Show usage and its exact cost."""
    from app.ledger.record_store import RecordStore, Wanted

    with database(url) as engine:
        store = RecordStore(engine)
        wanted = Wanted(tenant, _day(since), _day(until), model)
        if form in _OF_RECORDS:
            _OF_RECORDS[form](counted(store.each(wanted), "exporting"), source)
            return
        groups = _members(Grouping, by, "by")
        with working("adding up"):
            totals = store.totals(wanted, groups)
    _print_totals(totals, form)


def _print_totals(totals: list[Total], form: Format) -> None:
    rows = [total.to_fields() for total in totals]
    if form is Format.CSV:
        write_csv(rows, sys.stdout)
    elif form is Format.JSON:
        write_json_lines(rows, sys.stdout)
    else:
        _print_table(rows, total=add_up(totals).to_fields())


_OF_RECORDS: dict[Format, Callable[[Iterable[Any], str], None]] = {
    Format.RECORDS_CSV: lambda records, _: write_csv(map(record_fields, records), sys.stdout),
    Format.RECORDS_JSON: lambda records, _: write_json_lines(
        map(record_fields, records), sys.stdout
    ),
    Format.CLOUDEVENTS: lambda records, source: write_json_lines(
        (cloud_event(record, source) for record in records), sys.stdout
    ),
}


@ledger.command("migrate")
def migrate_store(url: Ledger = DEFAULT_URL) -> None:
    """Migrate the tables to the current version. Ingresses do that too, when they start."""
    with database(url):
        typer.echo("the tables are up to date")


@ledger.command("adopt")
def adopt_journals(
    folder: JournalFolder = _JOURNALS,
    url: Ledger = DEFAULT_URL,
) -> None:
    """Move the journals of this node's dead ingresses to the database.

    Living ingresses do that too.
    """
    from app.ledger.adoption import Adopter
    from app.ledger.record_store import RecordStore

    with database(url) as engine, counting("moving") as add:
        adopter = Adopter(Path(expand_path(folder)), RecordStore(engine), on_moved=add)
        moved = adopter.adopt(time.monotonic())
    typer.echo(f"{moved} records")
    if adopter.set_aside:
        typer.echo(f"{adopter.set_aside} journals set aside, not all of them can be read", err=True)
    for name, why in adopter.failing.items():
        typer.echo(f"journal {name}: {why}", err=True)
    if adopter.failing:
        raise typer.Exit(1)


@ledger.command("refused")
def show_refused(
    retry: Annotated[
        bool, typer.Option("--retry", help="First try to write them once more.")
    ] = False,
    folder: JournalFolder = _JOURNALS,
    as_json: JsonOutput = False,
    url: Ledger = DEFAULT_URL,
) -> None:
    """Show the records on this node that the database has permanently rejected."""
    from app.ledger.dead_letter import refused_records, retry_refused
    from app.ledger.record_store import RecordStore

    journals = Path(expand_path(folder))
    if retry:
        with database(url) as engine:
            written = retry_refused(RecordStore(engine), journals)
        typer.echo(f"{written} records written", err=True)
    kept = list(refused_records(journals))
    if as_json:
        write_json_lines([{"why": one.why, **one.fields} for one in kept], sys.stdout)
    else:
        _print_table([_refused_fields(one) for one in kept])


def _refused_fields(refused: RefusedRecord) -> dict[str, Any]:
    fields = refused.fields
    shown = {name: fields.get(name) for name in ("request_id", "tenant", "model", "state", "cost")}
    return {**shown, "why": refused.why}


def split(text: str) -> list[str]:
    """Return the parts of a text that are separated by commas."""
    return [part.strip() for part in text.split(",")]


def _members(kind: type[Member], text: str, option: str) -> list[Member]:
    try:
        return [kind(name) for name in split(text)]
    except ValueError:
        raise ValueError(f"--{option}: expected some of {', '.join(kind)}") from None


def _day(moment: datetime | None) -> date | None:
    return None if moment is None else moment.date()


def print_rows(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print rows as JSON, one a line, or as a table."""
    if as_json:
        write_json_lines(rows, sys.stdout)
    else:
        _print_table(rows)


def _print_table(rows: list[dict[str, Any]], total: dict[str, Any] | None = None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_footer=total is not None)
    for name in rows[0] if rows else ():
        justify = "right" if name in (total or ()) else "left"
        footer = "" if total is None else _cell(total.get(name, ""))
        table.add_column(name, footer, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        # `Text`, because names may contain Rich's markup.
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    if not rows:
        typer.echo("nothing")
        return
    # In a file each row is one line; in a terminal the table fits the width.
    Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(table)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
