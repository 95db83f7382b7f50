"""Make `.venv` with everything Counterpoint needs, on a machine with Python 3.11 to 3.13 and a C++ compiler.

It uses the standard library alone, because it runs before anything is installed. A second call with nothing changed
takes well under a second. It works with a package index alone and with PyTorch's CPU index beside it, and says what
is missing before it starts to install.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED_PYTHON = ((3, 11), (3, 14))
DISK_GIB = {"cpu": 9.0, "gpu": 20.0}
MEMORY_GIB = 6.0
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_S = 5.0

OPERATOR_HOOK = '''\
"""Declares two torchvision operators whose compiled library doesn't load beside this build of torch.

torchvision's Python part, which processors of vision-language models need, works without them but asks for their
schemas at import. The hook waits for that import, so that interpreters which never import torchvision pay nothing.
"""

import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _DeclareOperators.library = library
        return None


sys.meta_path.insert(0, _DeclareOperators())
'''


class SetupError(Exception):
    """Something essential is missing; the message says what and where to get it."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def memory_gib() -> float | None:
    """Total memory of the machine, or the limit of the control group where that is lower; None if unknown."""
    found = []
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return min(found) / 2**30


def find_problems(extra: str, environment: Path) -> list[str]:
    """What is missing, each as a sentence with its remedy; empty when the installation can start."""
    problems = []
    low, high = SUPPORTED_PYTHON
    if not low <= sys.version_info[:2] < high:
        problems.append(
            f"Python {sys.version_info[0]}.{sys.version_info[1]} can't be used: it needs 3.11 to 3.13. "
            "Call make with PYTHON=/path/to/python3.11."
        )
    if shutil.which("git") is None:
        problems.append("git is missing (MLflow records the commit of a run with it). Install it: apt-get install git.")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or shutil.which(compiler) is None:
        problems.append(
            "no C++ compiler found (c++, g++, clang++ or $CXX); vLLM and DeepSpeed compile kernels with it. "
            "Install one: apt-get install g++."
        )
    elif extra == "cpu" and not has_python_header():
        problems.append("Python's C headers are missing. Install them: apt-get install python3-dev.")
    free = shutil.disk_usage(environment.parent).free / 2**30
    if not environment.exists() and free < DISK_GIB[extra]:
        problems.append(
            f"{free:.1f} GiB are free below {environment.parent}; the set-up needs {DISK_GIB[extra]:.0f} GiB."
        )
    memory = memory_gib()
    if memory is not None and memory < MEMORY_GIB:
        problems.append(f"the machine has {memory:.1f} GiB of memory; Counterpoint needs {MEMORY_GIB:.0f} GiB.")
    if sys.platform != "linux":
        problems.append(f"the platform is {sys.platform}; vLLM and DeepSpeed run on Linux (a container will do).")
    return problems


def has_python_header() -> bool:
    import sysconfig

    return Path(sysconfig.get_paths()["include"], "Python.h").exists()


def fingerprint(extra: str) -> str:
    """Changes when anything that decides the content of the environment does."""
    parts = [sys.version, extra, str(ROOT), (ROOT / "pyproject.toml").read_text(), Path(__file__).read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def index_answers(url: str) -> bool:
    """Whether an extra package index can be reached at once; pip itself would retry for minutes."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/torch/", timeout=PROBE_S) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


def run(*command: str | Path, quiet: bool = False) -> None:
    outcome = subprocess.run([str(part) for part in command], capture_output=quiet, text=True, check=False)
    if outcome.returncode:
        tail = "\n".join((outcome.stderr or "").strip().splitlines()[-15:]) if quiet else ""
        raise SetupError(f"this failed with exit code {outcome.returncode}: {' '.join(map(str, command))}\n{tail}")


def imports(python: Path, module: str) -> bool:
    """Whether the environment can import a module (in a process of its own)."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def install(python: Path, extra: str, torch_index: str) -> None:
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    run(*pip, "--upgrade", "pip>=25,<27")
    options: list[str] = []
    if extra == "cpu" and torch_index:
        if index_answers(torch_index):
            say(f"PyTorch's CPU builds come from {torch_index}")
            options = ["--extra-index-url", torch_index]
        else:
            say("PyTorch's CPU index doesn't answer; using the package index and local files alone")
    try:
        run(*pip, *options, "--editable", f"{ROOT}[{extra},dev]")
    except SetupError as error:
        hint = " A CPU build of torch was probably not found: set TORCH_INDEX to an index that has it."
        raise SetupError(f"{error}{hint if extra == 'cpu' else ''}") from None


def mend(python: Path) -> None:
    """Repair packages built for CUDA that can't be imported beside a CPU build of torch."""
    broken = [name for name in ("torchaudio", "torchcodec") if installed(python, name) and not imports(python, name)]
    if broken:
        say(f"removing {' and '.join(broken)}: they are built for CUDA, and vLLM fails on their import")
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *broken, quiet=True)
    hook = site_packages(python) / "_declare_torchvision_operators.py"
    if installed(python, "torchvision") and not imports(python, "torchvision"):
        say("declaring torchvision's operators: its compiled library doesn't load beside this torch")
        hook.write_text(OPERATOR_HOOK)
        hook.with_suffix(".pth").write_text(f"import {hook.stem}\n")
        if not imports(python, "torchvision"):
            raise SetupError("torchvision can't be imported, even with its operators declared")


def installed(python: Path, distribution: str) -> bool:
    code = f"import importlib.metadata as m; m.version({distribution!r})"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", choices=("cpu", "gpu"), default="cpu", help="which engines to install")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv", help="the virtual environment to make")
    parser.add_argument("--torch-index", default=os.environ.get("TORCH_INDEX", TORCH_CPU_INDEX))
    arguments = parser.parse_args()
    environment: Path = arguments.environment.absolute()
    stamp, python = environment / ".counterpoint-setup", environment / "bin" / "python"
    wanted = fingerprint(arguments.extra)
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return 0
    started = time.monotonic()
    try:
        problems = find_problems(arguments.extra, environment)
        if problems:
            raise SetupError("nothing was installed:\n" + "\n".join(f"  - {problem}" for problem in problems))
        say(f"installing into {environment} (a few minutes, about 5 GiB on CPU)")
        if not python.exists():
            run(sys.executable, "-m", "venv", environment)
        install(python, arguments.extra, arguments.torch_index)
        mend(python)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    stamp.write_text(wanted)
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
