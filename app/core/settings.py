"""Base of all settings, and the errors of invalid ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

Key = tuple[str | int, ...]
"""The path to a value in nested settings: names, and indices in lists."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One error in a configuration."""

    key: Key
    message: str

    def __str__(self) -> str:
        key = ".".join(map(str, self.key))
        return f"{key}: {self.message}" if key else self.message


class SettingsError(ValueError):
    """A configuration has unknown keys or bad values; the message has one line for each."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems

    def __reduce__(self) -> tuple[type[SettingsError], tuple[Problem, ...]]:
        # Ray pickles exceptions of deployments.
        return type(self), self.problems


class Settings(BaseModel):
    """Base class: settings are frozen, typed and validated, and reject unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def load(cls, values: Mapping[str, Any], *where: str | int) -> Self:
        """Return settings from ``values``, the mapping at ``where`` in a configuration.

        Raises:
            SettingsError: with a problem for each wrong key, and the given value.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_describe(problem, where) for problem in error.errors()]
            raise SettingsError(*_innermost(problems)) from None


def _innermost(problems: list[Problem]) -> list[Problem]:
    """Drop problems that only follow from a nested one, such as a list left empty by bad items."""
    outer = {p.key[:length] for p in problems for length in range(len(p.key))}
    return [problem for problem in problems if problem.key not in outer]


def _describe(problem: Any, where: Key) -> Problem:
    key = (*where, *problem["loc"])
    if problem["type"] == "extra_forbidden":
        return Problem(key, "there is no such setting")
    if problem["type"] == "missing":
        return Problem(key, "must be set")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "secret":
        return Problem(key, message)
    return Problem(key, f"{message} (got {problem['input']!r})")
