"""Staging: loads a version into a shadow copy of the model while generation runs, then swaps the two sets of weights.

vLLM's layerwise reload loads into the model itself, so generation is paused for all of it; on CPU most of that time is
spent packing weights for the kernels. Here the same reload runs in a thread, on a shadow of the model: modules that
share everything with the model's own but their weights. Only the exchange of references needs a pause. Staging takes
memory for a second copy of the weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention, MMEncoderAttention, is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import layer_ref_sentinel
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

METHODS = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
"""Quantisation methods that keep everything that a load changes in the layer itself."""
ATTENTION = (Attention, MMEncoderAttention)
TENSORS = frozenset({"_parameters", "_buffers", "_modules"})


@dataclass(eq=False)
class _Pair:
    """A module of the model and its shadow.

    Attributes:
        attributes: the shadow's own, before anything was loaded into it.
    """

    module: nn.Module
    shadow: nn.Module
    attributes: dict[str, Any]


def staging_obstacle(model: nn.Module) -> str | None:
    """The reason why a model cannot be staged; None where it can."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, BaseLayerWithLoRA):
            return f"{name} ({kind}) has adapters"
        if type(getattr(module, "quant_method", None)) not in METHODS:
            return f"{name} ({kind}) computes with {type(module.quant_method).__name__}"
        if is_deferred_attention_layer(module) and type(module) not in ATTENTION:
            return f"{name} is {kind}, an attention layer with processed weights of its own"
        if any(tensor.device.type != "cpu" for tensor in module._parameters.values() if tensor is not None):
            return f"{name} is on a GPU, and staging works on CPU only"
    return None


class StagedModel:
    """One staged version of a model's weights. Call :meth:`load` from any thread, then :meth:`swap`."""

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self._model_config = model_config
        self._pairs = _shadows(model)
        self._shadow: Any = self._pairs[0].shadow

    @torch.no_grad()
    def load(self, load_weights: Callable[[Any], None]) -> None:
        """Load a version into the shadow; the model itself is unchanged.

        Args:
            load_weights: loads the version into the model it is called with, or raises.
        """
        for pair in self._pairs:
            _describe(pair)
        initialize_layerwise_reload(self._shadow)
        for pair in self._pairs:
            # None: the result stays in the tensors in which it is made
            get_layerwise_info(pair.shadow).kernel_tensors = None
            has_weights = any(tensor is not None for tensor in pair.module._parameters.values())
            for name, buffer in pair.module._buffers.items():
                pair.shadow._buffers[name] = buffer.clone() if buffer is not None and has_weights else buffer
        try:
            load_weights(self._shadow)
        finally:
            for pair in self._pairs:
                info = get_layerwise_info(pair.shadow)
                if info.can_load() and info.load_numel <= 0:  # no tensor came for it: it keeps its weights
                    info.kernel_tensors = _tensors(pair.module._parameters), _tensors(pair.shadow._buffers)
                    info.load_numel_total = 0
            finalize_layerwise_reload(self._shadow, self._model_config)
            for pair in self._pairs:
                del LAYERWISE_INFO[pair.shadow]
        self._tie_weights()

    def swap(self) -> None:
        """Exchange the model's weights and the shadow's, by reference. Generation must be paused."""
        swapped: set[int] = set()
        for pair in self._pairs:
            for name, own in (*pair.module._parameters.items(), *pair.module._buffers.items()):
                staged = pair.shadow._parameters.get(name, pair.shadow._buffers.get(name))
                if own is None or staged is None or staged is own or id(own) in swapped:
                    continue
                own.data, staged.data = staged.data, own.data  # other holders of the parameter see it too
                swapped.add(id(own))
            for name, value in pair.shadow.__dict__.items():
                if name not in TENSORS and value is not pair.attributes.get(name):
                    pair.shadow.__dict__[name] = pair.module.__dict__.get(name)
                    pair.module.__dict__[name] = value

    def release(self) -> None:
        """Free the shadow's weights: the staged ones, or the former ones after :meth:`swap`."""
        for pair in self._pairs:
            pair.shadow.__dict__.clear()  # its parameters' loaders refer to it: a reference cycle
            pair.attributes.clear()
        self._pairs.clear()

    def _tie_weights(self) -> None:
        """Give tied layers the new weights, processed for their kernels."""
        new: dict[int, Tensor] = {}
        for pair in self._pairs:
            for name, staged in _tensors(pair.shadow._parameters).items():
                own = pair.module._parameters[name]
                if own is not None and staged is not own:
                    new[id(own)] = staged
        for pair in self._pairs:
            tied = [name for name, staged in _tensors(pair.shadow._parameters).items() if id(staged) in new]
            for name in tied:
                pair.shadow._parameters[name] = new[id(pair.shadow._parameters[name])]  # type: ignore[assignment]
            if tied and getattr(pair.shadow, "quant_method", None) is not None:
                pair.shadow.quant_method.process_weights_after_loading(pair.shadow)  # type: ignore[union-attr,operator]


