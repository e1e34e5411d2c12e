"""Transcripts of recordings: requests, answers and events, in the shapes of vLLM 0.32.0
(``vllm/entrypoints/speech_to_text``). What is said depends on the recording's length alone."""

from __future__ import annotations

from typing import Any, ClassVar

from app.core.dialect import Route
from app.core.errors import InvalidRequest
from app.protocol.form import read_form
from app.protocol.json_body.scan import run
from app.protocol.recording import estimate_recording
from deployments.simulator.chunks import ChunkWriter
from deployments.simulator.generation import Choice, GeneratedReply
from deployments.simulator.requests import Body, Prompt, RefusedError, Wish

_FORMATS = ("json", "text", "verbose_json")
_WORDS_PER_SECOND = 2


class TranscriptionBody(Body):
    """``POST /v1/audio/transcriptions``: the texts of the form, and the recording's length."""

    model: str | None = None
    response_format: str = "json"
    stream: bool = False
    language: str | None = None
    prompt: str = ""
    seconds: int

    def wish(self) -> Wish:
        """Return what to generate: so many words that they fit the recording.

        Raises:
            RefusedError: the format of the answer is none that the engine has.
        """
        if self.response_format not in _FORMATS:
            raise RefusedError(
                400, "Currently only support response_format: `text`, `json`, `verbose_json`"
            )
        if self.stream and self.response_format == "verbose_json":
            raise RefusedError(400, "verbose_json format doesn't support streaming case")
        spoken = f"{self.seconds} seconds {self.language or 'en'} {self.prompt}"
        words = self.seconds * _WORDS_PER_SECOND
        return Wish([Prompt.of(spoken)], limit=words, min_tokens=words, stream=self.stream)


def form_values(content_type: bytes, body: bytes) -> dict[str, Any]:
    """Return the fields of a form with a recording.

    Raises:
        RefusedError: it is no such form.
    """
    try:
        form = run(read_form(content_type, body, Route.TRANSCRIPTIONS.prompt_field))
    except InvalidRequest as error:
        raise RefusedError(400, error.message, param=error.param) from None
    seconds, _ = estimate_recording(form.file)
    return {**form.last_texts, "seconds": seconds}


def transcript(body: TranscriptionBody, reply: GeneratedReply) -> dict[str, Any]:
    """Return the answer that is not streamed."""
    text = reply.choices[0].text
    if body.response_format != "verbose_json":
        return {"text": text, "usage": {"type": "duration", "seconds": body.seconds}}
    words = text.split()
    segments: list[dict[str, Any]] = [
        {
            "id": second,
            "avg_logprob": -0.125,
            "compression_ratio": 1.0,
            "end": float(second + 1),
            "no_speech_prob": None,
            "seek": 0,
            "start": float(second),
            "temperature": 0.0,
            "text": " ".join(words[second * _WORDS_PER_SECOND :][:_WORDS_PER_SECOND]),
            "tokens": [],
        }
        for second in range(body.seconds)
    ]
    return {
        "duration": body.seconds - 0.5,
        "language": body.language or "en",
        "text": text,
        "segments": segments,
        "words": None,
    }


class TranscriptWriter(ChunkWriter):
    """A transcript as a stream, without usage."""

    prefix: ClassVar[str] = "transcribe"

    def chunk(
        self, choice: Choice, text: str, final: bool, logprobs: object, usage: object
    ) -> dict[str, Any]:
        part: dict[str, Any] = {"delta": {"content": text}}
        if final:
            part |= {"finish_reason": "stop", "stop_reason": None}
        return {
            "id": f"{self.prefix}-{self.reply.id}",
            "object": "transcription.chunk",
            "created": self.reply.created,
            "model": self.reply.model,
            "choices": [part],
        }

    def logprobs(self, choice: Choice, token: int) -> object:
        return None

    def usage(self, prompt: int, completion: int, total: int) -> dict[str, Any]:
        return {"prompt_tokens": prompt, "total_tokens": total, "completion_tokens": completion}
