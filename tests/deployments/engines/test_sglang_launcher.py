import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.unit

INSIDE = Path(__file__).parents[3] / "deployments/engines/inside"

# What the launcher needs of SGLang.
SGLANG = {
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/entrypoints/__init__.py": "",
    "sglang/srt/entrypoints/http_server.py": """
class app:
    middlewares = []
    add_middleware = middlewares.append
""",
    "sglang/launch_server.py": """
import json, os, sys
from urllib.parse import urlsplit
from sglang.srt.entrypoints.http_server import app
place = os.environ.get("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE")
print(json.dumps({
    "main": __name__ == "__main__" and sys.modules["__main__"].__spec__.name,
    "arguments": sys.argv[1:],
    "guards": [f"{guard.__module__}.{guard.__name__}" for guard in app.middlewares],
    "place": place,
    "ready": place and os.access(urlsplit(place).path, os.R_OK | os.W_OK),
    "gloo": os.environ.get("GLOO_SOCKET_IFNAME"),
}))
""",
}


@pytest.fixture
def launch(tmp_path):
    for name, text in SGLANG.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def run(*arguments, **environment):
        path = os.pathsep.join([str(INSIDE), str(tmp_path)])
        done = subprocess.run(
            [sys.executable, "-m", "frontline_sglang", *arguments],
            env={"PYTHONPATH": path, "TMPDIR": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    return run


def test_sglang_runs_as_if_started_itself_with_the_guard_around_it(launch):
    told = launch("--port", "1")
    assert told["main"] == "sglang.launch_server"
    assert told["arguments"] == ["--port", "1"]
    assert told["guards"] == ["__main__.Guard"]


def test_its_processes_meet_in_a_file_that_goes_with_it(launch):
    told = launch()
    assert urlsplit(told["place"]).scheme == "file" and told["ready"]
    assert told["gloo"] == "lo"
    assert not Path(urlsplit(told["place"]).path).exists()


def test_where_there_are_other_machines_they_meet_as_the_operator_says(launch):
    told = launch("--dist-init-addr", "10.0.0.1:5000")
    assert (told["place"], told["gloo"]) == (None, None)
    told = launch(SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE="env://")
    assert (told["place"], told["gloo"]) == ("env://", None)
