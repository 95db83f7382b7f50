"""The README's own example, as printed: its reward, data, recipe and commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny_model import build_tiny_vlm

README = Path(__file__).parent.parent / "README.md"
SHORT = ("trainer.steps=2", "tracking.system_metrics=false")


def blocks(language: str) -> list[str]:
    """Code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def named(language: str, name: str) -> str:
    """The block that says which file it is."""
    return next(block for block in blocks(language) if block.startswith(f"# {name}\n"))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the files of the README, a model, and the image of the example."""
    build_tiny_vlm(tmp_path / "my_model")
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    row = json.loads(blocks("json")[0])
    rows = []
    for name, colour in colours.items():
        for size in (56, 84):
            Image.new("RGB", (size, size), colour).save(tmp_path / f"{name}{size}.png")
            rows.append(row | {"images": [f"{name}{size}.png"], "target": name})
    Image.new("RGB", (56, 56), colours["red"]).save(tmp_path / row["images"][0])
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [row, *rows]))
    (tmp_path / "my_rewards.py").write_text(named("python", "my_rewards.py"))
    (tmp_path / "my_recipe.yaml").write_text(named("yaml", "my_recipe.yaml"))
    return tmp_path


def commands() -> dict[str, list[str]]:
    """The README's `counterpoint` commands, by what they do."""
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    found = [shlex.split(line) for line in lines if line.startswith("counterpoint ")]
    return {("resume" if "--resume" in words else words[1]): words for words in found}


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


@pytest.mark.engine
@pytest.mark.slow
def test_the_example_trains_resumes_and_exports_as_printed(workplace: Path) -> None:
    words = commands()
    checked = run(words["check"], workplace)
    assert checked.returncode == 0, checked.stderr
    trained = run([*words["train"], *SHORT], workplace)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    resumed = run([*words["resume"], "trainer.steps=3", *SHORT[1:]], workplace)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    steps = [json.loads(line)["step"] for line in (workplace / "runs/colours/metrics.jsonl").read_text().splitlines()]
    assert sorted({*steps} - {0}) == [1, 2, 3]
    exported = run(words["export"], workplace)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert (workplace / "exported" / "model.safetensors").is_file()


@pytest.mark.parametrize("document", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_every_file_that_a_document_links_is_there(document: Path) -> None:
    links = re.findall(r"\]\(((?!https?:)[^)#\s]+)\)", document.read_text("utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_readme_names_every_room_and_sub_room() -> None:
    root = README.parent
    rooms = ("algorithms", "rollout", "reward", "actors", "orchestrator")
    packages = {path.parent.relative_to(root) for room in rooms for path in (root / room).rglob("__init__.py")}
    house = README.read_text("utf-8").partition("## The house")[2]
    assert [str(path) for path in packages if f"{path.name}/`" not in house] == []
