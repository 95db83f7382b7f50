"""What the policy's ranks publish, with Ray and DeepSpeed: the same bytes however the trainer is sharded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from actors.config import DeadlineConfig, FreezeConfig, ModelConfig, TrainerConfig, WeightsConfig
from actors.policy import PolicyGroup, PolicySpec
from actors.weights.receiver import WeightReceiver
from actors.weights.source import WeightSource
from algorithms.config import AlgorithmConfig
from tests.tiny_model import build_tiny_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelConfig]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    folder = build_tiny_vlm(tmp_path_factory.mktemp("policy") / "model")
    yield ModelConfig(path=folder, precision="float32", max_length=256, freeze=FreezeConfig(vision_tower=True))
    ray.shutdown()


@pytest.mark.engine
@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), (2, 3)])
async def test_a_version_has_the_same_bytes_whatever_the_ranks_and_the_zero_stage(
    model: ModelConfig, ranks: int, zero_stage: int, tmp_path: Path
):
    from transformers import Qwen2_5_VLForConditionalGeneration

    trainer = TrainerConfig(ranks=ranks, zero_stage=zero_stage)
    spec = PolicySpec(
        model=model,
        trainer=trainer,
        algorithm=AlgorithmConfig(),
        deadlines=DeadlineConfig(start_s=150.0),
        temperature=1.0,
        media_folder=tmp_path,
        seed=0,
        total_updates=10,
        weights=WeightsConfig(bucket_mib=1),
    )
    group = await PolicyGroup.start(spec)
    receiver = WeightReceiver(folder=tmp_path)
    try:
        offer = await group.publish(3)
        received = receiver.receive(offer, 20.0)
        content = received.path.read_bytes()
    finally:
        receiver.close()
        await group.stop()
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(model.path, dtype=torch.float32)
    plain.model.visual.requires_grad_(False)
    plain.model.visual.merger.requires_grad_(True)
    expected = WeightSource(plain, precision="float32", bucket_bytes=1 << 20).snapshot(3, keep=True)
    assert expected is not None
    assert [tensor.name for tensor in received.manifest.tensors] == [t.name for t in expected.manifest.tensors]
    assert content == b"".join(expected.buckets)
    assert offer.manifest_digest == expected.manifest.digest
