"""Brings the trainer's weights to the generators, with proof that they arrived."""

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
    """Prompts of so many canaries: one without media, the others from the data."""
    return [TEXT_CANARY, *prompts][:count]


async def publish(policy: PolicyGroup, fleet: GeneratorFleet, version: int, canaries: Sequence[Prompt]) -> Publication:
    """Bring the weights as they are now to every generator, as this policy version.

    The trainer computes what generators must reproduce while they receive the version.

    Args:
        canaries: prompts of the proof; none for proof by digest alone.
    Raises:
        FailureError: a role was lost, or a generator disagrees for good; then the verdict says whether the trainer's
            own weights are what was published.
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
        return f"The trainer's own {', '.join(different[:20])} aren't what was published."
    return "All that was published is what the trainer has, so the two compute differently with the same weights."
