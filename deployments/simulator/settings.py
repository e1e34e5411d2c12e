"""The settings of a simulated engine."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from app.core.settings import Settings


class DialectName(StrEnum):
    """The engine that is simulated."""

    VLLM = "vllm"
    SGLANG = "sglang"
    TENSORRT_LLM = "tensorrt_llm"


class Policy(StrEnum):
    """The order in which waiting requests are started."""

    PRIORITY = "priority"
    FCFS = "fcfs"
    """First come, first served: a request's priority is accepted and ignored."""


class RequestFailure(StrEnum):
    """How a request fails."""

    CRASH = "crash"
    """The process kills itself (SIGKILL)."""
    HANG = "hang"
    """The answer stops; the connection stays open and the slot stays taken."""
    ERROR = "error"
    """An HTTP error of ``status``, in the engine's own shape. Before the first byte only."""
    ERROR_EVENT = "error_event"
    """HTTP 200, then an error of ``status`` as an event; without tokens before it, this is how
    SGLang 0.5 refuses a stream. A request that does not stream gets the error itself."""
    TRUNCATE = "truncate"
    """A stream ends without ``[DONE]`` and its connection breaks, as TensorRT-LLM's do."""
    TRUNCATE_CLEANLY = "truncate_cleanly"
    """A stream ends without ``[DONE]``, in well-formed HTTP."""


class InjectedFailures(Settings):
    """The failures to inject. All can be changed while the engine runs, except ``start`` and
    ``leave_child``, which take effect at its start."""

    start: str | None = None
    """Fail to start, with this message and exit status 1. None: start normally."""
    request: RequestFailure | None = None
    """How inference requests fail. None: they do not."""
    at_request: int | None = Field(default=None, ge=1)
    """Which request fails, counting from 1 since the failures were set. None: every one."""
    after_tokens: int = Field(default=0, ge=0)
    """How many tokens are generated first; above 0, embeddings do not fail. 0: the request fails
    before the first byte, so that it can be repeated on another replica."""
    status: int = Field(default=500, ge=400, le=599)
    """The HTTP status of an error. 500 is an engine's own status for its faults."""
    health_hangs: bool = False
    """``/health`` and ``/ready`` accept requests and never answer."""
    ignore_sigterm: bool = False
    """Ignore SIGTERM, as vLLM 0.32 does while streams outlast its shutdown timeout."""
    leave_child: bool = False
    """Start a process in its own session, which outlives the engine unless something ends it, as
    vLLM's engine core does."""

    def strikes(self, number: int) -> bool:
        """Return whether the ``number``-th request since these failures were set fails."""
        return self.request is not None and self.at_request in (None, number)


