"""Publishes the trainer's weights to the generators, with proof that they arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from actors.weights.canary import TEXT_CANARY
from orchestrator.roles.delivery import Publication
from orchestrator.roles.fleet import DISAGREEMENT, GeneratorFleet
from rollout.failures import FailureError
from rollout.prompts import Prompt

if TYPE_CHECKING:
    from actors.trainer.policy import PolicyGroup


def proof_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Prompts of so many canaries: one without media, the others from the training prompts."""
    return [TEXT_CANARY, *prompts][:count]


async def publish(policy: PolicyGroup, fleet: GeneratorFleet, version: int, canaries: Sequence[Prompt]) -> Publication:
    """Publish the current weights to every generator as this policy version.

    While the generators receive the version, the trainer computes the log-probabilities that they must reproduce.

    Args:
        canaries: prompts of the canaries; empty for a proof by digest alone.
    Raises:
        FailureError: a role was lost; or a generator still disagrees after a full resend and a restart
            (`weights_disagree`), and the message says whether the trainer's own weights are what was published.
    """
    offer = await policy.publish(version)
    push = None if policy.spec.weights.backend == "zmq" else partial(policy.push, version)
    proof = asyncio.ensure_future(policy.canaries(canaries, version)) if canaries else None
    try:
        return await fleet.publish(offer, proof, push)
    except FailureError as error:
        if error.failure.reason != DISAGREEMENT:
            raise
        found = _explanation(await policy.unpublished())
        raise FailureError(replace(error.failure, message=f"{error.failure.message} {found}")) from error


def _explanation(different: Sequence[str]) -> str:
    if different:
        return f"The trainer's own tensors {', '.join(different[:20])} differ from what was published."
    return "All published tensors are equal to the trainer's, so the two compute differently with the same weights."
