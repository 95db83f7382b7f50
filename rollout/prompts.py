"""Prompts: messages of typed parts, a target, metadata, and an id that is the hash of the content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from rollout.media import MediaRef

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """A run of text."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image, video or audio clip, by reference."""

    media: MediaRef


Part = TextPart | MediaPart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of the conversation."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Prompt:
    """What the policy answers.

    Attributes:
        messages: the conversation so far; the policy answers as the assistant.
        target: what a verifier compares with (JSON-serialisable), or None.
        metadata: further columns of the data set, for rewards and reports (JSON-serialisable).
    """

    messages: tuple[Message, ...]
    target: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def prompt_id(self) -> str:
        """First 16 hex digits of the SHA-256 of messages (media by content hash), target and metadata."""
        content = json.dumps(
            {
                "messages": [
                    [m.role, [p.text if isinstance(p, TextPart) else [p.media.kind, p.media.sha256] for p in m.parts]]
                    for m in self.messages
                ],
                "target": self.target,
                "metadata": dict(self.metadata),
            },
            sort_keys=True,
            ensure_ascii=False,
            default=str,
        )
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """Every medium of the prompt, in the order in which the messages name them."""
        return tuple(p.media for m in self.messages for p in m.parts if isinstance(p, MediaPart))
