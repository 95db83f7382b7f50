"""One rank of a model under training: plans, optimiser steps, metrics and checkpoints, whatever the objective.

The loss is a sum over the whole optimiser batch with global denominators, so that neither the number of ranks, nor
micro-batches, nor ZeRO change the result. Every rank sees all samples and plans the same split. No Ray here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from actors.config import LoraConfig
from actors.model.batches import expand_prompts
from actors.model.shared_prompts import token_cost
from actors.trainer.deepspeed_engine import DeepSpeedEngine, Place, join
from actors.trainer.micro_batch import MicroBatchMaker
from actors.trainer.objective import Objective
from actors.trainer.passes import Forward, Passes
from actors.trainer.planning import Plan, Together, optimiser_batches, split_batch
from actors.trainer.sample_checks import check_samples
from actors.trainer.schedule import learning_rate
from actors.trainer.spec import LearnerSpec
from algorithms.objective_metrics import ObjectiveMetrics
from rollout.encoding import PromptEncoder
from rollout.failures import PEER_REFUSED, Failure, FailureError, FailureKind
from rollout.media import MediaStore
from rollout.samples import TokenSequence

logger = logging.getLogger(__name__)
T = TypeVar("T")
AnyObjective = TypeVar("AnyObjective", bound=Objective[Any])
STATE_TAG = "state"
LORA_FILE = "lora.json"


class Learner(Generic[AnyObjective]):
    """A model under training on one rank. Every method must be called on all ranks together.

    Attributes:
        objective: what the model learns.
        deepspeed: the DeepSpeed engine around the model.
        encoder: of prompts, from the model's folder.
        applied_steps: optimiser steps so far.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        place: Place,
        store: distributed.Store | None,
        make_objective: Callable[[PromptEncoder], AnyObjective],
    ) -> None:
        """Join the other ranks, and load the model.

        Args:
            store: rank 0's rendezvous store; the other ranks connect to it.
            make_objective: takes the encoder of the model's folder.
        """
        self.spec = spec
        self.place = place
        self.applied_steps = 0
        torch.set_num_threads(spec.trainer.threads)
        torch.manual_seed(spec.seed + place.rank)
        join(place, store, spec.deadlines.collective_s)
        self.encoder = PromptEncoder.from_pretrained(
            spec.model.path, MediaStore(spec.media_folder), spec.model.trust_remote_code
        )
        self.objective = make_objective(self.encoder)
        module = self.objective.load_module()
        if spec.trainer.gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.deepspeed = DeepSpeedEngine(module, spec.trainer, spec.model.precision, place)
        self._token_cost = token_cost(module)
        self._maker = MicroBatchMaker(self.encoder, zero_stage=spec.trainer.zero_stage, device=place.device)

    @property
    def module(self) -> Any:
        """The Hugging Face model; its parameters are sharded under ZeRO-3."""
        return self.deepspeed.module

    def update(self, samples: Sequence[TokenSequence]) -> dict[str, float]:
        """One training step: `updates_per_step` optimiser steps over consecutive parts of the samples.

        An optimiser step whose loss or gradient isn't finite is skipped on all ranks and counted.

        Returns:
            The objective's metrics (means over the optimiser steps that were applied, maxima of maxima), and
            `grad_norm`, `learning_rate`, `skipped_updates`, `seconds`, all under the objective's prefix. The same on
            every rank, but for time.
        Raises:
            FailureError: the samples can't be trained on; nothing has changed.
        """
        started = time.perf_counter()
        metrics = self.train(self.plans(samples))
        return metrics | {f"{self.objective.prefix}/seconds": time.perf_counter() - started}

    def plans(self, samples: Sequence[TokenSequence]) -> list[Plan]:
        """The samples checked and split over optimiser steps, ranks and micro-batches.

        Raises:
            FailureError: as :meth:`update`.
        """
        objective = self.objective
        check_samples(samples, self.encoder.banned_token_ids, objective.columns)
        parts = optimiser_batches(samples, objective.together, self.spec.trainer.updates_per_step)
        return self._agreed(lambda: [self._plan(part, objective.together) for part in parts])

    def train(self, plans: Sequence[Plan]) -> dict[str, float]:
        """The optimiser steps of an update; its metrics as :meth:`update` gives them, without `seconds`."""
        self.module.train()
        reports = [report for plan in plans if (report := self._optimise(plan)) is not None]
        metrics = _merged(reports) | {
            "learning_rate": self._learning_rate(max(0, self.applied_steps - 1)),
            "skipped_updates": float(len(plans) - len(reports)),
        }
        return {f"{self.objective.prefix}/{name}": value for name, value in metrics.items()}

    def each_token(self, sequences: Sequence[TokenSequence], forward: Forward) -> dict[int, NDArray[np.float32]]:
        """What a forward pass gives each completion token of this rank's share: [..., tokens] float32, by index.

        Raises:
            FailureError: a sequence can't be used.
        """
        check_samples(sequences, self.encoder.banned_token_ids)
        return self.passes(self._agreed(lambda: self._plan(sequences, Together.SEQUENCE))).each_token(forward)

    def passes(self, plan: Plan) -> Passes:
        """Forward and backward passes over a plan."""
        return Passes(plan, self.deepspeed, self._maker, self.applied_steps)

    def save(self, folder: Path) -> None:
        """Write everything the next update depends on, for :meth:`load`; all ranks write into the same folder."""
        folder.mkdir(parents=True, exist_ok=True)
        lora = self.spec.model.lora
        state = {"applied_steps": self.applied_steps} | self.objective.state()
        self.deepspeed.save(
            folder, STATE_TAG, state, with_frozen=lora is None
        )  # with adapters, the model folder has it
        if lora is not None and self.place.rank == 0:
            (folder / LORA_FILE).write_text(_identity(lora), encoding="utf-8")
        torch.save(_random_states(self.place), folder / f"random_{self.place.rank}.pt")

    def load(self, folder: Path) -> None:
        """Continue from :meth:`save`, with the same number of ranks, ZeRO stage and adapters.

        Raises:
            FailureError: `checkpoint_unreadable`.
        """
        random_file = folder / f"random_{self.place.rank}.pt"
        if not random_file.exists():
            raise _unreadable(
                f"{folder} holds no state of rank {self.place.rank} of {self.place.world_size}. "
                "Resume with as many trainer ranks as wrote it."
            )
        lora, lora_file = self.spec.model.lora, folder / LORA_FILE
        written = lora_file.read_text(encoding="utf-8") if lora_file.exists() else None
        own = None if lora is None else _identity(lora)
        if written != own:
            raise _unreadable(
                f"{folder} was written with model.lora = {written or 'null'}, and this run has {own or 'null'}. "
                "Resume with the model.lora that wrote it."
            )
        state = self.deepspeed.load(folder, STATE_TAG, with_frozen=lora is None)
        if state is None:
            raise _unreadable(f"{folder} holds no trainer state to load.")
        self.applied_steps = int(state["applied_steps"])
        self.objective.restore(state)
        _restore_random_states(torch.load(random_file, weights_only=True), self.place)

    def _learning_rate(self, step: int) -> float:
        trainer = self.spec.trainer
        return learning_rate(step, self.spec.total_updates, trainer.learning_rate, trainer.schedule)

    def _plan(self, samples: Sequence[TokenSequence], together: Together) -> Plan:
        split = split_batch(
            samples,
            together=together,
            ranks=self.place.world_size,
            max_tokens=self.spec.trainer.micro_batch_tokens,
            token_cost=self._token_cost,
        )
        own = split.ranks[self.place.rank]
        indices = sorted(index for micro_batch in own for row in micro_batch for index in row)
        prompts = expand_prompts([samples[index] for index in indices], self.encoder)
        return Plan(
            samples,
            own,
            rounds=max(map(len, split.ranks)),
            prompts=dict(zip(indices, prompts, strict=True)),
            padding_share=split.padding_share,
        )

    def _agreed(self, action: Callable[[], T]) -> T:
        """Run what may fail on one rank only, and fail on all, so that none waits for another in a collective."""
        failure: FailureError | None = None
        try:
            result = action()
        except FailureError as error:
            failure = error
        has_failed = torch.tensor([failure is not None], dtype=torch.int32, device=self.place.device)
        distributed.all_reduce(has_failed, op=distributed.ReduceOp.MAX)
        if failure is not None:
            raise failure
        if has_failed.item():
            raise FailureError(Failure(FailureKind.BUG, PEER_REFUSED, "another trainer rank refused the samples"))
        return result

    def _optimise(self, plan: Plan) -> dict[str, float] | None:
        """One optimiser step; its metrics, or None where it was skipped."""
        batch = self.objective.prepare(plan.samples)
        if batch is None:
            logger.warning("optimiser step skipped: its %d samples have nothing to learn from", len(plan.samples))
            return None
        parts, described = self.objective.gradient(self.passes(plan), batch)
        norm = self.deepspeed.step(self._learning_rate(self.applied_steps))
        totals = self._totals(parts, is_complete=len(parts) == plan.rounds)
        if norm is None or totals is None:
            logger.warning("optimiser step skipped: its loss or gradient isn't finite")
            return None
        self.applied_steps += 1
        return self.objective.after_step(*totals) | described | {"grad_norm": norm}

    def _totals(
        self, parts: Sequence[ObjectiveMetrics], *, is_complete: bool
    ) -> tuple[dict[str, float], dict[str, float]] | None:
        """Sums and maxima over micro-batches and ranks; None where a rank's parts aren't complete."""
        complete = torch.tensor([is_complete], dtype=torch.int32, device=self.place.device)
        distributed.all_reduce(complete, op=distributed.ReduceOp.MIN)
        if not complete.item():
            return None
        sums = {name: sum(float(part.sums[name]) for part in parts) for name in parts[0].sums}
        maxima = {name: max(float(part.maxima[name]) for part in parts) for name in parts[0].maxima}
        return self._over_ranks(sums, distributed.ReduceOp.SUM), self._over_ranks(maxima, distributed.ReduceOp.MAX)

    def _over_ranks(self, values: dict[str, float], op: Any) -> dict[str, float]:
        names = sorted(values)
        tensor = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.place.device)
        distributed.all_reduce(tensor, op=op)
        return dict(zip(names, tensor.tolist(), strict=True))


def _merged(reports: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of several optimiser steps: the mean, or the maximum of what is a maximum."""
    if not reports:
        return {}
    return {
        name: max(report[name] for report in reports)
        if name.startswith("max_")
        else sum(report[name] for report in reports) / len(reports)
        for name in reports[0]
    }


def _identity(lora: LoraConfig) -> str:
    """What of the adapters' settings a checkpoint depends on."""
    return lora.model_dump_json(include={"rank", "alpha", "targets", "use_rslora"})


def _unreadable(why: str) -> FailureError:
    return FailureError(Failure(FailureKind.DATA, "checkpoint_unreadable", why))


def _random_states(place: Place) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if place.device == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Tensor], place: Place) -> None:
    torch.set_rng_state(states["cpu"])
    if place.device == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
