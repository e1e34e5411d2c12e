"""``frontline doctor``: reports what is needlessly open on this machine.

It reads the processes of Ray clusters and engines here, their listening sockets, and Ray's token.
It starts and changes nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.cli.listening import Listener, ProcessView, family, listeners, processes

_MODE: Final = "RAY_AUTH_MODE"
_TOKEN_PATH: Final = "RAY_AUTH_TOKEN_PATH"
_DEFAULT_TOKEN: Final = Path(".ray/auth_token")
_GUARDED: Final = frozenset({"raylet", "gcs_server"})
"""Processes that require Ray's token if they are configured to."""


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A file with Ray's token: its path, and its permission bits."""

    path: str
    mode: int


@dataclass(frozen=True, slots=True)
class Look:
    """The findings on this machine.

    Attributes:
        listening: the listening sockets.
        unguarded: names of Ray processes that require no token.
        tokens: the files that contain a token.
    """

    listening: Sequence[Listener] = ()
    unguarded: Sequence[str] = ()
    tokens: Sequence[TokenFile] = ()


def findings(look: Look) -> list[str]:
    """Return one sentence for each needless opening; empty if there is none."""
    found = []
    if look.unguarded:
        names = ", ".join(sorted(set(look.unguarded)))
        found.append(
            f"no token guards Ray ({names}): whoever reaches its ports runs code. Set "
            f"{_MODE}=token before it is started; `. scripts/activate` does"
        )
    for token in look.tokens:
        if token.mode & 0o077:
            found.append(
                f"others can read Ray's token: chmod 600 {token.path} "
                f"(it is {token.mode & 0o777:04o}), and replace it"
            )
    for one in look.listening:
        if not one.on_loopback:
            found.append(
                f"{one.process} (pid {one.pid}) listens on {_where(one)}: other machines reach it"
            )
    return found


def to_text(look: Look) -> str:
    """Return a table of the listening sockets, and the findings."""
    width = max((len(_where(one)) for one in look.listening), default=0)
    lines = [f"{_where(one):{width}}  {one.process}" for one in look.listening]
    if not lines:
        lines = ["no Ray cluster or engine of this user listens on this machine"]
    problems = findings(look)
    lines += ["", *(f"! {problem}" for problem in problems)] if problems else []
    return "\n".join([*lines, "", f"{len(problems)} found" if problems else "all is well"])


def look_around(environment: Mapping[str, str], home: Path) -> Look:
    """Inspect this machine.

    Args:
        environment: the environment variables, which may name a token.
        home: the folder of Ray's default token.
    """
    ours = family(processes())
    return Look(
        listeners(ours),
        [view.name for view in ours if _asks_for_nothing(view)],
        _token_files([environment, *(view.environment for view in ours)], home),
    )


def run() -> bool:
    """Print the state of this machine; return whether there is no finding."""
    look = look_around(os.environ, Path.home())
    print(to_text(look))
    return not findings(look)


def _asks_for_nothing(view: ProcessView) -> bool:
    # Without permission to read a process's environment, nothing is known of it.
    return (
        view.name in _GUARDED
        and bool(view.environment)
        and view.environment.get(_MODE, "").lower() != "token"
    )


def _token_files(environments: Sequence[Mapping[str, str]], home: Path) -> list[TokenFile]:
    named = {Path(e[_TOKEN_PATH]) for e in environments if e.get(_TOKEN_PATH)}
    found = []
    for path in sorted(named | {home / _DEFAULT_TOKEN}):
        try:
            found.append(TokenFile(str(path), stat.S_IMODE(path.stat().st_mode)))
        except OSError:
            continue
    return found


def _where(one: Listener) -> str:
    host = f"[{one.address}]" if ":" in one.address else one.address
    return f"{host}:{one.port}"
