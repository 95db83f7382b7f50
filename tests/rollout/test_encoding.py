"""Prompt encoding against a real tokenizer and processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rollout.encoding import PromptEncoder
from rollout.failures import DataError
from rollout.media import MediaRef
from rollout.prompts import MediaPart, Message, Prompt, TextPart
from tests.tiny_model import VOCABULARY, build_tiny_lm, build_tiny_vlm

IMAGE_TOKEN = VOCABULARY["<|image_pad|>"]
RED = MediaPart(MediaRef("image", "red", "image/png"))
BLUE = MediaPart(MediaRef("image", "blue", "image/png"))


class Pictures:
    """A media store of two plain pictures that counts how often it is asked."""

    def __init__(self) -> None:
        self.loads = 0

    def load_image(self, ref: MediaRef) -> Image.Image:
        self.loads += 1
        return Image.new("RGB", (56, 56) if ref.sha256 == "red" else (112, 56), ref.sha256)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture
def pictures() -> Pictures:
    return Pictures()


@pytest.fixture
def encoder(vlm: Path, pictures: Pictures) -> PromptEncoder:
    return PromptEncoder.from_pretrained(vlm, pictures)


def ask(*parts: TextPart | MediaPart) -> Prompt:
    return Prompt((Message("user", parts),))


def test_encoding_keeps_one_placeholder_for_each_image(encoder: PromptEncoder) -> None:
    encoded = encoder.encode(ask(RED, BLUE, TextPart("which?")))
    assert np.count_nonzero(encoded.token_ids == IMAGE_TOKEN) == 2
    assert encoded.token_ids.dtype == np.int32
    assert [image.size for image in encoded.images] == [(56, 56), (112, 56)]
    assert encoded.text.endswith("<|im_start|>assistant\n")


def test_expansion_gives_each_image_its_vision_tokens_in_order(encoder: PromptEncoder) -> None:
    expanded = encoder.expand(ask(RED, TextPart(" or "), BLUE))
    # 56 x 56 pixels are 4 x 4 patches, merged 2 x 2: 4 tokens; 112 x 56 are 8.
    runs = np.split(np.flatnonzero(expanded.token_ids == IMAGE_TOKEN), [4])
    assert [len(run) for run in runs] == [4, 8]
    assert expanded.features["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8]]
    assert expanded.features["pixel_values"].shape[0] == 16 + 32
    assert expanded.features["mm_token_type_ids"].shape == (1, len(expanded.token_ids))


def test_expanded_ids_differ_from_unexpanded_ones_only_in_placeholders(encoder: PromptEncoder) -> None:
    prompt = ask(RED, TextPart("a"), BLUE)
    unexpanded, expanded = encoder.encode(prompt).token_ids, encoder.expand(prompt).token_ids
    assert unexpanded[unexpanded != IMAGE_TOKEN].tolist() == expanded[expanded != IMAGE_TOKEN].tolist()


def test_text_only_prompts_expand_to_what_they_encode_to(encoder: PromptEncoder) -> None:
    prompt = ask(TextPart("2+2?"))
    expanded = encoder.expand(prompt)
    assert expanded.token_ids.tolist() == encoder.encode(prompt).token_ids.tolist()
    assert not expanded.features


def test_a_prompt_is_processed_once(encoder: PromptEncoder, pictures: Pictures) -> None:
    first = encoder.expand(ask(RED, TextPart("x")))
    assert encoder.expand(ask(RED, TextPart("x"))) is first
    assert pictures.loads == 1


def test_the_cache_forgets_the_oldest_prompt_beyond_its_budget(
    encoder: PromptEncoder, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.encoding.CACHE_BYTES", 1)
    encoder.expand(ask(RED, TextPart("x")))
    encoder.expand(ask(RED, TextPart("y")))
    encoder.expand(ask(RED, TextPart("x")))
    assert pictures.loads == 3


def test_media_placeholders_are_banned_and_the_end_of_turn_stops(encoder: PromptEncoder) -> None:
    assert encoder.banned_token_ids == (VOCABULARY["<|image_pad|>"], VOCABULARY["<|video_pad|>"])
    assert encoder.stop_token_ids == (VOCABULARY["<|im_end|>"],)


def test_decoding_drops_special_tokens(encoder: PromptEncoder) -> None:
    assert encoder.decode([VOCABULARY["4"], VOCABULARY["2"], VOCABULARY["<|im_end|>"]]) == "42"


def test_a_text_model_refuses_images(lm: Path, pictures: Pictures) -> None:
    with pytest.raises(DataError) as caught:
        PromptEncoder.from_pretrained(lm, pictures).encode(ask(RED, TextPart("x")))
    assert caught.value.failure.reason == "media_unsupported"


def test_a_text_model_encodes_text_and_bans_nothing(lm: Path, pictures: Pictures) -> None:
    encoder = PromptEncoder.from_pretrained(lm, pictures)
    assert (
        encoder.encode(ask(TextPart("a"), TextPart("b"))).text
        == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encoder.banned_token_ids == ()


def test_video_is_refused_until_it_is_supported(encoder: PromptEncoder) -> None:
    with pytest.raises(DataError, match="video"):
        encoder.encode(ask(MediaPart(MediaRef("video", "0" * 64, "video/mp4"))))


def test_text_that_spells_a_placeholder_is_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(DataError) as caught:
        encoder.expand(ask(RED, TextPart("see <|image_pad|>")))
    assert caught.value.failure.reason == "placeholder_in_text"


def test_an_image_the_processor_refuses_is_a_data_error(vlm: Path) -> None:
    class Slivers:
        def load_image(self, ref: MediaRef) -> Image.Image:
            return Image.new("RGB", (3000, 2))  # beyond the processor's aspect ratio of 200

    with pytest.raises(DataError) as caught:
        PromptEncoder.from_pretrained(vlm, Slivers()).expand(ask(RED))
    assert caught.value.failure.reason == "media_unprocessable"


def test_a_model_without_a_chat_template_is_refused_at_once(tmp_path: Path, lm: Path, pictures: Pictures) -> None:
    for file in lm.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError) as caught:
        PromptEncoder.from_pretrained(tmp_path, pictures)
    assert caught.value.failure.reason == "chat_template_missing"


def test_the_filler_runs_the_vision_tower_of_a_multimodal_model_only(
    lm: Path, encoder: PromptEncoder, pictures: Pictures
) -> None:
    assert len(encoder.filler().features["image_grid_thw"]) == 1
    assert not PromptEncoder.from_pretrained(lm, pictures).filler().features
