"""One rank of a model under training, whatever it is trained on: plans, micro-batches, optimiser steps, checkpoints.

The loss is a sum over the whole optimiser batch with global denominators, so that neither the number of ranks, nor
micro-batches, nor ZeRO change the result. Every rank sees all samples and plans the same split; media are processed
only where they are trained on. What the loss is, the policy (trainer.py) and the critic (value_trainer.py) know.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from actors.config import LoraConfig
from actors.model.batches import TOKEN_FEATURES, ModelBatch, expand_prompts, model_batch
from actors.model.shared_prompts import LINEAR_COST, can_share_prompts, model_width
from actors.trainer.deepspeed_engine import DeepSpeedEngine, Place, join
from actors.trainer.schedule import learning_rate
from actors.trainer.spec import LearnerSpec
from algorithms.finite import NonFiniteError
from algorithms.policy_objective import Denominators, ObjectiveMetrics, finish_metrics
from rollout.balance import micro_batches, padding_share, row_lengths, rows_of_prompts, split_over_ranks
from rollout.encoding import ExpandedPrompt, PromptEncoder
from rollout.failures import PEER_REFUSED, Failure, FailureError, FailureKind
from rollout.media import MediaStore
from rollout.prompts import Message, Prompt, TextPart
from rollout.samples import TrainingSample

logger = logging.getLogger(__name__)
T = TypeVar("T")
STATE_TAG = "state"
LORA_FILE = "lora.json"


@dataclass(frozen=True, eq=False)
class Plan:
    """What one rank does with one optimiser batch.

    Attributes:
        samples: the whole batch.
        groups: this rank's micro-batches: rows of indices into it; the samples of a row share its prompt.
        rounds: micro-batches of the rank that has most; the others run fillers, so that collectives match.
        prompts: expanded prompts of this rank's samples, by index.
        padding_share: of all ranks' padded tokens.
    """

    samples: list[TrainingSample]
    groups: list[list[list[int]]]
    rounds: int
    prompts: dict[int, ExpandedPrompt]
    padding_share: float


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A part of a plan that runs through the model at once.

    Attributes:
        indices: into the plan's samples, in the order of the batch's sequences.
        samples: the same samples, and behind them the filler where there is one.
        batch: their tensors, on the model's device.
    """

    indices: list[int]
    samples: list[TrainingSample]
    batch: ModelBatch


PartialLoss = tuple[Tensor, ObjectiveMetrics]
"""A micro-batch's part of a loss and of its metrics."""


