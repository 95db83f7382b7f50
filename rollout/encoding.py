"""Encodes prompts for the model: chat template, token ids, pixels. Every role encodes through this file.

Two forms of a prompt exist and are never mixed: *unexpanded* ids, as the chat template renders them (what vLLM takes
together with the images, and expands itself), and *expanded* ids with one placeholder for each vision token (what the
trainer takes together with the pixel features).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rollout.failures import DataError
from rollout.prompts import MediaPart, Prompt, TextPart

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from rollout.media import MediaStore

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
PLACEHOLDER_FIELDS = tuple(
    f"{medium}_token_{suffix}" for medium in ("image", "video", "audio") for suffix in ("id", "index")
)
CACHE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """A prompt for vLLM, which expands media placeholders itself.

    Attributes:
        text: the rendered chat template, with the opening of the assistant's turn.
        token_ids: [unexpanded tokens] int32, placeholders as the template renders them.
        images: the images, in the order of their placeholders.
    """

    text: str
    token_ids: NDArray[np.int32]
    images: list[Image]


@dataclass(frozen=True, slots=True, eq=False)
class ExpandedPrompt:
    """A prompt for a model's forward pass.

    Attributes:
        token_ids: [tokens] int32, one placeholder for each vision token.
        features: what the processor made besides ids: media features (for Qwen-VL `pixel_values`
            [patches, patch size] and `image_grid_thw` [images, 3]) and features a token ([1, tokens], such as
            `mm_token_type_ids`). Empty for a prompt without media.
    """

    token_ids: NDArray[np.int32]
    features: Mapping[str, Tensor]


class PromptEncoder:
    """Turns prompts into token ids and pixel features with a model's own chat template and processor."""

    def __init__(
        self,
        tokenizer: Any,
        processor: Any | None,
        media: MediaStore,
        *,
        banned_token_ids: Iterable[int],
        stop_token_ids: Iterable[int],
    ) -> None:
        """Use :meth:`from_pretrained`, which reads all of this from a model's folder."""
        self.tokenizer = tokenizer
        self.processor = processor
        self.takes_images: bool = getattr(processor, "image_processor", None) is not None
        self.banned_token_ids: tuple[int, ...] = tuple(sorted(set(banned_token_ids)))
        """Media placeholders. They must never be sampled: a sampled one would have no features."""
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(set(stop_token_ids)))
        """Tokens that end the assistant's turn."""
        self._media = media
        self._placeholders = tuple(map(str, tokenizer.convert_ids_to_tokens(list(self.banned_token_ids))))
        self._cache: OrderedDict[str, ExpandedPrompt] = OrderedDict()
        self._cached_bytes = 0

    @classmethod
    def from_pretrained(cls, path: Path | str, media: MediaStore, trust_remote_code: bool = False) -> PromptEncoder:
        """Read tokenizer and, where the model has one, processor from a Hugging Face folder.

        Raises:
            DataError: `chat_template_missing` when the folder has none.
        """
        from transformers import AutoConfig, AutoProcessor, AutoTokenizer

        folder = Path(path)
        processor = None
        if any((folder / name).exists() for name in PROCESSOR_FILES):
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            processor = None
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not getattr(processor or tokenizer, "chat_template", None):
            raise DataError(
                "chat_template_missing",
                f"{folder} has no chat template, so messages can't be rendered. Add a chat_template.jinja to it.",
            )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return cls(
            tokenizer,
            processor,
            media,
            banned_token_ids=_placeholder_ids(config, processor),
            stop_token_ids=_stop_ids(folder, config, tokenizer),
        )

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Render a prompt and load its images.

        Raises:
            DataError: `media_unsupported` when the model can't see the prompt's media, `placeholder_in_text` when
                the text spells a media placeholder, or what the media store raises.
        """
        self._check(prompt)
        text = self._render([{"role": turn.role, "content": self._content(turn.parts)} for turn in prompt.messages])
        return EncodedPrompt(text, self._tokenize(text), [self._media.load_image(ref) for ref in prompt.media])

    def expand(self, prompt: Prompt) -> ExpandedPrompt:
        """Token ids with expanded placeholders, and their features. A prompt is expanded once, then read from a cache.

        Raises:
            DataError: as :meth:`encode`, and `media_unprocessable` when the processor refuses an image.
        """
        key = prompt.prompt_id
        if (cached := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            return cached
        expanded = self._expand(prompt)
        self._remember(key, expanded)
        return expanded

    def encode_response(self, text: str) -> NDArray[np.int32]:
        """[tokens] int32 of a response to imitate, with the end of the assistant's turn."""
        end = self.tokenizer.eos_token_id
        ends = [end if end is not None else self.stop_token_ids[0]]
        return np.concatenate([self._tokenize(text), np.asarray(ends, dtype=np.int32)])

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=True))

    def filler(self) -> ExpandedPrompt:
        """The smallest prompt that runs every module of the model, with a blank image if it takes images.

        For a rank that has no samples left while its peers wait for it in a collective.
        """
        parts: list[dict[str, str]] | str = "."
        images: list[Image] = []
        if self.processor is not None:
            parts = [{"type": "text", "text": "."}]
        if self.takes_images:
            import PIL.Image

            parts = [{"type": "image"}, {"type": "text", "text": "."}]
            images = [PIL.Image.new("RGB", (64, 64), "gray")]
        return self._expand_text(self._render([{"role": "user", "content": parts}]), images, "filler")

    def save_pretrained(self, folder: Path | str) -> None:
        """Write tokenizer, chat template and processor beside exported weights."""
        (self.processor or self.tokenizer).save_pretrained(folder)

    def _expand(self, prompt: Prompt) -> ExpandedPrompt:
        encoded = self.encode(prompt)
        return self._expand_text(encoded.text, encoded.images, prompt.prompt_id)

    def _expand_text(self, text: str, images: list[Image], prompt_id: str) -> ExpandedPrompt:
        if not images:
            return ExpandedPrompt(self._tokenize(text), {})
        assert self.processor is not None  # _check refused media without one
        try:
            output = self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                "media_unprocessable", f"prompt {prompt_id}: the model's processor refused its images: {error}"
            ) from error
        features = dict(output)
        token_ids = features.pop("input_ids")[0].numpy().astype(np.int32)
        features.pop("attention_mask", None)
        return ExpandedPrompt(token_ids, features)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        renderer = self.processor if self.processor is not None else self.tokenizer
        return str(renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _content(self, parts: Iterable[TextPart | MediaPart]) -> str | list[dict[str, str]]:
        """A list of typed parts for a multimodal template; a string for a text-only one, which takes nothing else."""
        if self.processor is None:
            return "".join(part.text for part in parts if isinstance(part, TextPart))
        return [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": part.media.kind}
            for part in parts
        ]

    def _check(self, prompt: Prompt) -> None:
        for message in prompt.messages:
            for part in message.parts:
                if isinstance(part, MediaPart):
                    if not self.takes_images or part.media.kind != "image":
                        raise DataError(
                            "media_unsupported",
                            f"prompt {prompt.prompt_id} holds {part.media.kind} media, but the model takes "
                            f"{'text and images' if self.takes_images else 'text only'}.",
                        )
                elif any(placeholder in part.text for placeholder in self._placeholders):
                    raise DataError(
                        "placeholder_in_text",
                        f"prompt {prompt.prompt_id}: its text spells one of the media placeholders "
                        f"{', '.join(self._placeholders)}; give media as media parts instead.",
                    )

    def _tokenize(self, text: str) -> NDArray[np.int32]:
        # The template writes every special token itself, the beginning of sequence included.
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def _remember(self, key: str, expanded: ExpandedPrompt) -> None:
        self._cache[key] = expanded
        self._cached_bytes += _size(expanded)
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= _size(self._cache.popitem(last=False)[1])


def _size(expanded: ExpandedPrompt) -> int:
    return int(expanded.token_ids.nbytes) + sum(tensor.nbytes for tensor in expanded.features.values())


def _placeholder_ids(config: Any, processor: Any | None) -> set[int]:
    """Ids of the media placeholders. Model families name them differently, in the config or the processor."""
    if processor is None:
        return set()
    found = (getattr(holder, name, None) for holder in (config, processor) for name in PLACEHOLDER_FIELDS)
    return {token for token in found if isinstance(token, int) and token >= 0}


def _stop_ids(folder: Path, config: Any, tokenizer: Any) -> set[int]:
    """End-of-turn tokens: the generation config's, or else the model config's, and always the tokenizer's."""
    from transformers import GenerationConfig

    declared: Any = None
    with contextlib.suppress(OSError):  # the file is optional
        declared = GenerationConfig.from_pretrained(folder).eos_token_id
    if declared is None:
        declared = getattr(config.get_text_config(), "eos_token_id", None)
    tokens = [declared] if isinstance(declared, int) else list(declared or ())
    if tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
    return set(tokens)