def _shadows(model: nn.Module) -> list[_Pair]:
    """A shadow of each module, the model's own first. References between modules become references between shadows."""
    shadows: dict[int, nn.Module] = {}
    for module in model.modules():
        shadow = shadows[id(module)] = object.__new__(type(module))
        shadow.__dict__.update(module.__dict__)  # one atomic copy: generation runs and may add attributes
    pairs = []
    for module in model.modules():
        shadow = shadows[id(module)]
        for name, value in shadow.__dict__.items():
            shadow.__dict__[name] = _referring(value, shadows)
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            shadow.__dict__[name] = shadow.__dict__[name].copy()
        pairs.append(_Pair(module, shadow, dict(shadow.__dict__)))
    return pairs


def _referring(value: Any, shadows: dict[int, nn.Module]) -> Any:
    """The value of a module's attribute, with modules replaced by their shadows."""
    if isinstance(value, nn.Module):
        return shadows.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in shadows:
        return MethodType(value.__func__, shadows[id(value.__self__)])
    if type(value) in (list, tuple) and any(isinstance(item, nn.Module) for item in value):
        return type(value)(_referring(item, shadows) for item in value)
    if type(value) in (dict, OrderedDict) and any(isinstance(item, nn.Module) for item in value.values()):
        return type(value)((key, _referring(item, shadows)) for key, item in value.items())
    return value


def _describe(pair: _Pair) -> None:
    """Register the shadow's unloaded parameters with vLLM's layerwise reload, from its record of the module's."""
    info = get_layerwise_info(pair.module)
    described = {name: _own(to_meta_tensor(tensor), pair) for name, tensor in info.restore_metadata[0].items()}
    LAYERWISE_INFO[pair.shadow] = LayerReloadingInfo((described, {}), info.restore_device)
    for name, tensor in _tensors(pair.module._parameters).items():
        if name not in described:  # small parameters, which vLLM loads in place
            copied = tensor.detach().clone()
            copied.__class__, copied.__dict__ = tensor.__class__, tensor.__dict__.copy()
            pair.shadow._parameters[name] = _own(copied, pair)  # type: ignore[assignment]


def _own(tensor: Tensor, pair: _Pair) -> Tensor:
    """Bind a parameter's loaders to the shadow, without vLLM's wrappers."""
    for name, value in tensor.__dict__.items():
        while getattr(value, "__name__", "") == "online_process_loader":
            value = value.__wrapped__
        if isinstance(value, MethodType) and value.__self__ in (pair.module, layer_ref_sentinel):
            value = MethodType(value.__func__, pair.shadow)
        tensor.__dict__[name] = value
    return tensor


def _tensors(found: Mapping[str, Any]) -> dict[str, Any]:
    """A module's parameters or buffers, except those registered as None."""
    return {name: tensor for name, tensor in found.items() if tensor is not None}
