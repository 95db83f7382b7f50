"""Freezing, batches, log-probabilities and the schedule, without an engine."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from actors.config import FreezeConfig, ModelConfig, ScheduleConfig
from actors.model.batches import ModelBatch, model_batch
from actors.model.forward import completion_log_probs
from actors.model.loading import freeze, load_model
from actors.trainer.deepspeed_engine import open_store
from actors.trainer.schedule import learning_rate
from rollout.encoding import ExpandedPrompt
from rollout.failures import DataError
from tests.actors.model import sharded_head
from tests.actors.model.sharded_head import RANKS, TILED_BYTES, WHOLE_BYTES
from tests.forks import run_ranks
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


SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Gemma 2, capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=2.0)),
    "Gemma 2, not capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=None)),
    "Granite, divided": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "Cohere, multiplied": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
}


def two_completions() -> ModelBatch:
    """10 completion tokens, whose logits over 128 tokens take 5,120 bytes."""
    completions = [np.arange(20, 24, dtype=np.int32), np.arange(30, 36, dtype=np.int32)]
    return model_batch([text_prompt(9, 10, 11), text_prompt(12)], completions, pad_token_id=0)


def assert_tiles_change_nothing(model: Any, batch: ModelBatch) -> None:
    """Values and gradients of every parameter, with tiles and with whole logits."""
    found, gradients = [], []
    for budget_bytes in (TILED_BYTES, WHOLE_BYTES):
        result = completion_log_probs(
            model, batch, temperature=0.7, banned_token_ids=(5, 6), with_entropy=True, entropy_gradient=True,
            with_collision=True, budget_bytes=budget_bytes,
        )  # fmt: skip
        assert result.entropy is not None
        trained = {name: part for name, part in model.named_parameters() if part.requires_grad}
        loss = (result.log_probs * torch.linspace(-1, 2, batch.shape[1])).sum() + result.entropy.sum()
        gradients.append(dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True)))
        found.append(result)
    torch.testing.assert_close(list(found[0]), list(found[1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_of_a_family_that_changes_its_logits_give_what_its_whole_logits_give(family: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_tiles_change_nothing(FAMILIES[family]().float().eval(), two_completions())


@pytest.mark.parametrize("tied", [True, False])
def test_tiles_change_nothing_for_a_tied_or_an_untied_head(tmp_path: Path, tied: bool) -> None:
    model = load_model(ModelConfig(path=build_tiny_lm(tmp_path, tied=tied), precision="float32"))
    assert_tiles_change_nothing(model, two_completions())


def test_tiles_change_nothing_for_a_vision_language_model_with_a_frozen_head(tmp_path: Path) -> None:
    model = load_model(ModelConfig(path=build_tiny_vlm(tmp_path, tied=False), precision="float32"))
    model.get_output_embeddings().requires_grad_(False)
    model.model.visual.requires_grad_(False)
    assert_tiles_change_nothing(model, two_completions())


class CentredLlama(LlamaForCausalLM):
    """Does something behind its head that no configuration tells of."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        output.logits = output.logits.pow(3)
        return output


def test_a_model_that_does_something_unknown_behind_its_head_gets_whole_logits_and_a_warning(lm: Path) -> None:
    model = CentredLlama.from_pretrained(lm, dtype=torch.float32)
    batch = two_completions()
    expected = completion_log_probs(model, batch, temperature=1.0, budget_bytes=WHOLE_BYTES)
    with pytest.warns(UserWarning, match="computed as a whole"):
        found = completion_log_probs(model, batch, temperature=1.0, budget_bytes=TILED_BYTES)
    torch.testing.assert_close(found.log_probs, expected.log_probs)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(part.shape) for part in (result,) if isinstance(part, Tensor)}
        return result


def test_a_model_in_tiles_never_makes_the_logits_of_all_tokens_and_gets_its_head_back() -> None:
    model = FAMILIES["Gemma 2, capped"]().float().eval()
    with Shapes() as shapes:
        completion_log_probs(model, two_completions(), temperature=1.0, budget_bytes=TILED_BYTES)
    assert (10, 128) not in shapes.seen
    with Shapes() as shapes:
        completion_log_probs(model, two_completions(), temperature=1.0, budget_bytes=WHOLE_BYTES)
    assert (10, 128) in shapes.seen
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.engine
def test_tiles_on_one_rank_only_change_no_gradient_under_zero_3(tmp_path: Path) -> None:
    folders = [build_tiny_lm(tmp_path / name, tied=name == "tied") for name in ("tied", "untied")]
    store = open_store(120.0, RANKS)
    outs = [tmp_path / f"rank-{rank}.pt" for rank in range(RANKS)]
    run_ranks(sharded_head.main, [(*folders, store.port, rank, out) for rank, out in enumerate(outs)], 300)
    for out in outs:
        found = torch.load(out)
        for kind in ("tied", "untied"):
            tiled, whole = found[kind, TILED_BYTES], found[kind, WHOLE_BYTES]
            assert float(whole["model.embed_tokens.weight"].abs().max()) > 0.01
            torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-4)
