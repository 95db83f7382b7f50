"""vLLM's side of a weight update, inside each of the engine's worker processes.

The generator has received and checked the version already; here it is mapped and loaded through vLLM's layerwise
reload. Called by vLLM on every worker, in this order, while generation is paused: `start_weight_update`,
`update_weights` (once), `finish_weight_update`. :class:`WeightsExtension` adds to the worker what vLLM doesn't offer.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.weights.manifest import Manifest
from actors.weights.source import tensors_in

logger = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1
MADV_POPULATE_READ = 22
PROBE_BYTES = 64 << 20
"""Of the unit matrix by which packed weights are read back, at once."""


@dataclass
class ZmqInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update says all it needs."""


@dataclass
class ZmqUpdateInfo(WeightTransferUpdateInfo):
    """A received version.

    Attributes:
        parts: packed manifest of each part, and the path its bytes are mapped from on this host.
    """

    parts: list[tuple[bytes, str]]


class ZmqWeightTransferEngine(WeightTransferEngine[ZmqInitInfo, ZmqUpdateInfo]):
    """Loads versions that the generator received."""

    init_info_cls = ZmqInitInfo
    update_info_cls = ZmqUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._maps: dict[str, _Mapping] = {}
        _die_with_parent()

    def init_transfer_engine(self, init_info: ZmqInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Make the layers ready to be loaded anew."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load a whole version, or raise; after a failure the layers are put back, but may differ in version."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def prepare(self, paths: list[str]) -> None:
        """Map what will be loaded, and have its pages at hand. Generation may go on."""
        self._maps = {path: self._maps.get(path) or _Mapping(path) for path in paths}
        for mapping in self._maps.values():
            mapping.refresh()

    def receive_weights(self, update_info: ZmqUpdateInfo) -> None:
        """Load every tensor of the version and check that the model took it.

        Raises:
            ValueError: the model has no such parameter, or took fewer than it was given.
        """
        parts = [(Manifest.unpack(packed), path) for packed, path in update_info.parts]
        self.prepare([path for _, path in parts])
        given = {tensor.name for manifest, _ in parts for tensor in manifest.tensors}
        taken: set[str] = set()
        load_weights: Any = self.model.load_weights
        loaded = load_weights(_taken(self._tensors(parts), taken))
        if taken != given:
            raise ValueError(f"the model didn't read {sorted(given - taken)[:5]}")
        if not loaded:
            raise ValueError("the model loaded none of the weights: their names don't fit this architecture")

    def finish_weight_update(self) -> None:
        """Put processed weights in place."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            refresh_tied_heads(self.model)
        else:
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        """Unmap what was loaded last."""
        self._maps.clear()

    def _tensors(self, parts: list[tuple[Manifest, str]]) -> Iterator[tuple[str, Tensor]]:
        for manifest, path in parts:
            yield from tensors_in(manifest, self._maps[path].content)


class WeightsExtension:
    """Added to vLLM's worker class: what a generator asks of its workers besides vLLM's own calls."""

    weight_transfer_engine: Any
    model_runner: Any

    def prepare_weights(self, paths: list[str]) -> None:
        """See :meth:`ZmqWeightTransferEngine.prepare`."""
        self.weight_transfer_engine.prepare(paths)

    def held_digests(self) -> dict[str, str]:
        """A digest of each tensor as the model computes with it, by vLLM's name. Slow: for finding what is wrong."""
        return {name: xxhash.xxh3_128_hexdigest(content) for name, content in held_tensors(self.model_runner.model)}


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each parameter's bytes, in blocks' digests joined; weights that vLLM's CPU kernels keep packed are read back.

    A packed linear layer is applied to the rows of a unit matrix, which gives its weight (and bias) exactly.
    """
    for name, parameter in model.named_parameters(remove_duplicate=True):
        if parameter.numel():
            yield name, _bytes_of(parameter.detach())
    for name, module in model.named_modules():
        packed = getattr(module, "cpu_linear", None)
        width = getattr(module, "input_size_per_partition", None) or getattr(module, "embedding_dim", None)
        if packed is None or width is None:
            continue
        weight = module.weight
        rows = max(1, PROBE_BYTES // (width * weight.dtype.itemsize))
        digest = xxhash.xxh3_128()
        with torch.no_grad():
            for start in range(0, width, rows):
                unit = torch.zeros(min(rows, width - start), width, dtype=weight.dtype)
                unit[torch.arange(len(unit)), torch.arange(start, start + len(unit))] = 1
                digest.update(_bytes_of(packed(unit, weight, getattr(module, "bias", None))))
        yield f"{name}.weight (packed)", digest.digest()


def refresh_tied_heads(model: nn.Module) -> None:
    """Have vLLM's CPU kernels pack the output head again: tied embeddings leave it as it was at the last load."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class _Mapping:
    """A file of weights, mapped as long as it stays the same."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._identity = (-1, -1)
        self.content: Any = b""

    def refresh(self) -> None:
        """Map it (again, if there is another file by that path now)."""
        with open(self._path, "rb") as file:
            found = os.fstat(file.fileno())
            if (found.st_dev, found.st_ino) == self._identity:
                return
            self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._identity = (found.st_dev, found.st_ino)
        with contextlib.suppress(OSError):  # older kernels fault the pages in one by one
            self.content.madvise(MADV_POPULATE_READ)


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def _taken(tensors: Iterator[tuple[str, Tensor]], taken: set[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        taken.add(name)


def _die_with_parent() -> None:
    """An engine process must not outlive a generator that was killed."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        logger.warning("this engine process can't be tied to its parent; it may outlive a killed generator")
    elif os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
