"""Registers the throughput benchmark's reward function with Counterpoint; the peer takes the same function as it is."""

from __future__ import annotations

from digit_share import digit_share

from reward.registry import reward_function

reward_function("digit_share", style="chat_columns")(digit_share)
