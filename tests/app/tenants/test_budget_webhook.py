"""The webhook before a real receiver on a port of its own."""

import asyncio
import json
import logging
import socket
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal

import openai
import pytest
from aiohttp import web

from app import alarms, supervision
from app.config.budget_webhook import BudgetWebhookSettings
from app.core.settings import SettingsError
from app.tenants import budget_webhook
from app.tenants.budget import Budget, Owner, Period
from app.tenants.budget_alert import BudgetAlert
from app.tenants.budget_webhook import BudgetWebhook, Outcome, asked_pause_s, receiver_of
from tests.support.waiting import SLOWEST, until

pytestmark = pytest.mark.unit

SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
OLD = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
TOKEN = "a-token-in-the-path"
WEBHOOKS = openai.OpenAI(api_key="none", webhook_secret=SECRET).webhooks
"""OpenAI's own webhooks follow Standard Webhooks, and its SDK verifies them."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """One alarm that another test has just raised would not be logged again; and be quick."""
    monkeypatch.setattr(alarms, "PROCESS", alarms.Alarms())
    monkeypatch.setattr(budget_webhook, "GRACE_S", 0.2)
    monkeypatch.setattr(budget_webhook, "backoff_s", lambda state: 0.02)
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)


def alert(number=1):
    budget = Budget(Owner.TENANT, f"tenant-{number}", Period.MONTH, Decimal(10))
    now = datetime.now(UTC)
    return BudgetAlert(budget, budget.at(now.date()), 80, Decimal(8), now)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Receiver:
    """Answers as planned, then with 204.

    A plan is a status; ``silent``, for no answer; or ``drip``, for a body that does not end.
    """

    def __init__(self, *plan):
        self.plan, self.port, self.requests, self.elsewhere = list(plan), free_port(), [], 0
        self.headers, self.ends = {}, asyncio.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/hooks/{TOKEN}"

    async def _take(self, request):
        self.requests.append((time.monotonic(), dict(request.headers), await request.read()))
        planned = self.plan.pop(0) if self.plan else 204
        if planned == "drip":
            answer = web.StreamResponse(headers={"content-length": "1000000"})
            await answer.prepare(request)
            await answer.write(b"x")
            planned = "silent"
        if planned == "silent":
            await self.ends.wait()
            planned = 200
        return web.Response(status=planned, headers=self.headers)

    async def _other(self, request):
        self.elsewhere += 1
        return web.Response(status=200)

    @asynccontextmanager
    async def up(self):
        api = web.Application()
        api.router.add_post(f"/hooks/{TOKEN}", self._take)
        api.router.add_route("*", "/elsewhere", self._other)
        runner = web.AppRunner(api, shutdown_timeout=0, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        try:
            yield self
        finally:
            self.ends.set()
            await runner.cleanup()

    @property
    def ids(self):
        """The ids of the messages that have come, after having verified each of them."""
        for _, headers, body in self.requests:
            lower = {name.lower(): value for name, value in headers.items()}
            WEBHOOKS.verify_signature(body, lower)
            assert json.loads(body)["data"]["id"] == headers["webhook-id"]
            assert headers["Content-Type"] == "application/json"
        return [headers["webhook-id"] for _, headers, _ in self.requests]


@asynccontextmanager
async def webhook(receiver, **more):
    made = BudgetWebhook()
    settings = BudgetWebhookSettings(url=receiver.url, secret_env="WEBHOOK_SECRET", **more)
    made.change(receiver_of(settings))
    try:
        yield made
    finally:
        await made.stop()


async def ended(made, count=1):
    """Wait until so many alerts have an outcome."""
    await until(lambda: sum(made.counts[one] for one in Outcome if one != Outcome.FAILED) >= count)


async def test_an_alert_arrives_once_with_a_signature_that_verifies():
    async with Receiver().up() as receiver, webhook(receiver) as made:
        sent = [alert(number) for number in range(20)]
        for one in sent:
            made.tell(one)
        await ended(made, 20)
        assert sorted(receiver.ids) == sorted(one.id for one in sent)
        assert {body for _, _, body in receiver.requests} == {one.body() for one in sent}
        assert made.counts == {Outcome.DELIVERED: 20}
        assert alarms.PROCESS.counts() == {}


async def test_an_alert_that_was_not_taken_is_sent_again_with_its_id_and_a_new_signature():
    async with Receiver(500, 503, 404, 302).up() as receiver, webhook(receiver) as made:
        receiver.headers = {"location": "/elsewhere"}
        made.tell(alert())
        await ended(made)
        assert receiver.ids == [alert().id] * 5
        assert made.counts == {Outcome.FAILED: 4, Outcome.DELIVERED: 1}
        assert alarms.PROCESS.counts() == {"budget webhook failing": 4}
        # Redirects are not followed.
        assert receiver.elsewhere == 0


async def test_a_receiver_that_is_down_gets_all_once_it_is_up():
    receiver = Receiver()
    async with webhook(receiver) as made:
        for number in range(10):
            made.tell(alert(number))
        await until(lambda: made.counts[Outcome.FAILED] > 8)
        async with receiver.up():
            await ended(made, 10)
            assert sorted(receiver.ids) == sorted(alert(number).id for number in range(10))
            assert made.counts[Outcome.DELIVERED] == 10


async def test_a_slow_receiver_holds_up_nobody_and_is_given_up_in_time():
    async with (
        Receiver("silent", "silent").up() as receiver,
        webhook(receiver, timeout_s=0.3) as made,
    ):
        began = time.monotonic()
        made.tell(alert())
        assert time.monotonic() - began < 0.1
        await ended(made)
        assert set(receiver.ids) == {alert().id}
        assert made.counts[Outcome.FAILED] >= 2 and made.counts[Outcome.DELIVERED] == 1


async def test_one_that_is_not_taken_does_not_hold_up_the_others():
    async with Receiver("silent").up() as receiver, webhook(receiver) as made:
        made.tell(alert(0))
        await until(lambda: receiver.requests)
        for number in range(1, 6):
            made.tell(alert(number))
        await ended(made, 5)
        assert made.counts == {Outcome.DELIVERED: 5}


async def test_the_body_of_an_answer_is_not_waited_for():
    async with Receiver("drip").up() as receiver, webhook(receiver, timeout_s=30) as made:
        made.tell(alert())
        await ended(made)
        assert made.counts == {Outcome.DELIVERED: 1}


async def test_it_gives_up_in_the_end_and_says_so(caplog):
    async with webhook(Receiver(), retry_for_s=0.3) as made:
        made.tell(alert(7))
        await ended(made)
        assert made.counts[Outcome.GIVEN_UP] == 1 and made.counts[Outcome.FAILED]
        assert alarms.PROCESS.counts()["budget alert lost"] == 1
    assert (
        "80 % of the budget of tenant tenant-7 (month) was not told to the webhook" in caplog.text
    )


async def test_a_receiver_that_is_gone_is_not_asked_again():
    async with Receiver(410).up() as receiver, webhook(receiver) as made:
        made.tell(alert())
        await ended(made)
        assert (len(receiver.requests), made.counts) == (1, {Outcome.GIVEN_UP: 1})


async def test_a_receiver_says_how_long_to_wait():
    async with Receiver(429).up() as receiver, webhook(receiver) as made:
        receiver.headers = {"retry-after": "1"}
        made.tell(alert())
        await ended(made)
        (first, *_), (second, *_) = receiver.requests
        assert 0.9 < second - first < 30
    for odd in ("soon", "-1", "٣", "1e9", "", "Wed, 21 Oct 2026 07:28:00 GMT"):
        assert asked_pause_s(odd) == 0
    assert asked_pause_s("9" * 5000) == budget_webhook.LONGEST_PAUSE_S


async def test_a_full_queue_drops_what_comes_and_says_so(caplog):
    async with webhook(Receiver(), max_waiting=3) as made:
        for number in range(10):
            made.tell(alert(number))
        assert made.counts == {Outcome.DROPPED: 7}
        assert alarms.PROCESS.counts() == {"budget alert lost": 7}
        assert "too many wait" in caplog.text


async def test_what_waits_at_the_end_is_sent_or_counted(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(budget_webhook, "GRACE_S", SLOWEST)
        async with Receiver().up() as receiver:
            async with webhook(receiver) as made:
                for number in range(8):
                    made.tell(alert(number))
            assert made.counts == {Outcome.DELIVERED: 8}
    async with webhook(Receiver()) as made:
        for number in range(8):
            made.tell(alert(number))
    assert made.counts[Outcome.DROPPED] == 8
    assert alarms.PROCESS.counts()["budget alert lost"] == 8
    assert not [one for one in asyncio.all_tasks() if one.get_name() == "budget webhook"]


async def test_an_error_of_our_own_is_reported_and_loses_no_alert_in_silence(monkeypatch):
    before = supervision.PROCESS.failures().get("budget webhook")

    def broken(*arguments):
        raise RuntimeError("of our own")

    async with Receiver().up() as receiver:
        with monkeypatch.context() as patch:
            patch.setattr(budget_webhook, "sign", broken)
            async with webhook(receiver) as made:
                made.tell(alert())
                await ended(made)
                patch.undo()
        assert made.counts == {Outcome.GIVEN_UP: 1}
    after = supervision.PROCESS.failures()["budget webhook"]
    assert (after.count, after.last_error) == (1 + (before.count if before else 0), "RuntimeError")


async def test_another_receiver_gets_what_waits():
    async with Receiver().up() as receiver, webhook(Receiver()) as made:
        for number in range(8):
            made.tell(alert(number))
        await until(lambda: made.counts[Outcome.FAILED])
        settings = BudgetWebhookSettings(url=receiver.url, secret_env="WEBHOOK_SECRET")
        made.change(receiver_of(settings))
        await ended(made, 8)
        assert made.counts[Outcome.DELIVERED] == 8
        made.change(None)
        made.tell(alert())
        assert sum(made.counts.values()) - made.counts[Outcome.FAILED] == 8
    async with webhook(Receiver()) as made:
        made.tell(alert())
        await until(lambda: made.counts[Outcome.FAILED])
        made.change(None)
        await ended(made)
        assert made.counts[Outcome.DROPPED] == 1


async def test_secrets_and_urls_are_in_no_log_and_no_error(caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("WEBHOOK_SECRET", f"{SECRET} {OLD}")
    async with Receiver(500, 410).up() as receiver, webhook(receiver) as made:
        made.tell(alert())
        await ended(made)
        assert "v1," in receiver.requests[0][1]["webhook-signature"]
        assert receiver.requests[0][1]["webhook-signature"].count(" ") == 1
    async with webhook(Receiver(), retry_for_s=0.05) as made:
        made.tell(alert())
        await ended(made)
        told = [caplog.text, str(vars(made))]
    settings = BudgetWebhookSettings(url=receiver.url, secret_env="WEBHOOK_SECRET")
    told += [repr(settings), str(settings), repr(receiver_of(settings))]
    for bad in (SECRET[:-1], SECRET.removeprefix("whsec_"), "whsec_short"):
        (tmp_path / "secret").write_text(bad)
        wrong = {"url": receiver.url, "secret_file": str(tmp_path / "secret")}
        with pytest.raises(SettingsError) as caught:
            receiver_of(BudgetWebhookSettings.load(wrong), "user_config", "budget_alert_webhook")
        assert str(caught.value).startswith("user_config.budget_alert_webhook.secret_file: ")
        told.append(str(caught.value))
    for text in told:
        for secret in (SECRET[6:20], OLD[6:20], TOKEN, "short"):
            assert secret not in text


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"secret_env": "A"}, "url"),
        ({"url": "ftp://example.com/TOKEN", "secret_env": "A"}, "url"),
        ({"url": "https:///TOKEN", "secret_env": "A"}, "url"),
        ({"url": "TOKEN", "secret_env": "A"}, "url"),
        ({"url": "https://example.com:0/TOKEN", "secret_env": "A"}, "url"),
        ({"url": "https://example.com:99999/TOKEN", "secret_env": "A"}, "url"),
        ({"url": "https://me:TOKEN@example.com/", "secret_env": "A"}, "url"),
        ({"url": "https://example.com/ TOKEN", "secret_env": "A"}, "url"),
        ({"url": "https://example.com/TOKEN\n", "secret_env": "A"}, "url"),
        ({"url": ["https://example.com/TOKEN"], "secret_env": "A"}, "url"),
        ({"url": "https://example.com/TOKEN"}, ""),
        ({"url": "https://example.com/TOKEN", "secret_env": "A", "secret_file": "B"}, ""),
        ({"url": "https://example.com/TOKEN", "secret_env": "A", "timeout_s": 0}, "timeout_s"),
    ],
)
def test_bad_settings_are_refused_by_name_without_the_url(values, key):
    with pytest.raises(SettingsError) as caught:
        BudgetWebhookSettings.load(values, "webhook")
    assert [".".join(map(str, one.key)) for one in caught.value.problems] == [
        f"webhook.{key}".rstrip(".")
    ]
    assert "TOKEN" not in str(caught.value)


def test_a_secret_that_is_not_there_is_told_by_its_setting(monkeypatch, tmp_path):
    monkeypatch.delenv("WEBHOOK_SECRET")
    url = "https://example.com/hook"
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, value in (
        ("secret_env", "WEBHOOK_SECRET"), ("secret_file", str(tmp_path / "none")),
        ("secret_file", str(tmp_path / "binary")), ("secret_file", "${WEBHOOK_SECRET}/x"),
    ):  # fmt: skip
        with pytest.raises(SettingsError) as caught:
            receiver_of(BudgetWebhookSettings.load({"url": url, name: value}), "webhook")
        assert str(caught.value).startswith(f"webhook.{name}: ")
    (tmp_path / "secret").write_text(f"{SECRET}\n{OLD}\n")
    monkeypatch.setenv("FOLDER", str(tmp_path))
    made = receiver_of(BudgetWebhookSettings(url=url, secret_file="${FOLDER}/secret"))
    assert len(made.keys) == 2
