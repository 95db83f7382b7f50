"""Policy versions for tests of the transport: random tensors, changed copies, and what they look like in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.weights.manifest import Manifest, TensorEntry, WeightsPart
from actors.weights.pull.delta import Delta
from actors.weights.pull.memory import Memory
from actors.weights.pull.server import HeldPart
from actors.weights.pull.writer import VersionWriter
from actors.weights.source import DTYPES, PolicyPartSource, SourceTensor

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def random_tensors(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors of so many elements each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def source_of(
    tensors: Sequence[Tensor],
    *,
    part: WeightsPart = WeightsPart.TRAINED,
    precision: str | None = None,
    prefix: str = "t",
) -> PolicyPartSource:
    """A source that reads these tensors as they are when it is read."""

    def source_tensor(index: int, tensor: Tensor) -> SourceTensor:
        dtype = precision or NAMES[tensor.dtype]
        return SourceTensor(f"{prefix}{index}", dtype, tuple(tensor.shape), (), lambda: tensor)

    return PolicyPartSource([source_tensor(i, t) for i, t in enumerate(tensors)], gather_bytes=1 << 20, part=part)


def changed(tensors: Sequence[Tensor], *positions: int) -> list[Tensor]:
    """Copies with one element doubled and one added, at these positions of all elements laid end to end."""
    copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    for position in positions:
        for copy in copies:
            if position < copy.numel():
                copy.view(-1)[position] = copy.view(-1)[position] * 2 + 1
                break
            position -= copy.numel()
    return copies


def written(
    source: PolicyPartSource, memory: Memory, bucket_bytes: int = 256, base: HeldPart | None = None, version: int = 1
) -> tuple[Manifest, Delta | None]:
    """What a publisher does with its memory."""
    writer = VersionWriter(source, memory, bucket_bytes=bucket_bytes, base=base)
    source.read(writer)
    return writer.finish(1, version)


def bytes_of(source: PolicyPartSource) -> bytes:
    """What the memory of a version has to hold, put together the plain way."""
    content = bytearray(source.nbytes)
    for entry, tensor in zip(source.entries, source.tensors, strict=True):
        own = torch.empty(tensor.shape, dtype=DTYPES[entry.dtype]).copy_(tensor.read().detach()).reshape(-1)
        content[entry.offset : entry.offset + entry.nbytes] = own.view(torch.uint8).numpy().tobytes()
    return bytes(content)


def tensor_in(memory: Memory, entry: TensorEntry) -> Tensor:
    """One tensor of what lies in memory."""
    content = torch.from_numpy(array(memory.view[entry.offset : entry.offset + entry.nbytes]))
    return content.view(DTYPES[entry.dtype]).reshape(entry.shape)


def array(content: Any) -> NDArray[np.uint8]:
    """Bytes as numpy's, writable."""
    return np.frombuffer(bytearray(content), dtype=np.uint8)
