"""Reads the weights of a policy under training: full tensors under their Hugging Face names, bucket by bucket.

Tied weights appear once. Frozen weights are left out: generators have them from the model folder, and they never
change. Under ZeRO-3 the shards are gathered one bucket at a time, so no rank ever holds the whole model twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from actors.weights.manifest import BucketEntry, Manifest, TensorEntry, content_digest, plan_buckets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class WeightSnapshot:
    """One policy version in memory: the manifest and the content of each bucket."""

    manifest: Manifest
    buckets: tuple[bytes, ...]


class WeightSource:
    """The trainable parameters of a module. Build it on every rank, from the same module."""

    def __init__(self, module: nn.Module, *, precision: str, bucket_bytes: int, include_frozen: bool = False) -> None:
        """Plan the buckets.

        Args:
            module: the Hugging Face model, not DeepSpeed's wrapper.
            precision: of the generators; parameters are cast to it.
            bucket_bytes: size of a bucket.
            include_frozen: also send parameters that aren't trained.
        """
        named = [(n, p) for n, p in module.named_parameters() if include_frozen or p.requires_grad]
        if not named:
            raise ValueError("the policy has no trainable parameter, so there is nothing to publish")
        self._parameters: dict[str, nn.Parameter] = dict(named)
        self._dtype = DTYPES[precision]
        specs = [(name, precision, _full_shape(parameter)) for name, parameter in named]
        self.entries, self.sizes = plan_buckets(specs, bucket_bytes)

    def snapshot(self, version: int, *, keep: bool) -> WeightSnapshot | None:
        """Copy the weights as they are now. Collective: every rank calls it, between two updates.

        Args:
            version: number of the policy version.
            keep: True on the rank that publishes; the others only take part in gathering.
        Returns:
            The snapshot, or None where `keep` is False.
        """
        contents: list[bytes] = []
        for index, entries in groupby(self.entries, key=lambda entry: entry.bucket):
            contents.extend(self._collect(list(entries), self.sizes[index], keep))
        if not keep:
            return None
        buckets = tuple(BucketEntry(len(content), content_digest(content)) for content in contents)
        return WeightSnapshot(Manifest(version, self.entries, buckets), tuple(contents))

    def _collect(self, entries: list[TensorEntry], size: int, keep: bool) -> Iterator[bytes]:
        parameters = [self._parameters[entry.name] for entry in entries]
        with torch.no_grad(), _gathered(parameters):
            if not keep:
                return
            content = torch.empty(size, dtype=torch.uint8)
            for entry, parameter in zip(entries, parameters, strict=True):
                piece = parameter.detach().to(device="cpu", dtype=self._dtype).contiguous()
                content[entry.offset : entry.offset + entry.nbytes] = _as_bytes(piece)
        yield content.numpy().tobytes()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Under ZeRO-3 a parameter is an empty shard that remembers its shape in `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded)
    return gathered
