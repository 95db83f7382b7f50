"""The DeepSpeed engine of one rank: process group, configuration, gradients, optimiser step, checkpoints."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor, distributed, nn

from actors.config import Precision, TrainerConfig

Device = Literal["cpu", "cuda"]
REDUCE_BUCKET_ELEMENTS = 50_000_000


@dataclass(frozen=True)
class Place:
    """Where a rank stands among its peers.

    Attributes:
        rank, world_size: of the data-parallel group.
        device: of the model.
        address, port: of rank 0's rendezvous store.
    """

    rank: int
    world_size: int
    device: Device
    address: str
    port: int


class PlainCpuAccelerator(CPU_Accelerator):
    """DeepSpeed's CPU back end without its shared-memory operator.

    That operator serves inference only, but is compiled (tens of seconds) whenever a process group starts.
    """

    def create_op_builder(self, op_name: str) -> Any:
        """An operator's builder, or None for the one left out."""
        return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)


def open_store(deadline_s: float, world_size: int) -> distributed.TCPStore:
    """Rank 0's rendezvous store, listening on a port that the operating system chose, so that none can be in use."""
    return distributed.TCPStore(
        "0.0.0.0", 0, world_size, is_master=True, timeout=timedelta(seconds=deadline_s), wait_for_workers=False
    )


def join(place: Place, store: distributed.Store | None, collective_s: float) -> None:
    """Join the process group: gloo between CPUs, nccl between GPUs.

    Args:
        store: rank 0's own; the other ranks connect to it.
        collective_s: deadline of every collective.
    """
    deadline = timedelta(seconds=collective_s)
    if store is None:
        store = distributed.TCPStore(place.address, place.port, place.world_size, is_master=False, timeout=deadline)
    # DeepSpeed reads these even where it is handed a ready process group. Ray shows an actor only its own GPUs.
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK="0")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if place.device == "cpu":
        set_accelerator(PlainCpuAccelerator())
        backend = "gloo"
    else:
        torch.cuda.set_device(0)
        backend = "nccl"
    distributed.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=deadline)
    deepspeed.init_distributed(backend, timeout=deadline, auto_mpi_discovery=False, verbose=False)


class DeepSpeedEngine:
    """Turns losses into changed weights. Gradients are summed over micro-batches and ranks, not averaged."""

    def __init__(self, module: nn.Module, config: TrainerConfig, precision: Precision, place: Place) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(
            trained, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self._trained = trained
        self._max_grad_norm = config.max_grad_norm
        self._world_size = place.world_size
        # Without ZeRO in float32, DeepSpeed steps a plain torch optimiser, and neither measures the norm nor looks
        # for NaN.
        self._steps_plainly = config.zero_stage == 0 and precision == "float32"
        settings = _settings(module, config, precision, clips=not self._steps_plainly)
        self.model: Any = deepspeed.initialize(model=module, optimizer=optimiser, config=settings)[0]
        """The model as DeepSpeed wraps it. Call it for every forward pass: under ZeRO-3 it gathers the parameters."""

    @property
    def module(self) -> Any:
        """The Hugging Face model; its parameters are sharded under ZeRO-3."""
        return self.model.module

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a rank's part of the loss; the last part of a step also reduces it over ranks."""
        # DeepSpeed averages gradients over ranks; the loss is a sum over them.
        self.model.backward(loss * self._world_size, scale_wrt_gas=False)

    def begin_micro_batch(self, *, is_last: bool) -> None:
        """Say before each forward pass whether it is the step's last."""
        self.model.set_gradient_accumulation_boundary(is_last)

    def step(self, learning_rate: float) -> float | None:
        """Apply the gradients, clipped to the greatest norm allowed.

        Returns:
            Their norm before clipping, or None where it isn't finite: then nothing has changed, on any rank.
        """
        for group in self.model.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._steps_plainly:
            norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._max_grad_norm))
            if not math.isfinite(norm):
                self.model.zero_grad()
                return None
            self.model.step()
            return norm
        self.model.step()
        if self.model.optimizer.overflow:
            return None
        return float(self.model.get_global_grad_norm())

    @property
    def shards_gradients(self) -> bool:
        """Whether each rank holds its own shard of the reduced gradient, rather than all of it."""
        return not self._steps_plainly

    def gradients(self) -> list[Tensor]:
        """This rank's share of the reduced gradient, in place: what is written into it is what :meth:`step` applies.

        Valid after the last micro-batch of a gradient, until it is cleared.
        """
        if self._steps_plainly:
            for parameter in self._trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return [parameter.grad for parameter in self._trained if parameter.grad is not None]
        averaged = self.model.optimizer.averaged_gradients
        return [shard for index in sorted(averaged) for shard in averaged[index]]

    def clear_gradients(self) -> None:
        """Start the next gradient of the same step from zero, on all ranks."""
        if self._steps_plainly:
            self.model.zero_grad()
            return
        optimiser = self.model.optimizer
        for index in optimiser.averaged_gradients:
            optimiser.averaged_gradients[index] = None
            if hasattr(optimiser, "_release_preflattened_grad_buffers"):  # stages 1 and 2
                optimiser._release_preflattened_grad_buffers(index)
        optimiser.zero_grad()

    def save(self, folder: Path, tag: str, client_state: dict[str, Any], *, with_frozen: bool) -> None:
        """Write weights, optimiser and `client_state`; all ranks write into the same folder.

        Args:
            with_frozen: whether frozen weights are written too.
        """
        self.model.save_checkpoint(
            str(folder),
            tag=tag,
            client_state=client_state,
            save_latest=False,
            exclude_frozen_parameters=not with_frozen,
        )

    def load(self, folder: Path, tag: str, *, with_frozen: bool) -> dict[str, Any] | None:
        """Continue from :meth:`save`. Returns its `client_state`, or None where the folder holds no such state."""
        path, client_state = self.model.load_checkpoint(str(folder), tag=tag, load_module_strict=with_frozen)
        return None if path is None else client_state


def _settings(module: nn.Module, config: TrainerConfig, precision: Precision, *, clips: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration. Accumulation boundaries are set by hand, micro-batches being of many sizes."""
    # In bfloat16, DeepSpeed accumulates gradients in float32 from stage 1 on only.
    stage = 1 if config.zero_stage == 0 and precision == "bfloat16" else config.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
        "allgather_bucket_size": REDUCE_BUCKET_ELEMENTS,
    }
    if stage == 3:
        hidden_size = module.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        # Only norms and biases stay whole on every rank.
        zero["stage3_param_persistence_threshold"] = 10 * hidden_size
        zero["stage3_prefetch_bucket_size"] = REDUCE_BUCKET_ELEMENTS
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm if clips else 0.0,
        "bf16": {"enabled": precision == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
