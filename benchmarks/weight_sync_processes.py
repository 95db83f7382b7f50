"""Processes of the weight-sync benchmark: a trainer that publishes, generators that receive, and a way to call them.

Clocks are the kernel's monotonic one, which all processes of a host share, so a span may begin in one and end in
another.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.config import GeneratorConfig
from actors.generator.vllm_engine import engine_environment
from actors.weights.offer import WeightsOffer
from actors.weights.pull.publisher import WeightPublisher
from actors.weights.pull.pull import ReceiverSettings
from actors.weights.pull.receiver import WeightReceiver
from actors.weights.source import DTYPES, PolicyPartSource, module_tensors

DEADLINE_S = 240.0
WIDTH = 1024
"""Of the trainer's matrices, which are square."""
WORDS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
WARMUP = 2
"""Rounds that aren't counted: memory is much slower when it is touched for the first time."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        case: what was measured, dtype included.
        seconds: median.
        nbytes: that took so long; None where a rate would mean nothing.
        limit: what it is held against, in words with its own figure.
        ratio: to the limit.
        at_least, at_most: what the ratio is wanted to be; None for a line that only tells.
    """

    case: str
    seconds: float | None = None
    nbytes: int | None = None
    limit: str = ""
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the ratio is within its bound; None where it has none."""
        if self.ratio is None or (self.at_least is None and self.at_most is None):
            return None
        return self.ratio >= self.at_least if self.at_least is not None else self.ratio <= (self.at_most or 0.0)


class Peer:
    """An object in a process of its own, whose methods are called by name. Several peers can work concurrently."""

    def __init__(self, make: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> None:
        """Start making it; the first answer waits for that.

        Args:
            make: the class.
            arguments: for it.
            environment: variables of the process, there before anything is imported.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, arguments))
        self._is_made = False
        with _environment({"OMP_NUM_THREADS": "1"} | dict(environment or {})):
            self._process.start()
        there.close()

    def ask(self, method: str, *arguments: Any) -> None:
        """Call a method; :meth:`answer` has its result."""
        self._pipe.send((method, arguments))

    def answer(self) -> Any:
        """The result of the previous call.

        Raises:
            RuntimeError: it raised, ended or didn't answer in time.
        """
        if not self._is_made:
            self._is_made = True
            self._receive()
        return self._receive()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method and wait for its result."""
        self.ask(method, *arguments)
        return self.answer()

    def _receive(self) -> Any:
        if not self._pipe.poll(DEADLINE_S):
            raise RuntimeError(f"process {self._process.pid} did not answer within {DEADLINE_S:g} s")
        try:
            error, result = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"process {self._process.pid} ended without an answer") from None
        if error:
            raise RuntimeError(error)
        return result

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # at the end of its input the process ends
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Any, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    made = None
    try:
        made = make(*arguments)
        pipe.send((None, None))
        while True:
            method, given = pipe.recv()
            try:
                pipe.send((None, getattr(made, method)(*given)))
            except Exception:
                pipe.send((traceback.format_exc(), None))
    except EOFError:
        pass
    except Exception:
        pipe.send((traceback.format_exc(), None))
    finally:
        if hasattr(made, "close"):
            made.close()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class MemoryGauge:
    """A process's resident memory as the kernel counts it: private and shared pages, each page once."""

    def memory(self) -> int:
        """Bytes that are resident now, nothing being under way."""
        gc.collect()
        return _status("VmRSS")

    def forget_peak(self) -> None:
        """Reset the peak of :meth:`peak`."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Largest resident memory since :meth:`forget_peak`, in bytes."""
        return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@dataclass(frozen=True)
