"""Which tensors of a policy the generators are sent, and how each is read. What training changes is apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from actors.config import ModelConfig
from actors.model.lora import BASE, adapter_config, adapter_parameters, adapters
from actors.weights.manifest import WeightsPart
from actors.weights.source import PolicyPartSource, SourceTensor, full_shape, is_frozen, is_trained, module_tensors


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


def adapter_tensors(module: nn.Module, precision: str) -> list[SourceTensor]:
    """A and B of every adapter as peft and vLLM read them: without the scaling, which their configuration has.

    Args:
        module: with adapters; its parameters may be sharded.
        precision: on the wire.
    """
    return [_as_it_is(name, parameter, precision) for name, parameter in adapter_parameters(module).items()]


def merged_tensors(module: nn.Module, precision: str) -> list[SourceTensor]:
    """W + scaling * B A of every adapted layer, added up in float32, under the name that W has without adapters.

    Args:
        module: with adapters; its parameters may be sharded.
        precision: on the wire.
    """
    return [
        SourceTensor(
            f"{adapter.path}.weight",
            precision,
            full_shape(adapter.weight),
            (adapter.weight, adapter.a, adapter.b),
            adapter.merged,
        )
        for adapter in adapters(module)
    ]


def base_tensors(module: nn.Module, precision: str) -> list[SourceTensor]:
    """Everything that isn't an adapter, under the names it has without adapters; tied weights once.

    Args:
        module: with adapters or without; its parameters may be sharded.
        precision: on the wire.
    """
    own = {id(parameter) for parameter in adapter_parameters(module).values()}
    paths = {adapter.path for adapter in adapters(module)}
    return [
        _as_it_is(_plain(name, paths), parameter, precision)
        for name, parameter in module.named_parameters()
        if id(parameter) not in own
    ]


def plain_tensors(module: nn.Module, precision: str) -> list[SourceTensor]:
    """The whole model as one without adapters that does the same: merged where a layer is adapted, else as it is."""
    merged = {tensor.name: tensor for tensor in merged_tensors(module, precision)}
    return [merged.get(tensor.name, tensor) for tensor in base_tensors(module, precision)]


def _block(name: str) -> str:
    """The attention or feed-forward block that a layer's parameter is in."""
    return name.rsplit(".", 2)[0]


def _plain(name: str, paths: set[str]) -> str:
    """A parameter's name without adapters."""
    path, dot, last = name.rpartition(f".{BASE}.")
    return f"{path}.{last}" if dot and path in paths else name


def _as_it_is(name: str, parameter: nn.Parameter, precision: str) -> SourceTensor:
    read: Callable[[], Tensor] = parameter.detach
    return SourceTensor(name, precision, full_shape(parameter), (parameter,), read)
