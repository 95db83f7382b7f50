"""Which tensors of a policy the generators are sent: what training changes each time, all the rest once."""

from __future__ import annotations

import json
from typing import Any

from actors.config import ModelConfig
from actors.model.lora import adapter_config, adapter_tensors, base_tensors, merged_tensors, plain_tensors
from actors.weights.manifest import WeightsPart
from actors.weights.source import PolicyPartSource, is_frozen, is_trained, module_tensors


def policy_sources(
    module: Any, model: ModelConfig, gather_bytes: int
) -> tuple[PolicyPartSource, PolicyPartSource | None]:
    """What changes, and all the rest, or None where that is nothing.

    Args:
        module: the Hugging Face model, with adapters where the recipe has them; its parameters may be sharded.
        model: precision and adapters.
        gather_bytes: under ZeRO-3, how much is gathered at a time.
    """
    precision, lora = model.precision, model.lora
    part, attributes = WeightsPart.TRAINED, ""
    if lora is None:
        changing = module_tensors(module, precision, is_trained)
        rest = module_tensors(module, precision, is_frozen)
    elif lora.sync == "merged":
        # generators make one layer of several (queries, keys and values; gate and up), and load it whole or not at all
        blocks = {_block(tensor.name) for tensor in merged_tensors(module, precision)}
        whole = plain_tensors(module, precision)
        changing = [tensor for tensor in whole if _block(tensor.name) in blocks]
        rest = [tensor for tensor in whole if _block(tensor.name) not in blocks]
    else:
        part, attributes = WeightsPart.ADAPTER, json.dumps(adapter_config(lora, module), sort_keys=True)
        changing, rest = adapter_tensors(module, precision), base_tensors(module, precision)
    frozen = PolicyPartSource(rest, gather_bytes=gather_bytes, part=WeightsPart.FROZEN) if rest else None
    return PolicyPartSource(changing, gather_bytes=gather_bytes, part=part, attributes=attributes), frozen


def _block(name: str) -> str:
    """The attention or feed-forward block that a layer's parameter is in."""
    return name.rsplit(".", 2)[0]
