"""Freezing, batches, log-probabilities and the schedule, without an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.batches import model_batch
from actors.config import FreezeConfig, ModelConfig, ScheduleConfig
from actors.model import completion_log_probs, freeze, load_model
from actors.schedule import learning_rate
from rollout.encoding import ExpandedPrompt
from rollout.failures import DataError
from tests.tiny_model import build_tiny_lm, build_tiny_vlm


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_vlm(tmp_path_factory.mktemp("vlm"))


def text_prompt(*token_ids: int) -> ExpandedPrompt:
    return ExpandedPrompt(np.array(token_ids, np.int32), {})


def test_log_probabilities_of_a_padded_batch_are_those_of_each_sequence_alone(lm: Path) -> None:
    model = load_model(ModelConfig(path=lm, precision="float32"))
    prompts = [text_prompt(9, 10, 11), text_prompt(12)]
    completions = [np.array([20, 21], np.int32), np.array([30, 31, 32, 33], np.int32)]
    batch = model_batch(prompts, completions, pad_token_id=0)
    with torch.no_grad():
        result = completion_log_probs(model, batch, temperature=0.7, banned_token_ids=(5, 6), with_entropy=True)
        assert result.log_probs.shape == (2, 4)
        assert result.log_probs[0, 2:].tolist() == [0.0, 0.0]
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids = torch.tensor([[*prompt.token_ids.tolist(), *completion.tolist()]])
            logits = model(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1] / 0.7
            logits[:, [5, 6]] = float("-inf")
            expected = torch.distributions.Categorical(logits=logits)
            tokens = torch.from_numpy(completion.astype(np.int64))
            torch.testing.assert_close(
                result.log_probs[row, : len(tokens)], expected.log_prob(tokens), atol=1e-5, rtol=0
            )
            assert result.entropy is not None
            exact = -(expected.probs * expected.probs.clamp(min=1e-30).log()).sum(-1)
            torch.testing.assert_close(result.entropy[row, : len(tokens)], exact, atol=1e-5, rtol=0)


def test_features_of_an_unknown_layout_are_refused_by_name() -> None:
    prompt = ExpandedPrompt(np.array([9], np.int32), {"pixel_attention_mask": torch.ones(1, 1, 4, 4)})
    with pytest.raises(DataError, match="pixel_attention_mask"):
        model_batch([prompt], [np.array([9], np.int32)], pad_token_id=0)


def test_pixels_that_do_not_concatenate_are_refused_with_their_shapes() -> None:
    prompts = [
        ExpandedPrompt(np.array([9], np.int32), {"pixel_values": torch.ones(1, 3, side, side)}) for side in (4, 8)
    ]
    with pytest.raises(DataError, match=r"1, 3, 4, 4"):
        model_batch(prompts, [np.array([9], np.int32)] * 2, pad_token_id=0)


@pytest.mark.parametrize(
    ("config", "frozen"),
    [
        (FreezeConfig(vision_tower=True), {"tower"}),
        (FreezeConfig(projector=True), {"projector"}),
        (FreezeConfig(vision_tower=True, projector=True), {"tower", "projector"}),
        (FreezeConfig(language_model=True), {"language"}),
    ],
)
def test_exactly_the_named_parts_are_frozen(vlm: Path, config: FreezeConfig, frozen: set[str]) -> None:
    model = load_model(ModelConfig(path=vlm, precision="float32"))
    freeze(model, config)
    for name, parameter in model.named_parameters():
        part = "projector" if ".visual.merger." in name else "tower" if ".visual." in name else "language"
        assert parameter.requires_grad == (part not in frozen), name


def test_freezing_what_a_model_does_not_have_is_refused(lm: Path) -> None:
    model = load_model(ModelConfig(path=lm, precision="float32"))
    with pytest.raises(ValueError, match=r"freeze\.vision_tower"):
        freeze(model, FreezeConfig(vision_tower=True))


def test_freezing_everything_is_refused(vlm: Path) -> None:
    model = load_model(ModelConfig(path=vlm, precision="float32"))
    with pytest.raises(ValueError, match="no parameter to train"):
        freeze(model, FreezeConfig(vision_tower=True, projector=True, language_model=True))


def test_the_learning_rate_warms_up_and_then_decays_to_its_final_share() -> None:
    linear = ScheduleConfig(kind="linear", warmup_steps=2, final_share=0.5)
    assert [learning_rate(step, 6, 1.0, linear) for step in range(6)] == pytest.approx(
        [0.5, 1.0, 1.0, 1 - 0.5 / 3, 1 - 1 / 3, 0.5]
    )
    cosine = ScheduleConfig(kind="cosine")
    assert [learning_rate(step, 3, 2.0, cosine) for step in range(3)] == pytest.approx([2.0, 1.0, 0.0])
    assert learning_rate(99, 3, 2.0, ScheduleConfig()) == 2.0
