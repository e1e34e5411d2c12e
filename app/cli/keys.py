"""``frontline keys``: creates, shows, changes and revokes API keys."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from app.cli.billing import JsonOutput, Ledger, database, fail, print_rows, split
from app.core.tiers import Tier
from app.ledger.record import now_utc
from app.ledger.usage import plain, write_json_lines
from app.store.database_url import DEFAULT_URL
from app.tenants.budget import Owner
from app.tenants.key_fields import CHANGEABLE, KeyFieldError, changed_key, new_key
from app.tenants.keys import ApiKey
from app.tenants.scope import joined

keys = typer.Typer(no_args_is_help=True, help="API keys.")

_OPTIONS: Final = {"addresses": "allow-address", "budgets": "budget", "expires_at": "expires"}
"""Options that are not called as their fields are."""
_LISTS: Final = frozenset({"tiers", "models", "routes", "addresses"})
_NUMBERS: Final = frozenset({"rpm", "tpm", "in_flight", "expires_at"})
_DIGITS: Final = 30


@keys.command("create")
def create(
    tenant: Annotated[str, typer.Option(help="The tenant that pays and sees the usage.")],
    name: Annotated[str, typer.Option(help="A name for the key.")] = "",
    default_tier: Annotated[
        Tier, typer.Option(help="The tier of requests that name none.")
    ] = Tier.DEFAULT,
    tiers: Annotated[
        str, typer.Option(help="The tiers that the key may use, separated by commas.")
    ] = ",".join(Tier),
    rpm: Annotated[int | None, typer.Option(min=1, help="Requests in any minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, help="Tokens in any minute.")] = None,
    priority_share: Annotated[
        str | None,
        typer.Option(help="Share of its requests that may be priority, from 0 to 1."),
    ] = None,
    in_flight: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight at once.")
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="The models that the key may use, by id, separated by commas; `*` stands for any "
            "text. Not set: all."
        ),
    ] = None,
    routes: Annotated[
        str | None,
        typer.Option(
            help="The routes that it may use, such as `chat/completions,embeddings`. Not set: all."
        ),
    ] = None,
    allow_address: Annotated[
        list[str] | None,
        typer.Option(
            help="An address or a network that it may be used from, such as `10.0.0.0/8`. May be "
            "repeated. Not set: everywhere."
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="What it may spend: `day=5`, `month=100`, `total=1000`, in USD; with "
            "`:warn` it only alerts. May be repeated."
        ),
    ] = None,
    expires: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"], help="When it stops working, in UTC."),
    ] = None,
    admin: Annotated[
        bool,
        typer.Option(
            "--admin", help="It opens `/board` and `/v1/keys`, for all tenants' traffic and keys."
        ),
    ] = False,
    as_json: JsonOutput = False,
    url: Ledger = DEFAULT_URL,
) -> None:
    """Create a key and print it. It is printed only once: the secret is not stored."""
    from app.tenants.key_store import KeyStore

    with database(url) as engine:
        fields = {
            "tenant": tenant,
            "name": name,
            "default_tier": default_tier,
            "tiers": split(tiers),
            "rpm": rpm,
            "tpm": tpm,
            "priority_share": priority_share,
            "in_flight": in_flight,
            "models": None if models is None else split(models),
            "routes": None if routes is None else split(routes),
            "addresses": allow_address,
            "budgets": budget,
            "expires_at": None if expires is None else int(expires.replace(tzinfo=UTC).timestamp()),
            "admin": admin,
        }
        try:
            key, text = new_key(fields, now_utc())
        except KeyFieldError as error:
            fail(f"--{_OPTIONS.get(error.field, error.field.replace('_', '-'))}: {error.message}")
        KeyStore(engine).add(key)
        if as_json:
            write_json_lines([{**_key_fields(key), "key": text}], sys.stdout)
            return
        typer.echo(text)
        typer.echo(f"This is key {key.key_id} of {tenant}. It is not shown again.", err=True)


@keys.command("list")
def list_keys(as_json: JsonOutput = False, url: Ledger = DEFAULT_URL) -> None:
    """Show all keys, without their secrets."""
    from app.tenants.key_store import KeyStore

    with database(url) as engine:
        found, unreadable = KeyStore(engine).listing()
        rows = [_key_fields(key) for key in found]
        for key_id, fault in unreadable.items():
            typer.echo(f"{key_id} cannot be read and does not work: {fault}", err=True)
    print_rows(rows, as_json=as_json)


@keys.command("change")
def change(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `list` shows it.")],
    changes: Annotated[
        list[str],
        typer.Argument(
            metavar="FIELD=VALUE...",
            help=f"Any of {', '.join(sorted(CHANGEABLE))}. Lists are separated by commas, "
            "`expires_at` is in Unix seconds, and nothing after `=` removes a limit or a bound.",
        ),
    ],
    url: Ledger = DEFAULT_URL,
) -> None:
    """Change a key that works. Ingresses apply that within a few seconds."""
    from app.tenants.key_store import KeyStore

    with database(url) as engine:
        fields = dict(_change(each) for each in changes)
        key = KeyStore(engine).change(key_id, lambda key: changed_key(key, fields))
        if key is None:
            fail(f"no key {key_id!r} works")
    typer.echo(f"{key_id} is changed: {', '.join(fields)}")


def _change(text: str) -> tuple[str, Any]:
    """Return the field and the value of a text such as ``rpm=60``, as over HTTP."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text[:50]!r}: expected FIELD=VALUE")
    if not value:
        return name, "" if name == "name" else None
    if name in _LISTS:
        return name, split(value)
    is_number = name in _NUMBERS and value.isascii() and value.isdigit() and len(value) < _DIGITS
    return name, int(value) if is_number else value


@keys.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `list` shows it.")],
    url: Ledger = DEFAULT_URL,
) -> None:
    """Revoke a key. Ingresses apply that within a few seconds."""
    from app.tenants.key_store import KeyStore

    with database(url) as engine:
        if not KeyStore(engine).revoke(key_id, now_utc()):
            fail(f"no key {key_id!r} works")
    typer.echo(f"{key_id} is revoked")


def _key_fields(key: ApiKey) -> dict[str, Any]:
    share = key.limits.priority_share
    return {
        "key_id": key.key_id,
        "tenant": key.tenant,
        "name": key.name,
        "default_tier": key.default_tier.value,
        "tiers": ",".join(tier for tier in Tier if tier in key.tiers),
        "rpm": key.limits.rpm,
        "tpm": key.limits.tpm,
        "priority_share": None if share is None else plain(share),
        "in_flight": key.limits.in_flight,
        "budgets": ",".join(str(one) for one in key.budgets if one.owner is Owner.KEY) or None,
        "models": joined(key.scope.models),
        "routes": joined(key.scope.routes),
        "addresses": joined(key.scope.addresses),
        "admin": key.admin,
        "created": key.created.isoformat(timespec="seconds"),
        "expires": key.expires and key.expires.isoformat(timespec="seconds"),
        "revoked": key.revoked and key.revoked.isoformat(timespec="seconds"),
    }
