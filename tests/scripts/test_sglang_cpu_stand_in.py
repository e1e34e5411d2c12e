import importlib
import os
import site
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.unit

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAME = "sglang_cpu_stand_in"


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """The module, installed into a folder from which Python imports; nothing of it stays."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module(NAME)
    # This machine may have a GPU, and the tests' environment may come to hold one of the packages.
    monkeypatch.setattr(module, "GPU", (str(tmp_path / "gpu"),))
    monkeypatch.setattr(module, "distributions", lambda: [])
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    yield module
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in (*module.SHELLS, NAME):
            del sys.modules[name]


@pytest.fixture
def installed(stand_in, tmp_path, monkeypatch):
    stand_in.install()
    monkeypatch.syspath_prepend(str(tmp_path))
    return stand_in


def test_what_is_imported_and_defined_works_and_what_is_called_says_what_is_missing(installed):
    kernels = importlib.import_module("sgl_kernel.kvcacheio")
    vision = importlib.import_module("torchvision.transforms")
    assert vision.InterpolationMode.BICUBIC is not None
    for call in (kernels.transfer_kv, vision.InterpolationMode, vision.functional.resize):
        with pytest.raises(installed.Missing, match="CPU-only stand-in"):
            call()


def test_triton_kernels_can_be_defined_and_not_launched(installed):
    triton = importlib.import_module("triton")
    language = importlib.import_module("triton.language")

    @triton.autotune(configs=[triton.Config({"BLOCK": 64})], key=["n"])
    @triton.jit(do_not_specialize=["n"])
    def kernel(x, n: language.constexpr):  # type: ignore[name-defined]
        raise AssertionError

    with pytest.raises(installed.Missing, match="kernel is a CPU-only stand-in"):
        kernel[(1,)](0)
    assert (triton.cdiv(7, 4), triton.next_power_of_2(5), triton.next_power_of_2(1)) == (2, 8, 1)
    assert "cpu" not in triton.backends.backends


def test_a_type_can_be_tested_against_and_an_error_caught(installed):
    jit = importlib.import_module("triton.runtime.jit")
    assert not isinstance(1, jit.JITFunction)
    autotuner = importlib.import_module("triton.runtime.autotuner")
    assert issubclass(autotuner.OutOfResources, Exception)


def test_what_older_tritons_lack_is_not_there(installed):
    with pytest.raises(ImportError):
        importlib.import_module("triton.knobs")


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_torchs_compiler_is_off_unless_told_otherwise(
    installed, monkeypatch, tmp_path, before, after
):
    """It would ask Triton for its version, and so end SGLang at a request with a penalty."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "")
    if before is None:
        monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    else:
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", before)
    site.addpackage(str(tmp_path), "sglang_cpu_stand_in.pth", set())
    assert os.environ["TORCH_COMPILE_DISABLE"] == after


def test_other_packages_are_found_as_before(installed):
    importlib.import_module("sgl_kernel")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sgl_kernel_of_another_name")


def test_it_is_neither_installed_nor_imported_where_there_is_a_gpu(stand_in, tmp_path):
    (tmp_path / "gpu").touch()
    with pytest.raises(SystemExit, match="has a GPU"):
        stand_in.install()
    with pytest.raises(ImportError, match="has a GPU"):
        stand_in.take_the_place_of("sgl_kernel")
    assert "sgl_kernel" not in sys.modules


@pytest.mark.parametrize("name", ["sglang-kernel", "sgl_kernel", "triton", "TorchVision"])
def test_it_is_neither_installed_nor_imported_beside_the_real_thing(stand_in, monkeypatch, name):
    monkeypatch.setattr(stand_in, "distributions", lambda: [SimpleNamespace(name=name)])
    with pytest.raises(SystemExit, match="is installed"):
        stand_in.install()
    with pytest.raises(ImportError, match="is installed"):
        stand_in.take_the_place_of("sgl_kernel")
