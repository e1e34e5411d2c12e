"""Clients of the API in environments of their own, before an ingress over HTTP without Ray."""

import asyncio
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.config.ingress import IngressSettings
from app.config.model import ModelSettings
from tests.app.gateway.test_anthropic_sdk import CARD, listening
from tests.support.environment import skip
from tests.support.waiting import SLOWEST
from tests.support.world import ENGINES, World

ENVIRONMENTS = Path(os.environ.get("FRONTLINE_HOME", "/nowhere")) / "envs"
PROGRAMS = Path(__file__).parent / "programs"
# A loaded machine imports a client in 20 s.
LIMIT_S = SLOWEST * 90
WITH_COMMENTS = {"auth": "keys", "stream_headers_after_s": 0.05, "stream_comment_s": 0.05}


def interpreter(environment):
    """Return the command that reads a program of an environment, and the folder to run it in.

    The test is skipped where the environment has not been made.
    """
    if environment == "test":
        return [sys.executable, "-"], None
    folder = (ENVIRONMENTS / environment).resolve()
    missing = f"scripts/setup {environment.removesuffix('-node')} has not been run"
    if environment == "clients-node":
        if not folder.exists():
            # npm's registry is out of reach of some machines that have npm.
            pytest.skip(missing if shutil.which("npm") else "Node.js and npm are not there")
        return ["node", "--input-type=module", "-"], folder
    if not folder.exists():
        # Too large for every run of the tests.
        pytest.skip(missing) if environment == "clients-more" else skip(missing)
    return [folder / "bin/python", "-"], None


@dataclass
class Site:
    """Where clients send their requests, and what came of them.

    Attributes:
        home: a home directory for the clients.
    """

    url: str
    key: str
    world: World
    home: Path

    async def run(self, environment, source):
        """Run a program of an environment, which must exit with 0; return what it prints."""
        command, folder = interpreter(environment)
        # Nothing of this environment: neither its modules nor a proxy.
        variables = {
            "PATH": f"{ENVIRONMENTS / environment / 'bin'}:{os.environ['PATH']}",
            "HOME": self.home,
            "LLM_USER_PATH": self.home / "llm",
            # LiteLLM asks GitHub for prices otherwise, and waits for them.
            "LITELLM_LOCAL_MODEL_COST_MAP": "true",
            "URL": self.url,
            "KEY": self.key,
        }
        process = await asyncio.create_subprocess_exec(
            *command, cwd=folder or self.home, env=variables,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(LIMIT_S):
                out, problems = await process.communicate(source.encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, problems.decode() + out.decode()
        return out.decode()

    async def billed(self):
        """Return the tier and the cost of each completed answer since the last call."""
        records = (await self.world.new_records()).values()
        done = [one for one in records if one["state"] == "completed"]
        return [(one["served_tier"], float(one["cost"])) for one in done]


@pytest.fixture
async def site(tmp_path, monkeypatch):
    # Each stream begins with comments, as where the engine is slow.
    slow = ENGINES["vllm"] | {"first_token_seconds": 0.2}
    monkeypatch.setitem(ENGINES, "vllm", slow)
    world = World(tmp_path, timeout_s=30)
    world.services.settings = IngressSettings.load(WITH_COMMENTS, "user_config")
    await world.start()
    await world.set(ModelSettings.load({"rate_card": CARD}, "user_config"), ["vllm"])
    home = tmp_path / "home"
    home.mkdir()
    async with listening(world) as url:
        yield Site(url, world.key("plain"), world, home)
    await world.close()
