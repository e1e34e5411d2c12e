"""A local Ray cluster that serves Frontline from config files, as tests use it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from copy import deepcopy
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import openai
import psutil
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.api import serve_start
from ray.serve._private.client import ServeControllerClient
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from app.contracts.stats import ModelBoard
from app.contracts.status import ModelSnapshot, ReplicaStatus
from deployments.process.reaper import OWNER_MARK
from tests.support.waiting import PATIENCE_S, SLOWEST, starting

INGRESS = "ingress"
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients of what is here, which is plain HTTP: with none given, each client reads a file of
all the authorities there are, which takes a core 30 ms."""
_MARK = "FRONTLINE_TEST_RUN"
_LEDGER = "FRONTLINE_TEST_LEDGER"
_POOL_SETTINGS = (
    *("slots", "weight", "cost_per_hour", "python"),
    *("health_timeout_s", "probe_timeout_s", "preemption"),
)
_NOT_THE_ENGINES = ("replicas", "autoscaling", *_POOL_SETTINGS)


LEDGER = {
    "ledger": f"sqlite:///${{{_LEDGER}}}/usage.db",
    # Tests wait for what is in the store.
    "journal": {"folder": f"${{{_LEDGER}}}/journal", "flush_interval_s": 0.25},
}
"""Settings of an ingress whose ledger ``Deployment.records`` reads."""


def ingress_app(*, replicas: int = 1, **user_config: Any) -> dict[str, Any]:
    """The ingress application of a config file."""
    return {
        "name": INGRESS,
        "route_prefix": "/",
        "import_path": "app.ingress:build",
        "deployments": [
            {
                "name": "Ingress",
                "num_replicas": replicas,
                "ray_actor_options": {"num_cpus": 0.1},
                "user_config": {
                    "discovery_interval_s": 0.5,
                    **LEDGER,
                    **user_config,
                },
            }
        ],
    }


def simulated_app(
    name: str, *, settings: dict[str, Any] | None = None, **engine_args: Any
) -> dict[str, Any]:
    """A model application on the simulated engine; ``settings`` is the Model's user_config."""
    return pooled_app(name, {"simulated": engine_args}, settings)


