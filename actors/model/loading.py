"""Loads the model of a folder, finds its parts and freezes those that a recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.config import FreezeConfig, ModelConfig

PROJECTORS = frozenset(
    {"multi_modal_projector", "mm_projector", "merger", "deepstack_merger_list", "connector", "aligner", "projector"}
)
VISION_TOWERS = frozenset({"visual", "vision_tower", "vision_model", "vision_encoder"})
LANGUAGE_MODELS = frozenset({"language_model", "text_model"})


def load_model(config: ModelConfig, path: Path | None = None) -> Any:
    """A model with its weights, on the CPU: a vision-language one where its architecture is, else a causal LM.

    Args:
        config: precision, attention and whether code of the folder may run.
        path: another folder than the config's (the reference may have its own).
    """
    folder = path or config.path
    kind, _ = auto_class(folder, trust_remote_code=config.trust_remote_code)
    return kind.from_pretrained(
        folder,
        dtype=getattr(torch, config.precision),
        attn_implementation=config.attention,
        trust_remote_code=config.trust_remote_code,
    )


def auto_class(folder: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """The class that makes a folder's model, and its configuration."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    hub_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    remote_classes = getattr(hub_config, "auto_map", None) or {}
    is_multimodal = (
        type(hub_config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in remote_classes
    )
    return (AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM), hub_config


def freeze(model: nn.Module, config: FreezeConfig) -> None:
    """Turn off the gradients of the parts that the config names.

    Raises:
        ValueError: a part to freeze doesn't exist in this architecture, or nothing would be left to train.
    """
    projector = outermost(model, PROJECTORS)
    if config.vision_tower:
        kept = {id(parameter) for module in projector for parameter in module.parameters()}
        _freeze_all("vision_tower", outermost(model, VISION_TOWERS), VISION_TOWERS, keep=kept)
    if config.projector:
        _freeze_all("projector", projector, PROJECTORS)
    if config.language_model:
        _freeze_all("language_model", outermost(model, LANGUAGE_MODELS), LANGUAGE_MODELS)
        output_embeddings = model.get_output_embeddings()  # type: ignore[operator]
        output_embeddings.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model.freeze leaves no parameter to train. Keep at least one part trainable.")


def outermost(model: nn.Module, names: frozenset[str]) -> list[nn.Module]:
    """Modules with one of these names that aren't inside another such module."""
    paths = [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in names]
    outermost = [path for path in paths if not any(path.startswith(other + ".") for other in paths)]
    return [model.get_submodule(path) for path in outermost]


def _freeze_all(part: str, modules: list[nn.Module], names: frozenset[str], keep: set[int] | None = None) -> None:
    if not modules:
        raise ValueError(
            f"model.freeze.{part} is set, but the model has no module named {', '.join(sorted(names))}. Unset it."
        )
    for module in modules:
        for parameter in module.parameters():
            if keep is None or id(parameter) not in keep:
                parameter.requires_grad_(False)
