"""The agreement check compares the log-probabilities that generators and trainer give to the same sampled tokens.

Synchronous training needs no extra samples: the trainer's first forward pass of a batch is at the version that sampled
it. With stale samples that pass is at a later version, so a few completions are sampled for the check after each
publication.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from actors.config import WeightsConfig
from orchestrator.roles.fleet import GeneratorFleet
from rollout.config import SamplingConfig
from rollout.failures import Failure, FailureError, FailureKind
from rollout.prompts import Prompt
from rollout.samples import Generation, TokenSequence

if TYPE_CHECKING:
    from actors.trainer.policy import PolicyGroup

CHECK_PROMPTS = 4
"""Prompts of one check."""
CHECK_TOKENS = 16
"""Longest completion of one check."""


async def measure_agreement(
    fleet: GeneratorFleet, policy: PolicyGroup, prompts: Sequence[Prompt], sampling: SamplingConfig, version: int
) -> dict[str, float]:
    """Sample a completion of each prompt and compare its log-probabilities with the trainer's own.

    Returns:
        `rollout/mismatch_kl`: KL(generator || trainer) by k3, nats, mean over the tokens; `rollout/max_logprob_gap`:
        the largest difference at one token, nats. Only tokens that `version` sampled count.
    Raises:
        FailureError: a role failed; no completion could be sampled (`no_agreement_check`); or no token was sampled by
            `version` (`agreement_check_version`).
    """
    short = sampling.model_copy(update={"max_tokens": min(sampling.max_tokens, CHECK_TOKENS)})
    requests = (
        fleet.generate(prompt, 1, short, index, f"agreement-{version}-{index}") for index, prompt in enumerate(prompts)
    )
    generations = await asyncio.gather(*requests)
    answered = [
        (prompt, generation)
        for prompt, generation in zip(prompts, generations, strict=True)
        if isinstance(generation, Generation) and len(generation.completions[0])
    ]
    if not answered:
        message = f"none of the {len(prompts)} prompts of the agreement check of version {version} got a completion"
        raise FailureError(Failure(FailureKind.INFRASTRUCTURE, "no_agreement_check", message))
    own = np.concatenate(await policy.log_probs([_sequence(*each) for each in answered]))
    completions = [generation.completions[0] for _, generation in answered]
    theirs = np.concatenate([completion.log_probs for completion in completions])
    current = np.concatenate([completion.policy_versions for completion in completions]) == version
    if not current.any():
        message = f"the generators answered the agreement check at another version than the published {version}"
        raise FailureError(Failure(FailureKind.BUG, "agreement_check_version", message))
    difference = (own - theirs)[current].astype(np.float64)
    return {
        "rollout/mismatch_kl": float(np.mean(np.expm1(difference) - difference)),
        "rollout/max_logprob_gap": float(np.abs(difference).max()),
    }


def alarm(metrics: dict[str, float], config: WeightsConfig) -> str | None:
    """The message where trainer and generators disagree by more than the recipe allows; None while they agree."""
    kl, gap = metrics.get("rollout/mismatch_kl", 0.0), metrics.get("rollout/max_logprob_gap", 0.0)
    if kl <= config.max_mismatch_kl and gap <= config.max_logprob_gap:
        return None
    return (
        f"trainer and generators disagree: mismatch KL {kl:.3g} nats a token (weights.max_mismatch_kl = "
        f"{config.max_mismatch_kl:g}), largest gap {gap:.3g} nats (weights.max_logprob_gap = "
        f"{config.max_logprob_gap:g}). Usual causes are weights that did not arrive whole, another precision, and "
        "sampling with top_p or top_k"
    )


def _sequence(prompt: Prompt, generation: Generation) -> TokenSequence:
    completion = generation.completions[0]
    return TokenSequence(
        prompt=prompt,
        prompt_token_ids=generation.prompt_token_ids,
        token_ids=completion.token_ids,
        loss_mask=np.ones(len(completion), dtype=np.bool_),
    )
