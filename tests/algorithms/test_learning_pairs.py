"""Every advantage estimator with every policy loss it goes with learns a bandit and a small sequence task to its known
optimum; every other pair is refused with the reason.

The policy is a table: logits for each prompt and each prefix of tokens. Samples are one batch old, each batch is
learned from twice, and advantages, marks and the loss are made as the trainer makes them. For each loss, all its
estimators learn at the same time, each with a policy and samples of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from algorithms import choices
from algorithms.aggregation import Denominators
from algorithms.config import AlgorithmConfig, CorrectionConfig
from algorithms.estimation import estimate_advantages
from algorithms.inputs import AdvantageInputs, BatchTokens
from algorithms.policy_objective import TokenBatch, policy_objective
from algorithms.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, Need, incompatibility
from algorithms.values import lambda_returns, value_loss

SAMPLES = 64
GROUP_SIZE = 8
SWITCHES = {"grpo_pass_at_k": {"k": 2}}
GROUP_SIZES = {"grpo_winner": 2}
"""The best of 8 is the best answer long before that has a probability of 0.9, and then there is nothing to learn."""
WEIGHTS = torch.tensor([0.5, 0.5], dtype=torch.float64)


def built_in(registry) -> list[str]:  # type: ignore[no-untyped-def]
    return [name for name in registry if registry.get(name).function.__module__.startswith("algorithms.")]


ESTIMATORS = built_in(ADVANTAGE_ESTIMATORS)
LOSSES = built_in(POLICY_LOSSES)


def partners(loss: str) -> list[str]:
    entry = POLICY_LOSSES.get(loss)
    return [name for name in ESTIMATORS if incompatibility(ADVANTAGE_ESTIMATORS.get(name), entry) is None]


PAIRED = [loss for loss in LOSSES if partners(loss)]
REFUSED = [(estimator, loss) for loss in LOSSES for estimator in ESTIMATORS if estimator not in partners(loss)]


@dataclass(frozen=True)
class Task:
    """Answers of `length` tokens; two reward components of each answer to each prompt, the best of which is worth 1.

    Attributes:
        components: [prompts, vocabulary ** length, 2] float64; answers in the order of their tokens' digits.
    """

    vocabulary: int
    length: int
    components: Tensor

    @property
    def prompts(self) -> int:
        return len(self.components)

    @property
    def states(self) -> int:
        return sum(self.vocabulary**t for t in range(self.length))

    @property
    def rewards(self) -> Tensor:
        return self.components @ WEIGHTS

    def states_of(self, answers: Tensor) -> Tensor:
        """[...] answers as [..., length] places in the table: the prefix before each token."""
        before = [self.vocabulary**t for t in range(self.length)]
        prefix = [answers // self.vocabulary ** (self.length - t) for t in range(self.length)]
        return torch.stack([sum(before[:t]) + prefix[t] for t in range(self.length)], -1)

    def tokens_of(self, answers: Tensor) -> Tensor:
        return torch.stack(
            [answers // self.vocabulary ** (self.length - 1 - t) % self.vocabulary for t in range(self.length)], -1
        )

    def distribution(self, logits: Tensor) -> Tensor:
        """[..., prompts, states, vocabulary] logits as [..., prompts, answers] probabilities."""
        answers = torch.arange(self.vocabulary**self.length)
        rows = logits.log_softmax(-1)[..., self.states_of(answers), self.tokens_of(answers)]
        return rows.sum(-1).exp()


def bandit() -> Task:
    first = torch.tensor([[0.0, 0.25, 0.5, 0.25, 1.0]], dtype=torch.float64)
    second = torch.tensor([[0.0, 0.0, 0.5, 0.0, 1.0]], dtype=torch.float64)
    return Task(vocabulary=5, length=1, components=torch.stack([first, second], -1))


def sequences() -> Task:
    """Two prompts, each with one right token a position: the share of right tokens, and whether all are."""
    answers = torch.arange(4**3)
    tokens = Task(4, 3, torch.empty(0)).tokens_of(answers)
    right = torch.tensor([[2, 0, 3], [1, 1, 0]])
    hits = (tokens == right[:, None]).double()
    return Task(vocabulary=4, length=3, components=torch.stack([hits.mean(-1), hits.prod(-1)], -1))


@dataclass(frozen=True)
class Rollouts:
    """One batch of one policy: [samples] answers to prompts, and of each of their tokens what the engines know."""

    task: Task
    prompts: Tensor
    group: Tensor
    answers: Tensor
    behaviour: Tensor

    @classmethod
    def draw(cls, task: Task, logits: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        group = torch.arange(SAMPLES) // group_size
        prompts = group % task.prompts
        answers = torch.multinomial(task.distribution(logits)[prompts], 1, generator=generator).squeeze(1)
        rollouts = cls(task, prompts, group, answers, torch.empty(0))
        return replace(rollouts, behaviour=rollouts.log_probs(logits))

    def log_probs(self, logits: Tensor) -> Tensor:
        """[samples, length] log-probabilities of the tokens under a table of logits."""
        table = logits.log_softmax(-1)
        return table[self.prompts[:, None], self.task.states_of(self.answers), self.task.tokens_of(self.answers)]

    def inputs(self, logits: Tensor, values: Tensor, shuffle: Tensor | None = None) -> AdvantageInputs:
        task = self.task
        states = task.states_of(self.answers)
        components = task.components[self.prompts, self.answers]
        components = components if shuffle is None else components[shuffle]
        greedy = task.distribution(logits).argmax(-1)[self.prompts]
        return AdvantageInputs(
            rewards=components @ WEIGHTS,
            group=self.group,
            lengths=torch.full((SAMPLES,), task.length),
            mask=torch.ones(SAMPLES * task.length, dtype=torch.bool),
            components=components,
            is_present=torch.ones_like(components, dtype=torch.bool),
            component_weights=WEIGHTS,
            component_names=("first", "second"),
            greedy_rewards=task.rewards[self.prompts, greedy],
            values=values[self.prompts[:, None], states].flatten(),
            log_probs=self.log_probs(logits).flatten(),
            collision=logits.softmax(-1).square().sum(-1)[self.prompts[:, None], states].flatten(),
        )


class Critic:
    """A table of values, which learns the returns of each batch."""

    def __init__(self, task: Task) -> None:
        self.values = torch.full((task.prompts, task.states), 0.5, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.values], lr=0.1)

    def learn(self, rollouts: Rollouts, inputs: AdvantageInputs) -> None:
        assert inputs.values is not None
        shape = rollouts.behaviour.shape
        found = self.values[rollouts.prompts[:, None], rollouts.task.states_of(rollouts.answers)]
        returns = lambda_returns(inputs).view(shape)
        loss = value_loss(found, inputs.values.view(shape), returns, inputs.mask.view(shape), clip=0.5)
        self.optimizer.zero_grad()
        loss.values.mean().backward()
        self.optimizer.step()


def config_of(estimator: str, loss: str) -> AlgorithmConfig:
    corrects = POLICY_LOSSES.get(loss).corrects_mismatch or not POLICY_LOSSES.get(loss).uses_rollouts
    return AlgorithmConfig(
        advantage=estimator,
        loss=loss,
        aggregation="sequence_mean",
        correction=CorrectionConfig(method="none" if corrects else "token_truncated"),
    )


def marks_of(loss: str, rollouts: Rollouts, advantages: Tensor, proximal: Tensor) -> Tensor:
    entry = POLICY_LOSSES.get(loss)
    if entry.prepare is None:
        return torch.zeros_like(proximal)
    sample = torch.arange(SAMPLES).repeat_interleave(rollouts.task.length)
    mask = torch.ones_like(sample, dtype=torch.bool)
    parts = (advantages, rollouts.behaviour, proximal)
    tokens = BatchTokens(sample, mask, *(part.flatten() for part in parts))
    return entry.prepare(tokens, entry.read_options({})).view(proximal.shape).double()


def trained(task: Task, loss: str, estimators: list[str], batches: int, seed: int, blind: bool = False) -> Tensor:
    """[estimators] expected reward of each policy at the end, exactly; `blind` gives each sample another's reward."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(len(estimators), task.prompts, task.states, task.vocabulary, dtype=torch.float64)
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    critics = [Critic(task) for _ in estimators]
    behaviour = logits.detach().clone()
    for _ in range(batches):
        proximal_logits = logits.detach().clone()
        drawn, parts = [], []
        for index, name in enumerate(estimators):
            rollouts = Rollouts.draw(task, behaviour[index], GROUP_SIZES.get(name, GROUP_SIZE), generator)
            shuffle = torch.randperm(SAMPLES, generator=generator) if blind else None
            inputs = rollouts.inputs(proximal_logits[index], critics[index].values.detach(), shuffle)
            advantages = estimate_advantages(name, inputs, SWITCHES.get(name)).view(rollouts.behaviour.shape)
            if Need.VALUES in ADVANTAGE_ESTIMATORS.get(name).needs:
                critics[index].learn(rollouts, inputs)
            proximal = rollouts.log_probs(proximal_logits[index])
            drawn.append(rollouts)
            marks = marks_of(loss, rollouts, advantages, proximal)
            parts.append((advantages, rollouts.behaviour, proximal, marks))
        advantages, sampled, proximal, marks = (torch.cat(part) for part in zip(*parts, strict=True))
        batch = TokenBatch(torch.ones_like(proximal, dtype=torch.bool), advantages, sampled, proximal, marks=marks)
        behaviour = proximal_logits
        for _ in range(2):
            current = torch.cat([rollouts.log_probs(table) for rollouts, table in zip(drawn, logits, strict=True)])
            # The denominators of one policy's batch: the others learn beside it, not with it.
            denominators = Denominators(SAMPLES * task.length, SAMPLES)
            value, _ = policy_objective(current, None, batch, config_of(estimators[0], loss), denominators, 0.0)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return (task.distribution(logits.detach()) * task.rewards).sum(-1).mean(-1)


