"""Transcripts of recordings, through a whole ingress, with the SDK that users have."""

import io
import json
import struct
import wave
from decimal import Decimal

import httpx
import openai
import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from tests.support.world import ALIAS, ENGINES, MODEL, World

pytestmark = pytest.mark.unit

CARD = {"input": 2, "output": 4, "audio_second": "0.001"}


def recording(seconds, rate=8000):
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(bytes(int(seconds * rate) * 2))
    return held.getvalue()


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "vllm", {"transcribes": True, "preemption": False})
    made = World(tmp_path, timeout_s=30)
    await made.start()
    await priced(made, CARD)
    yield made
    await made.close()


async def priced(world, card, engines=("vllm", "sglang")):
    settings = {"rate_card": card, "queue": {"headroom": 0}}
    await world.set(ModelSettings.load(settings, "user_config"), engines)


@pytest.fixture
async def sdk(world):
    transport = httpx.ASGITransport(world.front)
    async with openai.AsyncOpenAI(
        api_key=world.key("plain"),
        base_url="http://127.0.0.1/v1",
        http_client=httpx.AsyncClient(transport=transport),
        max_retries=0,
    ) as client:
        yield client


def plain(world, tenant="plain"):
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(world.front),
        base_url="http://127.0.0.1",
        headers={"x-api-key": world.key(tenant)},
    )


async def the_record(world):
    [record] = (await world.new_records()).values()
    return record


def told_to_engine(world):
    return world.engines["vllm"].observations.report()[-1]["body"]


@pytest.mark.parametrize("tier", ["priority", "default", "flex"])
async def test_the_engines_seconds_are_billed_at_the_tier_that_is_echoed(world, sdk, tier):
    raw = await sdk.audio.transcriptions.with_raw_response.create(
        model=ALIAS, file=("a.wav", recording(2.5)), extra_body={"service_tier": tier}
    )
    answer = raw.parse()
    # No engine reads a priority on this route.
    served = "default" if tier == "priority" else tier
    assert answer.text and answer.service_tier == raw.headers["x-service-tier"] == served
    reason = "route_does_not_honour_priority" if tier == "priority" else None
    assert raw.headers.get("x-service-tier-reason") == reason
    record = await the_record(world)
    assert (record["route"], record["state"], record["model"]) == (
        Route.TRANSCRIPTIONS, "completed", MODEL,
    )  # fmt: skip
    assert (record["served_tier"], record["audio_seconds"], record["usage_estimated"]) == (
        served, 3, 0,
    )  # fmt: skip
    assert (record["prompt_tokens"], record["completion_tokens"]) == (0, 0)
    factor = Decimal("0.8") if served == "flex" else 1
    assert Decimal(record["cost"]) == Decimal("0.003") * factor
    assert (answer.usage.type, answer.usage.seconds) == ("duration", 3)
    assert Decimal(str(answer.usage.estimated_cost)) == Decimal(record["cost"])


async def test_verbose_json_has_segments_and_usage(world, sdk):
    answer = await sdk.audio.transcriptions.create(
        model=ALIAS,
        file=("a.wav", recording(2)),
        response_format="verbose_json",
        timestamp_granularities=["segment"],
        language="fr",
    )
    assert [segment.end for segment in answer.segments] == [1.0, 2.0]
    assert answer.usage.seconds == (await the_record(world))["audio_seconds"] == 2


@pytest.mark.parametrize(
    ("form", "begins"),
    [
        ("text", ""),
        ("srt", "1\n00:00:00,000 --> 00:00:01,000\n"),
        ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n"),
    ],
)
async def test_formats_without_usage_are_made_here_and_billed_by_the_engines_seconds(
    world, sdk, form, begins
):
    raw = await sdk.audio.transcriptions.with_raw_response.create(
        model=ALIAS, file=("a.wav", recording(2)), response_format=form
    )
    assert raw.headers["content-type"] == "text/plain; charset=utf-8"
    assert raw.text.startswith(begins) and raw.text.endswith("\n") and isinstance(raw.parse(), str)
    record = await the_record(world)
    assert (record["audio_seconds"], record["usage_estimated"]) == (2, 0)


async def test_a_stream_is_billed_by_the_files_length(world, sdk):
    stream = await sdk.audio.transcriptions.create(
        model=ALIAS, file=("a.wav", recording(2.5)), stream=True,
        extra_body={"service_tier": "flex", "stream_include_usage": "true"},
    )  # fmt: skip
    chunks = [chunk.to_dict() async for chunk in stream]
    assert {chunk["service_tier"] for chunk in chunks} == {"flex"}
    assert sum(bool(chunk["choices"][0]["delta"]["content"]) for chunk in chunks) == 6
    record = await the_record(world)
    assert (record["stream"], record["audio_seconds"], record["usage_estimated"]) == (1, 3, 1)
    usage = chunks[-1]["usage"]
    assert usage["seconds"] == 3 and usage["usage_estimated"] is True
    assert Decimal(str(usage["estimated_cost"])) == Decimal(record["cost"]) == Decimal("0.0024")