class SimulatedSettings(Settings):
    """The simulated engine's ``engine_args``."""

    dialect: DialectName = DialectName.VLLM
    """The engine whose HTTP dialect, error shapes and sign of priority are simulated. vLLM is the
    engine of Frontline's default configuration."""
    slots: int = Field(default=8, ge=1)
    """How many requests run at once; the others wait. A request takes one slot, whatever its
    ``n``. 8 is small enough to see a queue form."""
    tokens_per_second: float = Field(default=50.0, ge=0)
    """The pace of each stream. 0: all tokens at once, in one write. 50 is a small model on a
    desktop processor, slow enough to watch."""
    first_token_seconds: float = Field(default=0.0, ge=0)
    """Time from a request's start to its first token. 0: tests should not wait."""
    prefill_seconds_per_token: float = Field(default=0.0, ge=0)
    """Further time to the first token for each prompt token that is not cached. 0, as above."""
    policy: Policy = Policy.PRIORITY
    """The order of waiting requests. Priority, because that is what Frontline starts the real
    engines with."""
    low_first: bool = True
    """Whether SGLang's lower priorities go first (``--schedule-low-priority-values-first``); with
    it one scale serves vLLM and SGLang. vLLM always does, TensorRT-LLM never."""
    preemption: bool | None = None
    """Whether a waiting request takes the slot of a running one whose priority is worse by more
    than 50. The running one later continues where it stopped. None: like the simulated engine as
    Frontline starts it. SGLang and vLLM do, if ``policy`` is ``priority``; TensorRT-LLM cannot."""
    max_waiting: int | None = Field(default=None, ge=0)
    """Answer 503 to requests when so many wait, whatever their priority. None: no limit, as in
    the engines by default; the ingress sheds, not the engine."""
    context_length: int = Field(default=4096, ge=2)
    """The longest prompt and answer together, in tokens. 4096 is what a small model has."""
    kv_tokens: int | None = Field(default=None, ge=1)
    """How many tokens it says that its KV cache holds. It holds none, so nothing else depends on
    this. None: it does not say it, as TensorRT-LLM's server."""
    default_completion_tokens: int = Field(default=64, ge=1)
    """The length of an answer whose request sets no limit. 64 makes a short paragraph."""
    generates: bool = True
    """Whether it answers chat completions, completions and responses. Most models do."""
    embedding_dimensions: int = Field(default=0, ge=0, le=65536)
    """The length of its embeddings. 0: it makes none, as most models."""
    transcribes: bool = False
    """Whether it transcribes recordings, as vLLM does with some models; of other dialects none."""
    cached_blocks: int = Field(default=4096, ge=0)
    """How many blocks of 16 prompt tokens its prefix cache holds; the least recently used go first.
    0: none. 4096 blocks outlast the conversations of a test and cost little memory."""
    remembered_requests: int = Field(default=256, ge=0)
    """How many of the last inference requests ``GET /simulate`` returns. 256 is enough for a test
    and bounds the memory of a long run."""
    seed: int = 0
    """Changes the words of all answers. Fixed, so that every run has the same answers."""
    startup_seconds: float = Field(default=0.0, ge=0)
    """How long it takes to become ready. 0: tests should not wait."""
    shutdown_seconds: int = Field(default=60, ge=0)
    """How long running requests may continue after SIGTERM. 60 is the ``--shutdown-timeout`` that
    Frontline starts vLLM with."""
    guarded: bool = True
    """Whether every route requires the engine's key, as Frontline's replicas must. False: no route
    does, as with TensorRT-LLM's own server; for tests of that adapter."""
    lacking_fields: frozenset[str] = frozenset()
    """Request fields that this build does not know; TensorRT-LLM only, the others accept any.
    ``[priority]`` makes it older than its HTTP priority (pull request 15329)."""
    older_errors: bool = False
    """Whether a validation error has the shape of TensorRT-LLM's builds of 2025; TensorRT-LLM only.
    Not set, it has that of 2026."""
    adapters: tuple[str, ...] = ()
    """The LoRA adapters that it answers for, by name. Set by the pool's ``adapters``."""
    adapter_room: int = Field(default=0, ge=0)
    """How many more it can be made to load by requests, on the routes of the engine that is
    simulated. Set by the pool's ``adapter_room``."""
    failures: InjectedFailures = InjectedFailures()

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.generates and not self.embedding_dimensions:
            raise ValueError("an engine that does not generate needs 'embedding_dimensions'")
        if self.transcribes and self.dialect is not DialectName.VLLM:
            raise ValueError("only 'dialect: vllm' transcribes")
        if self.preemption and self.dialect is DialectName.TENSORRT_LLM:
            raise ValueError("'preemption': TensorRT-LLM does not preempt by priority")
        if self.lacking_fields and self.dialect is not DialectName.TENSORRT_LLM:
            raise ValueError("only 'dialect: tensorrt_llm' refuses fields: 'lacking_fields'")
        if self.older_errors and self.dialect is not DialectName.TENSORRT_LLM:
            raise ValueError("only 'dialect: tensorrt_llm' has 'older_errors'")
        if (self.adapters or self.adapter_room) and self.dialect is DialectName.TENSORRT_LLM:
            raise ValueError("'dialect: tensorrt_llm' has no adapters")
        return self

    @property
    def lower_goes_first(self) -> bool:
        """Whether a lower priority value is served before a higher one."""
        if self.dialect is DialectName.SGLANG:
            return self.low_first
        return self.dialect is DialectName.VLLM

    @property
    def preempts(self) -> bool:
        """Whether a waiting request takes the slot of a running one that is worse."""
        can = self.policy is Policy.PRIORITY and self.dialect is not DialectName.TENSORRT_LLM
        return can and self.preemption is not False

    @property
    def unset_priority(self) -> float:
        """The priority of a request without one.

        vLLM's and TensorRT-LLM's own default. SGLang's default is the worst priority, but Frontline
        starts it with ``--default-priority-value 0``.
        """
        return 0.5 if self.dialect is DialectName.TENSORRT_LLM else 0.0

    @property
    def disconnect_seconds(self) -> float:
        """How long the engine continues after a client has disconnected.

        vLLM notices at once; the others check every few seconds.
        """
        return {DialectName.VLLM: 0.0, DialectName.SGLANG: 2.0}.get(self.dialect, 1.0)


class Change(Settings):
    """The body of ``POST /simulate``: changes to the running engine. Other settings stay."""

    failures: InjectedFailures | None = None
    """The failures from now on; ``{}`` removes all."""
    tokens_per_second: float | None = Field(default=None, ge=0)
    first_token_seconds: float | None = Field(default=None, ge=0)
    prefill_seconds_per_token: float | None = Field(default=None, ge=0)
    slots: int | None = Field(default=None, ge=1)
    """How many requests run at once. Running ones stay."""
    preemption: bool | None = None
    """Turn preemption off, or on again, as if the engine's own decision had failed."""
    forget: bool = False
    """Forget the recorded requests and starts, and reset the counts."""
