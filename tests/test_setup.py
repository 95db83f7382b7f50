"""The set-up says what is missing before it installs anything, and does nothing where nothing changed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "setup.py"
Version = namedtuple("Version", "major minor")


@pytest.fixture
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_is_missing_on_this_machine(setup: ModuleType, tmp_path: Path) -> None:
    assert setup.find_problems("cpu", Path(sys.prefix)) == []


def test_a_missing_compiler_is_named_with_its_remedy(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    git = shutil.which("git")
    assert git is not None
    (tmp_path / "git").symlink_to(git)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (problem,) = setup.find_problems("cpu", Path(sys.prefix))
    assert "no C++ compiler" in problem
    assert "apt-get install g++" in problem


@pytest.mark.parametrize("version", [Version(3, 10), Version(3, 14)])
def test_a_python_out_of_range_is_named(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, version: Version) -> None:
    monkeypatch.setattr(setup.sys, "version_info", version)
    problems = setup.find_problems("cpu", Path(sys.prefix))
    assert any(f"Python {version.major}.{version.minor} can't be used" in problem for problem in problems)


def test_too_little_memory_and_disk_are_named_with_the_figures(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup, "memory_gib", lambda: 2.0)
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(2**30))
    problems = setup.find_problems("cpu", tmp_path / "environment")
    assert any("1.0 GiB are free" in problem and "needs 9 GiB" in problem for problem in problems)
    assert any("2.0 GiB of memory" in problem for problem in problems)


def test_what_is_missing_ends_the_set_up_before_it_makes_an_environment(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    command = [sys.executable, str(SCRIPT), "--environment", str(environment)]
    outcome = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 1
    assert "nothing was installed" in outcome.stderr
    assert not environment.exists()


def test_an_index_that_does_not_answer_is_found_out_at_once(setup: ModuleType) -> None:
    assert setup.index_answers("http://127.0.0.1:9/whl") is False


def test_a_second_call_with_nothing_changed_installs_nothing(setup: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".counterpoint-setup").write_text(setup.fingerprint("cpu"))
    command = [sys.executable, str(SCRIPT), "--environment", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (outcome.returncode, outcome.stdout) == (0, "")


def test_the_torchvision_hook_declares_operators_only_when_torchvision_is_imported(
    setup: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "hook.py").write_text(setup.OPERATOR_HOOK)
    (tmp_path / "torchvision.py").write_text("import torch; torch.ops.torchvision.nms; READY = True\n")
    paths = [str(tmp_path), str(setup.site_packages(Path(sys.executable)))]
    code = (
        f"import sys; sys.path[:0] = {paths!r}; import hook; assert 'torch' not in sys.modules; "
        "import torchvision; assert torchvision.READY"
    )
    # Without site, so that a hook which the environment itself may have takes no part.
    command = [sys.executable, "-S", "-c", code]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert outcome.returncode == 0, outcome.stderr
