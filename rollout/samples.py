"""Completions, scores, token sequences and training samples. Completions stay token ids; text is never re-tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from rollout.prompts import Prompt


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """An end-of-turn token or a stop condition."""
    LENGTH = "length"
    """The token limit: the completion is truncated."""
    ABORT = "abort"
    """Cancelled by vLLM; never trained on."""


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled answer, as token ids.

    Attributes:
        token_ids: [tokens] int32, the end-of-turn token included where one was sampled.
        log_probs: [tokens] float32, nats, under the distribution each token was really sampled from.
        policy_versions: [tokens] int32, the policy version that sampled each token.
        finish_reason: why it ended.
        text: the decoded completion without special tokens; for rewards and people only, never re-tokenised.
    """

    token_ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    policy_versions: NDArray[np.int32]
    finish_reason: FinishReason
    text: str

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.log_probs) == len(self.policy_versions):
            raise ValueError(
                f"a completion needs one log-probability and one policy version a token; got {len(self.token_ids)} "
                f"tokens, {len(self.log_probs)} log-probabilities, {len(self.policy_versions)} versions"
            )

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Generation:
    """What a generator returns for one prompt.

    Attributes:
        prompt_token_ids: [prompt tokens] int32, media placeholders expanded, exactly as vLLM used them.
        completions: the n samples, in order.
        generator: name of the generator that made them.
        seconds: wall time inside the generator.
    """

    prompt_token_ids: NDArray[np.int32]
    completions: tuple[Completion, ...]
    generator: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Score:
    """What one completion was worth.

    Attributes:
        value: the combined reward, finite.
        components: value by reward component, before weights; finite.
    """

    value: float
    components: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """All samples of one prompt, scored: the unit of advantage estimation.

    Attributes:
        scores: of the generation's completions, in order.
        greedy: the greedy completion of the prompt and its score, where the advantage estimator asks for one.
    """

    group_id: str
    prompt: Prompt
    generation: Generation
    scores: tuple[Score, ...]
    greedy: tuple[Completion, Score] | None = None

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.generation.completions):
            raise ValueError(
                f"group {self.group_id}: {len(self.generation.completions)} completions but {len(self.scores)} scores"
            )


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """A prompt and a completion as token ids. Media travel as references; pixels are made where they are used.

    Attributes:
        prompt: the messages with their media references.
        prompt_token_ids: [prompt tokens] int32, placeholders expanded.
        token_ids: [tokens] int32, the completion.
        loss_mask: [tokens] bool, True where the model is trained (False on tool or environment tokens).
    """

    prompt: Prompt
    prompt_token_ids: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return len(self.prompt_token_ids) + len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSample(TokenSequence):
    """A sequence that the policy sampled, with the columns that reinforcement learning needs.

    Attributes:
        advantages: [tokens] float32.
        behaviour_log_probs: [tokens] float32, of the distribution sampled from.
        policy_versions: [tokens] int32.
        reference_log_probs: [tokens] float32, or None where no reference model takes part.
        reference_hidden: [tokens, width] float16 or float32, what the reference's output head makes the logits of each
            token of, where the exact KL is taken from it; None where it isn't.
        proximal_log_probs: [tokens] float32, the trainer's own at the start of the update, or None to take the
            first forward pass for them (right for one optimiser step a batch).
        objective_advantages: [objectives, tokens] float32, advantages by reward component, where their gradients are
            kept apart; None where they aren't.
        objective_rewards: [objectives] float32, the rewards themselves.
        values: [tokens] float32, the critic's value before each token; None where there is no critic.
        returns: [tokens] float32, the critic's target before each token.
    """

    advantages: NDArray[np.float32]
    behaviour_log_probs: NDArray[np.float32]
    policy_versions: NDArray[np.int32]
    reference_log_probs: NDArray[np.float32] | None = None
    reference_hidden: NDArray[np.float16 | np.float32] | None = None
    proximal_log_probs: NDArray[np.float32] | None = None
    objective_advantages: NDArray[np.float32] | None = None
    objective_rewards: NDArray[np.float32] | None = None
    values: NDArray[np.float32] | None = None
    returns: NDArray[np.float32] | None = None
