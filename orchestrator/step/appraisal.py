"""Turns scored groups into training samples with advantages, and computes the metrics of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algorithms import choices
from algorithms.constraints import ConstrainedOptions, LagrangeMultipliers
from algorithms.estimation import estimate_advantages, weigh_by_difficulty
from algorithms.inputs import AdvantageInputs
from algorithms.kl import kl_token_rewards
from algorithms.registry import ADVANTAGE_ESTIMATORS, REWARD_COMBINATIONS, Need
from algorithms.reward_combination import CombinationInputs, combine_rewards, component_means
from algorithms.shaping import ShapingInputs, informative_groups, overlong_filter, shape_rewards
from algorithms.values import lambda_returns
from orchestrator.config.schema import Config
from reward.returned_values import component_labels
from reward.verifiers import extract
from rollout.samples import Completion, FinishReason, Score, ScoredGroup, TrainingSample


@dataclass(frozen=True)
class Appraisal:
    """The result of appraising one batch.

    Attributes:
        samples: with advantages.
        metrics: of rewards and multipliers.
        component_means: mean reward by component, from which multipliers are updated.
    """

    samples: list[TrainingSample]
    metrics: dict[str, float]
    component_means: dict[str, float]


@dataclass(frozen=True)
class Components:
    """Rewards by component: [samples, components] each.

    Attributes:
        names: of the columns; a dict's entries are columns of their own ("function/key").
        values: float64, 0 where there is none.
        is_present: bool.
        weights: [components] float64.
    """

    names: tuple[str, ...]
    values: Tensor
    is_present: Tensor
    weights: Tensor


def as_samples(groups: Sequence[ScoredGroup]) -> list[TrainingSample]:
    """Every completion as a training sample whose advantages are still 0, group after group."""
    return [
        TrainingSample(
            prompt=group.prompt,
            prompt_token_ids=group.generation.prompt_token_ids,
            token_ids=completion.token_ids,
            loss_mask=np.ones(len(completion), dtype=np.bool_),
            advantages=np.zeros(len(completion), dtype=np.float32),
            behaviour_log_probs=completion.log_probs,
            policy_versions=completion.policy_versions,
        )
        for group in groups
        for completion in group.generation.completions
    ]


def with_reference(samples: Sequence[TrainingSample], log_probs: Sequence[NDArray[np.float32]]) -> list[TrainingSample]:
    """The samples with the reference model's log-probabilities, one [tokens] array each."""
    return [replace(s, reference_log_probs=r) for s, r in zip(samples, log_probs, strict=True)]


def with_hidden_states(
    samples: Sequence[TrainingSample], hidden: Sequence[NDArray[np.float16 | np.float32]]
) -> list[TrainingSample]:
    """The samples with the reference model's hidden states, one [tokens, width] array each."""
    return [replace(s, reference_hidden=h) for s, h in zip(samples, hidden, strict=True)]


def with_proximal(samples: Sequence[TrainingSample], log_probs: Sequence[NDArray[np.float32]]) -> list[TrainingSample]:
    """The samples with the trainer's own log-probabilities at the start of the update."""
    return [replace(s, proximal_log_probs=p) for s, p in zip(samples, log_probs, strict=True)]


def with_values(samples: Sequence[TrainingSample], values: Sequence[NDArray[np.float32]]) -> list[TrainingSample]:
    """The samples with the critic's values."""
    return [replace(s, values=v) for s, v in zip(samples, values, strict=True)]


def components_of(scores: Sequence[Score], weights: dict[str, float]) -> Components:
    """The rewards of completions by component.

    Args:
        weights: by the label of the component in the recipe.
    Raises:
        ValueError: a reward belongs to no component of the recipe; names it.
    """
    parts = [score.components for score in scores]
    names = tuple(sorted({name for part in parts for name in part}))
    table = np.array([[part.get(name, np.nan) for name in names] for part in parts], dtype=np.float64)
    is_present = ~np.isnan(table.reshape(len(parts), len(names)))
    return Components(
        names,
        torch.from_numpy(np.where(is_present, table.reshape(is_present.shape), 0.0)),
        torch.from_numpy(is_present),
        torch.tensor([_weight_of(name, weights) for name in names], dtype=torch.float64),
    )