class Workload:
    """The weights to sync.

    Attributes:
        nbytes: about the size of the model.
        dtype: of its tensors, and of the generators.
        bucket_bytes: size of a bucket.
    """

    nbytes: int
    dtype: str
    bucket_bytes: int

    def tensors(self) -> list[Tensor]:
        """Matrices of random bits with the workload's total size."""
        dtype, generator = DTYPES[self.dtype], torch.Generator().manual_seed(0)
        count = max(1, self.nbytes // (WIDTH * WIDTH * dtype.itemsize))
        words = [torch.empty(WIDTH, WIDTH, dtype=WORDS[dtype]).random_(generator=generator) for _ in range(count)]
        return [each.view(dtype) for each in words]


class Trainer(MemoryGauge):
    """Holds tensors like a trainer, changes and publishes them."""

    def __init__(
        self, module: nn.Module, dtype: str, bucket_bytes: int, has_delta: bool = False, is_encrypted: bool = True
    ) -> None:
        self._words = [each.data.view(WORDS[each.dtype]).view(-1) for each in module.parameters()]
        self._source = PolicyPartSource(module_tensors(module, dtype), gather_bytes=bucket_bytes)
        small = nn.Linear(64, 64, bias=False, dtype=DTYPES[dtype])
        self._small = PolicyPartSource(module_tensors(small, dtype), gather_bytes=bucket_bytes)
        self._random = torch.Generator().manual_seed(1)
        self.publisher = WeightPublisher(bucket_bytes=bucket_bytes, has_delta=has_delta, is_encrypted=is_encrypted)

    @classmethod
    def of(cls, workload: Workload, has_delta: bool = False, is_encrypted: bool = True) -> Trainer:
        """A trainer of random matrices."""
        parameters = [nn.Parameter(tensor, requires_grad=False) for tensor in workload.tensors()]
        module = nn.ParameterList(parameters)
        return cls(module, workload.dtype, workload.bucket_bytes, has_delta, is_encrypted)

    def change(self, share: float) -> None:
        """Change words: a share of them at random positions, or all."""
        for words in self._words:
            if share < 1:
                count = int(share * len(words))
                where = torch.randint(len(words), (count,), generator=self._random)
                words[where] ^= torch.randint(1, 128, (count,), generator=self._random, dtype=words.dtype)
            else:  # an odd sum and an odd factor leave no word as it was, and the differences look random
                words.mul_(-25_189).add_(12_345)

    def publish(self, version: int, is_small: bool = False) -> tuple[WeightsOffer, float, float]:
        """The offer, with start and end time of publishing."""
        started = time.perf_counter()
        offer = self.publisher.publish(version, self._small if is_small else self._source)
        return offer, started, time.perf_counter()

    def address(self) -> str:
        """Its address, "address:port"."""
        return self.publisher.endpoint.removeprefix("tcp://")

    def egress_bytes(self) -> int:
        """Bytes sent over the network since the start."""
        return self.publisher.server.egress_bytes

    def close(self) -> None:
        self.publisher.stop()


@dataclass(frozen=True)
class Arrival:
    """A generator's report that it has a version.

    Attributes:
        ended: when it had it, checked, and loaded if it has an engine.
        route: by which way it came.
        received_bytes: over the network.
        parts: seconds of an engine's `transfer`, `load` and `pause`.
    """

    ended: float
    route: str
    received_bytes: int
    parts: dict[str, float] = field(default_factory=dict)


class Sink(MemoryGauge):
    """A generator without a vLLM engine: it receives and checks."""

    def __init__(self, name: str, maps_memory: bool) -> None:
        self._receiver = WeightReceiver(name, ReceiverSettings(maps_memory=maps_memory))

    def receive(self, offer: WeightsOffer) -> Arrival:
        """Get a version."""
        received = self._receiver.receive(offer, DEADLINE_S)
        ended = time.perf_counter()
        is_on_disk = any(part.held.memory.is_on_disk for part in received.parts)
        self._receiver.loaded(received)
        if is_on_disk:
            raise RuntimeError("the version was put on disk for lack of memory. Set a smaller --gib.")
        return Arrival(ended, received.route, received.received_bytes)

    def close(self) -> None:
        self._receiver.close()


@dataclass
class Sync:
    """A trainer and its generators, which sync one version after the other."""

    trainer: Peer
    sinks: Sequence[Peer]
    version: int = field(default=0, init=False)

    def once(
        self, route: str, *, share: float = 1.0, count: int | None = None, endpoint: str | None = None
    ) -> dict[str, float]:
        """Change, publish, receive.

        Args:
            route: by which the generators must have got it.
            share: of the words that change.
            count: of generators; by default all.
            endpoint: where to reach the publisher; by default directly.
        Returns:
            `seconds` from the start of publishing until the last one has it checked, the same in its parts `gather` and
            `receive`, `received`, `egress` (bytes) and `changed` (share of the words), and the first engine's parts.
        """
        self.version += 1
        sinks = self.sinks[:count]
        self.trainer.call("change", share)
        before = self.trainer.call("egress_bytes")
        offer, started, published = self.trainer.call("publish", self.version)
        if endpoint is not None:
            offer = replace(offer, endpoint=endpoint)
        for sink in sinks:
            sink.ask("receive", offer)
        arrivals = [sink.answer() for sink in sinks]
        if self.version > 1 and {arrival.route for arrival in arrivals} != {route}:
            raise RuntimeError(f"version {self.version} came by route {[a.route for a in arrivals]}, not by {route}")
        ended = max(arrival.ended for arrival in arrivals)
        return {
            "seconds": ended - started,
            "gather": published - started,
            "receive": ended - published,
            "received": float(sum(arrival.received_bytes for arrival in arrivals)),
            "egress": float(self.trainer.call("egress_bytes") - before),
            "changed": offer.changed_share or 0.0,
            **arrivals[0].parts,
        }


def interleaved(rounds: Mapping[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of what each round measures. Every repeat goes through all of them, so that noise hits all alike."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in rounds}
    for repeat in range(WARMUP + repeats):
        for name, measure in rounds.items():
            figures = measure()
            if repeat >= WARMUP:
                found[name].append(figures)
    return {
        name: {key: statistics.median(figures[key] for figures in all_figures) for key in all_figures[0]}
        for name, all_figures in found.items()
    }


def starting(stack: contextlib.ExitStack, make: Callable[..., Any], *arguments: Any, **options: Any) -> Peer:
    """A peer that is stopped by the exit stack."""
    return stack.enter_context(Peer(make, *arguments, **options))


def starting_generator(stack: contextlib.ExitStack, make: Callable[..., Any], *arguments: Any) -> Peer:
    """The same in the environment of a generator's process, in which freed memory is kept."""
    return starting(stack, make, *arguments, environment=engine_environment(GeneratorConfig()))
