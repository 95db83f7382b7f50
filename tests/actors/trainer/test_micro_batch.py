"""Micro-batches as tensors: columns of the samples, and fillers that have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from actors.model.batches import expand_prompts
from actors.trainer.micro_batch import MicroBatchMaker
from actors.trainer.planning import Plan
from rollout.encoding import PromptEncoder
from rollout.media import MediaStore
from tests.actors.training_samples import make_samples
from tests.tiny_model import build_tiny_vlm


def test_a_filler_runs_the_vision_tower_and_has_zeros_for_columns(tmp_path: Path) -> None:
    samples = make_samples(build_tiny_vlm(tmp_path / "model"), tmp_path / "media", 2)  # text only; one image
    encoder = PromptEncoder.from_pretrained(tmp_path / "model", MediaStore(tmp_path / "media"))
    plan = Plan(samples, [[[0]], [[1]]], 3, dict(enumerate(expand_prompts(samples, encoder))), 0.0)
    maker = MicroBatchMaker(encoder, zero_stage=3, device="cpu")
    text, image, none = (maker.make(plan, turn) for turn in range(3))
    assert [each.indices for each in (text, image, none)] == [[0], [1], []]
    assert [each.batch.shape[0] for each in (text, image, none)] == [2, 1, 1]  # a filler joins text, and stands alone
    assert all("pixel_values" in each.batch.inputs for each in (text, image, none))
    advantages = text.column("advantages")
    assert advantages.shape == text.batch.shape
    np.testing.assert_array_equal(advantages[0], samples[0].advantages)
    assert not advantages[1].any()
    mask = none.column("loss_mask", torch.bool)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False]]


def test_without_sharding_text_needs_no_filler(tmp_path: Path) -> None:
    samples = make_samples(build_tiny_vlm(tmp_path / "model"), tmp_path / "media", 1)
    encoder = PromptEncoder.from_pretrained(tmp_path / "model", MediaStore(tmp_path / "media"))
    plan = Plan(samples, [[[0]]], 1, dict(enumerate(expand_prompts(samples, encoder))), 0.0)
    assert MicroBatchMaker(encoder, zero_stage=0, device="cpu").make(plan, 0).batch.shape[0] == 1
