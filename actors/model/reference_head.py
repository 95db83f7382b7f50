"""The reference's output head on a trainer's rank, read from its folder without the rest of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from actors.config import ModelConfig
from actors.model.forward import require_plain
from actors.model.loading import auto_class, load_model
from actors.model.output_head import OutputHead, expected_transform

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load_output_head(config: ModelConfig, path: Path) -> OutputHead:
    """The output head of a folder's model, on the CPU: [V, H] in the config's precision, frozen.

    Only its own tensors are read, those of the input embeddings where it shares them. A folder whose names don't tell
    which these are, or that holds no safetensors, is loaded whole for a moment.

    Args:
        config: precision, and whether code of the folder may run.
        path: the reference's folder.
    Raises:
        ValueError: the head isn't a plain matrix, or the family does more behind it than is known.
    """
    kind, hub_config = auto_class(path, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        skeleton = kind.from_config(hub_config, trust_remote_code=config.trust_remote_code)
    head = skeleton.get_output_embeddings()
    require_plain(skeleton, head)
    parts = _read(path, skeleton, head)
    if parts is None:
        whole = load_model(config, path).get_output_embeddings()
        parts = {name: part.detach().clone() for name, part in whole.named_parameters()}
    parts = {name: part.to(getattr(torch, config.precision)) for name, part in parts.items()}
    return OutputHead(parts["weight"], parts.get("bias"), expected_transform(hub_config))


def _read(path: Path, skeleton: Any, head: nn.Linear) -> dict[str, Tensor] | None:
    """The head's tensors by their names within it; None where the folder's files don't tell which they are."""
    files = _files(path)
    places = {name: _place(skeleton, head, parameter, files) for name, parameter in head.named_parameters()}
    found: dict[str, Tensor] = {}
    for name, place in places.items():
        if place is None:
            return None
        with safe_open(files[place], framework="pt") as file:
            found[name] = file.get_tensor(place)
        if found[name].shape != getattr(head, name).shape:
            return None
    return found


def _files(path: Path) -> dict[str, Path]:
    """The file of each tensor in a folder."""
    if (path / INDEX).is_file():
        names = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: path / file for name, file in names.items()}
    if (path / SINGLE).is_file():
        with safe_open(path / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), path / SINGLE)
    return {}


def _place(skeleton: Any, head: nn.Module, parameter: nn.Parameter, files: dict[str, Path]) -> str | None:
    """What files call a parameter of the head: by its own name, or else by one that it shares.

    Files may put another prefix before a module than the model itself ("model.embed_tokens" for
    "model.language_model.embed_tokens"): then the one name that ends alike is taken.
    """
    names = [name for name, each in skeleton.named_parameters(remove_duplicate=False) if each is parameter]
    path = next(path for path, module in skeleton.named_modules() if module is head)
    # Its own first: where files hold both and they differ, the model's loader doesn't tie them.
    for name in sorted(names, key=lambda name: not name.startswith(f"{path}.")):
        if name in files:
            return name
        ending = "." + ".".join(name.rsplit(".", 2)[-2:])
        alike = [each for each in files if f".{each}".endswith(ending)]
        if len(alike) == 1:
            return alike[0]
    return None