def pooled_app(
    name: str, pools: dict[str, dict[str, Any]], settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A model application on several pools of simulated engines.

    A pool's value holds the engine's own arguments, and beside them those of the pool's settings
    that are in ``_POOL_SETTINGS``, and how many ``replicas`` it has, or how it is scaled
    (``autoscaling``).
    """
    rate_card = {"input": 1, "cached_input": 0.5, "output": 2}
    deployments = [
        {
            "name": pool,
            **(
                {"autoscaling_config": engine_args["autoscaling"]}
                if "autoscaling" in engine_args
                else {"num_replicas": engine_args.get("replicas", 1)}
            ),
            "ray_actor_options": {"num_cpus": 0.1},
        }
        for pool, engine_args in pools.items()
    ]
    return {
        "name": name,
        "route_prefix": None,
        "import_path": "deployments.model:build",
        "args": {
            "id": f"test/{name}",
            "aliases": [name],
            "pools": [_simulated_pool(*pool) for pool in pools.items()],
        },
        "deployments": [
            {"name": "Model", "user_config": {"rate_card": rate_card, **(settings or {})}},
            *deployments,
        ],
    }


def _simulated_pool(name: str, args: dict[str, Any]) -> dict[str, Any]:
    own = {key: args[key] for key in _POOL_SETTINGS if key in args}
    engine_args = {"tokens_per_second": 0, "default_completion_tokens": 8}
    engine_args |= {key: value for key, value in args.items() if key not in _NOT_THE_ENGINES}
    return {
        "name": name,
        "engine": "simulated",
        "model": "simulated",
        "slots": 8,
        **own,
        "engine_args": engine_args,
        "stop_grace_s": 1,
    }


def ledger_url() -> str:
    """The ledger of this run's ingresses, as this process names it."""
    return f"sqlite:///{os.environ[_LEDGER]}/usage.db"


class Deployment:
    """Frontline on a local Ray cluster. Made by ``local_serve``."""

    def __init__(self, controller: ServeControllerClient, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.root}/v1/openai"
        self._controller = controller
        self._port = port
        self._apps: dict[str, dict[str, Any]] = {}
        self._clients: list[openai.OpenAI] = []
        # Connected anew each time: an open connection stays with the HAProxy that was replaced.
        self._looking = httpx.Client(
            base_url=self.root,
            verify=PLAIN,
            timeout=SLOWEST * 5,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def deploy(self, *apps: dict[str, Any]) -> None:
        """Add or change applications, as ``serve deploy`` of a whole config file does."""
        wanted = self._apps | {app["name"]: deepcopy(app) for app in apps}
        if wanted != self._apps:
            self._apps = wanted
            self._submit()

    def remove(self, *names: str) -> None:
        """Remove applications, and wait until the ingress knows."""
        self._apps = {name: app for name, app in self._apps.items() if name not in names}
        self._submit()
        for name in names:
            eventually(partial(self._lacks, name), why=f"{name} was not removed")

    def restore_ingress(self) -> None:
        """Have just the one ingress again that there is at first, and wait until it is alone."""
        self.deploy(ingress_app())
        eventually(lambda: _ingress_replicas() == {"RUNNING": 1}, 60)

    def _submit(self) -> None:
        options = {"host": "127.0.0.1", "port": self._port}
        config = {
            "proxy_location": "HeadOnly",
            "http_options": options,
            "applications": list(self._apps.values()),
        }
        self._controller.deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)

    def records(self, **wanted: Any) -> list[dict[str, Any]]:
        """The usage records in the ledger's database, in the order of arrival."""
        file = f"file:{os.environ[_LEDGER]}/usage.db?mode=ro"
        with closing(sqlite3.connect(file, uri=True)) as database:
            database.row_factory = sqlite3.Row
            rows = database.execute("SELECT * FROM usage_records ORDER BY arrived").fetchall()
        records = [dict(row) for row in rows]
        return [r for r in records if all(r[name] == value for name, value in wanted.items())]

    def client(self) -> openai.OpenAI:
        """An unmodified OpenAI SDK client that does not retry."""
        client = openai.OpenAI(
            base_url=self.base_url,
            api_key="none",
            max_retries=0,
            timeout=PATIENCE_S,
            http_client=openai.DefaultHttpxClient(verify=PLAIN),
        )
        self._clients.append(client)
        return client

    def close(self) -> None:
        """Close the clients that were handed out."""
        self._looking.close()
        for client in self._clients:
            client.close()

    def async_client(self) -> openai.AsyncOpenAI:
        """The same, asynchronous."""
        return openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key="none",
            max_retries=0,
            timeout=PATIENCE_S,
            http_client=openai.DefaultAsyncHttpxClient(verify=PLAIN),
        )

    def http(self) -> httpx.Client:
        """A plain HTTP client."""
        return httpx.Client(base_url=self.root, timeout=PATIENCE_S, verify=PLAIN)

    def entry(self, model: str) -> dict[str, Any] | None:
        """The model's entry in the models list, if it has one by now."""
        try:
            answer = self._looking.get(f"/v1/models/{model}")
        except httpx.TransportError:
            return None
        return answer.json() if answer.status_code == 200 else None

    def _lacks(self, model: str) -> bool:
        return self.entry(model) is None

    def serves(self, model: str) -> bool:
        """Whether the ingress that answers knows a replica of the model."""
        return bool((self.entry(model) or {}).get("service_tiers"))

    def serves_everywhere(self, model: str) -> bool:
        """Whether every ingress that there is to be knows a replica of the model."""
        ingresses = self._apps.get(INGRESS, {}).get("deployments", [{}])[0].get("num_replicas", 1)
        if ingresses == 1:
            return self.serves(model)
        # They are asked in turn.
        return (
            running_ingresses() == ingresses
            and all(self.serves(model) for _ in range(4 * ingresses))
            and len(self.board(model).ingresses) >= ingresses
        )

    def wait_ready(self, *models: str, timeout_s: float = 60) -> None:
        """Wait until each model serves some tier, whichever ingress is asked."""
        for model in models:
            eventually(
                partial(self.serves_everywhere, model),
                timeout_s,
                f"{model} is not ready; Serve says: {serve.status()}",
            )

    def snapshot(self, app: str) -> ModelSnapshot:
        """What a Model actor tells its ingresses, the engines' addresses and keys included."""
        return self.board(app).snapshot

    def replicas(self, app: str) -> tuple[ReplicaStatus, ...]:
        """A model's replicas; none while its Model is away, which was replaced or lost."""
        if self.entry(app) is None:
            return ()
        with suppress(RayError, RayServeException, TimeoutError):
            return self.snapshot(app).replicas
        return ()

    def board(self, app: str) -> ModelBoard:
        """What a Model actor tells people: what its ingresses have running where."""
        return self._ask(app, "board")

    def state(self, app: str) -> dict[str, Any]:
        """What the board shows of a model now."""
        state: dict[str, Any] = json.loads(self._ask(app, "news", "", 0).state)
        return state

    def _ask(self, app: str, what: str, *arguments: Any) -> Any:
        handle = getattr(serve.get_deployment_handle("Model", app_name=app), what)
        # Serve refuses to wait for an answer on an event loop; tests have one now and then.
        with ThreadPoolExecutor(1) as aside:
            return aside.submit(
                lambda: handle.remote(*arguments).result(timeout_s=PATIENCE_S)
            ).result()

    @contextmanager
    def engine(self, app: str, replica: int = 0) -> Iterator[httpx.Client]:
        """A connection to a replica's engine itself, with its key."""
        # A model that wakes serves, but has no replica yet.
        status = eventually(lambda: self.snapshot(app).replicas[replica:])[0]
        headers = {"authorization": f"Bearer {status.key}"}
        with httpx.Client(
            base_url=status.base_url, headers=headers, timeout=PATIENCE_S, verify=PLAIN
        ) as client:
            yield client


