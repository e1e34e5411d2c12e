"""docs/api.md names every error code, reason and header that there is, and no other."""

import ast
import re
from pathlib import Path

import pytest

from app.config.ingress import IngressSettings
from app.core.shed_reason import ShedReason
from app.core.tier_decision import RAISED
from app.core.tiers import TIER_WORDS, TierReason
from app.gateway.body_memory import NoRoom
from app.gateway.health import CANNOT_SERVE, HealthReason
from app.protocol.duration import LONGEST_S
from app.protocol.json_body.depth import MAX_DEPTH
from app.protocol.json_body.members import LONGEST_PARSED
from app.protocol.json_body.parse import FEW, LONGEST_SPARSE, LONGEST_WHOLE
from app.protocol.json_body.scan import MOST_MEMBERS
from app.protocol.requests import FRONTLINE_FIELDS
from app.protocol.start_within import START_WITHIN

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
SOURCES = {path: path.read_text() for path in (ROOT / "app").rglob("*.py")}


def rows(section, table=0):
    """Return the cells of a section's table, without its head."""
    [text] = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    lines = tables[table].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quoted(cell):
    return set(re.findall(r"`([a-z_-]+)`", cell))


def codes_in_sources():
    """Return every literal that is given as an error's ``code``, or is a default of it."""
    found = set()
    for text in SOURCES.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg == "code":
                found.add(getattr(node.value, "value", None))
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Unavailable":
                found.add(getattr(node.args[1], "value", None))
            elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
                defaults = zip(reversed(node.args.args), reversed(node.args.defaults), strict=False)
                found |= {getattr(d, "value", None) for a, d in defaults if a.arg == "code"}
    return {code for code in found if isinstance(code, str)}


def test_every_error_code_is_documented():
    documented = set().union(*(quoted(code) for _, code, *_ in rows("Errors")))
    assert codes_in_sources() >= {"invalid_api_key", "engine_error", "ledger_unavailable"}
    assert codes_in_sources() <= documented


def test_no_error_code_is_documented_that_there_is_not():
    documented = set().union(*(quoted(code) for _, code, *_ in rows("Errors"))) - {"null"}
    text = "\n".join(SOURCES.values())
    assert [code for code in documented if f'"{code}"' not in text] == []


def test_every_reason_is_documented():
    reasons = [*(reason.value for reason in TierReason), RAISED]
    assert [quoted(cell) for cell, _ in rows("Answers", 1)] == [{reason} for reason in reasons]
    shed = {reason.value for reason in ShedReason}
    shed |= {reason.value for reason in NoRoom if reason is not NoRoom.TOO_LARGE}
    assert {cell.strip("`") for cell, _ in rows("Errors", 1)} == shed


def test_every_tier_word_is_documented():
    def requests(word):
        tier = "the key's default tier" if word.tier is None else f"`{word.tier.value}`"
        return tier + (f", with the reason `{word.reason.value}`" if word.reason else "")

    assert rows("Tier words") == [
        [f"`{name}`", requests(word), word.used_by] for name, word in TIER_WORDS.items()
    ]


def test_the_bounds_of_a_request_are_the_codes_own():
    bounds = {bound: value for bound, value, _ in rows("Requests", 1)}
    defaults = {name: field.default for name, field in IngressSettings.model_fields.items()}
    assert (
        f"{defaults['max_body_bytes'] // 1024**2} MiB"
        in bounds["length of the body, compressed and decoded"]
    )
    assert bounds["nested arrays and objects"].startswith(f"{MAX_DEPTH} levels")
    assert bounds["top-level fields"] == f"{MOST_MEMBERS:,}"
    assert f"{defaults['body_timeout_s']:g} s" in bounds["time for the whole body"]
    assert f"{defaults['body_min_rate_kb']} KiB" in bounds["time for the whole body"]
    memory = bounds["memory of all bodies of a tenant, of an ingress"]
    assert f"{defaults['body_memory_tenant_mb']:,} MiB" in memory
    assert f"{defaults['body_memory_mb']:,} MiB" in memory
    assert f"of more than {LONGEST_PARSED // 1024} KiB is not parsed" in PAGE
    assert f"of up to {LONGEST_WHOLE // 1024} KiB is parsed" in PAGE
    sparse = f"one of up to {LONGEST_SPARSE // 1024} KiB is, too, if it has few arrays and objects"
    assert f"{sparse} ({FEW})" in PAGE


def test_every_header_is_documented():
    text = "".join(
        SOURCES[ROOT / "app" / "gateway" / name] for name in ("response.py", "lifecycle.py")
    )
    headers = set(re.findall(r'"(x-[a-z-]+)"', text)) - {"x-accel-buffering"}
    assert "x-service-tier" in headers
    assert [header for header in headers if f"`{header}`" not in PAGE] == []


def test_every_field_of_frontlines_own_is_documented():
    fields = set().union(*(quoted(cell) for cell, *_ in rows("Requests")))
    assert fields >= FRONTLINE_FIELDS
    assert START_WITHIN in fields
    assert f"at most {LONGEST_S / 3600:g} hours" in PAGE


def test_every_reason_of_health():
    told = {name: row[1] for row in rows("Health", 1) for name in quoted(row[0])}
    codes = {r.value: "503" if r in CANNOT_SERVE else "200" for r in HealthReason}
    assert told == codes
