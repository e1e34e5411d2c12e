"""The metrics of an engine replica: those of its engine, relayed, and its own faults."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from app import alarms, supervision
from app.observe.catalogue import ENGINE_SCRAPES_FAILED
from app.observe.exporter import Exporter, Sample
from app.observe.process import process_samples
from app.ray_compat.metrics import MetricsBackend
from app.upstream.http1 import ConnectionLost
from deployments.engines.metrics import EngineMetric, Reading, read_metrics

READ_EVERY_S: Final = 5.0
"""How often an engine's metrics are read, in seconds: twice in each of Ray's exports."""
_PATIENCE_S: Final = 5.0
_NO_SUCH_ROUTE: Final = 404

_log = logging.getLogger("ray.serve")


class ReplicaTelemetry:
    """Reads the metrics of one engine and exports the chosen ones. Belongs to an event loop.

    Args:
        model: the model's id.
        pool: the pool's name.
        get_text: returns the status and the text of a GET to the engine.
        path: where the engine shows its metrics.
        wanted: those to relay.
        backend: where they are exported to; Ray by default.
    """

    def __init__(
        self,
        model: str,
        pool: str,
        get_text: Callable[[str], Awaitable[tuple[int, str]]],
        path: str,
        wanted: tuple[EngineMetric, ...],
        backend: MetricsBackend | None = None,
    ) -> None:
        self.exporter = Exporter(self.samples, backend)
        self._labels = (model, pool)
        self._get_text = get_text
        self._path = path
        self._wanted = wanted
        self._readings: list[Reading] = []
        self._failed = 0
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start to read and to export."""
        self._tasks = [
            supervision.keep_running("metrics", self.exporter.run),
            supervision.keep_running("engine metrics", self._keep_reading),
        ]

    async def stop(self) -> None:
        """Stop both. No connection to the engine is left open."""
        await supervision.stop(*self._tasks)

    def samples(self) -> Iterator[Sample]:
        """Yield what was read last, and this process's own faults."""
        for metric, value in self._readings:
            yield Sample(metric.relayed, self._labels, value)
        yield Sample(ENGINE_SCRAPES_FAILED, self._labels, self._failed)
        yield from process_samples()

    async def read(self) -> bool:
        """Read the engine's metrics once, and return whether it shows any.

        A read that fails is counted. What was read before is dropped then: it may be wrong by now.
        """
        try:
            async with asyncio.timeout(_PATIENCE_S):
                status, text = await self._get_text(self._path)
            if status == _NO_SUCH_ROUTE:
                return False
            if status != 200:
                raise ValueError(f"status {status}")
            self._readings = list(read_metrics(text, self._wanted))
        except (ConnectionLost, TimeoutError, ValueError) as error:
            self._readings = []
            self._failed += 1
            alarms.PROCESS.raised("engine metrics", "an engine's metrics were not read", error)
        return True

    async def _keep_reading(self) -> None:
        while True:
            if not await self.read():
                break
            await asyncio.sleep(READ_EVERY_S)
        _log.info("the engine shows no metrics at %s: none are relayed", self._path)
