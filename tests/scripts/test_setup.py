"""Which environment scripts/setup uses, with Pythons that only say that they install something."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

SETUP = Path(__file__).parents[2] / "scripts/setup"
PYTHON = """#!/bin/bash
case "$*" in
  *platform*) echo "CPython {version} x86_64" ;;
  *_base_executable*) readlink -f "$0" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository's set-up."""
    (tmp_path / "clone/scripts").mkdir(parents=True)
    (tmp_path / "clone/requirements").mkdir()
    shutil.copy(SETUP, tmp_path / "clone/scripts/setup")
    (tmp_path / "clone/requirements/app.lock").write_text("ray==2.60.0\n")
    return tmp_path / "clone"


@pytest.fixture
def python(tmp_path):
    """Return a function that makes a Python of a version, and returns its folder."""

    def make(version):
        folder = tmp_path / version
        folder.mkdir()
        (folder / "python3.11").write_text(PYTHON.format(version=version))
        (folder / "python3.11").chmod(0o755)
        return folder

    return make


def set_up(clone, *path, **environment):
    """Set the application up; return the environments that are there, and the one in use."""
    home = clone.parent / "home"
    path = os.pathsep.join([*map(str, path), "/usr/bin", "/bin"])
    subprocess.run(
        [clone / "scripts/setup", "app"],
        env={"FRONTLINE_HOME": str(home), "PATH": path} | environment,
        check=True,
        capture_output=True,
    )
    return {one.name for one in (home / "envs").glob("app-*")}, (home / "envs/app").readlink().name


def test_the_environment_that_is_there_is_used_whatever_python_is_first_in_path(clone, python):
    first, second = python("3.11.7"), python("3.11.2")
    [made], _ = set_up(clone, first)
    assert set_up(clone, second, first) == ({made}, made)


def test_of_several_the_one_in_use_stays_in_use(clone, python):
    first, second = python("3.11.7"), python("3.11.2")
    set_up(clone, first)
    both, used = set_up(clone, FRONTLINE_PYTHON=str(second / "python3.11"))
    assert len(both) == 2
    assert set_up(clone, first) == (both, used)


@pytest.mark.parametrize("gone", ["bin/python", ".complete"])
def test_what_is_not_complete_is_not_used(clone, python, gone):
    first, second = python("3.11.7"), python("3.11.2")
    [made], _ = set_up(clone, first)
    (clone.parent / "home/envs" / made / gone).unlink()
    _, used = set_up(clone, second)
    assert used != made


def test_what_was_made_of_another_lock_is_not_used(clone, python):
    first = python("3.11.7")
    [made], _ = set_up(clone, first)
    (clone / "requirements/app.lock").write_text("ray==2.61.0\n")
    both, used = set_up(clone, first)
    assert both == {made, used} and used != made


APT = """#!/bin/bash
echo "$*" >>"{log}"
case "$*" in
  *" update") touch "{lists}" ;;
  *download*) [[ -e "{lists}" ]] && touch prometheus_1_amd64.deb ;;
esac
"""
DPKG = """#!/bin/bash
case "$1" in
  --print-architecture) echo amd64 ;;
  -x) mkdir -p "$3/usr/bin" && printf '#!/bin/bash\\n' >"$3/usr/bin/promtool" &&
    chmod +x "$3/usr/bin/promtool" ;;
esac
"""