async def test_what_reaches_the_engine_is_the_file_and_the_clients_fields_alone(world, sdk):
    file = recording(1) + b"\r\n--frontline-0\r\n"
    await sdk.audio.transcriptions.create(
        model=ALIAS, file=('a".wav', file, "audio/wav"), prompt="a b", temperature=0.5,
        extra_body={
            "service_tier": "flex", "fail_fast": "false", "require_tier": "true",
            "priority": "-999", "start_within": "30", "prompt_cache_key": "k",
        },
    )  # fmt: skip
    form = told_to_engine(world)
    names = [part.partition('name="')[2].partition('"')[0] for part in form.split("form-data; ")]
    assert names[1:] == ["model", "response_format", "prompt", "temperature", "file"]
    assert f"\r\n\r\n{MODEL}\r\n" in form and file[44:].decode() in form
    assert 'filename="a_.wav"' in form


@pytest.mark.parametrize(
    ("card", "engines"), [({"input": 2, "output": 4}, ["vllm"]), (CARD, ["sglang"])]
)
async def test_without_a_price_or_an_engine_nothing_is_transcribed(world, sdk, card, engines):
    await priced(world, card, engines)
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.audio.transcriptions.create(model=ALIAS, file=("a.wav", recording(1)))
    assert refused.value.code == "unsupported_endpoint"
    assert (await the_record(world))["state"] == "refused"
    entry = await sdk.models.retrieve(MODEL)
    assert Route.TRANSCRIPTIONS.value not in entry.metadata["routes"]


async def test_a_free_model_transcribes_for_nothing(world, sdk):
    await priced(world, {"free": True})
    answer = await sdk.audio.transcriptions.create(model=ALIAS, file=("a.wav", recording(1)))
    assert answer.usage.estimated_cost == 0
    assert Route.TRANSCRIPTIONS.value in (await sdk.models.retrieve(MODEL)).metadata["routes"]


BAD = [
    ({"response_format": "xml"}, "response_format", "invalid_value"),
    ({"response_format": "srt", "stream": "true"}, "response_format", "unsupported_value"),
    ({"stream": "perhaps"}, "stream", "invalid_type"),
    ({"service_tier": "gold"}, "service_tier", "invalid_value"),
    ({"start_within": "soon"}, "start_within", "invalid_value"),
    ({"model": ""}, "model", None),
]


@pytest.mark.parametrize(("more", "param", "code"), BAD)
async def test_errors_name_the_field(world, more, param, code):
    async with plain(world) as http:
        answer = await http.post(
            "/v1/audio/transcriptions",
            data={"model": ALIAS, **more},
            files={"file": ("a.wav", recording(1))},
        )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


async def test_other_bodies_are_refused(world):
    async with plain(world) as http:
        url = "/v1/audio/transcriptions"
        assert (await http.post(url, json={"model": ALIAS})).status_code == 415
        answer = await http.post(url, data={"model": ALIAS})
        assert "multipart/form-data" in answer.json()["error"]["message"]
        form = {"content-type": "multipart/form-data; boundary=x"}
        for body in (b"", b"--x", b"--x\r\n\r\n--x--", b"none"):
            answer = await http.post(url, content=body, headers=form)
            assert answer.status_code == 400, body
        no_file = await http.post(url, files={"model": (None, ALIAS)})
        assert no_file.json()["error"]["param"] == "file"
        text = await http.post(url, files={"file": (None, "text"), "model": (None, ALIAS)})
        assert text.json()["error"]["param"] == "file"


async def test_a_page_of_another_site_cannot_send_a_form_to_an_open_ingress(world):
    access, world.services.access = world.services.access, None
    try:
        async with plain(world) as http:
            for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
                answer = await http.post(
                    "/v1/audio/transcriptions",
                    data={"model": ALIAS},
                    files={"file": ("a.wav", recording(1))},
                    headers=headers,
                )
                assert answer.json()["error"]["code"] == "cross_site_request"
    finally:
        world.services.access = access


async def test_a_long_recording_counts_against_limits_by_its_seconds(world):
    file = recording(60)
    assert struct.unpack("<I", file[4:8])[0] == len(file) - 8
    async with plain(world, "limited") as http:
        answer = await http.post(
            "/v1/audio/transcriptions",
            data={"model": ALIAS},
            files={"file": ("a.wav", file)},
        )
    assert answer.json()["usage"]["seconds"] == 60
    assert json.loads(answer.content)["text"]
