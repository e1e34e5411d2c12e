"""What an operator or a test can set of a simulated engine."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from app.core.settings import Settings


class DialectName(StrEnum):
    """The engine that is imitated."""

    VLLM = "vllm"
    SGLANG = "sglang"
    TENSORRT_LLM = "tensorrt_llm"


class Policy(StrEnum):
    """In which order waiting requests are started."""

    PRIORITY = "priority"
    FCFS = "fcfs"
    """First come, first served: a request's priority is accepted and ignored."""


class RequestFailure(StrEnum):
    """What goes wrong with a request."""

    CRASH = "crash"
    """The process kills itself (SIGKILL)."""
    HANG = "hang"
    """The answer stops coming; the connection stays open and the slot stays taken."""
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
    """What the engine does wrong. All of it can be changed while the engine runs, but for
    ``start`` and ``leave_child``, which are over once it has started."""

    start: str | None = None
    """Fail to start, with this message and exit status 1. None: start, as an engine should."""
    request: RequestFailure | None = None
    """What goes wrong with inference requests. None: nothing."""
    at_request: int | None = Field(default=None, ge=1)
    """Which request fails, counting from 1 since the failures were set. None: every one."""
    after_tokens: int = Field(default=0, ge=0)
    """How many tokens are generated first; with some, embeddings do not fail. 0: it fails before
    the first byte, which is what a replay on another replica must cover."""
    status: int = Field(default=500, ge=400, le=599)
    """The HTTP status of an error. 500 is what an engine answers when it is at fault."""
    health_hangs: bool = False
    """``/health`` and ``/ready`` take the request and never answer."""
    ignore_sigterm: bool = False
    """SIGTERM does nothing, as with vLLM 0.32 whose streams outlast their shutdown timeout."""
    leave_child: bool = False
    """Start a process in a session of its own, which outlives the engine unless someone looks
    for it, as vLLM's engine core does."""

    def strikes(self, number: int) -> bool:
        """Return whether the ``number``-th request since these failures were set goes wrong."""
        return self.request is not None and self.at_request in (None, number)


class SimulatedSettings(Settings):
    """The simulated engine's ``engine_args``."""

    dialect: DialectName = DialectName.VLLM
    """Whose HTTP dialect, error shapes and sign of priority to imitate. vLLM is the engine that
    Frontline's own default configuration runs."""
    slots: int = Field(default=8, ge=1)
    """How many requests run at once; the others wait. A request takes one slot, whatever its
    ``n``. 8 is small enough to see a queue form."""
    tokens_per_second: float = Field(default=50.0, ge=0)
    """The pace of each stream. 0: all tokens at once, in one write. 50 is a small model on a
    desktop processor, slow enough to watch."""
    first_token_seconds: float = Field(default=0.0, ge=0)
    """Time from a request's start to its first token. 0: tests should not wait for nothing."""
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
    than 50, which later goes on where it stopped. None: as the engine does that is imitated when
    Frontline starts it. SGLang and vLLM do, if ``policy`` is ``priority``; TensorRT-LLM cannot."""
    max_waiting: int | None = Field(default=None, ge=0)
    """Answer 503 to requests beyond so many waiting, whatever their priority. None: no limit,
    as in the engines when nothing is set; the ingress is to shed, not the engine."""
    context_length: int = Field(default=4096, ge=2)
    """The longest prompt and answer together, in tokens. 4096 is what a small model has."""
    default_completion_tokens: int = Field(default=64, ge=1)
    """The length of an answer whose request sets no limit. 64 makes a short paragraph."""
    generates: bool = True
    """Whether it answers chat completions, completions and responses. Most models do."""
    embedding_dimensions: int = Field(default=0, ge=0, le=65536)
    """The length of its embeddings. 0: it makes none, as most models."""
    cached_blocks: int = Field(default=4096, ge=0)
    """How many blocks of 16 prompt tokens its prefix cache holds; the least recently used go first.
    0: none. 4096 blocks outlast the conversations of a test and cost little memory."""
    remembered_requests: int = Field(default=256, ge=0)
    """How many of the last inference requests ``GET /simulate`` tells. 256 covers a test and
    bounds the memory of a long run."""
    seed: int = 0
    """Changes the words of all answers. Fixed, so that answers are the same from run to run."""
    startup_seconds: float = Field(default=0.0, ge=0)
    """How long it takes to get ready. 0: tests should not wait for nothing."""
    shutdown_seconds: int = Field(default=60, ge=0)
    """How long running requests may go on after SIGTERM. 60 is the ``--shutdown-timeout`` that
    Frontline starts vLLM with."""
    guarded: bool = True
    """Whether every route demands the engine's key, as Frontline's replicas of it must. False:
    none does, as with TensorRT-LLM's own server; for tests of that adapter."""
    lacking_fields: frozenset[str] = frozenset()
    """Request fields that this build does not know yet; TensorRT-LLM only, the others tolerate
    any. ``[priority]`` makes one older than its HTTP priority (pull request 15329)."""
    failures: InjectedFailures = InjectedFailures()

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.generates and not self.embedding_dimensions:
            raise ValueError("an engine that does not generate needs 'embedding_dimensions'")
        if self.preemption and self.dialect is DialectName.TENSORRT_LLM:
            raise ValueError("'preemption': TensorRT-LLM does not preempt by priority")
        if self.lacking_fields and self.dialect is not DialectName.TENSORRT_LLM:
            raise ValueError("only 'dialect: tensorrt_llm' refuses fields: 'lacking_fields'")
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
        """The priority of a request that carries none.

        vLLM's and TensorRT-LLM's own; SGLang's is the worst there is, unless
        ``--default-priority-value 0``, with which Frontline starts it.
        """
        return 0.5 if self.dialect is DialectName.TENSORRT_LLM else 0.0

    @property
    def disconnect_seconds(self) -> float:
        """How long the engine goes on after a client has gone: vLLM notices at once, the others
        look every few seconds."""
        return {DialectName.VLLM: 0.0, DialectName.SGLANG: 2.0}.get(self.dialect, 1.0)


class Change(Settings):
    """The body of ``POST /simulate``: what to change in the running engine. What is not named
    stays as it is."""

    failures: InjectedFailures | None = None
    """The failures from now on; ``{}`` heals everything."""
    tokens_per_second: float | None = Field(default=None, ge=0)
    first_token_seconds: float | None = Field(default=None, ge=0)
    prefill_seconds_per_token: float | None = Field(default=None, ge=0)
    forget: bool = False
    """Forget the requests seen and the order of starts, and set the counts to zero."""
