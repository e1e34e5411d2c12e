"""What a replica of a pool would start: processes, files and ports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank of an engine that spans several nodes; the replica itself starts rank 0.

    Attributes:
        rank: the rank's number.
        command: the rank's command line.
        environment: variables set in addition to the inherited ones.
        log: pattern of the path of its log, on its own node.
    """

    rank: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: str


@dataclass(frozen=True, slots=True)
class OpenPort:
    """A port that a replica opens on its node's address; all other ports are on loopback.

    Attributes:
        name: what listens there.
        where: the address, in words.
        lets_in: which callers are admitted, in words.
        method: the only HTTP method admitted; empty if it is not HTTP.
        paths: the only paths admitted.
        port: 0, for any free port.
    """

    name: str
    where: str
    lets_in: str
    method: str = ""
    paths: tuple[str, ...] = ()
    port: int = 0


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What one replica starts. It contains secrets.

    Attributes:
        engine: the adapter's name.
        command: the command line, the interpreter first. Port 0 means any free port, ``NODE_n`` the
            address of the node that rank n of the engine runs on.
        environment: variables set in addition to the inherited ones.
        files: the text of each file created for it, by the option that names the file.
        log: pattern of the path of its log.
        priority_routes: the routes on which it should have native priority when started this way.
        ranks: the further ranks, if the engine spans several nodes.
        opens: the ports that other nodes can reach.
    """

    engine: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    files: Mapping[str, str]
    log: str
    priority_routes: tuple[str, ...]
    ranks: tuple[RankPlan, ...] = ()
    opens: tuple[OpenPort, ...] = ()
