"""When a silent stream gets a comment, and when its replica is suspected, on a simulated clock."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.ingress import IngressSettings
from app.contracts.status import ReplicaStatus
from app.core.dialect import Dialect, Route
from app.core.pricing import RateCard
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier
from app.gateway.keep_alive import COMMENT, KeepAlive
from app.gateway.response import Placement, Reply

pytestmark = pytest.mark.unit

DIALECT = Dialect("e", False, dict.fromkeys(Tier, 0), frozenset(Route), preempts=True)
CARD = RateCard(input="1", cached_input="1", output="1")
END_S = 400.0
EXACT_S = 1e-6


class Durable:
    async def durable(self):
        pass


class Simulated:
    """An engine's events on a simulated clock, with the connection's timer."""

    def __init__(self, settings, events, tier):
        self.now, self.comments, self.suspected = 0.0, [], []
        self.began = None
        self.reply = Reply(self._sent)
        replica = ReplicaStatus("r", "p", "http://e", "k", 8, "1", None, DIALECT)
        place = Placement(replica, TierDecision(tier, tier, None, CARD), 0.0)
        self.keep_alive = KeepAlive(
            self.reply, Durable(), place, settings,
            lambda: self.suspected.append(self.now), lambda: self.now,
        )  # fmt: skip
        asyncio.run(self._run(sorted(events)))

    async def _sent(self, message):
        if message["type"] == "http.response.start":
            self.began = self.now
        else:
            assert message["body"] == COMMENT
            self.comments.append(self.now)

    async def _run(self, events):
        received_at, look_at = 0.0, self.keep_alive.look(0.0, 0.0)
        while (now := min(look_at, *events[:1], END_S)) < END_S:
            self.now = now
            if events and events[0] == now:
                received_at = events.pop(0)
                if self.began is None:
                    self.reply.started, self.began = True, self.now
                continue
            look_at = self.keep_alive.look(received_at, now)
            assert look_at > now
            if self.keep_alive.due:
                await self.keep_alive.handle()


times = st.floats(1.0, 60.0)


@given(st.lists(st.floats(0.1, END_S), max_size=12), times, times, times, st.sampled_from(Tier))
def test_a_stream_gets_a_comment_exactly_when_it_has_been_silent_for_so_long(
    events, headers_after_s, comment_s, timeout_s, tier
):
    settings = IngressSettings(
        stream_headers_after_s=headers_after_s, stream_comment_s=comment_s,
        stream_timeout_s=timeout_s,
    )  # fmt: skip
    seen = Simulated(settings, events, tier)
    assert seen.began == pytest.approx(min([headers_after_s, *events]))
    sent = sorted({seen.began, *events, *seen.comments, END_S})
    for before, after in pairwise(sent):
        assert after - before <= comment_s + EXACT_S, "it is never silent for longer"
        if after in seen.comments and after > headers_after_s + EXACT_S:
            assert after - before >= comment_s - EXACT_S, "no comment is sent for nothing"
    if tier is Tier.PRIORITY:
        assert not seen.suspected, "priority is not suspended, so the read timeout is the bound"
        return
    signs = sorted({0.0, *events, *seen.suspected, END_S})
    for before, after in pairwise(signs):
        assert after - before <= timeout_s + EXACT_S
        if after in seen.suspected:
            assert after - before >= timeout_s - EXACT_S