@pytest.mark.parametrize("loss", PAIRED)
def test_every_estimator_that_goes_with_the_loss_learns_the_bandit(loss: str) -> None:
    estimators = partners(loss)
    assert float(bandit().rewards.mean()) < 0.4
    found = dict(zip(estimators, trained(bandit(), loss, estimators, batches=25, seed=1).tolist(), strict=True))
    assert min(found.values()) > 0.9, found


@pytest.mark.parametrize("loss", PAIRED)
def test_every_estimator_that_goes_with_the_loss_learns_the_sequence(loss: str) -> None:
    estimators = partners(loss)
    assert float(sequences().rewards.mean()) < 0.2
    found = dict(zip(estimators, trained(sequences(), loss, estimators, batches=40, seed=2).tolist(), strict=True))
    assert min(found.values()) > 0.9, found


def test_without_a_reward_of_its_own_no_sample_teaches() -> None:
    found = trained(sequences(), "clip", ["grpo", "rloo", "gae"], batches=40, seed=3, blind=True)
    assert float(found.max()) < 0.6


@pytest.mark.parametrize(("estimator", "loss"), REFUSED)
def test_a_pair_that_makes_no_sense_is_refused_with_the_reason(estimator: str, loss: str) -> None:
    reason = incompatibility(ADVANTAGE_ESTIMATORS.get(estimator), POLICY_LOSSES.get(loss))
    assert reason is not None
    (problem,) = choices.problems(config_of(estimator, loss))
    assert problem.startswith(
        f"algorithm.loss = {loss} can't be combined with algorithm.advantage = {estimator}: {reason}."
    )


def test_sequence_losses_refuse_token_advantages_and_imitation_refuses_them_all() -> None:
    expected = {("gae", "gspo"), ("gae", "gmpo"), ("gae", "topr"), ("reinforce_plus_plus", "gspo")}
    expected |= {(estimator, "nll") for estimator in ESTIMATORS}
    assert expected <= set(REFUSED)
    assert not {("gae", "gspo_token"), ("gae", "clip"), ("grpo", "gspo")} & set(REFUSED)


@pytest.mark.parametrize("loss", PAIRED)
def test_a_pair_that_learns_is_accepted(loss: str) -> None:
    for estimator in partners(loss):
        assert choices.problems(config_of(estimator, loss)) == []


@pytest.mark.parametrize("loss", [name for name in PAIRED if POLICY_LOSSES.get(name).corrects_mismatch])
def test_a_loss_that_weighs_by_the_behaviour_policy_refuses_a_correction(loss: str) -> None:
    (problem,) = choices.problems(AlgorithmConfig(loss=loss))
    assert "would correct the mismatch twice. Set it to none." in problem
