"""The wheel holds every room, and the command works from it alone, away from the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

ROOT = Path(__file__).parent.parent
ROOMS = ("algorithms", "rollout", "reward", "actors", "orchestrator")
RUN_COMMAND = """
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name="counterpoint")
command.load()()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy of the checkout that also holds a room which no list can know."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*ROOMS, "tests", "recipes", "benchmarks", "scripts", "k8s", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for new in (source / "actors" / "new_room", source / "new_room"):
        new.mkdir()
        (new / "__init__.py").touch()
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.glob("counterpoint-*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees the unpacked wheel and the installed packages, and nothing of the checkout.

    A folder that a .pth file names is searched, but the .pth files in it are not read; so the checkout's editable
    installation among the installed packages has no effect.
    """
    folder = tmp_path_factory.mktemp("environment")
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=60)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "wheel.pth").write_text(f"{unpacked}\n{sysconfig.get_paths()['purelib']}\n")
    return folder / "venv" / "bin" / "python"


def run(python: Path, code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_file_of_every_room_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {Path(name) for name in archive.namelist() if ".dist-info/" not in name}
    rooms = {
        path.relative_to(ROOT)
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(rooms) > 100
    assert packed == rooms | {Path("actors/new_room/__init__.py"), Path("new_room/__init__.py")}


@pytest.mark.parametrize("image", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_an_image_makes_every_room_before_it_installs_the_package(image: str) -> None:
    made = re.search(r"for room in (.+?);", (ROOT / "k8s" / "docker" / image).read_text("utf-8"))
    assert made is not None
    assert {*made[1].split()} == {path.parent.name for path in ROOT.glob("*/__init__.py")} == {*ROOMS}


def test_the_command_shows_its_help_from_the_wheel_alone(python: Path, tmp_path: Path) -> None:
    shown = run(python, RUN_COMMAND, "--help", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "Train a policy by reinforcement learning." in shown.stdout
    where = run(
        python, f"import {', '.join(ROOMS)}; print({', '.join(f'{r}.__file__' for r in ROOMS)})", folder=tmp_path
    )
    assert str(ROOT) not in where.stdout
    assert where.stdout.count(str(python.parents[2] / "unpacked")) == len(ROOMS), where.stdout + where.stderr


def test_a_recipe_is_checked_from_the_wheel_alone(python: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"weight": np.zeros((10, 10), np.float32)}, model / "model.safetensors")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "target": "2"}))
    recipe = {
        "model": {"path": "model", "max_length": 1024},
        "data": {"train": {"path": "data.jsonl"}},
        "reward": {"components": [{"function": "exact_match"}]},
        "generator": {"kv_cache_gib": 0.01},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    checked = run(python, RUN_COMMAND, "check", "mine.yaml", folder=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "Ready to run." in checked.stdout
