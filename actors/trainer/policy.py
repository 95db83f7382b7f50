"""The policy under training as Ray actors, one a rank, and the group that the driver calls. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.trainer.ranks import Rank, RankGroup
from actors.trainer.spec import PolicySpec
from actors.weights.canary import TOLERANCE_NATS, Canaries, CanarySequence
from actors.weights.offer import WeightsOffer
from actors.weights.push.port import GeneratorPort
from rollout.prompts import Prompt
from rollout.samples import TokenSequence

if TYPE_CHECKING:
    from actors.weights.push.recipients import PushReport

LOOPBACK = "127.0.0.1"


class PolicyRank(Rank):
    """One data-parallel rank of the policy."""

    def __init__(self, spec: PolicySpec, rank: int, device: str) -> None:
        super().__init__(spec, rank, device)
        self.sources: Any = None
        """What is published: the trained part, and the frozen one or None."""
        self.publisher: Any = None
        self.sender: Any = None
        self.has_published = False

    def learner_maker(self) -> Callable[[Any, Any, Any], Any]:
        """See :class:`actors.trainer.policy_learner.PolicyLearner`."""
        from actors.trainer.policy_learner import PolicyLearner

        return PolicyLearner

    @property
    def module(self) -> Any:
        """The Hugging Face model; its parameters are sharded under ZeRO-3."""
        return self.learner.module

    def update(self, samples: Sequence[TokenSequence], kl_coefficient: float) -> dict[str, float]:
        """See :meth:`actors.trainer.policy_learner.PolicyLearner.update`."""
        metrics: dict[str, float] = self.learner.update(samples, kl_coefficient)
        return metrics

    def log_probs(self, sequences: Sequence[TokenSequence]) -> dict[int, NDArray[np.float32]]:
        """See :meth:`actors.trainer.policy_learner.PolicyLearner.log_probs`."""
        log_probs: dict[int, NDArray[np.float32]] = self.learner.log_probs(sequences)
        return log_probs

    def log_probs_and_collision(self, sequences: Sequence[TokenSequence]) -> dict[int, NDArray[np.float32]]:
        """See :meth:`actors.trainer.policy_learner.PolicyLearner.log_probs_and_collision`."""
        values: dict[int, NDArray[np.float32]] = self.learner.log_probs_and_collision(sequences)
        return values

    def publish(self, version: int) -> WeightsOffer | None:
        """Serve the weights as they are now, as this policy version. Rank 0 returns the offer, the others None."""
        from actors.trainer.policy_weights import policy_sources
        from actors.weights.pull.publisher import WeightPublisher, read_on_other_ranks

        settings = self.spec.weights
        if self.sources is None:
            self.sources = policy_sources(self.module, self.spec.model, settings.bucket_mib << 20)
        trained, frozen = self.sources
        if self.rank > 0:
            has_frozen, self.has_published = frozen is not None and not self.has_published, True
            read_on_other_ranks([frozen, trained] if has_frozen else [trained])
            return None
        if self.publisher is None:
            self.publisher = WeightPublisher(
                host=LOOPBACK if settings.listen == "loopback" else ray.util.get_node_ip_address(),
                bucket_bytes=settings.bucket_mib << 20,
                fan_out=settings.fan_out,
                is_encrypted=settings.encryption,
                has_delta=settings.delta,
            )
        offer: WeightsOffer = self.publisher.publish(version, trained, frozen)
        return offer

    def push(self, version: int, ports: list[GeneratorPort]) -> PushReport | None:
        """Send the current weights into the generators' vLLM engines. Rank 0 reports; the others return None."""
        import torch

        from actors.weights.push.sender import DeviceSender, PushSettings

        settings = self.spec.weights
        if self.sender is None:
            assert self.sources is not None, "a version is published before it is pushed"
            assert settings.backend != "zmq"
            push = PushSettings(
                backend=settings.backend,
                address=LOOPBACK if settings.listen == "loopback" else ray.util.get_node_ip_address(),
                deadline_s=self.spec.deadlines.sync_s,
                gather_bytes=settings.bucket_mib << 20,
            )
            tensors = self.sources[0].tensors
            self.sender = DeviceSender(tensors, push, rank=self.rank, device=torch.device(self.device))
        report: PushReport | None = self.sender.push(version, ports if self.rank == 0 else ())
        return report

    def canaries(self, prompts: list[Prompt]) -> dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """See :meth:`actors.trainer.policy_learner.PolicyLearner.canaries`."""
        found: dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]] = self.learner.canaries(prompts)
        return found

    def unpublished(self) -> list[str]:
        """Names of tensors that differ from what was published last; rank 0 finds out, all ranks call."""
        from actors.weights.pull.publisher import read_on_other_ranks
        from actors.weights.pull.writer import PublishedComparison

        sources = [source for source in self.sources or () if source is not None]
        if self.publisher is None:
            read_on_other_ranks(sources)
            return []
        comparison = PublishedComparison(self.publisher.held_parts)
        for source in sources:
            source.read(comparison)
        return comparison.different

    def export(self, folder: Path) -> None:
        """See :meth:`actors.trainer.policy_learner.PolicyLearner.export`."""
        self.learner.export(folder)