def eventually(condition: Callable[[], Any], timeout_s: float = 20, why: str = "") -> Any:
    """Return the first true value of ``condition``, or fail after ``SLOWEST`` times ``timeout_s``.

    It looks less often the longer it takes: what an engine takes to start, looking takes from it.
    """
    began = time.monotonic()
    while not (value := condition()):
        time.sleep(_pause_s(time.monotonic() - began, timeout_s, why))
    return value


async def eventually_async(condition: Callable[[], Any], timeout_s: float = 20) -> Any:
    """The same for code on an event loop; ``condition`` runs in a thread.

    The thread ends with each look: one that went on after its test has failed would hold up the end
    of the test's event loop.
    """
    began = time.monotonic()
    while not (value := await asyncio.to_thread(condition)):
        await asyncio.sleep(_pause_s(time.monotonic() - began, timeout_s, ""))
    return value


def _pause_s(waited_s: float, timeout_s: float, why: str) -> float:
    """How long to wait before the next look, after so long."""
    assert waited_s < SLOWEST * timeout_s, why or f"not within {SLOWEST * timeout_s} s"
    return min(max(0.1, waited_s / 20), 0.5)


def test_run_processes() -> list[psutil.Process]:
    """Every process that this test run's cluster has started."""
    return [p for p, environment in _environments() if environment.get(_MARK) == str(os.getpid())]


test_run_processes.__test__ = False  # type: ignore[attr-defined]


def actors_titled(title: str) -> list[psutil.Process]:
    """Those of them that are actors of this title, such as ``ray::ServeReplica:app:Deployment``."""
    processes = ((process, command_line(process)) for process in test_run_processes())
    return [process for process, words in processes if words and words[0].startswith(title)]


def command_line(process: psutil.Process) -> list[str]:
    """The words of a process's command line; none where it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def ingress_processes() -> list[psutil.Process]:
    """The ingress replicas' processes."""
    return actors_titled(f"ray::ServeReplica:{INGRESS}:Ingress")


def running_ingresses() -> int:
    """How many ingress replicas Serve says are running."""
    return _ingress_replicas().get("RUNNING", 0)


def _ingress_replicas() -> dict[str, int]:
    ingress = serve.status().applications[INGRESS].deployments.get("Ingress")
    return dict(ingress.replica_states) if ingress else {}


def engine_processes() -> list[psutil.Process]:
    """Those of them that belong to engines."""
    ours = str(os.getpid())
    return [p for p, env in _environments() if env.get(_MARK) == ours and OWNER_MARK in env]


def _environments() -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            yield process, process.environ()


@contextmanager
def local_serve() -> Iterator[Deployment]:
    """Start a cluster with Serve on loopback, and leave no process of it behind."""
    # Inherited by everything that the cluster starts, so that no other run's is ever touched.
    os.environ[_MARK] = str(os.getpid())
    os.environ.pop("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as os.environ[_LEDGER]:
        yield from _serving(port)


def _start_node() -> None:
    """Start a node, or leave no process of it."""
    try:
        ray.init(num_cpus=16, include_dashboard=False, namespace="serve", log_to_driver=False)
    except Exception as error:  # Ray raises no narrower one
        print(f"Ray did not start: {error!r}")
        ray.shutdown()
        for process in test_run_processes():
            process.kill()
        raise


def _serving(port: int) -> Iterator[Deployment]:
    starting()(_start_node)
    try:
        controller = serve_start(
            http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 3600},
            proxy_location=ProxyLocation.HeadOnly,
        )
        with closing(Deployment(controller, port)) as deployment:
            yield deployment
        serve.shutdown()
    finally:
        ray.shutdown()
        for process in engine_processes():
            process.kill()
