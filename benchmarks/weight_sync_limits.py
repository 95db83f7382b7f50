"""Limits and alternatives for weight sync: plain copies, raw ZeroMQ, files of safetensors, Ray's object store."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
import zmq
from numpy.typing import NDArray
from torch import Tensor
from weight_sync_processes import WORDS, Workload

LOOPBACK = "127.0.0.1"
HERE = Path(__file__).resolve().parent


class Copier:
    """One end of a plain copy through shared memory: private bytes into it, or out of it, with all pages faulted in."""

    def __init__(self, nbytes: int, name: str) -> None:
        self._shared = shared_memory.SharedMemory(name)
        self._content: NDArray[np.uint8] | None = np.frombuffer(self._shared.buf, np.uint8, nbytes)
        self._private = np.random.default_rng(0).integers(0, 255, nbytes, np.uint8)

    def copy_in(self) -> tuple[float, float]:
        """Start and end time."""
        assert self._content is not None
        started = time.perf_counter()
        np.copyto(self._content, self._private)
        return started, time.perf_counter()

    def copy_out(self) -> tuple[float, float]:
        """Start and end time."""
        assert self._content is not None
        started = time.perf_counter()
        np.copyto(self._private, self._content)
        return started, time.perf_counter()

    def close(self) -> None:
        self._content = None
        self._shared.close()


class RawServer:
    """Answers a number with that message of a range of bytes, without copying or reading it."""

    def __init__(self, nbytes: int, message_bytes: int, is_encrypted: bool) -> None:
        content = memoryview(np.random.default_rng(0).integers(0, 255, nbytes, np.uint8))
        self._messages = [content[start : start + message_bytes] for start in range(0, nbytes, message_bytes)]
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self.key = b""
        if is_encrypted:
            self.key, secret = zmq.curve_keypair()
            self._socket.curve_server = True
            self._socket.curve_secretkey = secret
        self._port = self._socket.bind_to_random_port(f"tcp://{LOOPBACK}")
        threading.Thread(target=self._answer, daemon=True).start()

    def where(self) -> tuple[str, bytes, int]:
        """Address, key and number of messages."""
        return f"tcp://{LOOPBACK}:{self._port}", self.key, len(self._messages)

    def _answer(self) -> None:
        while True:
            client, number = self._socket.recv_multipart()
            self._socket.send_multipart([client, self._messages[int(number)]], copy=False)


class RawClient:
    """Receives and discards every message, with as many in flight as in our own receiver."""

    def __init__(self, address: str, key: bytes, messages: int, window: int) -> None:
        self._messages = messages
        self._window = window
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        if key:
            self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
            self._socket.curve_serverkey = key
        self._socket.connect(address)

    def receive(self) -> tuple[int, float]:
        """Received bytes and seconds."""
        started, received = time.perf_counter(), 0
        for number in range(min(self._window, self._messages)):
            self._socket.send(b"%d" % number)
        for number in range(self._messages):
            received += len(self._socket.recv(copy=False))
            if number + self._window < self._messages:
                self._socket.send(b"%d" % (number + self._window))
        return received, time.perf_counter() - started

    def close(self) -> None:
        self._context.destroy(linger=0)


class FileWriter:
    """A trainer that writes its tensors to a file."""

    def __init__(self, workload: Workload) -> None:
        self._tensors = {str(index): tensor for index, tensor in enumerate(workload.tensors())}

    def write(self, path: Path) -> float:
        """Start time."""
        from safetensors.torch import save_file

        path.unlink(missing_ok=True)
        started = time.perf_counter()
        save_file(self._tensors, path)
        return started


class FileReader:
    """A generator that reads such a file, every byte once, like our receiver."""

    def read(self, path: Path) -> float:
        """End time."""
        from safetensors.torch import load_file

        read_all([as_words(tensor) for tensor in load_file(path).values()])
        return time.perf_counter()


class RayPair:
    """A trainer and a generator as Ray actors that pass tensors through the object store."""

    def __init__(self, workload: Workload) -> None:
        import ray

        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=max(128 << 20, 3 * workload.nbytes),
        )
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE)))}
        options: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": variables}}
        self._writer: Any = ray.remote(RayWriter).options(**options).remote(workload)
        self._reader: Any = ray.remote(RayReader).options(**options).remote()

    def pass_on(self) -> float:
        """Seconds from the trainer's tensors to the generator's, read once."""
        import ray

        started, references = ray.get(self._writer.put.remote())
        ended: float = ray.get(self._reader.read.remote(references))
        return ended - started

    def close(self) -> None:
        import ray

        ray.shutdown()


class RayWriter:
    """Puts its tensors into the object store as arrays, whose content Ray does not pickle."""

    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(1)
        self._arrays = [as_words(tensor) for tensor in workload.tensors()]

    def put(self) -> tuple[float, list[Any]]:
        """Start time and the object reference, in a list so that Ray passes the reference itself."""
        import ray

        started = time.perf_counter()
        return started, [ray.put(self._arrays)]


class RayReader:
    """Reads the arrays in place."""

    def read(self, references: list[Any]) -> float:
        """End time."""
        import ray

        read_all(ray.get(references[0]))
        return time.perf_counter()


def as_words(tensor: Tensor) -> NDArray[Any]:
    """The same memory as integers; numpy has no bfloat16."""
    words: NDArray[Any] = tensor.detach().view(WORDS[tensor.dtype]).numpy()
    return words


def read_all(arrays: Sequence[NDArray[Any]]) -> list[bytes]:
    """Read every byte once, with our receiver's digest, which runs at memory speed."""
    return [xxhash.xxh3_128_digest(array.reshape(-1).view(np.uint8)) for array in arrays]
