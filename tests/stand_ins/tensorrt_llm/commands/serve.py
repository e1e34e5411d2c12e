"""``python -m tensorrt_llm.commands.serve MODEL [OPTION...]``: trtllm-serve's options, strictly."""

import argparse
import asyncio
import json
import os
import socket
from importlib import import_module
from types import SimpleNamespace

import uvicorn
import yaml

from deployments.simulator.application import Application
from deployments.simulator.engine import Engine
from deployments.simulator.settings import SimulatedSettings

SETTINGS_VARIABLE = "STAND_IN_SETTINGS"
"""Further settings of the simulated engine, as JSON."""
IN_BOTH = {"max_seq_len", "max_batch_size"}
"""Settings that are options and keys of the configuration file."""
CONFIG_KEYS = IN_BOTH | {
    "scheduler_config", "enable_chunked_prefill", "kv_cache_config", "guided_decoding_backend",
}  # fmt: skip
MOST_AT_ONCE = 2048
SCHEDULER_KEYS = {"waiting_queue_policy", "capacity_scheduler_policy"}


def parse():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served_model_name")
    parser.add_argument("--max_batch_size", type=int)
    parser.add_argument("--max_seq_len", type=int)
    parser.add_argument("--tensor_parallel_size", "--tp_size", type=int, default=1)
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--middleware", action="append", default=[])
    parser.add_argument("--config", "--extra_llm_api_options", dest="config")
    return parser.parse_args()


def read_config(path):
    if path is None:
        return {}
    with open(path) as file:
        config = yaml.safe_load(file)
    assert config.keys() <= CONFIG_KEYS, config
    return {name: value for name, value in config.items() if value is not None}


def read_policy(config):
    scheduler = config.get("scheduler_config", {})
    assert scheduler.keys() <= SCHEDULER_KEYS, config
    return scheduler.get("waiting_queue_policy", "fcfs")


def settings_for(options, config):
    own = json.loads(os.environ.get(SETTINGS_VARIABLE, "{}"))
    # Builds of 2025 read the file over the options; since 2026 an option that is given counts.
    file_counts = own.get("older_errors", False)
    given = {name: value for name in IN_BOTH if (value := getattr(options, name)) is not None}
    filed = {name: config[name] for name in IN_BOTH & config.keys()}
    chosen = given | filed if file_counts else filed | given
    length = chosen.get("max_seq_len")
    return SimulatedSettings.load(
        {
            "dialect": "tensorrt_llm",
            "guarded": False,
            "slots": chosen.get("max_batch_size", MOST_AT_ONCE),
            "policy": read_policy(config),
            **({"context_length": length} if length else {}),
            **own,
        },
        "settings",
    )


class Wrapped:
    """The application in a middleware, which finds the engine as trtllm-serve's own does."""

    def __init__(self, application, settings):
        scheduler = SimpleNamespace(waiting_queue_policy=settings.policy)
        length = settings.context_length
        arguments = SimpleNamespace(scheduler_config=scheduler, max_seq_len=length)
        self.application, self.generator = application, SimpleNamespace(args=arguments)
        self.routes = [SimpleNamespace(endpoint=self.chat)]

    def chat(self):
        """A route, as a method of what owns the engine."""

    def inside(self, name):
        module, _, cls = name.rpartition(".")
        middleware = getattr(import_module(module), cls)(self.application)

        async def answer(scope, receive, send):
            await middleware({**scope, "app": self}, receive, send)

        return answer


async def serve(listener, options, config):
    engine = Engine(settings_for(options, config), asyncio.get_running_loop())
    application = Application(engine, options.served_model_name or options.model, "", "")
    application.ready = True
    for name in options.middleware:
        application = Wrapped(application, engine.settings).inside(name)
    server = uvicorn.Server(uvicorn.Config(application, lifespan="off", timeout_keep_alive=5))
    await server.serve(sockets=[listener])


def main():
    options = parse()
    with socket.socket() as listener:
        listener.bind((options.host, options.port))  # as plainly as trtllm-serve does
        asyncio.run(serve(listener, options, read_config(options.config)))


if __name__ == "__main__":
    main()