class Learner(ABC):
    """The model under training on one rank."""

    def __init__(self, spec: LearnerSpec, place: Place, store: distributed.Store | None = None) -> None:
        self.spec = spec
        self.place = place
        self.applied_steps = 0
        torch.set_num_threads(spec.trainer.threads)
        torch.manual_seed(spec.seed + place.rank)
        join(place, store, spec.deadlines.collective_s)
        self.encoder = PromptEncoder.from_pretrained(
            spec.model.path, MediaStore(spec.media_folder), spec.model.trust_remote_code
        )
        module = self._load_module()
        if spec.trainer.gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.engine = DeepSpeedEngine(module, spec.trainer, spec.model.precision, place)
        self._shares_prompts = can_share_prompts(module)
        self._filler = self.encoder.filler()
        self._token_features = TOKEN_FEATURES & set(self._filler.features)
        self._pad_token_id = self.encoder.tokenizer.pad_token_id or 0

    @abstractmethod
    def _load_module(self) -> Any:
        """The model, with what isn't trained frozen."""

    @property
    def module(self) -> Any:
        """The Hugging Face model; its parameters are sharded under ZeRO-3."""
        return self.engine.module

    def save(self, folder: Path) -> None:
        """Write everything the next update depends on, for :meth:`load`; all ranks write into the same folder."""
        folder.mkdir(parents=True, exist_ok=True)
        lora = self.spec.model.lora
        self.engine.engine.save_checkpoint(
            str(folder),
            tag=STATE_TAG,
            client_state=self._client_state(),
            save_latest=False,
            exclude_frozen_parameters=lora is not None,  # the model folder has them
        )
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
                "Resume with what wrote it."
            )
        path, client_state = self.engine.engine.load_checkpoint(
            str(folder), tag=STATE_TAG, load_module_strict=lora is None
        )
        if path is None:
            raise _unreadable(f"{folder} holds no trainer state to load.")
        self._restore(client_state)
        _restore_random_states(torch.load(random_file, weights_only=True), self.place)

    def _client_state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights, optimiser and random states."""
        return {"applied_steps": self.applied_steps}

    def _restore(self, client_state: dict[str, Any]) -> None:
        self.applied_steps = int(client_state["applied_steps"])

    @property
    def _updates_per_step(self) -> int:
        return self.spec.trainer.updates_per_step

    def _learning_rate(self, step: int) -> float:
        trainer = self.spec.trainer
        return learning_rate(step, self.spec.total_updates, trainer.learning_rate, trainer.schedule)

    def _plan(self, samples: list[TrainingSample]) -> Plan:
        rows, lengths = self._rows(samples)
        shares = split_over_ranks(lengths, self.place.world_size)
        groups = [micro_batches(lengths, share, self.spec.trainer.micro_batch_tokens) for share in shares]
        own = [index for row in shares[self.place.rank] for index in rows[row]]
        prompts = expand_prompts([samples[index] for index in own], self.encoder)
        return Plan(
            samples,
            [[rows[row] for row in group] for group in groups[self.place.rank]],
            rounds=max(map(len, groups)),
            prompts=dict(zip(own, prompts, strict=True)),
            padding_share=padding_share(lengths, [group for rank in groups for group in rank]),
        )

    def _rows(self, samples: list[TrainingSample]) -> tuple[list[list[int]], list[int]]:
        """Rows of samples that share a prompt, and their lengths; the same on every rank."""
        bound = self.spec.trainer.micro_batch_tokens
        prompt_lengths = [len(sample.prompt_token_ids) for sample in samples]
        completion_lengths = [len(sample.token_ids) for sample in samples]
        rows = [[index] for index in range(len(samples))]
        if self._shares_prompts:
            # Rows are what ranks and micro-batches are made of: long ones would balance badly.
            fair = sum(sample.total_tokens for sample in samples) // (2 * self.place.world_size)
            rows = rows_of_prompts(
                [sample.prompt.prompt_id for sample in samples],
                prompt_lengths,
                completion_lengths,
                max_tokens=min(bound, fair),
                token_cost=LINEAR_COST * model_width(self.module),
            )
        return rows, row_lengths(rows, prompt_lengths, completion_lengths)

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

    def _optimise(self, plan: Plan, loss: Callable[[MicroBatch, Denominators], PartialLoss]) -> dict[str, float] | None:
        """One optimiser step; its metrics, or None where it was skipped."""
        denominators = self._denominators(plan)
        if denominators is None:
            return None
        parts = self._backward(plan, lambda micro_batch: loss(micro_batch, denominators))
        return self._step(parts, plan.rounds)

    def _denominators(self, plan: Plan) -> Denominators | None:
        """Sizes of the optimiser batch; None where it has no trained token, so that there is no step to make."""
        tokens = sum(int(sample.loss_mask.sum()) for sample in plan.samples)
        if tokens == 0:
            logger.warning("optimiser step skipped: none of its %d samples has a trained token", len(plan.samples))
            return None
        return Denominators(tokens, sum(bool(sample.loss_mask.any()) for sample in plan.samples))

    def _backward(self, plan: Plan, loss: Callable[[MicroBatch], PartialLoss]) -> list[ObjectiveMetrics]:
        """Gradients of a loss over all micro-batches; the metrics of those whose loss was finite."""
        parts = []
        for turn in range(plan.rounds):
            self.engine.begin_micro_batch(is_last=turn == plan.rounds - 1)
            value, metrics = self._finite(turn, loss, self._micro_batch(plan, turn))
            self.engine.backward(value)
            if metrics is not None:
                parts.append(metrics)
        return parts

    def _finite(
        self, turn: int, loss: Callable[[MicroBatch], PartialLoss], micro_batch: MicroBatch
    ) -> tuple[Tensor, ObjectiveMetrics | None]:
        """A micro-batch's part of the loss. NaN, without metrics, where the model's output isn't finite."""
        try:
            return loss(micro_batch)
        except UnusableOutputError as error:
            logger.warning("rank %d, micro-batch %d: %s", self.place.rank, turn, error)
            # NaN gradients spread to every rank in the reduction, so that all skip the step together.
            return error.outputs.sum() * math.nan, None

    def _step(self, parts: list[ObjectiveMetrics], rounds: int) -> dict[str, float] | None:
        """Apply the gradients; the step's metrics, or None where something in it wasn't finite."""
        norm = self.engine.step(self._learning_rate(self.applied_steps))
        report = self._reduced(parts, complete=len(parts) == rounds)
        if norm is None or report is None:
            logger.warning("optimiser step skipped: its loss or gradient isn't finite")
            return None
        self.applied_steps += 1
        return report | {"grad_norm": norm}

    def _each_token(self, plan: Plan, forward: Callable[[MicroBatch], Tensor]) -> dict[int, NDArray[np.float32]]:
        """What a forward pass gives each completion token, by index of this rank's samples.

        Args:
            forward: returns [..., B, T].
        Returns:
            [..., tokens] float32 by index.
        """
        self.module.eval()
        result: dict[int, NDArray[np.float32]] = {}
        with torch.no_grad():
            for turn in range(plan.rounds):
                micro_batch = self._micro_batch(plan, turn)
                values = forward(micro_batch).float().cpu().numpy()
                for place, index in enumerate(micro_batch.indices):
                    result[index] = values[..., place, : len(micro_batch.samples[place].token_ids)].copy()
        return result

    def _micro_batch(self, plan: Plan, turn: int) -> MicroBatch:
        """Samples and tensors of a micro-batch: this rank's next group, or a filler of zero weight."""
        group = plan.groups[turn] if turn < len(plan.groups) else []
        indices = [index for row in group for index in row]
        samples = [plan.samples[index] for index in indices]
        prompts = [plan.prompts[index] for index in indices]
        rows = [number for number, row in enumerate(group) for _ in row]
        if not group or self._lacks_media(prompts):
            samples.append(_filler_sample(self._filler, self.encoder.stop_token_ids, like=plan.samples[0]))
            prompts.append(self._filler)
            rows.append(len(group))
        batch = model_batch(
            prompts,
            [sample.token_ids for sample in samples],
            pad_token_id=self._pad_token_id,
            token_features=self._token_features,
            rows=rows,
        )
        return MicroBatch(indices, samples, batch.to(self.place.device))

    def _lacks_media(self, prompts: Iterable[ExpandedPrompt]) -> bool:
        """Whether the vision tower would be left out, which ZeRO 2 and 3 can't bear when another rank runs it."""
        return (
            self.spec.trainer.zero_stage >= 2
            and bool(self._filler.features)
            and not any(prompt.features for prompt in prompts)
        )

    def _reduced(self, parts: list[ObjectiveMetrics], *, complete: bool) -> dict[str, float] | None:
        """Parts added up over micro-batches and ranks; None where a rank has none because of NaN."""
        is_complete = torch.tensor([complete], dtype=torch.int32, device=self.place.device)
        distributed.all_reduce(is_complete, op=distributed.ReduceOp.MIN)
        if not is_complete.item():
            return None
        sums = {name: sum(float(part.sums[name]) for part in parts) for name in parts[0].sums}
        maxima = {name: max(float(part.maxima[name]) for part in parts) for name in parts[0].maxima}
        sums = self._over_ranks(sums, distributed.ReduceOp.SUM)
        return finish_metrics(sums, self._over_ranks(maxima, distributed.ReduceOp.MAX))

    def _over_ranks(self, values: dict[str, float], op: Any) -> dict[str, float]:
        names = sorted(values)
        tensor = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.place.device)
        distributed.all_reduce(tensor, op=op)
        return dict(zip(names, tensor.tolist(), strict=True))


