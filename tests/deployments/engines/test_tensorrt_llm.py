"""The adapter of TensorRT-LLM, against the simulated engine in its dialect: started by the
adapter's own command line, through a stand-in for TensorRT-LLM's package. No GPU, and no
TensorRT-LLM."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.core.dialect import Route
from app.core.settings import SettingsError
from app.core.tiers import Tier
from deployments.engines.base import EngineContractError, Launch
from deployments.engines.tensorrt_llm import TensorrtLlm
from deployments.engines.tensorrt_llm_requests import CLIENT_FIELDS, refused_fields
from deployments.replica import LocalEngine
from tests.stand_ins.tensorrt_llm.commands import serve as stand_in

pytestmark = pytest.mark.unit

STAND_INS = Path(__file__).parents[2] / "stand_ins"
INSIDE = Path(__file__).parents[3] / "deployments" / "engines" / "inside"
PRIORITY_OFF = {"config": {"scheduler_config": {"waiting_queue_policy": "fcfs"}}}


def launch(at=1234, **engine_args):
    return Launch(
        model="/models/m",
        served_name="org/m",
        host="127.0.0.1",
        port=at,
        slots=16,
        key="secret",
        python=sys.executable,
        engine_args=engine_args,
    )


def flag(command, name):
    return command[command.index(name) + 1]


def test_the_command_line():
    command = TensorrtLlm().command(
        launch(tp_size=2, trust_remote_code=True, custom_module_dirs=["/a", "/b"], tool_parser=None)
    )
    server = command[command.index("--") + 1 :]
    assert server[0] == "/models/m"
    assert flag(server, "--host") == "127.0.0.1"
    assert flag(server, "--port") == "1234"
    assert flag(server, "--max_batch_size") == "16"
    assert flag(server, "--tp_size") == "2"
    assert "--trust_remote_code" in server and "--tool_parser" not in server
    assert " ".join(server).count("--custom_module_dirs") == 2
    assert flag(command, "--served-name") == "org/m"
    assert flag(command, "--policy") == "priority"


def test_an_operators_arguments_win_over_defaults():
    own = launch(max_batch_size=3, **PRIORITY_OFF)
    assert flag(TensorrtLlm().command(own), "--max_batch_size") == "3"
    assert "--policy" not in TensorrtLlm().command(own)
    environment = TensorrtLlm().environment(own)
    config = json.loads(environment["FRONTLINE_ENGINE_CONFIG"])
    # Without these, schemas are not enforced and long prompts are refused.
    assert config == PRIORITY_OFF["config"] | {
        "guided_decoding_backend": "xgrammar", "enable_chunked_prefill": True,
    }  # fmt: skip
    own = launch(config={"enable_chunked_prefill": False, "guided_decoding_backend": "llguidance"})
    config = json.loads(TensorrtLlm().environment(own)["FRONTLINE_ENGINE_CONFIG"])
    assert set(config.values()) == {False, "llguidance"}


def test_nothing_of_the_configuration_file_is_on_the_command_line():
    command = TensorrtLlm().command(launch(config={"internal_request_auth_key": "a-secret-word"}))
    assert not any("secret" in word for word in command)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"host": "0.0.0.0"}, "engine_args.host"),
        ({"port": 1}, "engine_args.port"),
        ({"served_model_name": "x"}, "engine_args.served_model_name"),
        ({"grpc": True}, "engine_args.grpc"),
        ({"config": "/etc/trtllm.yaml"}, "engine_args.config"),
        ({"extra_llm_api_options": "/etc/trtllm.yaml"}, "under 'config'"),
        ({"set": "scheduler_config.waiting_queue_policy=fcfs"}, "under 'config'"),
        ({"kv_cache_config": {"dtype": "fp8"}}, "under 'config'"),
        ({"middleware": "x.Y"}, "engine_args.middleware"),
        # Builds differ in which of the two counts.
        ({"config": {"max_batch_size": 4}}, "engine_args.config.max_batch_size"),
        ({"max_seq_len": 1, "config": {"max_seq_len": 2}}, "engine_args.config.max_seq_len"),
        # The same under another name.
        ({"tp_size": 2, "config": {"tensor_parallel_size": 4}}, "config.tensor_parallel_size"),
        (
            {
                "kv_cache_free_gpu_memory_fraction": 0.5,
                "config": {"kv_cache_config": {"free_gpu_memory_fraction": 0.8}},
            },
            "config.kv_cache_config.free_gpu_memory_fraction",
        ),
    ],
)
def test_what_would_open_the_engine_or_hide_its_policy_is_refused(args, words):
    with pytest.raises(SettingsError, match=words):
        TensorrtLlm().command(launch(**args))


# What a running engine is found to take


@asynccontextmanager
async def running(build=STAND_INS, simulation=None, **engine_args):
    """The engine as a replica starts it, and HTTP to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    adapter, own = TensorrtLlm(), launch(port, **engine_args)
    path = os.pathsep.join([str(build), str(INSIDE), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "STAND_IN_SETTINGS": json.dumps(simulation or {})}
    process = await asyncio.create_subprocess_exec(
        *adapter.command(own), env={**os.environ, **adapter.environment(own), **environment}
    )
    http = LocalEngine(f"http://127.0.0.1:{port}", own.key)
    try:
        deadline = time.monotonic() + 30
        while not await http.answers(adapter.ready_path, 5):
            assert process.returncode is None and time.monotonic() < deadline
            await asyncio.sleep(0.05)
        yield own, http
    finally:
        process.kill()
        await process.wait()


async def inspect(**options):
    async with running(**options) as (own, http):
        return await TensorrtLlm().inspect(own, http)


async def test_priority_is_offered_where_it_is_taken_and_in_force():
    facts = await inspect(max_seq_len=512)
    assert (facts.version, facts.context_length) == ("simulated-1", 512)
    dialect = facts.dialect
    assert dialect.engine == "tensorrt-llm"
    assert dialect.priority_routes == {Route.CHAT, Route.COMPLETIONS}
    assert dialect.priority_values == {Tier.PRIORITY: 1.0, Tier.DEFAULT: 0.5, Tier.FLEX: 0.0}
    assert dialect.accepted_fields == CLIENT_FIELDS


async def test_a_build_with_middleware_has_a_key_and_reports_its_policy():
    """410afd7: no key, and what the server was started with was taken for what it had in force."""
    async with running(max_seq_len=512, simulation={"policy": "fcfs"}) as (own, http):
        for path in ("/v1/models", "/version", "/metrics", "/frontline/facts"):
            assert (await http.get_json(path, authorized=False))[0] == 401
        facts = await TensorrtLlm().inspect(own, http)
    assert not facts.dialect.native_priority, "it was started with the policy, and has another"
    assert facts.context_length == 512


@pytest.mark.parametrize("year", [2025, 2026])
@pytest.mark.parametrize("where", [{"max_seq_len": 512}, {"config": {"max_seq_len": 512}}])
async def test_a_setting_counts_from_either_place_in_builds_of_both_years(year, where):
    async with running(simulation={"older_errors": year == 2025}, **where) as (own, http):
        facts = await TensorrtLlm().inspect(own, http)
        _, report = await http.get_json("/simulate")
    assert facts.context_length == report["context_length"] == 512
    assert report["slots"] == 16


@pytest.mark.parametrize(("year", "length", "slots"), [(2025, 700, 9), (2026, 512, 5)])
def test_the_stand_ins_of_both_years_differ_in_what_counts(monkeypatch, year, length, slots):
    """That is why the adapter refuses a setting in two places."""
    monkeypatch.setenv("STAND_IN_SETTINGS", json.dumps({"older_errors": year == 2025}))
    given = SimpleNamespace(max_seq_len=512, max_batch_size=5)
    filed = {"max_seq_len": 700, "max_batch_size": 9}
    both = stand_in.settings_for(given, filed)
    assert (both.context_length, both.slots) == (length, slots)
    unset = SimpleNamespace(max_seq_len=None, max_batch_size=None)
    alone = stand_in.settings_for(unset, filed)
    assert (alone.context_length, alone.slots) == (700, 9)
    assert stand_in.settings_for(unset, {}).slots == stand_in.MOST_AT_ONCE


def test_parallel_sizes_of_the_file_count_for_its_gpus():
    for args in ({"tp_size": 2, "pp_size": 2},
                 {"config": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}}):  # fmt: skip
        assert TensorrtLlm().needs(launch(**args), {}).gpus == 4


