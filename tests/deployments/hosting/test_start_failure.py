"""What the ends of engines' logs mean: the lines are of vLLM, SGLang, TensorRT-LLM and torch."""

import pytest

from app.contracts.findings import error, ok, warning
from app.contracts.start import StartProblem, find_failure
from app.core.settings import Problem, SettingsError
from deployments.engines.base import EngineContractError
from deployments.hosting.start_failure import EngineEnded, EngineNotReady, explain
from deployments.process.supervisor import EngineNotStarted

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("/opt/venv/bin/python: No module named vllm.entrypoints", StartProblem.MISSING_MODULE),
        ("ModuleNotFoundError: No module named 'tensorrt_llm'", StartProblem.MISSING_MODULE),
        (
            "api_server.py: error: unrecognized arguments: --max-modle-len 4",
            StartProblem.BAD_OPTION,
        ),
        ("error: argument --dtype: invalid choice: 'fp3'", StartProblem.BAD_OPTION),
        ("Error: No such option: --max-seqlen", StartProblem.BAD_OPTION),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            StartProblem.OUT_OF_MEMORY,
        ),
        (
            "ValueError: Free memory on device (3.1/79 GiB) on startup is less than desired GPU "
            "memory utilization (0.9, 71 GiB).",
            StartProblem.OUT_OF_MEMORY,
        ),
        (
            "ValueError: No available memory for the cache blocks. Try increasing it.",
            StartProblem.OUT_OF_MEMORY,
        ),
        (
            "ValueError: To serve at least one request with max seq len 131072, 16 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (3 GiB).",
            StartProblem.OUT_OF_MEMORY,
        ),
        ("RuntimeError: Not enough memory. Please try to increase it", StartProblem.OUT_OF_MEMORY),
        ("RuntimeError: Found no NVIDIA driver on your system.", StartProblem.NO_GPU),
        ("ImportError: libcuda.so.1: cannot open shared object file", StartProblem.NO_GPU),
        ("RuntimeError: Failed to infer device type", StartProblem.NO_GPU),
        ("RuntimeError: No CUDA GPUs are available", StartProblem.NO_GPU),
        (
            "OSError: /models/x does not appear to have a file named config.json.",
            StartProblem.MISSING_MODEL,
        ),
        (
            "OSError: org/x is not a local folder and is not a valid model identifier listed",
            StartProblem.MISSING_MODEL,
        ),
        ("huggingface_hub.errors.RepositoryNotFoundError: 404", StartProblem.MISSING_MODEL),
        ("OSError: [Errno 98] Address already in use", StartProblem.PORT_IN_USE),
        ("OSError: [Errno 28] No space left on device", StartProblem.DISK_FULL),
        ("Segmentation fault", StartProblem.ENDED),
        ("", StartProblem.ENDED),
    ],
)
def test_the_log_of_an_engine_that_ended_names_the_problem(lines, problem):
    tail = f"INFO starting\n{lines}\n\n"
    failure = explain("p", EngineEnded(1), tail, log="/logs/x.log", node="10.0.0.1")
    assert failure.problem is problem
    assert failure.detail.startswith("it ended with status 1 before it was ready")
    if problem is not StartProblem.ENDED:
        assert lines in failure.detail
    assert failure.advice and failure.log == "/logs/x.log"
    assert failure.lines[0] == "INFO starting"


def test_the_cause_counts_and_not_what_follows_from_it():
    tail = "torch.OutOfMemoryError: CUDA out of memory\nOSError: Address already in use\n"
    assert explain("p", EngineEnded(1), tail).problem is StartProblem.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (EngineEnded(-9), StartProblem.OUT_OF_MEMORY),
        (EngineEnded(-11), StartProblem.ENDED),
        (EngineNotStarted("cannot run '/x/python': it does not exist"), StartProblem.CANNOT_RUN),
        (SettingsError(Problem((), "'$X' names a variable")), StartProblem.CANNOT_RUN),
        (EngineNotReady("it was not ready after 5 s"), StartProblem.TIMEOUT),
        (EngineContractError("answers without the key"), StartProblem.NOT_AS_REQUIRED),
        (OSError(28, "no"), StartProblem.ENDED),
        (RuntimeError(), StartProblem.ENDED),
    ],
)
def test_an_error_names_the_problem_where_the_log_does_not(error, problem):
    failure = explain("p", error, "out of memory" if isinstance(error, EngineNotReady) else "")
    assert failure.problem is problem and failure.detail


def test_the_end_of_a_long_log_is_kept():
    failure = explain("p", EngineEnded(1), "\n".join(map(str, range(100))))
    assert failure.lines[-1] == "99" and len(failure.lines) == 20


FOUND = (
    ok("vllm 0.33.0"),
    warning("little disk", "logs need room", "make room"),
    error("no nvidia-smi", "it needs a GPU", "install the driver", StartProblem.NO_GPU),
)


def test_what_was_found_before_explains_what_the_log_does_not():
    failure = explain("pool", EngineEnded(1), "Segmentation fault", findings=FOUND)
    assert (failure.problem, failure.advice) == (StartProblem.NO_GPU, "install the driver")
    assert "no nvidia-smi: it needs a GPU" in failure.detail
    # The log knows better, but what was found is shown all the same.
    failure = explain("pool", EngineEnded(1), "No module named 'vllm'", findings=FOUND)
    assert failure.problem is StartProblem.MISSING_MODULE
    assert "before the start: warning: little disk" in failure.report()
    assert "vllm 0.33.0" not in failure.report(), "what was well explains nothing"
    assert find_failure(failure.to_text()) == failure
