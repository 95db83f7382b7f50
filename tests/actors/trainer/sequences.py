"""Token sequences without a model, for tests of planning and checks."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from rollout.prompts import Message, Prompt, TextPart
from rollout.samples import TokenSequence


def sequence(prompt: str, prompt_tokens: int, tokens: int) -> TokenSequence:
    """One trained completion; only its lengths and its prompt mean something."""
    return TokenSequence(
        Prompt((Message("user", (TextPart(prompt),)),)),
        np.arange(prompt_tokens, dtype=np.int32),
        np.arange(tokens, dtype=np.int32),
        np.ones(tokens, np.bool_),
    )


def plain(sample: TokenSequence) -> TokenSequence:
    """The sequence of a training sample, without its columns."""
    return TokenSequence(**{field.name: getattr(sample, field.name) for field in fields(TokenSequence)})
