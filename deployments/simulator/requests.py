"""Parses requests: typed bodies, and what to generate for them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.simulator.language import minimal_json

COMPLETION_LIMIT: Final = 16
"""The length of a completion without a limit: OpenAI's, vLLM's and SGLang's default."""

BodyT = TypeVar("BodyT", bound=BaseModel)

Problem = Mapping[str, Any]
"""A problem of one field, in pydantic's format, which all three engines pass on."""


class InvalidBodyError(ValueError):
    """A request's body is malformed; ``problems`` says where."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(str(problems[0]["msg"]))
        self.problems = problems


class RefusedError(ValueError):
    """The engine rejects a request."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param


def problem(kind: str, place: Sequence[str | int], message: str, value: object = None) -> Problem:
    """Return a problem at ``place`` in the body, in pydantic's format."""
    return {"type": kind, "loc": ("body", *place), "msg": message, "input": value}


class Body(BaseModel):
    """The fields that the engine reads. The dialect decides about others."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    request_id: str | None = None


class StreamOptions(BaseModel):
    """``stream_options``; ``None`` is the dialect's default."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = False


class FunctionName(BaseModel):
    """The function of a tool choice."""

    name: str


class Function(FunctionName):
    """The function of a tool."""

    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool of a chat request."""

    type: str = "function"
    function: Function


class NamedToolChoice(BaseModel):
    """A tool choice that forces one function."""

    function: FunctionName


class ResponseFormat(BaseModel):
    """The required format of an answer. The dialects know different types."""

    type: str
    json_schema: dict[str, Any] | None = None


class GenerationBody(Body):
    """The common fields of chat completions and completions."""

    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    response_format: ResponseFormat | None = None


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None


class EmbeddingBody(Body):
    """``POST /v1/embeddings``."""

    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=65536)] | None = None


class ResponsesBody(Body):
    """``POST /v1/responses``, with the fields that the answer echoes."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = True
    previous_response_id: str | None = None
    reasoning: dict[str, Any] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] = "auto"
    stream: bool | None = False
    temperature: float | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    top_p: float | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    user: str | None = None


def parse_json(body: bytes) -> dict[str, Any]:
    """Return a request's JSON object.

    Raises:
        InvalidBodyError: it is something else.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        found = problem("json_invalid", (error.pos,), "JSON decode error", {})
        raise InvalidBodyError([{**found, "ctx": {"error": error.msg}}]) from None
    if not isinstance(value, dict):
        message = "Input should be a valid dictionary"
        raise InvalidBodyError([problem("model_attributes_type", (), message, value)])
    return value


def read(kind: type[BodyT], values: Mapping[str, Any]) -> BodyT:
    """Return the typed body.

    Raises:
        InvalidBodyError: a field is missing or has a wrong type.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise InvalidBodyError(
            [{**found, "loc": ("body", *found["loc"])} for found in problems]
        ) from None


@dataclass(slots=True)
class Prompt:
    """One prompt: its words or token ids, and the text that determines its answer."""

    text: str
    tokens: Sequence[object]

    @classmethod
    def of(cls, source: str | Sequence[int]) -> Prompt:
        """Return the prompt made of a text, or of token ids."""
        if isinstance(source, str):
            return cls(source, source.split())
        return cls(" ".join(map(str, source)), source)


def prompts_of(source: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
    """Return the prompts of a completion's ``prompt`` or an embedding's ``input``."""
    if isinstance(source, str) or not source or isinstance(source[0], int):
        return [Prompt.of(source)]  # type: ignore[arg-type]
    return [Prompt.of(part) for part in source]


def chat_prompt(messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """Return the prompt of a conversation: its contents joined, without a chat template.

    A part that is not text, such as an image, counts as one token.
    """
    return Prompt.of("\n".join(_content(message.get("content")) for message in messages))


def _content(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return " ".join(text if isinstance(text, str) else "<part>" for text in parts)


@dataclass(slots=True)
class Wish:
    """What to generate for a request; the same for all routes and dialects."""

    prompts: list[Prompt]
    n: int = 1
    limit: int | None = None
    """The most tokens of an answer; ``None``: the engine's default length."""
    min_tokens: int = 0
    stops: Sequence[str] = ()
    keep_stop: bool = False
    fixed_text: str | None = None
    """An answer whose text the request determines, such as minimal JSON."""
    tool: str | None = None
    """The function that the answer must call."""
    tool_arguments: str = "{}"
    """Its arguments: the smallest JSON that its parameters allow."""
    tool_required: bool = False
    """Whether the request said ``required`` instead of naming the function."""
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    top_logprobs: int = 0


def fixed_text(format_: ResponseFormat | None) -> str | None:
    """Return the text for a response format: the smallest JSON that fits.

    Raises:
        RefusedError: its schema is malformed, or nothing finite fits it.
    """
    if format_ is None or format_.type in ("text", "regex", "ebnf", "structural_tag"):
        return None
    schema = format_.json_schema or {}
    try:
        value = minimal_json(schema.get("schema", schema)) if schema else {}
        return orjson.dumps(value).decode()
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise RefusedError(400, "Invalid JSON schema.", param="response_format") from None


def forced_tool(body: ChatBody) -> tuple[Function | None, bool]:
    """Return the function that a chat request forces, and whether by ``required``.

    Raises:
        RefusedError: it forces a function that it does not bring.
    """
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return None, False
    if not body.tools:
        raise RefusedError(400, "When using `tool_choice`, `tools` must be set.", param="tools")
    if isinstance(choice, NamedToolChoice):
        named = [tool.function for tool in body.tools if tool.function.name == choice.function.name]
        if not named:
            message = "The tool specified in `tool_choice` does not match any of the specified"
            raise RefusedError(400, f"{message} `tools`", param="tool_choice")
        return named[0], False
    return body.tools[0].function, True


def forced_response_tool(body: ResponsesBody) -> dict[str, Any] | None:
    """Return the tool that a Responses request forces: its name, and parameters if it has some.

    ``required`` forces the first function. Tools of other types are the engine's own.
    """
    choice = body.tool_choice
    functions = [tool for tool in body.tools if tool.get("type") == "function"]
    if choice == "required":
        return functions[0] if functions else None
    if not isinstance(choice, dict) or not isinstance(choice.get("name"), str):
        return None
    named = [tool for tool in functions if tool.get("name") == choice["name"]]
    return named[0] if named else {"name": choice["name"]}
