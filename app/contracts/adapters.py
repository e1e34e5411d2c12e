"""The LoRA adapters that running engines load and unload: which pool gets which, and their state.

The Model shares them out among its pools. It sends them to the replicas, and leaves them in Ray's
key-value store for engines that start later. Each replica reports what its engine has loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from urllib.parse import quote

import orjson

from app.config.model import LaterAdapterSettings, ModelArgs, PoolSettings


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """An adapter that an engine is to load.

    Attributes:
        name: its name in requests.
        path: its folder, as in the settings: a replica expands it on its own node.
    """

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class AdapterState:
    """An adapter that a replica is to load, as the replica knows it.

    Attributes:
        wanted: the adapter.
        loaded: whether the engine serves it.
        why_not: why the last try to load it has failed; empty if none has. It may name paths, so
            only operators see it.
    """

    wanted: WantedAdapter
    loaded: bool
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """How a model's later adapters are shared out.

    Attributes:
        by_pool: the adapters of each pool that has room for some.
        problems: why an adapter is not loaded, by its place in the settings.
    """

    by_pool: Mapping[str, tuple[WantedAdapter, ...]] = field(default_factory=dict)
    problems: Mapping[int, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all that are to be loaded, each once."""
        return tuple(dict.fromkeys(one.name for pool in self.by_pool.values() for one in pool))


def plan_adapters(args: ModelArgs, later: Sequence[LaterAdapterSettings]) -> AdapterPlan:
    """Share out the adapters that ``user_config`` names among a model's pools.

    One that cannot be loaded everywhere where it is to be is left out, and has a problem.
    """
    taken = {args.id, *args.aliases, *args.adapters}
    roomy = {pool.name: pool for pool in args.pools if pool.adapter_room}
    by_pool: dict[str, list[WantedAdapter]] = {name: [] for name in roomy}
    problems: dict[int, str] = {}
    for place, one in enumerate(later):
        pools = one.pools or tuple(roomy)
        if one.name in taken:
            problems[place] = f"the name {one.name!r} is taken already"
        elif problem := next(_misfits(pools, roomy, by_pool), ""):
            problems[place] = problem
        else:
            for name in pools:
                by_pool[name].append(WantedAdapter(one.name, one.path))
    return AdapterPlan({name: tuple(of) for name, of in by_pool.items()}, problems)


def _misfits(
    pools: Sequence[str],
    roomy: Mapping[str, PoolSettings],
    by_pool: Mapping[str, Sequence[WantedAdapter]],
) -> Iterator[str]:
    if not pools:
        yield "no pool of the model has `adapter_room`"
    for name in pools:
        if name not in roomy:
            yield f"the model has no pool {name!r} with `adapter_room`"
        elif len(by_pool[name]) >= roomy[name].adapter_room:
            yield f"the pool {name!r} has `adapter_room` for {roomy[name].adapter_room} only"


def adapters_note(application: str, pool: str) -> str:
    """Return the name of the note with a pool's adapters."""
    return f"adapters/{quote(application, safe='')}/{pool}"


def to_note(wanted: Sequence[WantedAdapter]) -> bytes:
    """Return the adapters of a pool as a note."""
    return orjson.dumps([asdict(one) for one in wanted])


def read_wanted(note: bytes | None) -> tuple[WantedAdapter, ...]:
    """Return the adapters in a note; none without one.

    Raises:
        ValueError: it is of another version.
    """
    if note is None:
        return ()
    try:
        return tuple(WantedAdapter(**one) for one in orjson.loads(note))
    except TypeError as error:
        raise ValueError("not a note of adapters") from error
