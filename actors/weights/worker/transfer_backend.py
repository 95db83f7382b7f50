"""The zmq transfer backend: loads a received version inside each of the vLLM engine's worker processes.

The generator has already received and checked the version; here it is mapped and loaded through vLLM's layerwise
reload. vLLM calls, on every worker and while generation is paused: `start_weight_update`, `update_weights` (once),
`finish_weight_update`. A version that was staged before (staging.py) is swapped in instead. :class:`WeightsExtension`
adds the worker methods that vLLM lacks.
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
from concurrent.futures import Future, ThreadPoolExecutor
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
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from actors.weights.manifest import Manifest
from actors.weights.source import tensors_in
from actors.weights.worker.staging import StagedModel, staging_obstacle

logger = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1
MADV_POPULATE_READ = 22
NAMED_IN_ERRORS = 5
UNIT_MATRIX_BYTES = 64 << 20
"""Largest block of the unit matrix with which packed weights are read back."""


@dataclass
class ZmqInitInfo(WeightTransferInitInfo):
    """Empty: every update carries all that it needs."""


@dataclass
class ZmqUpdateInfo(WeightTransferUpdateInfo):
    """A received version.

    Attributes:
        parts: packed manifest of each part, and the path from which its bytes are mapped on this host.
    """

    parts: list[tuple[bytes, str]]

    def __post_init__(self) -> None:
        self.parts = [(bytes(packed), str(path)) for packed, path in self.parts]  # a message carries them as lists


class ZmqTransferBackend(WeightTransferEngine[ZmqInitInfo, ZmqUpdateInfo]):
    """Loads versions that the generator has received."""

    init_info_cls = ZmqInitInfo
    update_info_cls = ZmqUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._maps: dict[str, _Mapping] = {}
        self._stager = ThreadPoolExecutor(1, "weights-stager")
        self._staging: tuple[ZmqUpdateInfo, Future[StagedModel]] | None = None
        self._is_in_place = True
        _die_with_parent()

    def init_transfer_engine(self, init_info: ZmqInitInfo) -> None:
        """Does nothing: there is no connection to set up."""

    def start_weight_update(self) -> None:
        """Does nothing: only the update tells whether the version was staged."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load a whole version, or raise. After a failure the layers are restored, but may hold different versions."""
        info = self.parse_update_info(update_info)
        staged = self._take_staged(info)
        self._is_in_place = staged is None
        if staged is not None:
            staged.swap()
            self._stager.submit(staged.release)  # the former weights: freeing a model's memory takes a while
            return
        initialize_layerwise_reload(self.model)
        try:
            self.receive_weights(info)
        except BaseException:
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def stage(self, update_info: dict[str, Any]) -> str | None:
        """Start staging a version while generation runs. Returns the reason where this model cannot be staged."""
        self._discard_staged()
        obstacle = staging_obstacle(self.model)
        if obstacle is None:
            info = self.parse_update_info(update_info)
            self._staging = info, self._stager.submit(self._staged, info)
        return obstacle

    def is_staged(self) -> bool:
        """Whether staging has finished. Raises the exception that it ended with."""
        if self._staging is None:
            return True
        _, future = self._staging
        if not future.done():
            return False
        try:
            future.result()
        except BaseException:
            self._staging = None
            raise
        return True

    def prepare(self, paths: list[str]) -> None:
        """Map the files to be loaded and fault their pages in. Generation may run."""
        self._maps = {path: self._maps.get(path) or _Mapping(path) for path in paths}
        for mapping in self._maps.values():
            mapping.refresh()

    def receive_weights(self, update_info: ZmqUpdateInfo) -> None:
        """Load every tensor of the version and check that the model read it.

        Raises:
            ValueError: the model has no such parameter, or read fewer tensors than the version has.
        """
        self._load_into(self.model, update_info)

    def finish_weight_update(self) -> None:
        """Process the loaded weights for the kernels."""
        if not self._is_in_place:
            return
        for module in self.model.modules():
            info = get_layerwise_info(module)
            if info.can_load() and info.load_numel <= 0:
                info.load_numel_total = 0  # keeps vLLM from warning about layers that the version leaves unchanged
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            refresh_tied_heads(self.model)
        else:
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        """Discard a staged version and unmap the last one."""
        self._discard_staged()
        self._maps.clear()

    def _staged(self, info: ZmqUpdateInfo) -> StagedModel:
        staged = StagedModel(self.model, self.model_config)
        try:
            staged.load(lambda shadow: self._load_into(shadow, info))
        except BaseException:
            staged.release()
            raise
        return staged

    def _discard_staged(self) -> None:
        staging, self._staging = self._staging, None
        if staging is not None:
            staging[1].add_done_callback(_release)

    def _take_staged(self, info: ZmqUpdateInfo) -> StagedModel | None:
        """The staged model, if it holds this version."""
        if self._staging is None or self._staging[0] != info or not self._staging[1].done():
            self._discard_staged()
            return None
        staged, self._staging = self._staging[1].result(), None
        return staged

    def _load_into(self, model: Any, info: ZmqUpdateInfo) -> None:
        parts = [(Manifest.unpack(packed), path) for packed, path in info.parts]
        self.prepare([path for _, path in parts])
        given = {tensor.name for manifest, _ in parts for tensor in manifest.tensors}
        taken: set[str] = set()
        loaded = model.load_weights(_taken(self._tensors(parts), taken))
        if taken != given:
            raise ValueError(f"the model did not read {first_names(sorted(given - taken))}")
        if not loaded:
            raise ValueError("the model loaded no weight: the names do not match this architecture")

    def _tensors(self, parts: list[tuple[Manifest, str]]) -> Iterator[tuple[str, Tensor]]:
        for manifest, path in parts:
            yield from tensors_in(manifest, self._maps[path].content)


