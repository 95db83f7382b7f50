"""Ranks of a policy with LoRA adapters as plain processes: two updates, a checkpoint between them, an export."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, distributed

from actors.config import LoraConfig
from actors.trainer.spec import PolicySpec
from rollout.failures import FailureError
from rollout.samples import TrainingSample
from tests import forks

KL_COEFFICIENT = 0.1


@dataclass(frozen=True)
class Task:
    """What the ranks do.

    Attributes:
        resumes: only load the checkpoint in the folder, and make the second update.
    """

    spec: PolicySpec
    samples: list[TrainingSample]
    folder: Path
    resumes: bool = False


@dataclass
class Outcome:
    """What a rank saw. Adapters are whole, by their names in a checkpoint of peft's."""

    initial: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    resumed: dict[str, Tensor]
    merged: dict[str, Tensor]
    base: dict[str, Tensor]
    metrics: list[dict[str, float]]
    log_probs: dict[int, NDArray[np.float32]]
    refusal: str


def run_ranks(task: Task) -> list[Outcome]:
    """The outcome of each rank."""
    from actors.trainer.deepspeed_engine import open_store

    task.folder.mkdir(parents=True, exist_ok=True)
    count = task.spec.trainer.ranks
    store = open_store(120.0, count)
    outs = [task.folder / f"outcome-{task.resumes}-{rank}.pickle" for rank in range(count)]
    forks.run_ranks(main, [(task, store.port, rank, out) for rank, out in enumerate(outs)], 300)
    return [pickle.loads(out.read_bytes()) for out in outs]


def main(task: Task, port: int, rank: int, out: Path) -> None:
    """One rank, whose outcome is pickled into a file."""
    from actors.trainer.deepspeed_engine import Place
    from actors.trainer.policy_learner import PolicyLearner
    from actors.trainer.policy_weights import adapter_tensors, base_tensors, merged_tensors
    from actors.weights.source import SourceTensor, gathered

    count = task.spec.trainer.ranks
    store = distributed.TCPStore("127.0.0.1", port, count, is_master=False, timeout=timedelta(seconds=120))
    trainer = PolicyLearner(task.spec, Place(rank, count, "cpu", "127.0.0.1", port), store)

    def whole(tensors: list[SourceTensor]) -> dict[str, Tensor]:
        found = {}
        for tensor in tensors:
            with gathered(list(tensor.parameters)):
                found[tensor.name] = tensor.read().clone()
                assert found[tensor.name].shape == tensor.shape
        return found

    def adapters() -> dict[str, Tensor]:
        return whole(adapter_tensors(trainer.module, task.spec.model.precision))

    state = task.folder / "state"
    initial, metrics, refusal = adapters(), [], ""
    if task.resumes:
        trainer.load(state)
        first = adapters()
        metrics.append(trainer.update(task.samples, KL_COEFFICIENT))
        second = resumed = adapters()
    else:
        metrics.append(trainer.update(task.samples, KL_COEFFICIENT))
        first = adapters()
        trainer.save(state)
        metrics.append(trainer.update(task.samples, KL_COEFFICIENT))
        second = adapters()
        trainer.export(task.folder / "export")
        other = task.spec.model.model_copy(update={"lora": LoraConfig(rank=3)})
        trainer.learner.spec = replace(task.spec, model=other)
        try:
            trainer.load(state)
        except FailureError as error:
            refusal = error.failure.message
        trainer.learner.spec = task.spec
        trainer.load(state)
        trainer.update(task.samples, KL_COEFFICIENT)
        resumed = adapters()
    outcome = Outcome(
        initial=initial,
        first=first,
        second=second,
        resumed=resumed,
        merged=whole(merged_tensors(trainer.module, task.spec.model.precision)),
        base=whole(base_tensors(trainer.module, task.spec.model.precision)),
        metrics=metrics,
        log_probs=trainer.log_probs(task.samples),
        refusal=refusal,
    )
    out.write_bytes(pickle.dumps(outcome))
