"""Texts ranked by their embeddings: requests and answers, in the shapes of vLLM 0.32.0
(``vllm/entrypoints/pooling/scoring``)."""

from __future__ import annotations

from typing import Any, Final

from app.core.dialect import Route
from deployments.simulator.language import embed
from deployments.simulator.requests import Body, Prompt, RefusedError
from deployments.simulator.settings import SimulatedSettings

RANKING_ROUTES: Final = frozenset({Route.RERANK, Route.SCORE})
"""The pooled routes of an embeddings model that are simulated."""


class RankingBody(Body):
    """What both routes have in common: the texts on each side."""

    def sides(self) -> tuple[list[str], list[str]]:
        """Return the texts of both sides."""
        raise NotImplementedError

    def answer(self, scores: list[float], usage: dict[str, int]) -> dict[str, Any]:
        """Return the answer without its id and its model."""
        raise NotImplementedError

    def prompts(self) -> list[Prompt]:
        """Return the texts as prompts.

        Raises:
            RefusedError: the sides are neither of equal length, nor is the first a single text.
        """
        left, right = self.sides()
        if len(left) not in (1, len(right)):
            raise RefusedError(400, "Input lengths must be either 1:1, 1:N or N:N")
        return [Prompt.of(text) for text in (*left, *right)]

    def scores(self, settings: SimulatedSettings) -> list[float]:
        """Return how similar the texts of each pair are."""
        left, right = (
            [embed(text, settings.embedding_dimensions, settings.seed) for text in side]
            for side in self.sides()
        )
        pairs = zip(left * len(right) if len(left) == 1 else left, right, strict=True)
        return [sum(a * b for a, b in zip(*pair, strict=True)) for pair in pairs]


class RerankBody(RankingBody):
    """``POST /v1/rerank``."""

    query: str
    documents: str | list[str]
    top_n: int = 0

    def sides(self) -> tuple[list[str], list[str]]:
        return [self.query], _texts(self.documents)

    def answer(self, scores: list[float], usage: dict[str, int]) -> dict[str, Any]:
        texts = self.sides()[1]
        best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        results = [
            {"index": place, "document": {"text": texts[place]}, "relevance_score": scores[place]}
            for place in best
        ]
        return {"usage": usage, "results": results[: self.top_n or None]}


class ScoreBody(RankingBody):
    """``POST /v1/score``."""

    text_1: str | list[str]
    text_2: str | list[str]

    def sides(self) -> tuple[list[str], list[str]]:
        return _texts(self.text_1), _texts(self.text_2)

    def answer(self, scores: list[float], usage: dict[str, int]) -> dict[str, Any]:
        data = [{"index": at, "object": "score", "score": one} for at, one in enumerate(scores)]
        return {"object": "list", "data": data, "usage": usage}


def _texts(side: str | list[str]) -> list[str]:
    return [side] if isinstance(side, str) else side
