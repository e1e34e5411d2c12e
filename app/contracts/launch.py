"""What a pool says that a replica of it would start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankPlan:
    """A further part of an engine on several nodes; the replica itself starts part 0.

    Attributes:
        rank: its number.
        command: its command line.
        environment: what is set besides what is inherited.
        log: where its output goes; a pattern, on its own node.
    """

    rank: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: str


@dataclass(frozen=True, slots=True)
class OpenPort:
    """A port that a replica opens on its node's own address; everything else is on loopback.

    Attributes:
        name: what listens there.
        where: at which address, in words.
        lets_in: who comes in, in words.
        method: the only HTTP method that does; empty where it is not HTTP.
        paths: the only paths that do.
        port: 0, which stands for a free one.
    """

    name: str
    where: str
    lets_in: str
    method: str = ""
    paths: tuple[str, ...] = ()
    port: int = 0


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What one replica starts. Secrets are in it.

    Attributes:
        engine: the adapter's name.
        command: the command line, the interpreter first. Port 0 stands for a free one, ``NODE_n``
            for the address of the node that part n of the engine runs on.
        environment: what is set besides what is inherited.
        files: the text of each file that is made for it, by the option that names the file.
        log: where its output goes; a pattern.
        priority_routes: where it ought to have native priority, started so.
        ranks: its further parts, where the engine runs on several nodes.
        opens: what other nodes reach of it.
    """

    engine: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    files: Mapping[str, str]
    log: str
    priority_routes: tuple[str, ...]
    ranks: tuple[RankPlan, ...] = ()
    opens: tuple[OpenPort, ...] = ()