def older(tmp_path):
    """A build without ``--middleware``."""
    build = shutil.copytree(STAND_INS, tmp_path / "build")
    server = build / "tensorrt_llm" / "commands" / "serve.py"
    server.write_text(server.read_text().replace('"--middleware"', '"--unheard_of_as_well"')
                      .replace("options.middleware", "[]"))  # fmt: skip
    return build


async def test_an_older_build_has_no_key_and_its_launch_counts(tmp_path):
    async with running(build=older(tmp_path), max_seq_len=512) as (own, http):
        assert (await http.get_json("/v1/models", authorized=False))[0] == 200
        facts = await TensorrtLlm().inspect(own, http)
    assert facts.dialect.native_priority and facts.context_length == 512


@pytest.mark.parametrize("older_errors", [False, True])
async def test_unknown_fields_are_read_off_the_errors_of_both_eras(older_errors):
    """410afd7 took every field for known on a build of 2025, so parallel_tool_calls was a 400."""
    lacking = ["parallel_tool_calls", "thinking"]
    facts = await inspect(simulation={"lacking_fields": lacking, "older_errors": older_errors})
    assert CLIENT_FIELDS[Route.CHAT] - facts.dialect.accepted_fields[Route.CHAT] == set(lacking)


async def test_first_come_first_served_is_not_taken_for_priority():
    async with running(**PRIORITY_OFF) as (own, http):
        facts = await TensorrtLlm().inspect(own, http)
        _, report = await http.get_json("/simulate")
    assert report["policy"] == "fcfs"
    assert not facts.dialect.native_priority and facts.context_length == report["context_length"]


