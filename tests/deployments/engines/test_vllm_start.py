"""How vLLM's server is started: by the deprecated module where vLLM has it, else by `vllm serve`.

Each vLLM here is a made-up package in a Python of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from frontline_vllm_start import CHOICE, serve_words

from deployments.engines.base import Launch, NodeSpan
from deployments.engines.vllm import STARTER, Vllm

pytestmark = pytest.mark.unit

INSIDE = Path(__file__).parents[3] / "deployments" / "engines" / "inside"
TELL = "import importlib.metadata, json, sys\ndef tell(way):\n" \
       "    print(json.dumps([way, sys.argv[1:], __name__]))\n"  # fmt: skip
MODULE = TELL + "if __name__ == '__main__':\n    tell('module')\n"
COMMAND = TELL + (
    "from vllm.platforms import kind\n"
    "def main():\n    tell(importlib.metadata.version('vllm') + ' ' + kind)\n"
)
LAUNCH = Launch("/models/m", "org/m", "127.0.0.1", 1234, 16, "k", sys.executable, {"dtype": "half"})


PLATFORM = """import importlib.metadata as m
try:
    kind = m.version('vllm')
except m.PackageNotFoundError:
    kind = 'cpu'
"""


def vllm(folder, *, module=False, command=False, distribution=False):
    """Make a vLLM whose package imports nothing that it needs, such as torch."""
    files = {"vllm/__init__.py": "__version__ = '9.9'\n", "vllm/platforms.py": PLATFORM}
    if module:
        files["vllm/entrypoints/openai/api_server.py"] = MODULE
    if command:
        files["vllm/entrypoints/cli/main.py"] = COMMAND
    if distribution:
        files["vllm-9.8.dist-info/METADATA"] = "Metadata-Version: 2.1\nName: vllm\nVersion: 9.8\n"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def started(path, **environment):
    """Start what the adapter starts, with this folder on Python's path."""
    ended = subprocess.run(
        Vllm().command(LAUNCH),
        env=os.environ | {"PYTHONPATH": f"{INSIDE}{os.pathsep}{path}"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return json.loads(ended.stdout) if ended.returncode == 0 else ended.stderr


def test_the_deprecated_module_is_used_while_there_is_one(tmp_path):
    way, words, name = started(vllm(tmp_path, module=True, command=True))
    assert (way, name) == ("module", "__main__"), "as `python -m` runs it"
    assert words == Vllm().command(LAUNCH)[3:]


@pytest.mark.parametrize(("distribution", "version"), [(True, "9.8 9.8"), (False, "9.9 cpu")])
def test_without_it_the_command_is_used(tmp_path, distribution, version):
    """The CPU build is another distribution. The command looks for one named vllm, and vLLM's
    platforms tell by its absence that this is the CPU build."""
    found, words, _ = started(vllm(tmp_path, command=True, distribution=distribution))
    assert found == version
    assert words == serve_words(Vllm().command(LAUNCH)[3:])
    assert words[:2] == ["serve", "/models/m"]


def test_the_command_can_be_chosen(tmp_path):
    made = vllm(tmp_path, module=True, command=True)
    assert started(made, **{CHOICE: "serve"})[1][0] == "serve"
    assert started(made, **{CHOICE: ""})[0] == "module"


def test_it_says_what_is_missing(tmp_path):
    assert "No module named 'vllm'" in started(tmp_path)
    assert "No module named 'vllm.entrypoints'" in started(vllm(tmp_path, module=False))


def test_both_ways_get_the_same_options():
    words = Vllm().command(LAUNCH)
    assert words[1:3] == ["-m", STARTER]
    options = words[3:]
    at = options.index("--model")
    rest = options[:at] + options[at + 2 :]
    assert serve_words(options) == ["serve", "/models/m", *rest, "--api-server-count", "1"]


@pytest.mark.parametrize("own", [["--api-server-count", "2"], ["--api-server-count=2"]])
def test_an_operators_number_of_servers_stays(own):
    assert serve_words(["--model", "m", *own]) == ["serve", "m", *own]
    assert serve_words(["--config", "x"]) == ["serve", "--config", "x", "--api-server-count", "1"]


def test_a_part_without_server_is_started_by_the_command_in_any_case():
    span = NodeSpan(nodes=2, rank=1, here="10.0.0.2", address="10.0.0.1", port=2345)
    launch = Launch("/m", "m", "127.0.0.1", 1, 4, "k", "python", span=span)
    assert Vllm().command(launch)[1:4] == ["-m", "frontline_vllm_headless", "serve"]
