"""LoRA adapters on the policy: where they sit, their matrices, and the folder that vLLM loads them from.

Adapters are put into the Hugging Face model in place (peft's `inject_adapter_in_model`), so its class, its forward
pass and its output head stay what they are. Nothing here knows of training or of transport.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from actors.config import LoraConfig, ModelConfig
from actors.model.loading import LANGUAGE_MODELS, PROJECTORS, VISION_TOWERS, auto_class, outermost

if TYPE_CHECKING:
    import peft

logger = logging.getLogger(__name__)

NAME = "default"
"""peft's name of the one adapter; it is part of parameter names in the module, and of none outside."""
BASE = "base_layer"
"""peft's name of the layer that an adapter was put around."""
PEFT_PREFIX = "base_model.model."
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapted linear layer: y = W x + scaling * B A x.

    Attributes:
        path: of the layer in the module.
        weight: W, [out, in].
        a: A, [rank, in].
        b: B, [out, rank].
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    """

    path: str
    weight: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    scaling: float

    @torch.no_grad()
    def merged(self) -> Tensor:
        """[out, in] float32, on the weight's device: the matrix of a plain layer that does the same."""
        return torch.addmm(self.weight.float(), self.b.float(), self.a.float(), alpha=self.scaling)


def add_adapters(module: nn.Module, config: LoraConfig, *, seed: int = 0) -> None:
    """Put an adapter into every targeted layer, and freeze everything else.

    A fresh adapter adds nothing: its B is 0. Its A is random, and the same for the same seed, wherever it is made.

    Args:
        module: a Hugging Face model, whole.
        config: rank, scaling and targets.
        seed: of A; torch's global random state is left as it was.
    Raises:
        ValueError: no layer is targeted, or one that can't have an adapter.
    """
    import peft

    paths = _targeted(module, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(config, paths), module, NAME)
    found = [adapter.path for adapter in adapters(module)]
    if found != paths:
        raise ValueError(f"peft put adapters into {found} instead of {paths}")
    trained = {id(parameter) for parameter in adapter_parameters(module).values()}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def adapters(module: nn.Module) -> list[Adapter]:
    """Every adapted layer, in the module's order; empty for a module without adapters."""
    if not hasattr(module, "peft_config"):  # as peft leaves it; without, peft needn't be imported
        return []
    from peft.tuners.lora import LoraLayer

    layers: list[tuple[str, Any]] = [
        (path, each) for path, each in module.named_modules() if isinstance(each, LoraLayer)
    ]
    return [
        Adapter(path, each.base_layer.weight, each.lora_A[NAME].weight, each.lora_B[NAME].weight, each.scaling[NAME])
        for path, each in layers
    ]


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every adapter, by their names in a checkpoint of peft's, in the module's order."""
    return {
        f"{PEFT_PREFIX}{adapter.path}.{matrix}.weight": parameter
        for adapter in adapters(module)
        for matrix, parameter in (("lora_A", adapter.a), ("lora_B", adapter.b))
    }


def adapter_config(config: LoraConfig, module: nn.Module) -> dict[str, Any]:
    """Content of `adapter_config.json`, plain JSON: what peft and vLLM have to know of adapters besides their matrices.

    Args:
        config: that the adapters were made with.
        module: that they are in.
    """
    content = _peft_config(config, [adapter.path for adapter in adapters(module)]).to_dict()
    content |= {"peft_type": "LORA", "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}


def write_adapter_folder(folder: Path, adapter_config: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write what peft's `from_pretrained` and vLLM's `LoRARequest(lora_path=...)` load.

    Args:
        folder: made if need be; an adapter in it is replaced.
        adapter_config: of :func:`adapter_config`.
        tensors: A and B of every adapter, by their names in a checkpoint of peft's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(adapter_config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_empty_adapter(folder: Path, model: ModelConfig) -> None:
    """Write an adapter that adds nothing, for the model of a folder, of which only the configuration is read.

    A generator starts with it: a running request follows an adapter that is replaced, but can't be given one.

    Args:
        folder: see :func:`write_adapter_folder`.
        model: with `lora` set.
    """
    assert model.lora is not None
    kind, hub_config = auto_class(model.path, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        skeleton = kind.from_config(hub_config, trust_remote_code=model.trust_remote_code)
        add_adapters(skeleton, model.lora)
    dtype = getattr(torch, model.precision)
    zeros = ((name, torch.zeros(part.shape, dtype=dtype)) for name, part in adapter_parameters(skeleton).items())
    write_adapter_folder(folder, adapter_config(model.lora, skeleton), zeros)


def _targeted(module: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the layers that get an adapter."""
    language = outermost(module, LANGUAGE_MODELS) or [module]
    inside = {id(each) for part in language for each in part.modules()}
    inside -= {id(each) for part in outermost(module, VISION_TOWERS | PROJECTORS) for each in part.modules()}
    paths: list[str] = []
    missing = set(config.targets)
    for path, each in module.named_modules():
        matched = {target for target in config.targets if f".{path}".endswith(f".{target}")}
        if not matched or (id(each) not in inside and not _is_embedding(module, each)):
            continue
        _require_linear(module, path, each)
        missing -= matched
        paths.append(path)
    if not paths:
        linear = {path.rsplit(".", 1)[-1] for path, each in module.named_modules() if type(each) is nn.Linear}
        raise ValueError(
            f"model.lora.targets = [{', '.join(config.targets)}] names no layer of the language model of "
            f"{type(module).__name__}. Name some of its linear layers ({', '.join(sorted(linear))})."
        )
    if missing:
        logger.warning("model.lora.targets: %s has no layer named %s", type(module).__name__, sorted(missing))
    return paths


def _is_embedding(module: Any, layer: nn.Module) -> bool:
    return layer is module.get_output_embeddings() or layer is module.get_input_embeddings()


def _require_linear(module: nn.Module, path: str, layer: nn.Module) -> None:
    if _is_embedding(module, layer):
        raise ValueError(
            f"model.lora.targets reaches {path}, the embeddings. Their adapter would be as large as the vocabulary, "
            "and the log-probabilities are made inside a plain output head. Leave it out."
        )
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"model.lora.targets reaches {path}, a {type(layer).__name__}. Adapters are for linear layers: leave it "
            "out, or name the layers inside it."
        )


def _peft_config(config: LoraConfig, paths: list[str]) -> peft.LoraConfig:
    import peft

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=paths,
        use_rslora=config.use_rslora,
        bias="none",
    )
