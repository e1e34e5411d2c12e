"""Starts TensorRT-LLM's server: ``frontline_trtllm_start.py [options] -- MODEL [OPTION...]``.

Runs under the engine's interpreter, where Frontline is not installed: standard library only.

The arguments after ``--`` are trtllm-serve's own command line. This program adds the options that
not every build accepts, and then becomes the server: it stays the same process, so that signals and
the exit status are the server's.

- ``--policy`` is the policy of the waiting queue. It is left out for a build whose chat request has
  no ``priority``: the policy would have no effect there, and some such builds reject it.
- ``--served-name`` is the model's id. Builds without the option answer to any name.
- The guard, which requires the key and reports facts, in builds that have ``--middleware``.

The environment variable FRONTLINE_ENGINE_CONFIG holds the server's configuration file as JSON,
which is also YAML. The file exists in memory only and disappears with the process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

SERVER = "tensorrt_llm.commands.serve"
GUARD = "frontline_trtllm_guard.Guard"
CONFIG_VARIABLE = "FRONTLINE_ENGINE_CONFIG"


def main(arguments: list[str]) -> NoReturn:
    options = _parse(arguments)
    package = _find_package()
    words = list(options.server)
    if options.served_name and _has_option(package, "served_model_name"):
        words += ["--served_model_name", options.served_name]
    if _has_option(package, "middleware"):
        words += ["--middleware", GUARD]
    config = json.loads(os.environ.pop(CONFIG_VARIABLE, "{}"))
    if options.policy and takes_priority(package):
        config.setdefault("scheduler_config", {})["waiting_queue_policy"] = options.policy
    if config:
        # The older of the option's two names, which every build has.
        words += ["--extra_llm_api_options", _in_memory(config)]
    os.execv(sys.executable, [sys.executable, "-m", SERVER, *words])


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy")
    parser.add_argument("--served-name")
    parser.add_argument("server", nargs="+")
    return parser.parse_args(arguments)


def _find_package() -> Path:
    """Return the package's folder without importing it: an import is slow and claims the GPU."""
    spec = importlib.util.find_spec("tensorrt_llm")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"TensorRT-LLM is not installed for {sys.executable}")
    return Path(spec.submodule_search_locations[0])


def takes_priority(package: Path) -> bool:
    """Return whether the build's chat request has a ``priority``; true if that is unknown, so that
    the policy is left out only where it certainly has no effect."""
    requests = package / "serve" / "openai_protocol.py"
    source = requests.read_text() if requests.is_file() else ""
    if "class ChatCompletionRequest" not in source:
        return True
    return re.search(r"^\s+priority\s*:", source, re.MULTILINE) is not None


def _has_option(package: Path, name: str) -> bool:
    sources = (package / "commands").glob("*.py")
    return any(f"--{name}" in source.read_text() for source in sources)


def _in_memory(config: dict[str, Any]) -> str:
    descriptor = os.memfd_create("config.yaml", 0)  # without CLOEXEC: the server inherits it
    os.write(descriptor, json.dumps(config).encode())
    # By pid and not as /proc/self: child processes of the server can open it as well.
    return f"/proc/{os.getpid()}/fd/{descriptor}"


if __name__ == "__main__":
    main(sys.argv[1:])
