"""The request fields that TensorRT-LLM's server accepts, and how it reports unknown ones.

Based on the source of its main branch of 2026 (``tensorrt_llm/serve/openai_protocol.py``). The
adapter and the simulated engine both use this module, so that they cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from app.core.dialect import Route
from app.core.tiers import Tier

PRIORITY_VALUES: Final = {Tier.PRIORITY: 1.0, Tier.DEFAULT: 0.5, Tier.FLEX: 0.0}
"""Between 0 and 1, higher first. The engine's default for requests without a priority is 0.5."""

PRIORITY_ROUTES: Final = frozenset({Route.CHAT, Route.COMPLETIONS})
"""The routes whose requests can carry a priority."""


def _fields(names: str) -> frozenset[str]:
    return frozenset(names.split())


_SAMPLING: Final = _fields(
    """best_of frequency_penalty logit_bias logprobs max_tokens n presence_penalty
    prompt_ignore_length seed stop stream stream_options temperature top_p user lora_request
    use_beam_search top_k top_p_min min_p repetition_penalty length_penalty early_stopping
    stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
    spaces_between_special_tokens truncate_prompt_tokens thinking_token_budget add_special_tokens
    response_format disaggregated_params priority conversation_params model echo"""
)
REQUEST_FIELDS: Final[Mapping[Route, frozenset[str]]] = {
    Route.CHAT: _SAMPLING
    | _fields(
        """messages prompt_token_ids prompt_token_ids_b64 top_logprobs max_completion_tokens tools
        tool_choice parallel_tool_calls reasoning_effort thinking add_generation_prompt documents
        chat_template chat_template_kwargs injected_chat_template_kwargs media_io_kwargs cache_salt
        agent_hierarchy mm_processor_kwargs"""
    ),
    Route.COMPLETIONS: _SAMPLING | _fields("prompt suffix return_context_logits detokenize"),
    Route.EMBEDDINGS: _fields("model input encoding_format dimensions user add_special_tokens"),
}
"""The fields of the request classes that reject unknown fields. The class of ``/v1/responses`` does
not reject them."""

INTERNAL_FIELDS: Final = _fields(
    "prompt_token_ids_b64 injected_chat_template_kwargs disaggregated_params lora_request"
)
"""Fields that TensorRT-LLM's servers send to each other, and one that names files on its host."""

CLIENT_FIELDS: Final[Mapping[Route, frozenset[str]]] = {
    route: names - INTERNAL_FIELDS for route, names in REQUEST_FIELDS.items()
}
"""The fields that clients may send to an engine."""

# The server's 400 quotes pydantic's errors in Python notation, as a list or one per line.
_UNKNOWN_FIELD: Final = re.compile(r"'type': 'extra_forbidden', 'loc': \('body', '(\w+)'\)")


def refused_fields(answer: object) -> frozenset[str]:
    """Return the request fields that the server's 400 reports as unknown.

    Builds before 2026 have the text in ``message``, later ones in ``error``.
    """
    fields = answer if isinstance(answer, dict) else {}
    error = fields.get("error", fields.get("message"))
    return frozenset(_UNKNOWN_FIELD.findall(error)) if isinstance(error, str) else frozenset()
