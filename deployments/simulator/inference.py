"""The inference routes: from a request's body to the last byte of its answer."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import orjson
from frontline_tally import current

from app.core.dialect import Route
from deployments.simulator.chunks import StreamWriter
from deployments.simulator.engine import Engine, GivenUpError, Run
from deployments.simulator.exchange import HttpExchange
from deployments.simulator.generation import GeneratedReply
from deployments.simulator.messages import (
    CountTokensBody,
    DetokenizeBody,
    MessagesAnswer,
    MessagesBody,
    MessagesWriter,
    TokenizeBody,
)
from deployments.simulator.ranking import RANKING_ROUTES, RerankBody, ScoreBody
from deployments.simulator.requests import (
    InvalidBodyError,
    Prompt,
    RefusedError,
    ResponsesBody,
    parse_json,
    read,
)
from deployments.simulator.responses import ResponsesAnswer, ResponsesWriter
from deployments.simulator.settings import InjectedFailures, RequestFailure
from deployments.simulator.transcripts import (
    TranscriptionBody,
    TranscriptWriter,
    form_values,
    transcript,
)
from deployments.simulator.wire import Wire

_Whole = ResponsesAnswer | MessagesAnswer | TranscriptionBody
_STREAM_FAILURES: Final = {RequestFailure.TRUNCATE, RequestFailure.TRUNCATE_CLEANLY}
"""Failures that affect only streams; other requests are answered."""


@dataclass(slots=True)
class Call:
    """A request on its way through the engine."""

    exchange: HttpExchange
    route: Route
    number: int
    values: dict[str, Any]
    priority: float
    failure: InjectedFailures | None
    """The failure to inject after some tokens."""


class Inference:
    """Reads inference requests, runs them in the engine and writes their answers."""

    def __init__(self, engine: Engine, wire: Wire) -> None:
        self.engine, self.wire = engine, wire
        # The words that were turned into tokens; a token is the place of its word.
        self._words: list[str] = []

    async def serve(self, exchange: HttpExchange, route: Route) -> None:
        """Answer an inference request, or fail as configured."""
        body = await exchange.body()
        number = self.engine.observations.record(exchange.path, exchange.raw_headers, body)
        try:
            failure = self.engine.failure_of(number)
            if failure is not None and not failure.after_tokens:
                await _fail_at_once(exchange, failure)
            values = self._read(route, body, exchange)
            priority = self.wire.priority(route, values, exchange.headers)
            call = Call(exchange, route, number, values, priority, failure)
            if not route.takes_slot:
                await self._count(call)
            elif route in RANKING_ROUTES:
                await self._rank(call)
            else:
                await (self._embed(call) if route is Route.EMBEDDINGS else self._generate(call))
        except InvalidBodyError as error:
            await exchange.answer(400, orjson.dumps(self.wire.invalid(error, route)))
        except RefusedError as error:
            await self.refuse(exchange, error, route)
        except GivenUpError:
            return

    async def refuse(
        self, exchange: HttpExchange, error: RefusedError, route: Route | None = None
    ) -> None:
        """Answer with an error."""
        await exchange.answer(error.status, orjson.dumps(self.wire.refused(error, route)))

    def _read(self, route: Route, body: bytes, exchange: HttpExchange) -> dict[str, Any]:
        settings = self.engine.settings
        if route.is_form:
            if not settings.transcribes:
                raise RefusedError(404, "Not Found", "Not Found")
            return form_values(exchange.headers.get(b"content-type", b""), body)
        values = parse_json(body)
        self.wire.check_fields(route, values)
        embeds = route is Route.EMBEDDINGS or route in RANKING_ROUTES
        if not (settings.embedding_dimensions if embeds else settings.generates):
            raise RefusedError(404, "Not Found", "Not Found")
        self.wire.check_stream_options(route, values)
        self.wire.check_adapter(values)
        return values

    def _admit(self, call: Call, total: int, computed: int) -> Run:
        if self.engine.full:
            raise self.wire.busy()
        run = self.engine.admit(call.number, call.priority, total, computed, call.exchange.gone)
        if (tally := current()) is not None:
            tally.add(lambda: run.job.history.preemptions)
        return run

    def _id(self, call: Call, requested: str | None) -> str:
        header = call.exchange.headers.get(b"x-request-id")
        given = header.decode("latin-1") if header is not None else requested
        return given if given is not None and self.wire.keeps_request_id else uuid.uuid4().hex

    async def _count(self, call: Call) -> None:
        model, answer = self._counted(call.route, call.values)
        self.wire.check_model(call.route, model)
        await call.exchange.answer(200, orjson.dumps(answer))

    def _counted(self, route: Route, values: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Return the model that a request names, and its answer."""
        if route is Route.COUNT_TOKENS:
            counting = read(CountTokensBody, values)
            return counting.model, {"input_tokens": len(counting.prompt().tokens)}
        if route is Route.TOKENIZE:
            text = read(TokenizeBody, values)
            ids = [self._id_of(str(word)) for word in text.parts().tokens]
            context = self.engine.settings.context_length
            return text.model, {"count": len(ids), "max_model_len": context, "tokens": ids}
        given = read(DetokenizeBody, values)
        words = [self._words[one] for one in given.tokens if one < len(self._words)]
        return given.model, {self.wire.detokenized: " ".join(words)}

    def _id_of(self, word: str) -> int:
        if word not in self._words:
            self._words.append(word)
        return self._words.index(word)

    async def _embed(self, call: Call) -> None:
        body, prompts = self.wire.read_embedding(call.values)
        self.wire.check_model(call.route, body.model)
        tokens = await self._prefill(call, prompts)
        vectors = self.wire.vectors(body, prompts)
        id_, model = self._id(call, body.request_id), self.wire.answered_model(body.model)
        answer = self.wire.embedding(id_, int(time.time()), model, vectors, tokens)
        await call.exchange.answer(200, orjson.dumps(answer))

    async def _rank(self, call: Call) -> None:
        body = read(RerankBody if call.route is Route.RERANK else ScoreBody, call.values)
        self.wire.check_model(call.route, body.model)
        prompts = body.prompts()
        for prompt in prompts:
            self.wire.check_length(len(prompt.tokens), None, "")
        tokens = await self._prefill(call, prompts)
        answer = body.answer(
            body.scores(self.engine.settings), {"prompt_tokens": tokens, "total_tokens": tokens}
        )
        named = {"id": f"score-{self._id(call, body.request_id)}", "created": int(time.time())}
        model = self.wire.answered_model(body.model)
        await call.exchange.answer(200, orjson.dumps(named | {"model": model} | answer))

    async def _prefill(self, call: Call, prompts: Sequence[Prompt]) -> int:
        """Compute prompts whose request generates nothing; return how many tokens they have."""
        tokens = sum(len(prompt.tokens) for prompt in prompts)
        run = self._admit(call, 1, tokens)
        try:
            await run.advance(1)
        finally:
            run.finish()
        return tokens

    async def _generate(self, call: Call) -> None:
        reply, whole = self._reply(call)
        if reply.wish.stream and self.wire.refuses_in_band and self.engine.full:
            await self._end_with_error(call, self.wire.busy())
            return
        run = self._admit(call, reply.steps, reply.prompt_tokens - reply.cached_tokens)
        try:
            if reply.wish.stream:
                await self._stream(call, run, self._writer(call.route, reply, whole))
            else:
                await self._answer(call, run, reply, whole)
        finally:
            run.finish()

    def _reply(self, call: Call) -> tuple[GeneratedReply, _Whole | None]:
        body, wish = self.wire.read_generation(call.route, call.values)
        self.wire.check_model(call.route, body.model)
        choices, cached = self.engine.answers(wish)
        tokens = sum(len(prompt.tokens) for prompt in wish.prompts)
        created, model = int(time.time()), self.wire.answered_model(body.model)
        if isinstance(body, MessagesBody):
            id_ = self.wire.message_id(self._id(call, None))
            reply = GeneratedReply(id_, created, model, tokens, cached, choices, wish)
            return reply, MessagesAnswer(reply, whole_usage=self.wire.whole_messages_usage)
        if isinstance(body, TranscriptionBody):
            id_ = self._id(call, None)
            return GeneratedReply(id_, created, model, tokens, cached, choices, wish), body
        if not isinstance(body, ResponsesBody):
            id_ = self._id(call, body.request_id)
            return GeneratedReply(id_, created, model, tokens, cached, choices, wish), None
        id_ = body.request_id or f"resp_{uuid.uuid4().hex}"
        reply = GeneratedReply(id_, created, model, tokens, cached, choices, wish)
        room = self.engine.settings.context_length - tokens
        return reply, ResponsesAnswer(reply, body, self.wire.echoes_service_tier, room)

    def _writer(self, route: Route, reply: GeneratedReply, whole: _Whole | None) -> StreamWriter:
        if isinstance(whole, MessagesAnswer):
            return MessagesWriter(whole)
        if isinstance(whole, TranscriptionBody):
            return TranscriptWriter(reply)
        if whole is not None:
            return ResponsesWriter(whole)
        if route is Route.CHAT:
            return self.wire.chat_stream(reply)
        return self.wire.completion_stream(reply)

    async def _answer(
        self, call: Call, run: Run, reply: GeneratedReply, whole: _Whole | None
    ) -> None:
        failure = call.failure
        if failure is not None and failure.request not in _STREAM_FAILURES:
            await run.advance(min(failure.after_tokens, reply.steps))
            await self._fail(call, run, failure, streams=False)
        await run.advance(reply.steps)
        run.finish()
        if isinstance(whole, TranscriptionBody):
            answer = transcript(whole, reply)
        elif whole is not None:
            answer = whole.finished()
        elif call.route is Route.CHAT:
            answer = self.wire.chat(reply)
        else:
            answer = self.wire.completion(reply)
        await call.exchange.answer(200, orjson.dumps(answer))

    async def _stream(self, call: Call, run: Run, writer: StreamWriter) -> None:
        exchange, failure, steps = call.exchange, call.failure, writer.reply.steps
        end = steps if failure is None else min(failure.after_tokens, steps)
        if self.wire.headers_before_first_token:
            await exchange.start_stream()
        if greeting := writer.greeting():
            await exchange.write(greeting)
        written = 0
        while written < end:
            reached = min(await run.advance(written + 1), end)
            opening = b"" if written else writer.opening()
            data = opening + writer.tokens(written, reached)
            written = reached
            if written == steps and failure is None:
                run.finish()
                await exchange.write(data + writer.closing(), more=False)
            else:
                await exchange.write(data)
        if failure is not None:
            await self._fail(call, run, failure, streams=True)

    async def _fail(
        self, call: Call, run: Run, failure: InjectedFailures, *, streams: bool
    ) -> NoReturn:
        kind, exchange = failure.request, call.exchange
        if kind is RequestFailure.CRASH:
            # uvloop sends written data at the end of an iteration of the event loop.
            await asyncio.sleep(0)
            crash()
        elif kind is RequestFailure.HANG:
            await run.stall()
        elif kind in (RequestFailure.ERROR, RequestFailure.ERROR_EVENT):
            if not streams:
                raise _asked_for(failure)
            await self._end_with_error(call, _asked_for(failure))
        elif kind is RequestFailure.TRUNCATE_CLEANLY:
            await exchange.write(b"", more=False)
        else:
            await exchange.start_stream()
        raise GivenUpError  # an incomplete answer closes the connection

    async def _end_with_error(self, call: Call, error: RefusedError) -> None:
        begun = call.exchange.wrote
        last, well_formed = self.wire.stream_error(call.route, error, begun=begun)
        await call.exchange.write(last, more=not well_formed)


async def _fail_at_once(exchange: HttpExchange, failure: InjectedFailures) -> None:
    if failure.request is RequestFailure.CRASH:
        crash()
    elif failure.request is RequestFailure.HANG:
        await exchange.gone()
        raise GivenUpError
    elif failure.request is RequestFailure.ERROR:
        raise _asked_for(failure)


def _asked_for(failure: InjectedFailures) -> RefusedError:
    return RefusedError(failure.status, "This failure was asked for.", "InternalServerError")


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
