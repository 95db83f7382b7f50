"""The reference pool against plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.config import DeadlineConfig, ModelConfig, ReferenceConfig
from actors.reference_pool import ReferencePool, ReferenceServer, ReferenceSpec
from algorithms.finite import NonFiniteError
from rollout.failures import FailureError, FailureKind
from tests.actors.trainer.plain_update import PlainTrainer
from tests.actors.trainer.sequences import plain
from tests.actors.training_samples import make_samples
from tests.tiny_model import build_tiny_vlm

pytestmark = pytest.mark.engine


async def test_replicas_share_the_work_agree_with_plain_pytorch_and_say_when_one_is_lost(
    ray_session: None, tmp_path: Path
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
        hidden = await pool.hidden_states(samples)
        with pytest.raises(FailureError) as mismatch:
            await pool.log_probs([replace(samples[0], prompt_token_ids=samples[0].prompt_token_ids[1:])])
        ray.kill(pool.actors[0])
        with pytest.raises(FailureError, match="replica 0") as lost:
            await pool.log_probs(samples)
    finally:
        await pool.stop()
    plain = PlainTrainer(model, tmp_path / "media", 1e-3, 1.0)
    banned = torch.tensor(plain.encoder.banned_token_ids)
    with torch.no_grad():
        for sample, values, states in zip(samples, log_probs, hidden, strict=True):
            expected = plain.log_probs(sample).numpy()
            assert values == pytest.approx(expected, abs=1e-5)
            assert states.dtype == np.float32
            logits = plain.model.get_output_embeddings()(torch.tensor(states)).index_fill(-1, banned, -1e30)
            tokens = torch.from_numpy(sample.token_ids.astype("int64"))
            of_states = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].numpy()
            assert of_states == pytest.approx(expected, abs=1e-5)
    assert mismatch.value.failure.reason == "prompt_expansion_mismatch"
    assert lost.value.failure.kind is FailureKind.INFRASTRUCTURE


def server_of(folder: Path, **model_settings: Any) -> ReferenceServer:
    spec = ReferenceSpec(
        model=ModelConfig(path=folder / "model", **model_settings),
        config=ReferenceConfig(micro_batch_tokens=100),
        deadlines=DeadlineConfig(),
        temperature=1.0,
        media_folder=folder / "media",
    )
    return ReferenceServer(spec, "cpu")


def test_sequences_without_columns_give_what_training_samples_give(tmp_path: Path) -> None:
    samples = make_samples(build_tiny_vlm(tmp_path / "model"), tmp_path / "media", 4)
    sequences = [plain(sample) for sample in samples]
    server = server_of(tmp_path, precision="float32")
    for found, expected in (
        (server.log_probs(sequences), server.log_probs(samples)),
        (server.hidden_states(sequences), server.hidden_states(samples)),
    ):
        for row, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(row, other)


def test_hidden_states_in_bfloat16_travel_in_half_the_room_and_come_back_as_they_were(tmp_path: Path) -> None:
    samples = make_samples(build_tiny_vlm(tmp_path / "model"), tmp_path / "media", 4)
    server = server_of(tmp_path, precision="bfloat16")
    seen: list[torch.Tensor] = []
    server._model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found = server.hidden_states(samples)
    assert [states.shape for states in found] == [(len(sample.token_ids), 128) for sample in samples]
    assert {states.dtype for states in found} == {np.dtype(np.float16)}
    known = {tuple(row.tolist()) for part in seen for row in part.flatten(0, -2)}
    for states in found:
        for row in torch.from_numpy(states).bfloat16():
            assert tuple(row.tolist()) in known


def test_hidden_states_too_great_for_float16_travel_as_float32(tmp_path: Path) -> None:
    samples = make_samples(build_tiny_vlm(tmp_path / "model"), tmp_path / "media", 2)
    server = server_of(tmp_path, precision="bfloat16")
    server._model.model.language_model.norm.weight.data.fill_(1e6)
    found = server.hidden_states(samples)
    assert {states.dtype for states in found} == {np.dtype(np.float32)}
    assert max(float(np.abs(states).max()) for states in found) > 65504


def test_hidden_states_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    samples = make_samples(build_tiny_vlm(tmp_path / "model"), tmp_path / "media", 2)
    server = server_of(tmp_path, precision="float32")
    server._model.model.language_model.norm.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError, match="the reference's hidden states"):
        server.hidden_states(samples)
