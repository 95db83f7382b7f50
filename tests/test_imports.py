"""Imports as a reader meets them: no two files import each other, and what only looks at a recipe loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("algorithms", "rollout", "reward", "actors", "orchestrator")


def modules(root: Path) -> dict[str, Path]:
    """The file of each module of the five rooms, by dotted name."""
    paths = [path for room in ROOMS for path in (root / room).rglob("*.py")]
    names = [path.relative_to(root).with_suffix("").parts for path in paths]
    return {".".join(n[:-1] if n[-1] == "__init__" else n): path for n, path in zip(names, paths, strict=True)}


def imported(source: str, known: set[str]) -> Iterator[str]:
    """The known modules that a file imports anywhere: at the top, for types, or within a function.

    `from package import name` imports the module `package.name` where there is one, and else `package`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"a relative import of {node.module}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from (name for name in ((inner if inner in known else node.module),) if name in known)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of two or more modules, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            at = stack.index(module)
            if len(component := set(stack[at:])) > 1:
                found.append(component)
            del stack[at:]

    for module in graph:
        if module not in order:
            visit(module)
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    """The modules that each module imports, itself left out."""
    files = modules(root)
    return {name: set(imported(path.read_text("utf-8"), {*files})) - {name} for name, path in files.items()}


def test_no_two_files_import_each_other_for_types_included() -> None:
    graph = import_graph(ROOT)
    assert len(graph) > 100
    told = [
        "; ".join(sorted(f"{name} imports {other}" for name in circle for other in graph[name] & circle))
        for circle in circles(graph)
    ]
    assert told == []


@pytest.mark.parametrize(
    "back",
    [
        "import rollout.first",
        "if TYPE_CHECKING:\n    from rollout import first",
        "def f():\n    from rollout.first import a",
    ],
)
def test_a_circle_is_found_however_it_is_written(tmp_path: Path, back: str) -> None:
    room = tmp_path / "rollout"
    room.mkdir()
    (room / "__init__.py").write_text("")
    (room / "first.py").write_text("from rollout.second import b\n")
    (room / "second.py").write_text("from rollout import third\n")
    (room / "third.py").write_text(f"{back}\n")
    assert circles(import_graph(tmp_path)) == [{"rollout.first", "rollout.second", "rollout.third"}]


@pytest.mark.parametrize(
    "code",
    [
        "import orchestrator.config.schema, orchestrator.config.loading, orchestrator.config.cross_checks",
        "sys.argv[1:] = ['--help']; import orchestrator.cli; orchestrator.cli.main()",
        "sys.argv[1:] = ['config', 'trainer']; import orchestrator.cli; orchestrator.cli.main()",
        "sys.argv[1:] = ['check', 'recipes/digits.yaml', 'trainer.steps=0']; import orchestrator.cli; "
        "orchestrator.cli.main()",
    ],
    ids=["configuration", "help", "list of settings", "refused value"],
)
def test_what_needs_no_tensor_loads_no_engine(code: str) -> None:
    heavy = "{'torch', 'ray', 'transformers', 'vllm', 'deepspeed', 'mlflow'}"
    program = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr
