"""Checks that a Hugging Face model folder is complete before an engine opens it. Reads headers, never weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_MEDIA_KEYS = ("vision_config", "audio_config", "vision_tower", "image_token_id", "image_token_index")
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a model folder holds.

    Attributes:
        problems: what is missing or broken, one sentence each. Where there are any, the other attributes may be wrong.
        parameters: number of parameters, from the weights' headers; 0 where they can't be read.
        max_positions: longest sequence the model was built for, or None where its config doesn't say.
        takes_media: whether the model has an encoder for images, video or audio.
    """

    problems: tuple[str, ...]
    parameters: int = 0
    max_positions: int | None = None
    takes_media: bool = False


def inspect_model_folder(folder: Path) -> ModelFolder:
    """Inspect a folder for config, tokenizer, chat template, processor (where needed) and complete weights."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        return ModelFolder(
            (f"the model folder {folder} {what}. Name a folder on disk. A model of a hub must be downloaded first.",)
        )
    problems: list[str] = []
    config = _json(folder / "config.json", problems)
    takes_media = any(key in config for key in _MEDIA_KEYS)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        problems.append(f"{folder} has no tokenizer (tokenizer.json). Save the tokenizer into it.")
    elif not _has_chat_template(folder):
        problems.append(f"{folder} has no chat template (chat_template.jinja). Save it with the tokenizer.")
    if takes_media and not any((folder / name).is_file() for name in _PROCESSORS):
        problems.append(f"{folder} holds a multimodal model without processor_config.json. Save its processor into it.")
    parameters = _count_parameters(folder, problems)
    text = config.get("text_config")
    positions = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return ModelFolder(tuple(problems), parameters, positions if isinstance(positions, int) else None, takes_media)


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.parent} has no {path.name}, so it is not a Hugging Face model folder.")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path} can't be read: {error}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path} is not a JSON object.")
        return {}
    return content


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    return any(
        "chat_template" in _json(folder / name, []) for name in ("tokenizer_config.json", "processor_config.json")
    )


def _count_parameters(folder: Path, problems: list[str]) -> int:
    files = sorted(folder.glob("*.safetensors"))
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        names = set(map(str, dict(_json(index_path, problems).get("weight_map", {})).values()))
        for name in sorted(names - {path.name for path in files}):
            problems.append(f"{folder} lacks {name}, which {index_path.name} names. Download it again.")
    if not files:
        pickled = sorted(folder.glob("pytorch_model*.bin"))
        if not pickled:
            problems.append(f"{folder} has no weights (model.safetensors). Save the model into it.")
        return sum(path.stat().st_size for path in pickled) // 2
    return sum(_parameters_of(path, problems) for path in files)


def _parameters_of(path: Path, problems: list[str]) -> int:
    """Parameters in one safetensors file, whose header also says how long the file must be."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError("its header is truncated")
            header = json.loads(file.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
        if size != needed:
            raise ValueError(f"it has {size:,} bytes where its header says {needed:,}")
        return sum(math.prod(entry["shape"]) for entry in tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        problems.append(f"{path} is not a complete safetensors file: {error}. Download or save it again.")
        return 0