class WeightsExtension:
    """Methods added to vLLM's worker class, which the generator calls by name."""

    weight_transfer_engine: Any
    model_runner: Any

    def prepare_weights(self, paths: list[str]) -> None:
        """See :meth:`ZmqTransferBackend.prepare`."""
        self.weight_transfer_engine.prepare(paths)

    def stage_weights(self, update_info: dict[str, Any]) -> str | None:
        """See :meth:`ZmqTransferBackend.stage`."""
        obstacle: str | None = self.weight_transfer_engine.stage(update_info)
        return obstacle

    def is_staged(self) -> bool:
        """See :meth:`ZmqTransferBackend.is_staged`."""
        is_staged: bool = self.weight_transfer_engine.is_staged()
        return is_staged

    def held_digests(self) -> dict[str, str]:
        """Digest of each tensor that the model computes with, by vLLM's name. Slow: used after a disagreement."""
        return {name: xxhash.xxh3_128_hexdigest(content) for name, content in held_tensors(self.model_runner.model)}


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and bytes of each parameter; of weights that vLLM's CPU kernels keep packed, name and digest.

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
        rows = max(1, UNIT_MATRIX_BYTES // (width * weight.dtype.itemsize))
        digest = xxhash.xxh3_128()
        with torch.no_grad():
            for start in range(0, width, rows):
                unit = torch.zeros(min(rows, width - start), width, dtype=weight.dtype)
                unit[torch.arange(len(unit)), torch.arange(start, start + len(unit))] = 1
                digest.update(_bytes_of(packed(unit, weight, getattr(module, "bias", None))))
        yield f"{name}.weight (packed)", digest.digest()


def refresh_tied_heads(model: nn.Module) -> None:
    """Repack output heads for vLLM's CPU kernels: a load leaves tied ones packed from older weights."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class _Mapping:
    """A mapped file of weights, mapped again when the path leads to another file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._identity = (-1, -1)
        self.content: Any = b""

    def refresh(self) -> None:
        """Map the file, if the mapped one is another."""
        with open(self._path, "rb") as file:
            found = os.fstat(file.fileno())
            if (found.st_dev, found.st_ino) == self._identity:
                return
            self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._identity = (found.st_dev, found.st_ino)
        with contextlib.suppress(OSError):  # older kernels fault the pages in one by one
            self.content.madvise(MADV_POPULATE_READ)


def _release(staging: Future[StagedModel]) -> None:
    if staging.exception() is None:
        staging.result().release()


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def _taken(tensors: Iterator[tuple[str, Tensor]], taken: set[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        taken.add(name)


def first_names(names: list[str]) -> str:
    more = len(names) - NAMED_IN_ERRORS
    return ", ".join(names[:NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent, the generator, dies."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        logger.warning("prctl(PR_SET_PDEATHSIG) failed: this vLLM process may outlive a killed generator")
    elif os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
