"""Imports the user's Python files by path, once a process, so that a recipe can name what they register."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from rollout.failures import Failure, FailureError, FailureKind

_import_lock = threading.RLock()


class UserCodeError(FailureError):
    """The user's code failed; the message names the file and the line."""


def import_modules(paths: Iterable[Path], *, base: Path = Path()) -> list[ModuleType]:
    """Import Python files, each exactly once a process, however often and in whatever spelling its path is given.

    The module's name follows from the resolved path alone, so another process that imports the same paths first can
    unpickle what refers to it. The file's folder is appended to ``sys.path``: it may import the files beside it.

    Args:
        paths: the files; relative ones are taken from `base`.
        base: usually the folder of the recipe.
    Raises:
        UserCodeError: a file is missing (``module_missing``) or fails while it is imported (``module_failed``).
    """
    with _import_lock:
        return [_import_file((base / path).resolve()) for path in paths]


def user_traceback(error: BaseException, *, own_file: str = __file__) -> str:
    """The error and the innermost line of user code that raised it, without `own_file` and the import machinery."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != own_file and not frame.filename.startswith("<frozen")
    ]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    code = f" (at `{frames[-1].line}`)" if frames and frames[-1].line else ""
    return f"{where}{type(error).__name__}: {error}{code}"


def _import_file(path: Path) -> ModuleType:
    name = f"counterpoint_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file() or path.suffix != ".py":
        what = "is not a Python file (.py)" if path.exists() else "does not exist"
        raise UserCodeError(
            Failure(FailureKind.USER_CODE, "module_missing", f"the module {path}, which the recipe names, {what}")
        )
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserCodeError(Failure(FailureKind.USER_CODE, "module_failed", f"Python has no loader for {path}"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        message = f"importing {path} failed at {user_traceback(error)}"
        raise UserCodeError(Failure(FailureKind.USER_CODE, "module_failed", message)) from error
    return module
