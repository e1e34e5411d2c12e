"""CPU-only stand-in for the GPU packages that SGLang imports, and does not use, on a CPU.

SGLang imports `sgl_kernel`, `triton` and `torchvision` wherever it runs. The first has no CPU
build, the second is a gigabyte of GPU compiler, the third has no CPU build in the package index.
On a CPU without AMX, SGLang computes with torch's own operators and calls none of them, so empty
shells are enough to import it. Whatever of them is called nevertheless says what is missing.

torch's compiler asks Triton for its version, also on a CPU. So it is switched off: a request with
`repetition_penalty`, whose function SGLang compiles, would end the engine.

    python sglang_cpu_stand_in.py install

installs the shells into the environment of that python; only `scripts/setup sglang-cpu` does.
Neither that nor an import of a shell works on a machine with a GPU, or beside the real packages.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import shutil
import sys
import sysconfig
import types
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NoReturn

SHELLS = ("sgl_kernel", "torchvision", "triton")
_REAL = {"sgl-kernel", "sglang-kernel", "torchvision", "triton"}
"""The distributions that hold the real packages, and their other names."""
GPU = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What the drivers of GPUs show that SGLang runs on: NVIDIA's, AMD's, either inside WSL."""
_LACKING = {"triton.knobs"}
"""What older versions do not have either: SGLang does without."""
_SHELL = '''"""CPU-only stand-in; see sglang_cpu_stand_in.py beside this folder."""

import sglang_cpu_stand_in

sglang_cpu_stand_in.take_the_place_of(__name__)
'''

_WITHOUT_COMPILER = 'import os; os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")\n'
"""Python runs it at its start, from a file of paths (``site``)."""


class Missing(RuntimeError):
    """Something was called that only the real package can do."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is a CPU-only stand-in: the real one is needed for this")


def why_refused() -> str | None:
    """What speaks against the stand-in in this environment; ``None``: nothing."""
    for path in GPU:
        if Path(path).exists():
            return f"this machine has a GPU ({path})"
    for distribution in distributions():
        if (name := distribution.name.lower().replace("_", "-")) in _REAL:
            return f"the real {name} is installed"
    return None


def take_the_place_of(package: str) -> None:
    """Make ``package``, which is being imported, a shell.

    Raises:
        ImportError: this is no place for a stand-in.
    """
    if reason := why_refused():
        raise ImportError(f"{package} here is a CPU-only stand-in, which is refused: {reason}")
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        sys.meta_path.append(finder := _Finder())
    sys.modules[package] = importlib.util.module_from_spec(finder.spec(package))


class _Absent:
    """Anything that is not a class. Can be named, looked into and written in annotations."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return _look_up(self._name, name)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise Missing(self._name)

    def __getitem__(self, key: object) -> NoReturn:  # how a Triton kernel is launched
        raise Missing(self._name)


class _AbsentType(type):
    """A class of a shell: can be inherited from, tested against and looked into, not made."""

    def __getattr__(cls, name: str) -> Any:
        return _look_up(f"{cls.__module__}.{cls.__name__}", name)

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise Missing(f"{cls.__module__}.{cls.__name__}")


class _Shell(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        found = _look_up(self.__name__, name)
        setattr(self, name, found)
        return found


def _look_up(owner: str, name: str) -> Any:
    qualified = f"{owner}.{name}"
    if qualified in _TRITON:
        return _TRITON[qualified]
    if name.startswith("__") or qualified in _LACKING:
        raise AttributeError(f"{owner} is a CPU-only stand-in without {name}")
    if name.endswith(("Error", "OutOfResources")):
        return type(name, (Exception,), {})
    if name[:1].isupper():
        return _AbsentType(name, (), {"__module__": owner})
    return _Absent(qualified)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the shells' submodules: every name that is asked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if package not in SHELLS or not rest or fullname in _LACKING:
            return None
        return self.spec(fullname)

    def spec(self, fullname: str) -> importlib.machinery.ModuleSpec:
        """The spec of a shell, or of a module in one."""
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Shell(spec.name)
        # Older than anything: whoever asks for a version finds that it is too old.
        module.__dict__["__version__"] = "0.0.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


# --- what of Triton runs when kernels are defined, not when they are launched ---


def _jit(function: Callable[..., Any] | None = None, **options: object) -> Any:
    if function is None:
        return _jit
    return _Absent(f"the Triton kernel {function.__name__}")


def _unchanged(*args: object, **options: object) -> Callable[[Any], Any]:
    return lambda kernel: kernel


class _Config:
    def __init__(self, kwargs: dict[str, Any], **options: object) -> None:
        self.kwargs = kwargs


class _Constexpr:
    def __init__(self, value: Any) -> None:
        self.value = value


_TRITON: dict[str, Any] = {
    "triton.Config": _Config,
    "triton.jit": _jit,
    "triton.autotune": _unchanged,
    "triton.heuristics": _unchanged,
    "triton.cdiv": lambda a, b: -(a // -b),
    "triton.next_power_of_2": lambda n: 1 << max(n - 1, 0).bit_length(),
    "triton.language.constexpr": _Constexpr,
    "triton.backends.backends": {},  # where torch looks for the devices that it can compile for
}


def install() -> None:
    """Put the shells, and this file, into the environment that this runs in.

    Raises:
        SystemExit: there is a GPU, or a real package.
    """
    if reason := why_refused():
        raise SystemExit(f"no CPU-only stand-in is installed: {reason}")
    folder = Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, folder / "sglang_cpu_stand_in.py")
    (folder / "sglang_cpu_stand_in.pth").write_text(_WITHOUT_COMPILER)
    for shell in SHELLS:
        (folder / shell).mkdir()
        (folder / shell / "__init__.py").write_text(_SHELL)


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        raise SystemExit(__doc__)
    install()
