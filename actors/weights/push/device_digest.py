"""Fingerprints of tensors, computed where the tensors are, and the digest of a version made of them.

A push sends weights from one GPU to another without passing through host memory, so their bytes can't be hashed there.
Sender and receiver take a fingerprint each, with torch operations on their own device, and compare.

A fingerprint finds damage: any change confined to eight neighbouring bytes (a flipped bit, a corrupt element) for
certain; swapped, shifted, repeated, missing or stale elements and any other change that wasn't made for the purpose
with a chance of about 2^-128 of being missed. It is not cryptographic: whoever knows the algorithm can make two tensors
with the same fingerprint. Against forgery, the transport has to say who may send.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import msgpack
import torch
from torch import Tensor
from torch.nn import functional

BLOCK_WORDS = 1 << 20
"""Words of 8 bytes hashed at once; three such blocks is all the memory that is needed besides the tensor."""
WORD_BYTES = 8

# Odd 64-bit constants of splitmix64 and murmur3, as the signed integers that torch computes with.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = (0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64))


def fingerprint(tensor: Tensor) -> int:
    """128-bit fingerprint of a tensor's content, in row-major order.

    The same on every device and for every layout in memory; dtype and shape don't enter it (see :func:`digest_of`).

    Args:
        tensor: of any shape and any dtype of 1, 2, 4 or 8 bytes; compared bit by bit, so that -0.0 isn't 0.0.
    """
    (value,) = as_integers([lanes(tensor)])
    return value


def as_integers(all_lanes: list[Tensor]) -> list[int]:
    """Fingerprints from their two halves, with a single copy from the device to the host.

    Args:
        all_lanes: what :func:`lanes` returned for each tensor, on one device.
    """
    if not all_lanes:
        return []
    words = torch.stack(all_lanes).tolist()
    return [(low & (1 << 64) - 1) | (high & (1 << 64) - 1) << 64 for low, high in words]


@torch.no_grad()
def lanes(tensor: Tensor) -> Tensor:
    """The two halves of a fingerprint, on the tensor's device; the host waits for nothing.

    Returns:
        [2] int64.
    """
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    keys = _keys(tensor.device)
    block_bytes = BLOCK_WORDS * WORD_BYTES
    starts = range(0, max(1, content.numel()), block_bytes)
    sums = torch.stack([_hash(_words(content[start : start + block_bytes]), keys) for start in starts])  # [blocks, 2]
    places = keys[: 2 * len(starts)].view(-1, 2)
    return _scramble(_scramble(sums ^ places).sum(0) + content.numel())


def digest_of(version: int, tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> str:
    """Hex digest (BLAKE2b, 128 bits) of a version: its number, and name, dtype, shape and fingerprint of each tensor.

    Args:
        version: the policy version.
        tensors: name, dtype ("bfloat16"), shape and fingerprint of each, in any order.
    Raises:
        ValueError: a name comes twice.
    """
    rows = sorted((name, dtype, list(shape), f"{value:032x}") for name, dtype, shape, value in tensors)
    for (name, *_), (following, *_) in pairwise(rows):
        if name == following:
            raise ValueError(f"{name} comes twice in policy version {version}")
    encoded: bytes = msgpack.packb([version, rows], use_bin_type=True)
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class VersionPrint:
    """What a policy version is known by on both sides of a push.

    Attributes:
        version: the policy version.
        tensors: name, dtype, shape and fingerprint of each, in the order in which they were sent.
    """

    version: int
    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]

    @property
    def digest(self) -> str:
        """See :func:`digest_of`."""
        return digest_of(self.version, self.tensors)

    def pack(self) -> dict[str, Any]:
        """As plain values, which any serialiser of control messages carries."""
        rows = [[name, dtype, list(shape), f"{value:032x}"] for name, dtype, shape, value in self.tensors]
        return {"version": self.version, "tensors": rows}

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> VersionPrint:
        """Read what :meth:`pack` wrote.

        Raises:
            ValueError: it isn't that.
        """
        try:
            rows = tuple(
                (str(name), str(dtype), tuple(map(int, shape)), int(value, 16))
                for name, dtype, shape, value in packed["tensors"]
            )
            return cls(int(packed["version"]), rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a version's fingerprints: {error!r}") from error


def _words(content: Tensor) -> Tensor:
    """A block's bytes as int64 words, padded with zeros; a copy only where they aren't aligned to words."""
    if content.numel() % WORD_BYTES:
        content = functional.pad(content, (0, -content.numel() % WORD_BYTES))
    elif content.storage_offset() % WORD_BYTES or content.data_ptr() % WORD_BYTES:
        content = content.clone()
    return content.view(torch.int64)


def _hash(words: Tensor, keys: Tensor) -> Tensor:
    """[2] int64: sums of every word scrambled with the key of its place, in two ways that share no structure.

    Each word's scrambling is one-to-one, so that one changed word changes both sums. Sums modulo 2^64 are the same in
    whatever order a device adds.
    """
    mixed = words ^ keys[: words.numel()]
    spare = torch.empty_like(mixed)
    _fold(mixed, 33, spare)
    mixed *= MIX[0]
    _fold(mixed, 33, spare)
    mixed *= MIX[1]
    low = mixed.sum()
    _fold(mixed, 29, spare)
    mixed *= MIX[2]
    _fold(mixed, 32, spare)
    return torch.stack((low, mixed.sum()))


def _fold(words: Tensor, bits: int, spare: Tensor) -> None:
    """words ^= words >>> bits, in place. torch shifts signed integers, so the sign's copies are masked out."""
    torch.bitwise_right_shift(words, bits, out=spare)
    spare &= (1 << (64 - bits)) - 1
    words ^= spare


def _scramble(words: Tensor) -> Tensor:
    """Each word by itself, one-to-one (murmur3's finaliser)."""
    mixed = words.clone()
    spare = torch.empty_like(mixed)
    _fold(mixed, 33, spare)
    mixed *= MIX[0]
    _fold(mixed, 33, spare)
    mixed *= MIX[1]
    _fold(mixed, 33, spare)
    return mixed


@lru_cache(maxsize=8)
def _keys(device: torch.device) -> Tensor:
    """[BLOCK_WORDS] int64: a key for each place in a block. Kept, as the same constant for every tensor of a device."""
    places = torch.arange(1, BLOCK_WORDS + 1, dtype=torch.int64, device=device)
    keys = _scramble(places * GOLDEN)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)  # later calls may come on other streams
    return keys
