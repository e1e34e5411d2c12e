"""A Ray cluster of several machines that serves Frontline, operated by the commands of Ray."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import openai
import psutil
import yaml
from tenacity import RetryCallState, retry_if_exception
from typer.testing import CliRunner

from app.cli.main import main
from deployments.process.reaper import OWNER_MARK
from tests.support.cluster import PLAIN, eventually, ingress_app
from tests.support.late_nodes import HEAD_ENV, HEAD_NODE
from tests.support.machines import HTTP_PORT, NETWORK, Machine, machines
from tests.support.waiting import PATIENCE_S, SLOWEST, starting

HEAD = f"{NETWORK}.1"
FRONT = {"front": 0.01}
"""What ingresses and Models ask of a node; ``front: 1`` is what one for them offers."""
OF_THE_HEAD = {"front": 1}
"""What the head node of a cluster with Ray's autoscaler offers: nobody else is for the ingress."""
_MEMORY = "--object-store-memory=80000000"
_SETTINGS = {
    # These machines have addresses, and other machines to be reached from.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    # What the cluster is, outlives its head node.
    "RAY_gcs_storage": "rocksdb",
    "RAY_AUTH_MODE": "token",
    # What tests.conftest sets is for the test's process alone.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


def front_ingress() -> dict[str, Any]:
    """The ingress application, all of it on the nodes for it, as configs/cluster.yaml has it."""
    app = ingress_app(auth="keys", open_to_network=True)
    app["deployments"].append({"name": "Limits"})
    for deployment in app["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0, "resources": FRONT}
    return app


class RayMachines:
    """The cluster. Made by ``ray_machines``; the first machine is the head, without CPUs.

    Attributes:
        front: where the ingress and the Models run; set by the test, as is the other.
        engines_node: where only engines run.
    """

    front: Machine
    engines_node: Machine

    def __init__(self, network: Any, folder: Path, scaling: dict[str, Any] | None = None) -> None:
        self._network = network
        self.folder = folder
        self._scaling = scaling
        self._env = {
            **_SETTINGS,
            "RAY_gcs_storage_path": str(folder / "gcs"),
            # Whoever lacks it gets nothing from any node.
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "FRONTLINE_HOME": str(folder / "home"),
            "FRONTLINE_TEST_LEDGER": str(folder),
        }
        if scaling:
            self._env |= HEAD_ENV
        self._windows: dict[str, str] = {}
        self.key = self._create_key()
        self.head = self.start_head()

    def start_head(self) -> Machine:
        """Start the head node, or its successor, which has its address and its storage."""
        machine: Machine = self._network.add(1)
        addresses = (f"--node-ip-address={HEAD}", "--port=6379", f"--dashboard-host={HEAD}")
        words = ["--head", *addresses, "--num-cpus=0", _MEMORY]
        if self._scaling:
            path = self.folder / "scaling.json"
            path.write_text(json.dumps(self._scaling))
            words += [f"--autoscaling-config={path}", f"--resources={json.dumps(OF_THE_HEAD)}"]
        self._start(machine, *words)
        self.head = machine
        return machine

    def join(self, number: int, **resources: float) -> Machine:
        """Start a node of the cluster that offers these resources."""
        machine: Machine = self._network.add(number)
        where = (f"--address={HEAD}:6379", f"--node-ip-address={machine.address}")
        offers = f"--resources={json.dumps(resources)}"
        self._start(machine, *where, "--num-cpus=4", offers, _MEMORY)
        return machine

    def join_all(self, **kinds: dict[str, float]) -> list[Machine]:
        """Start several nodes at once, by number: ``n2={...}``."""
        with ThreadPoolExecutor() as pool:
            joining = [pool.submit(self.join, int(n[1:]), **kind) for n, kind in kinds.items()]
        return [one.result() for one in joining]

    def deploy(self, *applications: dict[str, Any]) -> None:
        """Make these the applications, with ``serve deploy`` and a config file."""
        config = {
            # Nodes that Ray's autoscaler adds are on the head's machine, and so is its HTTP port.
            "proxy_location": "HeadOnly" if self._scaling else "EveryNode",
            "http_options": {"host": "0.0.0.0", "port": HTTP_PORT, "request_timeout_s": 3600},
            "applications": list(applications),
        }
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        self.head.run("serve", "deploy", f"--address=http://{HEAD}:8265", str(path), **self._env)

    def drain(self, machine: Machine, deadline_s: int = 7200) -> None:
        """Have a node emptied, with ``ray drain-node``; returns at once.

        The deadline is beyond the longest time that Serve gives replicas to stop in: otherwise it
        stops them before others are there.
        """
        node = self.node_id(machine)
        reason = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=replaced")
        limit = f"--deadline-remaining-seconds={deadline_s}"
        words = (f"--address={HEAD}:6379", f"--node-id={node}", *reason, limit)
        self._ray(self.head, "drain-node", *words)

    def node_id(self, machine: Machine) -> str:
        """Ray's name for a node that is alive."""
        rows = "[n['NodeID'] for n in ray.nodes() if n['Alive'] and n['NodeName'] == address]"
        code = f"import ray; ray.init('auto', log_to_driver=False); address = '{machine.address}'"
        return self.head.run("python", "-c", f"{code}; print(*{rows})", **self._env).split()[-1]

    def added(self) -> dict[str, bool]:
        """Whether each node that Ray's autoscaler ever added is alive, by Ray's name for it."""
        code = "import json, ray; ray.init('auto', log_to_driver=False); "
        code += "print('nodes:', json.dumps({n['NodeID']: n['Alive'] for n in ray.nodes()}))"
        printed = self.head.run("python", "-c", code, **self._env)
        nodes: dict[str, bool] = json.loads(printed.rpartition("nodes:")[2].splitlines()[0])
        return {node: alive for node, alive in nodes.items() if node != HEAD_NODE}

    def log(self, machine: Machine, files: str) -> str:
        """What Ray has logged on a machine, in files of such names."""
        session = self.folder / f"{machine.address}/tmp/ray"
        return "".join(path.read_text() for path in session.glob(f"session_2*/logs/{files}"))

    def frame(self, model: str) -> dict[str, Any]:
        """What `frontline top` shows of a model."""
        printed = self.head.run("python", "-m", "app.cli", "top", "--once", "--json", **self._env)
        # Ray may print before it, and after it.
        shown, _ = json.JSONDecoder().raw_decode(printed[printed.index("{\n") :])
        [frame] = (one for one in shown["models"] if one["application"] == model)
        return dict(frame)

    def client(self, machine: Machine) -> openai.AsyncOpenAI:
        """An OpenAI client that speaks to the HAProxy of this machine, and does not retry."""
        transport = httpx.AsyncHTTPTransport(uds=self.window(machine), verify=PLAIN)
        return openai.AsyncOpenAI(
            base_url=f"http://{machine.address}/v1",
            api_key=self.key,
            max_retries=0,
            timeout=PATIENCE_S,
            http_client=httpx.AsyncClient(transport=transport, timeout=PATIENCE_S),
        )

    def window(self, machine: Machine) -> str:
        """The Unix socket that leads to this machine's HTTP port."""
        if machine.address not in self._windows:
            self._windows[machine.address] = self._network.open_window(machine)
        return self._windows[machine.address]

    def models(self, machine: Machine) -> dict[str, list[str]]:
        """The tiers that each model serves, as the models list tells here; {} if none answers."""
        transport = httpx.HTTPTransport(uds=self.window(machine), verify=PLAIN)
        headers = {"authorization": f"Bearer {self.key}"}
        try:
            with httpx.Client(transport=transport, timeout=SLOWEST * 5) as client:
                answer = client.get(f"http://{machine.address}/v1/models", headers=headers)
        except httpx.TransportError:
            return {}
        if answer.status_code != 200:
            return {}
        return {
            one["metadata"]["aliases"][0]: one["service_tiers"] for one in answer.json()["data"]
        }

    def wait_ready(self, machine: Machine, *models: str, timeout_s: float = 90) -> None:
        """Wait until just these models are served."""

        def ready() -> bool:
            listed = self.models(machine)
            return set(listed) == set(models) and all(listed.values())

        eventually(ready, timeout_s, f"{models} are not ready: {self.models(machine)}")

    def engines(self, machine: Machine) -> dict[int, str]:
        """Processes of engines on a machine, by process id, with the model that each serves."""
        here = os.readlink(f"/proc/{machine.pid}/ns/net")
        found = {}
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/net") != here:
                    continue
                words = process.cmdline()
                if OWNER_MARK in process.environ() and "--served-name" in words[:12]:
                    found[process.pid] = words[words.index("--served-name") + 1]
            except (psutil.Error, OSError):
                continue
        return found

    def _create_key(self) -> str:
        # More than anybody asks for: what it may is looked up with every request.
        options = ("--tenant", "acme", "--rpm", "1000000", "--tpm", "1000000000")
        ledger = f"sqlite:///{self.folder}/usage.db"
        made = CliRunner().invoke(main, ["keys", "create", *options, "--ledger", ledger])
        assert made.exit_code == 0, made.output
        return next(word for word in made.output.split() if word.startswith("fl-"))

    def _start(self, machine: Machine, *words: str) -> None:
        def clear(_: RetryCallState) -> None:
            print(f"Ray did not start on {machine.address}")
            self._ray(machine, "stop", "--force")

        again = starting(retry=retry_if_exception(_was_slow), before_sleep=clear)
        again(self._ray, machine, "start", *words)

    def _ray(self, machine: Machine, *words: str) -> str:
        return machine.run("ray", *words, **self._env)


def _was_slow(error: BaseException) -> bool:
    return isinstance(error, AssertionError) and "timed out during startup" in str(error)


@contextmanager
def ray_machines(scaling: dict[str, Any] | None = None) -> Iterator[RayMachines]:
    """A head node, to which others join. No process is left of it.

    With ``scaling``, a configuration of Ray's autoscaler, that adds and removes nodes by itself.
    """
    own_folders = ("/tmp/ray", os.path.dirname(os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]))
    # A short path: Unix sockets are in it.
    with (
        TemporaryDirectory(prefix="fl-", dir="/tmp") as folder,
        machines(Path(folder), *own_folders) as network,
    ):
        started = time.monotonic()
        cluster = RayMachines(network, Path(folder), scaling)
        print(f"head node after {time.monotonic() - started:.1f} s")
        try:
            yield cluster
        except BaseException:
            if scaling:
                print(cluster.log(cluster.head, "monitor.*"))
            raise