class UnusableOutputError(Exception):
    """The model's output isn't finite.

    Attributes:
        outputs: float, carrying the graph: every rank must run its backward pass.
    """

    def __init__(self, outputs: Tensor, error: NonFiniteError) -> None:
        super().__init__(str(error))
        self.outputs = outputs


def _filler_sample(filler: ExpandedPrompt, stop_token_ids: Sequence[int], like: TrainingSample) -> TrainingSample:
    """One untrained token behind the filler prompt, with the same optional columns as the batch it joins."""
    zero = np.zeros(1, np.float32)
    return TrainingSample(
        prompt=Prompt((Message("user", (TextPart("."),)),)),
        prompt_token_ids=filler.token_ids,
        token_ids=np.array(stop_token_ids[:1] or [0], np.int32),
        loss_mask=np.zeros(1, np.bool_),
        advantages=zero,
        behaviour_log_probs=zero,
        policy_versions=np.zeros(1, np.int32),
        reference_log_probs=None if like.reference_log_probs is None else zero,
        reference_hidden=None if like.reference_hidden is None else np.zeros_like(like.reference_hidden[:1]),
        proximal_log_probs=None if like.proximal_log_probs is None else zero,
    )


def merged_reports(reports: list[dict[str, float]]) -> dict[str, float]:
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