@pytest.mark.parametrize("lists_are_there", [True, False])
def test_prometheus_is_unpacked_from_debians_packages_with_lists_of_its_own(
    clone, tmp_path, lists_are_there
):
    """A bare machine has no package lists, and only root may change the machine's."""
    tools, lists, log = tmp_path / "tools", tmp_path / "lists", tmp_path / "log"
    tools.mkdir()
    for name, text in (("apt-get", APT.format(log=log, lists=lists)), ("dpkg", DPKG)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    if lists_are_there:
        lists.touch()
    home = tmp_path / "home"
    environment = {"FRONTLINE_HOME": str(home), "PATH": f"{tools}:/usr/bin:/bin"}
    for _ in range(2):
        subprocess.run(
            [clone / "scripts/setup", "prometheus"], env=environment, check=True,
            capture_output=True,
        )  # fmt: skip
    assert (home / "tools/prometheus/usr/bin/promtool").exists()
    called = log.read_text()
    assert called.count(" update") == (not lists_are_there)
    if not lists_are_there:
        assert f"Dir::State::lists={home}/tools/prometheus-" in called


def test_an_engine_for_gpus_has_an_environment_of_its_own(clone, tmp_path, python):
    folder = python("3.11.7")
    shutil.copy(folder / "python3.11", folder / "python3.12")
    home = tmp_path / "home"
    environment = {"FRONTLINE_HOME": str(home), "PATH": f"{folder}:/usr/bin:/bin"}
    for engine in ("vllm", "sglang", "tensorrt-llm"):
        (clone / f"requirements/{engine}.lock").write_text(f"{engine}==1.0\n")
        # Fewer gigabytes than it wants are free here.
        text = (clone / "scripts/setup").read_text()
        (clone / "scripts/setup").write_text(re.sub(r'"\$part" 2[05]000', '"$part" 1', text))
        subprocess.run([clone / "scripts/setup", engine], env=environment, check=True)
        assert (home / "envs" / engine / "bin/python").exists()
    assert not (home / "envs/app").exists() and not (home / "envs/vllm-cpu").exists()


def test_tensorrt_llm_needs_a_python_that_it_has_a_package_for(clone, tmp_path, python):
    (clone / "requirements/tensorrt-llm.lock").write_text("tensorrt-llm==1.0\n")
    folder = python("3.11.7")
    path = tmp_path / "tools"
    path.mkdir()
    for tool in ("bash", "cat", "cut", "dirname", "env", "mkdir", "readlink", "sha256sum", "uname"):
        (path / tool).symlink_to(shutil.which(tool))
    ended = subprocess.run(
        [clone / "scripts/setup", "tensorrt-llm"], capture_output=True, text=True,
        env={"FRONTLINE_HOME": str(tmp_path / "home"), "PATH": f"{folder}:{path}"},
    )  # fmt: skip
    assert ended.returncode == 1 and "none of python3.12 found" in ended.stderr


NPM = """#!/bin/bash
echo "$*" >>"{log}"
while [[ $1 != --prefix ]]; do shift; done
[[ -e $2/package-lock.json ]] && mkdir "$2/node_modules"
"""


@pytest.mark.parametrize("npm", [True, False])
def test_clients_in_javascript_are_installed_where_npm_is(clone, tmp_path, python, npm):
    (clone / "requirements/clients.lock").write_text("langchain-openai==1.0\n")
    (clone / "requirements/clients-node").mkdir()
    for name in ("package.json", "package-lock.json"):
        (clone / "requirements/clients-node" / name).write_text("{}")
    tools, log, home = tmp_path / "tools", tmp_path / "log", tmp_path / "home"
    tools.mkdir()
    for tool in Path("/usr/bin").iterdir():
        if tool.name not in ("npm", "node"):
            (tools / tool.name).symlink_to(tool)
    if npm:
        for name, text in (("npm", NPM.format(log=log)), ("node", "#!/bin/bash\necho v20\n")):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
    environment = {"FRONTLINE_HOME": str(home), "PATH": f"{python('3.11.7')}:{tools}"}
    for _ in range(2):
        ended = subprocess.run(
            [clone / "scripts/setup", "clients"], env=environment, capture_output=True, text=True
        )
        assert (home / "envs/clients/bin/python").exists()
        assert (home / "envs/clients-node/node_modules").exists() is npm
        assert ended.returncode == (0 if npm else 1)
        assert ("need Node.js with npm" in ended.stderr) is not npm
    if npm:
        [command] = log.read_text().splitlines()
        assert command.startswith("ci ") and "--ignore-scripts" in command
