"""Users' Python files: imported once, under a name any process arrives at, and failing with file and line."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.failures import FailureKind
from rollout.user_code import UserCodeError, import_modules


def test_a_file_is_imported_once_however_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nwith open(__file__ + '.log', 'a') as f: f.write('x')\n"
    )
    (tmp_path / "link").symlink_to(tmp_path)
    [first] = import_modules([tmp_path / "mine.py"])
    [second, third] = import_modules([Path("mine.py"), Path("link/mine.py")], base=tmp_path)
    assert first is second is third
    assert (tmp_path / "mine.py.log").read_text() == "x"


def test_a_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 7\n")
    (tmp_path / "with_neighbour.py").write_text("from neighbour_of_mine import VALUE\n")
    [module] = import_modules([tmp_path / "with_neighbour.py"])
    assert module.VALUE == 7


def test_what_a_file_defines_unpickles_in_a_process_that_imported_it_first(tmp_path: Path) -> None:
    path = tmp_path / "defines.py"
    path.write_text("class Thing:\n    size = 3\n")
    [module] = import_modules([path])
    code = (
        "import pickle, sys; from pathlib import Path; from rollout.user_code import import_modules; "
        "import_modules([Path(sys.argv[1])]); print(pickle.loads(sys.stdin.buffer.read()).size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], input=pickle.dumps(module.Thing()), capture_output=True, timeout=60
    )
    assert done.stdout.strip() == b"3", done.stderr.decode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = x / 0\n", r"broken\.py:2: ZeroDivisionError: division by zero \(at `y = x / 0`\)"),
        ("x = 1\ndef f(:\n", r"broken\.py:2: SyntaxError"),
        ("import no_such_module_anywhere\n", r"broken\.py:1: ModuleNotFoundError: .*no_such_module_anywhere"),
        ("raise SystemExit(3)\n", r"broken\.py:1: SystemExit: 3"),
    ],
    ids=["raises", "syntax", "import", "exits"],
)
def test_a_file_that_fails_names_itself_the_line_and_the_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserCodeError, match=said) as raised:
        import_modules([tmp_path / "broken.py"])
    assert (raised.value.failure.kind, raised.value.failure.reason) == (FailureKind.USER_CODE, "module_failed")


def test_a_file_that_failed_can_be_imported_once_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "mended.py"
    path.write_text("raise ValueError\n")
    with pytest.raises(UserCodeError):
        import_modules([path])
    path.write_text("VALUE = 'whole again'\n")
    os.utime(path, (1, 1))
    assert import_modules([path])[0].VALUE == "whole again"


@pytest.mark.parametrize(("name", "said"), [("nothing.py", "does not exist"), ("notes.txt", "is not a Python file")])
def test_a_file_that_is_missing_or_not_python_is_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserCodeError, match=said) as raised:
        import_modules([tmp_path / name])
    assert raised.value.failure.reason == "module_missing"