async def test_a_policy_that_nobody_has_set_is_not_in_force():
    facts = await inspect(config={"scheduler_config": None})
    assert not facts.dialect.native_priority


async def test_a_build_that_does_not_know_the_field_is_found_out():
    lacking = ["priority", "thinking", "parallel_tool_calls"]
    facts = await inspect(simulation={"lacking_fields": lacking})
    assert not facts.dialect.native_priority
    assert CLIENT_FIELDS[Route.CHAT] - facts.dialect.accepted_fields[Route.CHAT] == set(lacking)


async def test_a_build_without_priority_is_started_without_the_policy(tmp_path):
    build = shutil.copytree(STAND_INS, tmp_path / "build")
    requests = build / "tensorrt_llm" / "serve" / "openai_protocol.py"
    requests.write_text(requests.read_text().replace("priority", "suffix"))
    server = build / "tensorrt_llm" / "commands" / "serve.py"
    without = server.read_text().replace('"--served_model_name"', '"--unheard_of"')
    server.write_text(
        without.replace('"waiting_queue_policy", "cap', '"cap').replace(
            "served_model_name", "model"
        )
    )
    simulation = {"lacking_fields": ["priority"]}
    async with running(build=build, simulation=simulation) as (own, http):
        facts = await TensorrtLlm().inspect(own, http)
        _, report = await http.get_json("/simulate")
    assert report["policy"] == "fcfs"
    assert not facts.dialect.native_priority


async def test_an_interpreter_without_the_engine_says_so():
    own = launch()
    process = await asyncio.create_subprocess_exec(
        *TensorrtLlm().command(own),
        env={"PATH": os.environ["PATH"]},
        stderr=asyncio.subprocess.PIPE,
    )
    _, complaint = await process.communicate()
    assert process.returncode == 1 and b"TensorRT-LLM is not installed" in complaint


class Odd:
    """A server that answers every POST in one way."""

    def __init__(self, status, answer, version=(200, {"version": "9"})):
        self._answer, self._version = (status, answer), version

    async def get_json(self, path, *, authorized=True):
        return self._version

    async def post_json(self, path, body, *, authorized=True):
        return self._answer


@pytest.mark.parametrize(
    ("status", "answer"),
    [(400, {"error": "out of memory"}), (500, None), (404, {"detail": "Not Found"}), (400, [])],
)
async def test_what_is_not_an_answer_proves_nothing(status, answer):
    facts = await TensorrtLlm().inspect(launch(), Odd(status, answer))
    assert not facts.dialect.native_priority
    assert facts.dialect.accepted_fields == CLIENT_FIELDS


async def test_another_server_is_not_taken_for_it():
    with pytest.raises(EngineContractError, match="did not tell its version"):
        await TensorrtLlm().inspect(launch(), Odd(200, {}, version=(404, None)))


@pytest.mark.parametrize("shape", ["[{}]", '1 validation error:\n  {}\n\n  File "/x.py", line 1'])
def test_refused_fields_are_read_off_either_shape_of_the_message(shape):
    found = "{'type': 'extra_forbidden', 'loc': ('body', 'priority'), 'msg': 'Extra', 'input': 1.0}"
    assert refused_fields({"error": shape.replace("{}", found)}) == {"priority"}
    nested = found.replace("('body', 'priority')", "('body', 'stream_options', 'x')")
    assert refused_fields({"error": nested}) == frozenset()
