"""Requests to a model that its page shows, ready to be copied. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

ORIGIN = "\x00origin\x00"
"""Stands in a request for the server's address, such as ``http://127.0.0.1:8000``."""
TIER = "\x00tier\x00"
"""Stands in a request for the tier."""


class Piece(NamedTuple):
    """A part of a request: ``text`` as it is, or what is filled in for ``fill``."""

    text: str
    fill: str = ""


@dataclass(frozen=True, slots=True)
class ReadyRequest:
    """A request in one language.

    Attributes:
        key: the language in one word, for ids of elements.
        language: the language, in words.
        text: the request, with ``ORIGIN`` and ``TIER`` in it.
    """

    key: str
    language: str
    text: str

    def pieces(self, origin: str, tier: str) -> Iterator[Piece]:
        """Yield the request in parts; the parts that are filled in are marked."""
        values = {ORIGIN: Piece(origin, "origin"), TIER: Piece(tier, "tier")}
        for part in re.split(f"({ORIGIN}|{TIER})", self.text):
            if part:
                yield values.get(part) or Piece(part)


def ready_requests(model: str, *, chats: bool) -> tuple[ReadyRequest, ...]:
    """Return a request to a model in each language: a chat, or an embedding."""
    texts = _chat(model) if chats else _embedding(model)
    languages = (("curl", "curl"), ("python", "Python"), ("javascript", "JavaScript"))
    return tuple(
        ReadyRequest(key, language, text)
        for (key, language), text in zip(languages, texts, strict=True)
    )


def _chat(model: str) -> tuple[str, str, str]:
    name = json.dumps(model)
    curl = f"""\
curl {ORIGIN}/v1/chat/completions \\
  -H "Authorization: Bearer $FRONTLINE_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d {
        _quoted(f'''{{
    "model": {name},
    "messages": [{{"role": "user", "content": "Hello!"}}],
    "service_tier": "{TIER}"
  }}''')
    }"""
    python = f"""\
import os
from openai import OpenAI

client = OpenAI(
    base_url="{ORIGIN}/v1",
    api_key=os.environ.get("FRONTLINE_API_KEY", "none"),
)
answer = client.chat.completions.create(
    model={name},
    messages=[{{"role": "user", "content": "Hello!"}}],
    service_tier="{TIER}",
)
print(answer.choices[0].message.content)
print("served as:", answer.service_tier)"""
    javascript = f"""\
import OpenAI from "openai";

const client = new OpenAI({{
  baseURL: "{ORIGIN}/v1",
  apiKey: process.env.FRONTLINE_API_KEY ?? "none",
}});
const answer = await client.chat.completions.create({{
  model: {name},
  messages: [{{ role: "user", content: "Hello!" }}],
  service_tier: "{TIER}",
}});
console.log(answer.choices[0].message.content);
console.log("served as:", answer.service_tier);"""
    return curl, python, javascript


def _embedding(model: str) -> tuple[str, str, str]:
    name = json.dumps(model)
    curl = f"""\
curl {ORIGIN}/v1/embeddings \\
  -H "Authorization: Bearer $FRONTLINE_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d {
        _quoted(f'''{{
    "model": {name},
    "input": "Hello!",
    "service_tier": "{TIER}"
  }}''')
    }"""
    python = f"""\
import os
from openai import OpenAI

client = OpenAI(
    base_url="{ORIGIN}/v1",
    api_key=os.environ.get("FRONTLINE_API_KEY", "none"),
)
answer = client.embeddings.create(
    model={name},
    input="Hello!",
    extra_body={{"service_tier": "{TIER}"}},
)
print(len(answer.data[0].embedding), "dimensions")"""
    javascript = f"""\
import OpenAI from "openai";

const client = new OpenAI({{
  baseURL: "{ORIGIN}/v1",
  apiKey: process.env.FRONTLINE_API_KEY ?? "none",
}});
const answer = await client.embeddings.create({{
  model: {name},
  input: "Hello!",
  encoding_format: "float",
  service_tier: "{TIER}",
}});
console.log(answer.data[0].embedding.length, "dimensions");"""
    return curl, python, javascript


def _quoted(text: str) -> str:
    """Return a text as one word of a shell."""
    return "'" + text.replace("'", "'\\''") + "'"
