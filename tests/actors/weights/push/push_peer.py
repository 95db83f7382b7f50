"""Generators without vLLM's engine: the real worker-side engine around a model of four tensors, as a push sees them.

Each worker lives in a thread, or in a process of its own that can be killed in the middle of a push.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from actors.weights.source import SourceTensor
from tests.forks import ForkContext

SHAPES = {"first.weight": (64, 32), "first.bias": (64,), "second.weight": (8, 64), "scale": ()}


class ToyModel(nn.Module):
    """Takes every tensor but a stranger, and can act when one comes."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Tensor] = {}
        self.actions: dict[str, Callable[[], Any]] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            if name in self.actions:
                self.actions.pop(name)()
            if name != "stranger":
                self.held[name] = tensor.clone()
                loaded.add(name)
        return loaded


class Worker:
    """What vLLM's worker does around its engine, as far as it matters here."""

    def __init__(self, rank: int, workers: int) -> None:
        from actors.weights.push.vllm_backends import CheckedNcclBackend

        self.model = ToyModel()
        parallel = SimpleNamespace(
            data_parallel_index=0,
            world_size=workers,
            rank=rank,
            pipeline_parallel_size=1,
            enable_expert_parallel=False,
        )
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(dtype=torch.float32))
        self.engine = CheckedNcclBackend(config, config, torch.device("cpu"), self.model)
        self.is_open = False

    def call(self, method: str, *arguments: Any) -> Any:
        match method:
            case "init_weight_transfer_engine":
                self.engine.init_transfer_engine(self.engine.parse_init_info(*arguments))
            case "start_weight_update":
                if self.is_open:
                    raise RuntimeError("a session is open")
                self.engine.start_weight_update()
                self.is_open = True
            case "update_weights":
                if not self.is_open:
                    raise RuntimeError("no session is open")
                try:
                    self.engine.update_weights(*arguments)
                except BaseException:
                    self.is_open = False
                    raise
            case "finish_weight_update":
                self.engine.finish_weight_update()
                self.is_open = False
                return arguments
            case "when":
                self.model.actions = dict([arguments])
            case "held":
                return dict(self.model.held)
        return None


class PeerTarget:
    """A generator of one or more such workers."""

    def __init__(self, name: str, workers: int = 1, *, in_process: bool = False, incarnation: str = "first") -> None:
        self.name = name
        self.incarnation = incarnation
        self.workers = workers
        self.calls: list[str] = []
        self._refusals: dict[str, Exception] = {}
        self.threads: list[Worker] = []
        """Its workers, where they live in threads."""
        self._pools: list[Executor] = []
        self._workers: list[Callable[..., Any]] = []
        for rank in range(workers):
            if in_process:
                context = ForkContext()
                self._pools.append(ProcessPoolExecutor(1, context, _start, (rank, workers)))
                self._workers.append(_call)
            else:
                self._pools.append(ThreadPoolExecutor(1, thread_name_prefix=name))
                self.threads.append(Worker(rank, workers))
                self._workers.append(self.threads[-1].call)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Each worker's answer."""
        return [future.result(120) for future in self._futures(method, arguments)]

    def when(self, tensor: str, action: Callable[[], Any]) -> None:
        """Act once, on every worker, when this tensor is loaded."""
        self.ask("when", tensor, action)

    def refuse(self, method: str, error: Exception) -> None:
        """Answer this call with an error from now on."""
        self._refusals[method] = error

    def holds(self, tensors: list[SourceTensor]) -> bool:
        """Whether every worker has exactly these."""
        return all(
            held.keys() == {t.name for t in tensors} and all(torch.equal(held[t.name], t.read()) for t in tensors)
            for held in self.ask("held")
        )

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Future[Any]:
        return self._all("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> Future[Any]:
        return self._all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> Future[Any]:
        return self._all("update_weights", update_info)

    def finish_weight_update(self, version: int, digest: str) -> Future[Any]:
        return self._all("finish_weight_update", version, digest)

    def stop(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def _futures(self, method: str, arguments: tuple[Any, ...]) -> list[Future[Any]]:
        return [
            pool.submit(worker, method, *arguments) for pool, worker in zip(self._pools, self._workers, strict=True)
        ]

    def _all(self, method: str, *arguments: Any) -> Future[Any]:
        """All workers' answers as one: the first error is the generator's, as in vLLM's collective calls."""
        kinds = [key for key in ("names", "verify", "abandon") if method == "update_weights" and key in arguments[0]]
        self.calls.extend(kinds or [method])
        result: Future[Any] = Future()
        if method in self._refusals:
            result.set_exception(self._refusals[method])
            return result
        futures, lock = self._futures(method, arguments), threading.Lock()

        def settle(future: Future[Any]) -> None:
            with lock:
                if result.done():
                    return
                if (error := future.exception()) is not None:
                    result.set_exception(error)
                elif all(other.done() for other in futures):
                    result.set_result(future.result())

        for future in futures:
            future.add_done_callback(settle)
        return result


def policy_tensors(extra: dict[str, tuple[int, ...]] | None = None, seed: int = 0) -> list[SourceTensor]:
    """What a trainer sends to such peers, drawn at random."""
    random = torch.Generator().manual_seed(seed)
    tensors = []
    for name, shape in (SHAPES | (extra or {})).items():
        parameter = nn.Parameter(torch.randn(shape, generator=random))
        tensors.append(SourceTensor(name, "float32", shape, (parameter,), partial(nn.Parameter.detach, parameter)))
    return tensors


def die() -> None:
    """The end of this process, at once."""
    os.kill(os.getpid(), signal.SIGKILL)


_worker: Worker | None = None


def _start(rank: int, workers: int) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Worker(rank, workers)


def _call(method: str, *arguments: Any) -> Any:
    assert _worker is not None
    return _worker.call(method, *arguments)