class PolicyGroup(RankGroup):
    """All ranks of the policy, as one."""

    role = "policy"
    rank_class = PolicyRank

    async def update(self, samples: Sequence[TokenSequence], kl_coefficient: float) -> dict[str, float]:
        """One training step on all ranks; metrics under `train/`, as :meth:`PolicyRank.update` gives them."""
        samples_ref = ray.put(samples)
        metrics: list[dict[str, float]] = await self._all(
            "update", "update", self.spec.deadlines.update_s, samples_ref, kl_coefficient
        )
        return metrics[0]

    async def log_probs(self, sequences: Sequence[TokenSequence]) -> list[NDArray[np.float32]]:
        """The policy's log-probabilities of the completions, [tokens] float32 each, nats."""
        return await self._by_sample("log_probs", "compute log-probabilities", sequences)

    async def log_probs_and_collision(self, sequences: Sequence[TokenSequence]) -> list[NDArray[np.float32]]:
        """The same and, as a second row, the sum of squared probabilities at each token: [2, tokens] float32 each."""
        return await self._by_sample("log_probs_and_collision", "compute log-probabilities", sequences)

    async def publish(self, version: int) -> WeightsOffer:
        """Serve the weights as they are now, as this policy version, until the generators have it or a later one."""
        offers = await self._all("publish", f"publish version {version}", self.spec.deadlines.sync_s, version)
        offer: WeightsOffer = offers[0]
        return offer

    async def push(self, version: int, ports: Sequence[GeneratorPort]) -> PushReport:
        """Send the weights as they are now, already published as this version, into the generators' vLLM engines."""
        what = f"push version {version}"
        reports = await self._all("push", what, 2 * self.spec.deadlines.sync_s, version, list(ports))
        report: PushReport = reports[0]
        return report

    async def canaries(self, prompts: Sequence[Prompt], version: int) -> Canaries:
        """What a generator of the policy as it is now must reproduce on these prompts."""
        what, deadline_s = "compute log-probabilities of canaries", self.spec.deadlines.update_s
        shares = await self._all("canaries", what, deadline_s, list(prompts))
        by_index = {index: values for share in shares for index, values in share.items()}
        sequences = [CanarySequence(prompt, *by_index[index]) for index, prompt in enumerate(prompts)]
        tolerance = self.spec.weights.canary_tolerance or TOLERANCE_NATS[self.spec.model.precision]
        return Canaries(version, tuple(sequences), tolerance)

    async def unpublished(self) -> list[str]:
        """Names of tensors that differ from what was published last; empty unless something is wrong."""
        found = await self._all("unpublished", "compare its weights", self.spec.deadlines.update_s)
        names: list[str] = found[0]
        return names

    async def export(self, folder: Path) -> None:
        """Write a Hugging Face folder that transformers and vLLM load."""
        await self._all("export", "export", self.spec.deadlines.update_s, folder.absolute())
