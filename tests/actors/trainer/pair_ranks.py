"""Ranks of a model that learns from pairs, by an objective of the test's own, as plain processes.

Run as a script: a pickled :class:`Task`, the store's port, the rank, a file for the result.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed
from torch.nn.functional import logsigmoid

from actors.model.forward import completion_log_probs
from actors.model.loading import load_model
from actors.trainer.deepspeed_engine import Place, open_store
from actors.trainer.learner import Learner
from actors.trainer.micro_batch import MicroBatch
from actors.trainer.objective import Objective
from actors.trainer.passes import PartialLoss
from actors.trainer.planning import Together
from actors.trainer.spec import LearnerSpec
from algorithms.objective_metrics import ObjectiveMetrics
from rollout.samples import TokenSequence


class PairObjective(Objective[int]):
    """-log sigmoid(log pi(first) - log pi(second)), mean over pairs. Remembers the pairs it has seen and its steps."""

    prefix = "pairs"
    together = Together.PAIR

    def __init__(self, spec: LearnerSpec, banned_token_ids: tuple[int, ...]) -> None:
        self._spec = spec
        self._banned_token_ids = banned_token_ids
        self.seen: list[tuple[int, int]] = []
        self.steps = 0

    def load_module(self) -> Any:
        return load_model(self._spec.model)

    def prepare(self, samples: Sequence[TokenSequence]) -> int | None:
        return len(samples) // 2 or None

    def log_probs(self, model: Any, micro_batch: MicroBatch) -> torch.Tensor:
        return completion_log_probs(
            model, micro_batch.batch, temperature=1.0, banned_token_ids=self._banned_token_ids
        ).log_probs

    def loss(self, model: Any, micro_batch: MicroBatch, batch: int) -> PartialLoss:
        log_probs = self.log_probs(model, micro_batch)
        totals = (log_probs * micro_batch.column("loss_mask", torch.bool)).sum(-1)
        indices = micro_batch.indices
        self.seen += zip(indices[::2], indices[1::2], strict=True)
        first, second = totals[: len(indices)].view(-1, 2).unbind(-1)
        # a filler's total is 0, and so is its part
        loss = -logsigmoid(first - second).sum() / batch + 0.0 * totals.sum()
        correct = (first > second).float().sum() / batch
        return loss, ObjectiveMetrics({"loss": loss.detach(), "accuracy": correct.detach()}, {})

    def after_step(self, sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
        self.steps += 1
        return sums | maxima

    def state(self) -> dict[str, Any]:
        return {"pair_steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        self.steps = state["pair_steps"]


@dataclass(frozen=True)
class Task:
    """What the ranks do: two updates, of which the second is done again from a checkpoint."""

    spec: LearnerSpec
    sequences: list[TokenSequence]
    folder: Path


@dataclass
class Outcome:
    """What a rank saw: metrics of two updates, pairs of the first by micro-batch, log-probabilities of its share."""

    metrics: list[dict[str, float]]
    seen: list[tuple[int, int]]
    steps: list[int]
    log_probs: dict[int, NDArray[np.float32]]
    again: dict[int, NDArray[np.float32]]


def run_ranks(task: Task) -> list[Outcome]:
    """The outcome of each rank."""
    task.folder.mkdir(parents=True, exist_ok=True)
    (task.folder / "task.pickle").write_bytes(pickle.dumps(task))
    count = task.spec.trainer.ranks
    store = open_store(120.0, count)
    outs = [task.folder / f"outcome-{rank}.pickle" for rank in range(count)]
    command = [sys.executable, "-m", "tests.actors.trainer.pair_ranks", task.folder / "task.pickle", str(store.port)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), out],
            cwd=Path(__file__).resolve().parents[3],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count, "\n".join(output[-4000:] for output in outputs)
    return [pickle.loads(out.read_bytes()) for out in outs]


def main() -> None:
    path, port, rank, out = sys.argv[1:]
    task: Task = pickle.loads(Path(path).read_bytes())
    count = task.spec.trainer.ranks
    store = distributed.TCPStore("127.0.0.1", int(port), count, is_master=False, timeout=timedelta(seconds=120))
    learner = Learner(
        task.spec,
        Place(int(rank), count, "cpu", "127.0.0.1", int(port)),
        store,
        lambda encoder: PairObjective(task.spec, encoder.banned_token_ids),
    )
    objective = learner.objective
    metrics = [learner.update(task.sequences)]
    seen, steps = list(objective.seen), [objective.steps]
    learner.save(task.folder / "state")
    metrics.append(learner.update(task.sequences))
    log_probs = learner.each_token(task.sequences, objective.log_probs)
    steps.append(objective.steps)
    learner.load(task.folder / "state")
    steps.append(objective.steps)
    learner.update(task.sequences)
    again = learner.each_token(task.sequences, objective.log_probs)
    Path(out).write_bytes(pickle.dumps(Outcome(metrics, seen, steps, log_probs, again)))


if __name__ == "__main__":
    from tests.actors.trainer import pair_ranks  # so that what it pickles isn't called __main__.Outcome

    pair_ranks.main()