def _weight_of(name: str, weights: dict[str, float]) -> float:
    """The weight of the component that a reward, or an entry of its dict ("function/key"), belongs to."""
    for label in sorted(weights, key=len, reverse=True):
        if name == label or name.startswith(f"{label}/"):
            return weights[label]
    raise ValueError(f"the reward {name!r} belongs to none of reward.components: {', '.join(weights)}")


class Appraiser:
    """Computes advantages from rewards as the recipe says: combination, shaping, KL, estimator, weighting."""

    def __init__(self, config: Config, multipliers: dict[str, float] | None = None) -> None:
        """The appraiser of a run.

        Args:
            config: the recipe; the user's own methods must have been imported.
            multipliers: state of the multipliers of constrained rewards, from a checkpoint.
        """
        self._algorithm = config.algorithm
        self._max_tokens = config.rollout.sampling.max_tokens
        labels = component_labels(config.reward.components)
        self._weights = {label: c.weight for label, c in zip(labels, config.reward.components, strict=True)}
        self._multipliers = self._first_multipliers(multipliers)
        self._advantage_options = ADVANTAGE_ESTIMATORS.get(self._algorithm.advantage).read_options(
            self._algorithm.advantage_options, "algorithm.advantage_options"
        )
        self._critic_trace_decay = config.critic.trace_decay
        self.needs = choices.needs(self._algorithm)

    def _first_multipliers(self, state: dict[str, float] | None) -> LagrangeMultipliers | None:
        algorithm = self._algorithm
        combination = REWARD_COMBINATIONS.get(algorithm.combination)
        options = combination.read_options(algorithm.combination_options, "algorithm.combination_options")
        if not isinstance(options, ConstrainedOptions):
            return None
        multipliers = LagrangeMultipliers.of(options)
        return multipliers.restored(state) if state else multipliers

    def state(self) -> dict[str, float]:
        """The multipliers' state, for a checkpoint."""
        return {} if self._multipliers is None else self._multipliers.state()

    def learned(self, appraisal: Appraisal) -> None:
        """The policy has learned from the batch: update the multipliers by its component means."""
        if self._multipliers is not None:
            self._multipliers = self._multipliers.update(appraisal.component_means)

    def appraise(
        self,
        samples: Sequence[TrainingSample],
        groups: Sequence[ScoredGroup],
        kl_coefficient: float,
        collision: Sequence[NDArray[np.float32]] | None = None,
    ) -> Appraisal:
        """The samples with the advantage of each completion token.

        Where the recipe places the KL in the reward, each token's reward is lowered by the coefficient times its KL to
        the reference, under the distribution it was sampled from.

        Args:
            samples: of all groups' completions, in order, with what the recipe's methods need.
            groups: scored.
            kl_coefficient: the KL's weight, where it is placed in the reward.
            collision: [tokens] each, the sum of squared probabilities at each token, for estimators that need it.
        Raises:
            NonFiniteError: a reward or advantage is NaN or infinite; names the sample.
            ValueError: something that a method needs is missing.
        """
        table = components_of([score for g in groups for score in g.scores], self._weights)
        inputs = self._inputs(samples, groups, table, kl_coefficient, collision)
        multipliers = {} if self._multipliers is None else self._multipliers.values
        metrics = {f"reward/multiplier/{name}": value for name, value in multipliers.items()}
        metrics["reward/combined_mean"] = float(inputs.rewards.mean())
        lengths = inputs.lengths.tolist()
        advantages = self._advantages(inputs).to(torch.float32).split(lengths)
        made = [replace(s, advantages=a.numpy()) for s, a in zip(samples, advantages, strict=True)]
        if Need.VALUES in self.needs:
            discount = getattr(self._advantage_options, "discount", 1.0)
            returns = lambda_returns(inputs, discount, self._critic_trace_decay).to(torch.float32).split(lengths)
            made = [replace(s, returns=r.numpy()) for s, r in zip(made, returns, strict=True)]
        if not self._algorithm.train_on_truncated:
            masks = overlong_filter(inputs.mask, inputs.sample, _truncated(_completions(groups))).split(lengths)
            made = [replace(s, loss_mask=m.numpy()) for s, m in zip(made, masks, strict=True)]
        if self._algorithm.gradient_combination is not None:
            made = self._with_objectives(made, inputs, table)
        return Appraisal(made, metrics, component_means(self._table(table, inputs.group)))

    def _inputs(
        self,
        samples: Sequence[TrainingSample],
        groups: Sequence[ScoredGroup],
        table: Components,
        kl_coefficient: float,
        collision: Sequence[NDArray[np.float32]] | None,
    ) -> AdvantageInputs:
        group = torch.tensor([i for i, g in enumerate(groups) for _ in g.scores], dtype=torch.int64)
        mask = torch.from_numpy(np.concatenate([s.loss_mask for s in samples]))
        inputs = AdvantageInputs(
            rewards=torch.zeros(len(samples), dtype=torch.float64),
            group=group,
            lengths=torch.tensor([len(s.token_ids) for s in samples]),
            mask=mask,
            components=table.values,
            is_present=table.is_present,
            component_weights=table.weights,
            component_names=table.names,
            values=_packed(samples, "values") if Need.VALUES in self.needs else None,
            log_probs=_packed(samples, "proximal_log_probs") if Need.PROXIMAL_LOG_PROBS in self.needs else None,
            collision=None if collision is None else torch.from_numpy(np.concatenate(collision)).double(),
            answers=_answers(groups, self._algorithm.answer_pattern),
            token_rewards=self._kl_rewards(samples, mask, kl_coefficient),
        )
        rewards = self._shaped(self._combined(table, group), _completions(groups))
        return replace(inputs, rewards=rewards, greedy_rewards=self._greedy_rewards(groups, group))

    def _table(self, table: Components, group: Tensor) -> CombinationInputs:
        return CombinationInputs(table.values, table.is_present, table.weights, table.names, group, self._multipliers)

    def _combined(self, table: Components, group: Tensor) -> Tensor:
        algorithm = self._algorithm
        return combine_rewards(algorithm.combination, self._table(table, group), algorithm.combination_options)

    def _shaped(self, rewards: Tensor, completions: Sequence[Completion]) -> Tensor:
        if not self._algorithm.shaping:
            return rewards
        lengths = torch.tensor([len(c) for c in completions])
        shaping = ShapingInputs(
            rewards=rewards,
            lengths=lengths,
            is_truncated=_truncated(completions),
            token_ids=torch.from_numpy(np.concatenate([c.token_ids for c in completions])).long(),
            sample=torch.repeat_interleave(torch.arange(len(completions)), lengths),
            max_tokens=self._max_tokens,
        )
        for shape in self._algorithm.shaping:
            shaping = replace(shaping, rewards=shape_rewards(shape.name, shaping, shape.options))
        return shaping.rewards

    def _greedy_rewards(self, groups: Sequence[ScoredGroup], group: Tensor) -> Tensor | None:
        """The greedy completion's reward of each sample's prompt, combined and shaped as the samples' are."""
        if Need.GREEDY_REWARDS not in self.needs:
            return None
        greedy = [g.greedy for g in groups if g.greedy is not None]
        if len(greedy) != len(groups):
            raise ValueError(f"{len(groups) - len(greedy)} of {len(groups)} groups have no greedy completion")
        table = components_of([score for _, score in greedy], self._weights)
        rewards = self._combined(table, torch.arange(len(groups)))
        return self._shaped(rewards, [completion for completion, _ in greedy])[group]

    def _kl_rewards(self, samples: Sequence[TrainingSample], mask: Tensor, coefficient: float) -> Tensor | None:
        kl = self._algorithm.kl
        if kl.placement != "reward" or coefficient == 0.0:
            return None
        if any(sample.reference_log_probs is None for sample in samples):
            raise ValueError("algorithm.kl.placement = reward needs the reference model's log-probabilities")
        behaviour, reference = _packed(samples, "behaviour_log_probs"), _packed(samples, "reference_log_probs")
        return kl_token_rewards(behaviour, reference, coefficient, kl.estimator, mask=mask)

    def _advantages(self, inputs: AdvantageInputs) -> Tensor:
        algorithm = self._algorithm
        advantages = estimate_advantages(
            algorithm.advantage,
            inputs,
            algorithm.advantage_options,
            credit=algorithm.credit,
            turn_discount=algorithm.turn_discount,
        )
        return weigh_by_difficulty(advantages, inputs) if algorithm.difficulty_weighting else advantages

    def _with_objectives(
        self, samples: Sequence[TrainingSample], inputs: AdvantageInputs, table: Components
    ) -> list[TrainingSample]:
        """The samples with advantages by component, each estimated as if it were the only reward."""
        rows = []
        for index, name in enumerate(table.names):
            if not bool(table.is_present[:, index].all()):
                missing = int((~table.is_present[:, index]).nonzero()[0])
                raise ValueError(
                    f"algorithm.gradient_combination needs every reward component of every sample, and sample "
                    f"{missing} has no {name}. Return it for all, or use algorithm.combination instead."
                )
            rewards = table.values[:, index] * table.weights[index]
            rows.append(self._advantages(replace(inputs, rewards=rewards)))
        by_sample = torch.stack(rows).to(torch.float32).split(inputs.lengths.tolist(), dim=1)
        rewards = (table.values * table.weights).to(torch.float32)
        return [
            replace(s, objective_advantages=a.numpy(), objective_rewards=r.numpy())
            for s, a, r in zip(samples, by_sample, rewards, strict=True)
        ]


