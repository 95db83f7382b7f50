"""A reward that costs next to nothing and differs between samples: the share of digits in a completion's text."""

from __future__ import annotations

from typing import Any


def digit_share(prompts: list[Any], completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """Digits per character of each completion, 0 for an empty one."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in texts]
