"""A vLLM logits processor that bans media placeholder tokens, which have no image features when they are sampled.

It costs one indexed fill per decoding step, independent of the number of requests. vLLM's processed log-probabilities
include it, so the trainer masks the same tokens in its log-softmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "counterpoint_banned_token_ids"


class BannedTokens(LogitsProcessor):
    """Sets the logits of banned tokens to minus infinity. Their ids stand in the vLLM engine's `additional_config`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        additional = vllm_config.additional_config
        token_ids = additional.get(CONFIG_KEY, ()) if isinstance(additional, dict) else ()
        self._token_ids = torch.tensor(list(token_ids), dtype=torch.int64, device=device)

    def is_argmax_invariant(self) -> bool:
        """False: a banned token may have had the highest logit."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing: the mask is the same for every request."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask [requests, vocabulary] logits in place."""
        return logits.index_fill_(1, self._token_ids, float("-inf"))