def _completions(groups: Sequence[ScoredGroup]) -> list[Completion]:
    return [completion for group in groups for completion in group.generation.completions]


def _truncated(completions: Sequence[Completion]) -> Tensor:
    """[samples] bool, completions that the token limit cut off."""
    return torch.tensor([completion.finish_reason is FinishReason.LENGTH for completion in completions])


def _packed(samples: Sequence[TrainingSample], name: str) -> Tensor:
    """A column of all samples' tokens end to end, [tokens] float64."""
    missing = sum(getattr(sample, name) is None for sample in samples)
    if missing:
        raise ValueError(f"{missing} of {len(samples)} samples have no {name}, which the recipe's methods need")
    return torch.from_numpy(np.concatenate([getattr(sample, name) for sample in samples])).double()


def _answers(groups: Sequence[ScoredGroup], pattern: str | None) -> Tensor:
    """[samples] int64, equal for completions that give the same answer; -1 where none can be read."""
    known: dict[str, int] = {}
    found = [extract(c.text, pattern) for g in groups for c in g.generation.completions]
    return torch.tensor([-1 if text is None else known.setdefault(text, len(known)) for text in found])


def batch_metrics(groups: Sequence[ScoredGroup], version: int) -> dict[str, float]:
    """Rewards, lengths and staleness of a batch. `version` is the policy version that learns from it."""
    group = torch.tensor([i for i, g in enumerate(groups) for _ in g.scores])
    flat = np.array([s.value for g in groups for s in g.scores], dtype=np.float64)
    completions = [c for g in groups for c in g.generation.completions]
    lengths = np.array([len(c) for c in completions], dtype=np.float64)
    oldest = np.array([version - int(c.policy_versions.min(initial=version)) for c in completions], dtype=np.float64)
    newest = np.array([version - int(c.policy_versions.max(initial=version)) for c in completions], dtype=np.float64)
    metrics = {
        "reward/mean": float(flat.mean()),
        "reward/std": float(flat.std()),
        "reward/min": float(flat.min()),
        "reward/max": float(flat.max()),
        "reward/equal_groups_share": 1.0 - float(informative_groups(torch.from_numpy(flat), group).double().mean()),
        "rollout/groups": float(len(groups)),
        "rollout/completions": float(len(completions)),
        "rollout/tokens": float(lengths.sum()),
        "rollout/mean_tokens": float(lengths.mean()),
        "rollout/max_tokens": float(lengths.max()),
        "rollout/truncated_share": float(np.mean([c.finish_reason is FinishReason.LENGTH for c in completions])),
        "rollout/staleness": float(oldest.mean()),
        "rollout/max_staleness": float(oldest.max()),
        "rollout/min_staleness": float(newest.min()),
    }
    names = sorted({name for g in groups for s in g.scores for name in s.components})
    for name in names:
        values = [s.components[name] for g in groups for s in g.scores if name in s.components]
        metrics[f"reward/component/{name}"] = float(np.mean(values))
    return metrics
