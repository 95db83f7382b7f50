"""The reference pool against plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from actors.config import DeadlineConfig, ModelConfig, ReferenceConfig
from actors.reference import ReferencePool, ReferenceSpec
from rollout.failures import FailureError, FailureKind
from tests.actors.plain_update import PlainTrainer
from tests.actors.training_samples import make_samples
from tests.tiny_model import build_tiny_vlm

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


async def test_replicas_share_the_work_agree_with_plain_pytorch_and_say_when_one_is_lost(
    session: None, tmp_path: Path
) -> None:
    model = build_tiny_vlm(tmp_path / "model", tied=False)
    samples = make_samples(model, tmp_path / "media")
    spec = ReferenceSpec(
        model=ModelConfig(path=model, precision="float32"),
        config=ReferenceConfig(replicas=2, micro_batch_tokens=100),
        deadlines=DeadlineConfig(start_s=120, update_s=30),
        temperature=1.0,
        media_folder=tmp_path / "media",
    )
    pool = await ReferencePool.start(spec)
    try:
        log_probs = await pool.log_probs(samples)
        with pytest.raises(FailureError) as mismatch:
            await pool.log_probs([replace(samples[0], prompt_token_ids=samples[0].prompt_token_ids[1:])])
        ray.kill(pool.actors[0])
        with pytest.raises(FailureError, match="replica 0") as lost:
            await pool.log_probs(samples)
    finally:
        await pool.stop()
    plain = PlainTrainer(model, tmp_path / "media", 1e-3, 1.0)
    with torch.no_grad():
        for sample, values in zip(samples, log_probs, strict=True):
            assert values == pytest.approx(plain.log_probs(sample).numpy(), abs=1e-5)
    assert mismatch.value.failure.reason == "prompt_expansion_mismatch"
    assert lost.value.failure.kind is FailureKind.INFRASTRUCTURE
