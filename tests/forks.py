"""Processes from a fork server that has torch, transformers, DeepSpeed and vLLM loaded: they start in moments.

A new interpreter imports for ten seconds before it does anything. The fork server imports once for a test run, starts
no thread, and every process that it forks begins where the imports ended. Three kinds come from here: ranks that are
plain functions (`run_ranks`), rank groups whose subject is the arithmetic and not Ray (`ray_of_forks`), and cores of
vLLM engines (`forked_cores`).
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray import cloudpickle
from ray.exceptions import RayActorError, RayTaskError

from actors.config import GeneratorConfig
from actors.generator.vllm_engine import engine_environment

ENVIRONMENT = engine_environment(GeneratorConfig()) | {"OMP_NUM_THREADS": "1"}
"""Of the fork server: what has to be set before an interpreter starts, or vLLM is imported."""


class ForkContext:
    """A multiprocessing context whose processes come from the fork server, with this process's environment."""

    def __init__(self) -> None:
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.preload"])
        with mock.patch.dict(os.environ, ENVIRONMENT):
            forkserver.ensure_running()

    def Process(self, target: Callable[..., Any], args: tuple[Any, ...] = (), **options: Any) -> Any:  # noqa: N802
        """A process that is not started yet, as multiprocessing's; a daemon may have children all the same."""
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
        return self._context.Process(target=_enter, args=(environment, target, args), **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _enter(environment: dict[str, str], target: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> None:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(environment)
    target(*args, **options)


def run_ranks(rank_function: Callable[..., None], arguments: Sequence[tuple[Any, ...]], deadline_s: float) -> None:
    """Call a function once a rank, each in a process of its own, and wait for all; fails with what they printed."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"{rank}.txt") for rank in range(len(arguments))]
        ranks = [
            ForkContext().Process(target=_printing_to, args=(output, rank_function, given), daemon=True)
            for output, given in zip(outputs, arguments, strict=True)
        ]
        for rank in ranks:
            rank.start()
        end = time.monotonic() + deadline_s
        for rank in ranks:
            rank.join(max(0.0, end - time.monotonic()))
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        said = "\n".join(output.read_text(errors="replace")[-4000:] for output in outputs if output.exists())
    assert codes == [0] * len(ranks), f"exit codes {codes} (None: not done within {deadline_s:g} s)\n{said}"


def _printing_to(output: Path, rank_function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    rank_function(*arguments)


@contextlib.contextmanager
def forked_cores() -> Iterator[None]:
    """vLLM engines that are made in here get their core's process from the fork server."""
    with mock.patch("vllm.v1.engine.utils.get_mp_context", ForkContext):
        yield


@contextlib.contextmanager
def ray_of_forks() -> Iterator[None]:
    """In here, what Ray does for a group of ranks is done by forked processes: actors, calls, puts and kills.

    Errors and deaths reach the caller as Ray's exceptions. Ray itself need not be initialised.
    """
    started: list[ForkedActor] = []

    class Remote:
        def __init__(self, actor_class: type) -> None:
            self.actor_class = actor_class

        def options(self, **_: Any) -> Remote:
            return self

        def remote(self, *arguments: Any) -> ForkedActor:
            started.append(ForkedActor(self.actor_class, arguments))
            return started[-1]

    def get(references: Any, timeout: float | None = None) -> Any:
        if isinstance(references, Reference):
            return references.future().result(timeout)
        return [reference.future().result(timeout) for reference in references]

    with contextlib.ExitStack() as stack:
        for name, standing_in in {
            "remote": Remote, "put": lambda value: value, "get": get, "kill": ForkedActor.kill, "cancel": lambda _: None
        }.items():  # fmt: skip
            stack.enter_context(mock.patch.object(ray, name, standing_in))
        try:
            yield
        finally:
            for actor in started:
                actor.kill()


class Reference:
    """A result to come, as far as Ray's object references are used."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def future(self) -> Future[Any]:
        """The result as a future of this process."""
        return self._future

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self._future).__await__()


class ForkedActor:
    """An object in a forked process, which answers one call after the other."""

    def __init__(self, actor_class: type, arguments: tuple[Any, ...]) -> None:
        self._name = actor_class.__name__
        context = ForkContext()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._calls = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self._call("__init__", actor_class, *arguments)

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_") and method != "__ray_call__":
            raise AttributeError(method)
        return type("Method", (), {"remote": lambda _, *arguments: self._call(method, *arguments)})()

    def kill(self) -> None:
        """End its process at once."""
        self._process.kill()
        self._process.join(10)
        self._calls.shutdown(wait=True, cancel_futures=True)
        self._connection.close()

    def _call(self, method: str, *arguments: Any) -> Reference:
        content = cloudpickle.dumps((method, arguments))

        def call() -> Any:
            try:
                self._connection.send_bytes(content)
                result, error, trace = cloudpickle.loads(self._connection.recv_bytes())
            except (EOFError, OSError) as lost:
                raise RayActorError(error_msg=f"the process of {self._name} is gone") from lost
            if error is not None:
                raise RayTaskError(f"{self._name}.{method}", trace, error, self._name, self._process.pid, "127.0.0.1")
            return result

        return Reference(self._calls.submit(call))


def _serve(connection: Connection) -> None:
    """Make the object that the first call names, then answer calls until nobody is there to ask."""
    held: Any = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            result, error, trace = None, None, ""
            try:
                method, arguments = cloudpickle.loads(connection.recv_bytes())
                if method == "__init__":
                    held = arguments[0](*arguments[1:])
                elif method == "__ray_call__":
                    result = arguments[0](held, *arguments[1:])
                else:
                    result = getattr(held, method)(*arguments)
            except (EOFError, OSError):
                raise
            except BaseException as raised:
                error, trace = raised, traceback.format_exc()
            connection.send_bytes(cloudpickle.dumps((result, error, trace)))
    os._exit(0)
