"""The demo's data, policy and recipes."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from orchestrator.config import cross_checks
from orchestrator.config.schema import Config, SFTConfig
from reward.registry import RewardRequest
from reward.verifiers import exact_match
from rollout.encoding import PromptEncoder
from rollout.media import MediaStore
from rollout.prompts import Prompt
from rollout.user_code import import_modules

RECIPES = Path(__file__).parents[2] / "recipes"
SPLITS = ("sft", "train", "evaluation")


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return import_modules([Path("digits.py")], base=RECIPES)[0]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> MediaStore:
    return MediaStore(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def prompts(digits: ModuleType, media: MediaStore) -> dict[str, list[Prompt]]:
    return {split: list(digits.digits_sum(media, split, pairs=300)) for split in SPLITS}


@pytest.fixture(scope="module")
def model_folder(digits: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    digits.build(folder, seed=0)
    return folder


def test_every_digit_is_in_exactly_one_split(digits: ModuleType) -> None:
    indices = np.concatenate(list(digits.split_digits().values()))
    assert sorted(indices) == list(range(1797))


def test_no_split_shows_an_image_of_another(prompts: dict[str, list[Prompt]]) -> None:
    shown = {split: {ref.sha256 for prompt in prompts[split] for ref in prompt.media} for split in SPLITS}
    assert all(len(shown[split]) > 100 for split in SPLITS)
    assert shown["evaluation"].isdisjoint(shown["train"] | shown["sft"])
    assert shown["train"].isdisjoint(shown["sft"])


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others(digits: ModuleType, media: MediaStore) -> None:
    def ids(seed: int) -> list[str]:
        return [prompt.prompt_id for prompt in digits.digits_sum(media, "train", pairs=20, seed=seed)]

    assert ids(0) == ids(0)
    assert set(ids(0)).isdisjoint(ids(1))


def test_the_target_is_the_sum_of_the_two_digits_shown(
    digits: ModuleType, media: MediaStore, prompts: dict[str, list[Prompt]]
) -> None:
    images, labels = digits.digit_images()
    digit_of = {media.put_image(image).sha256: int(label) for image, label in zip(images, labels, strict=True)}
    for prompt in (prompt for split in SPLITS for prompt in prompts[split]):
        first, second = (digit_of[ref.sha256] for ref in prompt.media)
        assert prompt.target == str(first + second)


def test_only_the_warm_start_has_responses_and_most_sums_from_10_on_lack_their_carry(
    prompts: dict[str, list[Prompt]],
) -> None:
    assert not any("response" in prompt.metadata for split in ("train", "evaluation") for prompt in prompts[split])
    wrong = 0
    for prompt in prompts["sft"]:
        first, second = prompt.metadata["digits"]
        match = re.fullmatch(rf"{first}\+{second}=<answer>(\d+)</answer>", prompt.metadata["response"])
        assert match is not None
        assert int(match[1]) == first + second or int(match[1]) == first + second - 10
        wrong += int(match[1]) != first + second
    with_carry = sum(int(prompt.target) >= 10 for prompt in prompts["sft"])
    assert 0.5 * with_carry < wrong < with_carry


def test_a_demonstrator_who_never_forgets_is_always_rewarded(digits: ModuleType, media: MediaStore) -> None:
    for prompt in digits.digits_sum(media, "sft", pairs=100, forget_carry=0.0):
        assert exact_match(RewardRequest(prompt, prompt.metadata["response"])) == 1.0


def test_a_split_that_does_not_exist_is_refused_by_name(digits: ModuleType, media: MediaStore) -> None:
    with pytest.raises(ValueError, match="'test'; it has evaluation, sft, train"):
        next(iter(digits.digits_sum(media, "test")))


def test_the_policy_is_small_and_its_vocabulary_is_its_tokenizers(model_folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    processor = AutoProcessor.from_pretrained(model_folder)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_seed_decides_the_weights(digits: ModuleType) -> None:
    tokenizer = digits.make_tokenizer()
    first, again, other = (digits.make_model(tokenizer, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_text_survives_the_saved_tokenizer(model_folder: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(model_folder).tokenizer
    for text in (
        "7+8=<answer>15</answer>",
        'The thesis: {"a": [1, ~2]}\n  twice  ',
        "What is the sum of these two digits?",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert len(tokenizer("7+8=<answer>15</answer>")["input_ids"]) == 8
    assert tokenizer.decode(tokenizer("é")["input_ids"]) == "<|unknown|>"


def test_a_question_has_a_placeholder_for_each_image_and_fits_the_recipe(
    model_folder: Path, media: MediaStore, prompts: dict[str, list[Prompt]]
) -> None:
    encoder = PromptEncoder.from_pretrained(model_folder, media)
    prompt = prompts["evaluation"][0]
    encoded, expanded = encoder.encode(prompt), encoder.expand(prompt)
    assert encoded.text.count("<|image_pad|>") == 2
    image_token = encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert list(expanded.token_ids).count(image_token) == 2 * 4
    config = Config.model_validate(yaml.safe_load((RECIPES / "digits.yaml").read_text()))
    assert len(expanded.token_ids) + config.rollout.sampling.max_tokens <= config.model.max_length


def test_the_saved_policy_reads_both_images(
    model_folder: Path, media: MediaStore, prompts: dict[str, list[Prompt]]
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    encoder = PromptEncoder.from_pretrained(model_folder, media)

    def last_logits(prompt: Prompt) -> torch.Tensor:
        expanded = encoder.expand(prompt)
        ids = torch.tensor(expanded.token_ids[None].astype(np.int64))
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), **expanded.features).logits[0, -1]

    first, other = prompts["evaluation"][:2]
    left, right, question = first.messages[0].parts
    for parts in ((other.messages[0].parts[0], right, question), (left, other.messages[0].parts[1], question)):
        changed = Prompt((type(first.messages[0])("user", parts),))
        assert not torch.allclose(last_logits(first), last_logits(changed))


def test_both_recipes_are_valid_and_start_where_the_other_ends() -> None:
    train = Config.model_validate(yaml.safe_load((RECIPES / "digits.yaml").read_text()))
    warm_start = SFTConfig.model_validate(yaml.safe_load((RECIPES / "digits-sft.yaml").read_text()))
    assert cross_checks.problems(train) == cross_checks.problems(warm_start) == []
    root = RECIPES.parent
    assert (RECIPES / train.model.path).resolve() == (root / warm_start.export_folder).resolve()
    assert train.data.evaluation is not None
    assert train.data.evaluation.split == "evaluation" != train.data.train.split
    assert train.algorithm.kl.coefficient > 0, "the demo must exercise the reference model"
