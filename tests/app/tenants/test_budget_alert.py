import base64
import json
from datetime import UTC, date, datetime
from decimal import Decimal

import openai
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.tenants.budget import Budget, Owner, Period
from app.tenants.budget_alert import BudgetAlert, InvalidSecret, parse_secrets, sign
from app.tenants.spending import ALERTS

pytestmark = pytest.mark.unit

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
WEBHOOKS = openai.OpenAI(api_key="none").webhooks
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_the_specifications_own_example():
    """That of the reference libraries of Standard Webhooks."""
    signature = sign(
        parse_secrets(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


keys = st.binary(min_size=24, max_size=64)


def secret_of(key):
    return "whsec_" + base64.b64encode(key).decode()


@given(st.lists(keys, min_size=1, max_size=3), st.text(), st.integers(0, 2**33))
def test_any_secret_verifies_by_itself_with_an_independent_implementation(made, text, at):
    """OpenAI's SDK verifies OpenAI's own webhooks, which follow the specification."""
    body = json.dumps({"text": text}).encode()
    parsed = parse_secrets("\n".join(map(secret_of, made)) + "\n")
    assert list(parsed) == made
    headers = {
        "webhook-id": "budget_1",
        "webhook-timestamp": str(at),
        "webhook-signature": sign(parsed, "budget_1", at, body),
    }
    for key in made:
        WEBHOOKS.verify_signature(body, headers, secret=secret_of(key), tolerance=2**40)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        WEBHOOKS.verify_signature(body + b" ", headers, secret=SECRET, tolerance=2**40)


@pytest.mark.parametrize(
    "text",
    ["", " \n", "secret", "whsec_", "whsec_***", "whsec_é", SECRET[:-4] + "=",
     secret_of(bytes(23)), secret_of(bytes(65)), SECRET.removeprefix("whsec_"),
     SECRET + " other", SECRET + ","],
)  # fmt: skip
def test_what_is_no_secret_is_refused_without_a_word_of_it(text):
    with pytest.raises(InvalidSecret) as caught:
        parse_secrets(text)
    for word in text.replace("whsec_", " ").split():
        assert word not in str(caught.value)


days = st.dates(date(2020, 1, 1), date(2030, 1, 1))
budgets = st.builds(
    Budget, st.sampled_from(Owner), st.text(max_size=5), st.sampled_from(Period),
    st.decimals(0, 1000, places=3), st.booleans(),
)  # fmt: skip
percents = st.sampled_from(ALERTS)
spends = st.decimals(0, 1000, places=3)


TODAY = NOON.date()


def alert(budget, day=TODAY, percent=80, spent=Decimal(1), at=NOON):
    return BudgetAlert(budget, budget.at(day), percent, spent, at)


@given(budgets, days, days, percents, spends, spends, st.booleans())
def test_every_ingress_gives_it_the_same_id(budget, day, other, percent, spent, more, hard):
    same_period = budget.at(day) == budget.at(other)
    assume(same_period)
    as_stored_elsewhere = Decimal(format(budget.usd, "f") + ("0" if "." in str(budget.usd) else ""))
    again = Budget(budget.owner, budget.name, budget.period, as_stored_elsewhere, hard)
    first = alert(budget, day, percent, spent)
    second = alert(again, other, percent, more, datetime(2027, 1, 1, tzinfo=UTC))
    assert first.id == second.id
    # A full stop would let a message be taken for another one.
    assert "." not in first.id and len(first.id) < 64


@given(budgets, days, percents, budgets, days, percents)
def test_another_budget_period_or_percentage_has_another_id(one, day, percent, other, later, more):
    def facts(budget, day, percent):
        return budget.at(day), budget.usd, percent

    same = facts(one, day, percent) == facts(other, later, more)
    assert (alert(one, day, percent).id == alert(other, later, more).id) == same


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (
            Budget(Owner.KEY, "k1", Period.MONTH, Decimal("100.50")),
            {"owner": "key", "key_id": "k1", "tenant": None, "period": "month",
             "period_start": "2026-11-01", "period_end": "2026-12-01", "mode": "hard",
             "limit": "100.5", "requests_refused": False},
        ),
        (
            Budget(Owner.TENANT, "acme", Period.TOTAL, Decimal("90"), hard=False),
            {"owner": "tenant", "key_id": None, "tenant": "acme", "period": "total",
             "period_start": None, "period_end": None, "mode": "warn",
             "limit": "90", "requests_refused": False},
        ),
        (
            Budget(Owner.TENANT, "acme", Period.DAY, Decimal("90")),
            {"owner": "tenant", "key_id": None, "tenant": "acme", "period": "day",
             "period_start": "2026-11-30", "period_end": "2026-12-01", "mode": "hard",
             "limit": "90", "requests_refused": True},
        ),
    ],
)  # fmt: skip
def test_a_message_says_what_was_reached(budget, expected):
    made = alert(budget, percent=80, spent=Decimal("92.1000"))
    body = json.loads(made.body())
    assert (body["type"], body["timestamp"]) == (
        "budget.threshold_reached", "2026-11-30T12:00:00.000Z"
    )  # fmt: skip
    assert body["data"] == expected | {
        "id": made.id, "percent": 80, "spent": "92.1", "currency": "usd"
    }  # fmt: skip
