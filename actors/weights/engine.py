"""vLLM's side of a weight update, inside each of the engine's worker processes.

The generator has pulled and checked the version already; here it is mapped from the file and loaded through vLLM's
layerwise reload. Called by vLLM on every worker, in this order, while generation is paused: `start_weight_update`,
`update_weights` (once), `finish_weight_update`.
"""

from __future__ import annotations

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
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.weights.manifest import Manifest
from actors.weights.source import DTYPES

logger = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1


@dataclass
class ZmqInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update says all it needs."""


@dataclass
class ZmqUpdateInfo(WeightTransferUpdateInfo):
    """A received version.

    Attributes:
        manifest: packed manifest.
        path: file with the buckets end to end, on this host.
    """

    manifest: bytes
    path: str


class ZmqWeightTransferEngine(WeightTransferEngine[ZmqInitInfo, ZmqUpdateInfo]):
    """Loads versions that the generator pulled from the trainer."""

    init_info_cls = ZmqInitInfo
    update_info_cls = ZmqUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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

    def receive_weights(self, update_info: ZmqUpdateInfo) -> None:
        """Load every tensor of the version and check that the model took it.

        Raises:
            ValueError: the model has no such parameter, or took fewer than it was given.
        """
        manifest = Manifest.unpack(update_info.manifest)
        with open(update_info.path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(content) < manifest.nbytes:
            raise ValueError(f"{update_info.path} has {len(content)} bytes, the manifest names {manifest.nbytes}")
        given = {tensor.name for tensor in manifest.tensors}
        taken: set[str] = set()
        load_weights: Any = self.model.load_weights
        loaded = load_weights(_taken(_tensors(manifest, content), taken))
        if taken != given:
            raise ValueError(f"the model didn't read {sorted(given - taken)[:5]}")
        if not loaded:
            raise ValueError("the model loaded none of the weights: their names don't fit this architecture")

    def finish_weight_update(self) -> None:
        """Put processed weights in place. vLLM's CPU kernels pack the output head apart from tied embeddings."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
            return
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def _tensors(manifest: Manifest, content: mmap.mmap) -> Iterator[tuple[str, torch.Tensor]]:
    starts = manifest.starts
    for entry in manifest.tensors:
        dtype = DTYPES[entry.dtype]
        start = starts[entry.bucket] + entry.offset
        flat = torch.frombuffer(content, dtype=dtype, count=entry.nbytes // dtype.itemsize, offset=start)
        yield entry.name, flat.reshape(entry.shape)


def _taken(tensors: Iterator[tuple[str, torch.Tensor]], taken: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
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
