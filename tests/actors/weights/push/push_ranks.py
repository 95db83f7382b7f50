"""Pushes from two trainer ranks under ZeRO-3, one of which fails in the middle.

Rank 0 writes the result: what the generator held after the push that succeeded, and what became of each push.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from actors.config import ModelConfig, TrainerConfig
from actors.model.loading import load_model
from actors.trainer.deepspeed_engine import DeepSpeedEngine, Place, join
from actors.weights.push.sender import DeviceSender, PushSettings
from actors.weights.source import module_tensors
from tests.actors.weights.push.push_peer import PeerTarget

RANKS = 2
FAILS_AT = "model.layers.0.mlp.down_proj.weight"


def fail() -> None:
    raise RuntimeError("out of memory")


def main(folder: Path, port: int, rank: int, out: Path) -> None:
    """One rank: a model's folder, the store's port, the rank, a file for the result."""
    torch.set_num_threads(1)
    place = Place(rank, RANKS, "cpu", "127.0.0.1", port)
    deadline = timedelta(seconds=120)
    store = distributed.TCPStore("127.0.0.1", port, RANKS, is_master=False, timeout=deadline)
    join(place, store, 120.0)
    trainer = TrainerConfig(zero_stage=3, steps=1)
    engine = DeepSpeedEngine(load_model(ModelConfig(path=folder, precision="float32")), trainer, "float32", place)
    tensors = module_tensors(engine.module, "bfloat16")
    settings = PushSettings("nccl", "127.0.0.1", 30.0, gather_bytes=100_000, buffer_bytes=150_000)
    sender = DeviceSender(tensors, settings, rank=place.rank, device=torch.device("cpu"))
    result: dict[str, Any] = {}
    for name in ("well", "ill", "well again"):
        targets = [PeerTarget(name)] if place.rank == 0 else []
        if name == "ill":
            targets and targets[0].when(FAILS_AT, fail)
        report = sender.push(1, targets)
        if report is not None:
            (held,) = targets[0].ask("held")
            result[name] = (report.is_whole, str(report), held)
            targets[0].stop()
    sender.close()
    distributed.barrier()
    if place.rank == 0:
        torch.save(result, out)
    sys.stdout.flush()
    os._exit(0)  # threads of the group that was given up may still wait for their peer: C++ would abort over them
