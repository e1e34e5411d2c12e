"""``frontline budgets``: how much keys and tenants may spend."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli.billing import JsonOutput, Ledger, database, fail, print_rows
from app.ledger.record import now_utc
from app.ledger.usage import plain
from app.store.database_url import DEFAULT_URL
from app.tenants.budget import Owner, Period, parse_budgets

budgets = typer.Typer(no_args_is_help=True, help="Budgets of keys and tenants, in USD.")

_Key = Annotated[str | None, typer.Option("--key", help="The key with this id.")]
_Tenant = Annotated[str | None, typer.Option("--tenant", help="The tenant with this name.")]


@budgets.command("set")
def set_budgets(
    budget: Annotated[
        list[str],
        typer.Argument(
            help="`day=5`, `month=100` or `total=1000`; with `:warn` it only alerts.",
            metavar="BUDGET...",
        ),
    ],
    key: _Key = None,
    tenant: _Tenant = None,
    url: Ledger = DEFAULT_URL,
) -> None:
    """Set budgets, in place of those for the same period. Ingresses apply that within seconds."""
    from app.tenants.budget_store import BudgetStore

    owner, name = _owner(key, tenant)
    with database(url) as engine:
        given = parse_budgets(budget, owner, name)
        _check_owner(engine, owner, name)
        BudgetStore(engine).set(*given)
    for each in given:
        typer.echo(f"{owner} {name}: {each}")


@budgets.command("list")
def list_budgets(as_json: JsonOutput = False, url: Ledger = DEFAULT_URL) -> None:
    """Show all budgets, with what is spent according to the database."""
    from app.ledger.record_store import RecordStore
    from app.tenants.budget_store import BudgetStore
    from app.tenants.spending import total

    today = now_utc().date()
    with database(url) as engine:
        table, store = BudgetStore(engine).table(), RecordStore(engine)
        rows = [
            {
                "owner": each.owner.value,
                "name": each.name,
                "period": each.period.value,
                "usd": plain(each.usd),
                "mode": each.mode,
                "spent": plain(total(store.spent(each.at(today)).values())),
            }
            for owner in sorted(table.by_owner)
            for each in table.by_owner[owner]
        ]
    for (kind, name), fault in table.unreadable.items():
        typer.echo(f"a budget of {kind} {name} cannot be read: {fault}", err=True)
    print_rows(rows, as_json=as_json)


@budgets.command("remove")
def remove(
    key: _Key = None,
    tenant: _Tenant = None,
    period: Annotated[
        Period | None, typer.Option(help="Only the budget for this period. Not set: all.")
    ] = None,
    url: Ledger = DEFAULT_URL,
) -> None:
    """Remove budgets. Ingresses apply that within seconds."""
    from app.tenants.budget_store import BudgetStore

    owner, name = _owner(key, tenant)
    with database(url) as engine:
        removed = BudgetStore(engine).remove(owner, name, period)
    if not removed:
        fail(f"{owner} {name!r} has no such budget")
    typer.echo(f"{removed} removed")


def _owner(key: str | None, tenant: str | None) -> tuple[Owner, str]:
    if (key is None) is (tenant is None):
        fail("expected --key or --tenant")
    return (Owner.KEY, key) if key is not None else (Owner.TENANT, tenant or "")


def _check_owner(engine: Any, owner: Owner, name: str) -> None:
    """Refuse a budget of a key that does not exist; say so if a tenant has no key yet."""
    from app.tenants.key_store import KeyStore

    keys = [key for key in KeyStore(engine).all() if key.revoked is None]
    if owner is Owner.KEY and all(key.key_id != name for key in keys):
        fail(f"no key {name!r} works")
    if owner is Owner.TENANT and all(key.tenant != name for key in keys):
        typer.echo(f"no key is of the tenant {name!r} at present", err=True)
