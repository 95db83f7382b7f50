"""CUDA IPC handles as plain values, so that they reach a vLLM engine without pickle.

vLLM sends the arguments of torch's `rebuild_cuda_tensor` unchanged, classes included, which its control channel carries
only as a pickle (`VLLM_ALLOW_INSECURE_SERIALIZATION`). The classes are the same for every tensor; the rest is numbers,
names and opaque bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HandleError(ValueError):
    """The values are no handle of a tensor."""


def to_plain(handle: Mapping[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """Convert a handle of vLLM to plain values.

    Args:
        handle: by the GPU's UUID, the arguments of `rebuild_cuda_tensor` for a plain tensor.
    Raises:
        HandleError: the arguments rebuild something else.
    """
    return {uuid: _plain(arguments) for uuid, arguments in handle.items()}


def from_plain(handle: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Convert plain values to a handle of vLLM; the receiver fills in its device index (the seventh argument).

    Raises:
        HandleError: the values are no handle.
    """
    try:
        return {str(uuid): _arguments(plain) for uuid, plain in handle.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HandleError(f"not the handle of a tensor on a GPU: {error!r}") from error


def _plain(arguments: tuple[Any, ...]) -> dict[str, Any]:
    (
        tensor_class,
        shape,
        stride,
        offset,
        storage_class,
        dtype,
        _device,
        storage,
        storage_bytes,
        storage_offset,
        requires_grad,
        counter,
        counter_offset,
        event,
        waits_for_event,
    ) = arguments
    name = str(dtype).removeprefix("torch.")
    if tensor_class is not torch.Tensor or storage_class is not torch.storage.TypedStorage or requires_grad:
        raise HandleError(
            f"a {tensor_class.__name__} on a {storage_class.__name__} cannot be sent over ipc: only a Tensor on a "
            "TypedStorage, without gradient"
        )
    if name not in DTYPES:
        raise HandleError(f"a tensor of {name} cannot be sent over ipc; {', '.join(DTYPES)} can")
    return {
        "shape": list(shape),
        "stride": list(stride),
        "offset": offset,
        "dtype": name,
        "storage": storage,
        "storage_bytes": storage_bytes,
        "storage_offset": storage_offset,
        "counter": counter,
        "counter_offset": counter_offset,
        "event": event,
        "waits_for_event": waits_for_event,
    }


def _arguments(plain: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        torch.Tensor,
        torch.Size(map(int, plain["shape"])),
        tuple(map(int, plain["stride"])),
        int(plain["offset"]),
        torch.storage.TypedStorage,
        DTYPES[plain["dtype"]],
        0,
        bytes(plain["storage"]),
        int(plain["storage_bytes"]),
        int(plain["storage_offset"]),
        False,
        bytes(plain["counter"]),
        int(plain["counter_offset"]),
        bytes(plain["event"]),
        bool(plain["waits_for_event"]),
    )
