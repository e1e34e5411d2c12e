from decimal import Decimal

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dialect import Route
from app.core.errors import ServerError
from app.core.pricing import RateCard, TokenUsage
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier
from app.protocol.requests import Inbound
from app.protocol.stream import stamp_answer

pytestmark = pytest.mark.unit

CARD = RateCard(input=1, output=1, audio_second="0.5")
FLEX = TierDecision(Tier.FLEX, Tier.FLEX, None, CARD)
SEGMENTS = [
    {"start": 0.0, "end": 1.25, "text": " one\n\ntwo -->"},
    {"start": 1.25, "end": 2, "text": "  "},
    {"start": 3599.9996, "end": 3661.5, "text": "three"},
]


def asked(wanted):
    fields = {"response_format": wanted}
    return Inbound(Route.TRANSCRIPTIONS, fields, "m", None, False, {}, recording_s=9)


def stamped(wanted, **answer):
    body, counted = stamp_answer(orjson.dumps(answer), asked(wanted), FLEX)
    return body.decode(), counted


def test_subtitles_have_numbers_times_and_no_empty_lines_inside():
    body, counted = stamped("srt", text="x", duration=2.5, segments=SEGMENTS)
    assert body == (
        "1\n00:00:00,000 --> 00:00:01,250\none two -->\n\n"
        "2\n01:00:00,000 --> 01:01:01,500\nthree\n\n"
    )
    assert counted == (TokenUsage(0, 0, 0, audio_seconds=3), False)
    body, _ = stamped("vtt", text="x", duration=2.5, segments=SEGMENTS)
    assert body == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\none two ->\n\n"
        "01:00:00.000 --> 01:01:01.500\nthree\n\n"
    )
    assert stamped("vtt", text="", duration=1, segments=None)[0] == "WEBVTT\n\n"
    assert stamped("srt", text="", duration=1, segments=[])[0] == ""


@given(st.integers(1, 10**6), st.text(), st.sampled_from(["json", "verbose_json", "diarized_json"]))
def test_json_has_the_tier_and_what_the_record_says_it_cost(seconds, text, wanted):
    told = {"type": "duration", "seconds": seconds}
    body, counted = stamped(wanted, text=text, usage=told, more=[1])
    answer = orjson.loads(body)
    assert (answer["text"], answer["more"], answer["service_tier"]) == (text, [1], "flex")
    cost = CARD.at(Tier.FLEX).cost(counted.usage)
    assert cost == Decimal("0.4") * seconds
    usage = answer["usage"]
    assert usage == {**told, "estimated_cost": pytest.approx(float(cost))}


@pytest.mark.parametrize("usage", [None, {}, {"seconds": 0}, {"seconds": "9"}, [1], 7])
def test_a_length_that_cannot_be_is_estimated_and_never_free(usage):
    body, counted = stamped("json", text="x", usage=usage)
    assert counted == (TokenUsage(0, 0, 0, audio_seconds=9), True)
    told = orjson.loads(body)["usage"]
    assert (told["seconds"], told["usage_estimated"]) == (9, True) and told["estimated_cost"] > 0


@pytest.mark.parametrize("answer", [{}, {"text": None}, {"text": "x", "duration": 1}])
def test_what_is_no_transcript_is_not_passed_on(answer):
    with pytest.raises(ServerError):
        stamped("srt", **answer)
