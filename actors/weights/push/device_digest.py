"""Device digests: digests of tensors computed on the tensors' own device, and the digest of a version made of them.

A push sends weights from one GPU to another without passing through host memory, so their bytes cannot be hashed there.
Sender and receiver each compute a device digest, with torch operations on their own device, and compare.

A device digest detects damage: every change within eight neighbouring bytes (a flipped bit, a corrupt element) for
certain; swapped, shifted, repeated, missing or stale elements and any other accidental change except with a probability
of about 2^-128. It is not cryptographic: whoever knows the algorithm can make two tensors with the same digest. The
transport has to exclude forgery.
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
"""Words of 8 bytes hashed at once. Hashing needs memory for three such blocks besides the tensor."""
WORD_BYTES = 8

# Odd 64-bit constants of splitmix64 and murmur3, as the signed integers that torch computes with.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = (0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64))


def device_digest(tensor: Tensor) -> int:
    """128-bit digest of a tensor's content, in row-major order.

    Equal on every device and for every layout in memory. It excludes dtype and shape (see :func:`version_digest`).

    Args:
        tensor: of any shape and any dtype of 1, 2, 4 or 8 bytes; its bits count, so -0.0 and 0.0 differ.
    """
    (value,) = as_integers([digest_halves(tensor)])
    return value


def as_integers(all_halves: list[Tensor]) -> list[int]:
    """Device digests as integers, with a single copy from the device to the host.

    Args:
        all_halves: the result of :func:`digest_halves` for each tensor, on one device.
    """
    if not all_halves:
        return []
    words = torch.stack(all_halves).tolist()
    return [(low & (1 << 64) - 1) | (high & (1 << 64) - 1) << 64 for low, high in words]


@torch.no_grad()
def digest_halves(tensor: Tensor) -> Tensor:
    """The two halves of a device digest, on the tensor's device and without synchronising the host.

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


def version_digest(version: int, tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> str:
    """Hex digest (BLAKE2b, 128 bits) of a version: its number, and name, dtype, shape and device digest of each tensor.

    Args:
        version: the policy version.
        tensors: name, dtype ("bfloat16"), shape and device digest of each, in any order.
    Raises:
        ValueError: two tensors have one name.
    """
    rows = sorted((name, dtype, list(shape), f"{value:032x}") for name, dtype, shape, value in tensors)
    for (name, *_), (following, *_) in pairwise(rows):
        if name == following:
            raise ValueError(f"policy version {version} has two tensors named {name}")
    encoded: bytes = msgpack.packb([version, rows], use_bin_type=True)
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class VersionDigests:
    """The device digests of a policy version's tensors, which both sides of a push compute.

    Attributes:
        version: the policy version.
        tensors: name, dtype, shape and device digest of each, in the order of sending.
    """

    version: int
    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]

    @property
    def digest(self) -> str:
        """See :func:`version_digest`."""
        return version_digest(self.version, self.tensors)

    def pack(self) -> dict[str, Any]:
        """The digests as plain values, for a control message."""
        rows = [[name, dtype, list(shape), f"{value:032x}"] for name, dtype, shape, value in self.tensors]
        return {"version": self.version, "tensors": rows}

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> VersionDigests:
        """Read what :meth:`pack` wrote.

        Raises:
            ValueError: it has another form.
        """
        try:
            rows = tuple(
                (str(name), str(dtype), tuple(map(int, shape)), int(value, 16))
                for name, dtype, shape, value in packed["tensors"]
            )
            return cls(int(packed["version"]), rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the device digests of a version: {error!r}") from error


def _words(content: Tensor) -> Tensor:
    """A block's bytes as int64 words, padded with zeros; a copy only where they are misaligned."""
    if content.numel() % WORD_BYTES:
        content = functional.pad(content, (0, -content.numel() % WORD_BYTES))
    elif content.storage_offset() % WORD_BYTES or content.data_ptr() % WORD_BYTES:
        content = content.clone()
    return content.view(torch.int64)


def _hash(words: Tensor, keys: Tensor) -> Tensor:
    """[2] int64: two sums over all words, each word scrambled with the key of its place in two unrelated ways.

    The scrambling of a word is one-to-one, so one changed word changes both sums. Sums modulo 2^64 are independent of
    the order in which a device adds.
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
    """words ^= words >>> bits, in place. torch's shift is arithmetic, so the copies of the sign are masked out."""
    torch.bitwise_right_shift(words, bits, out=spare)
    spare &= (1 << (64 - bits)) - 1
    words ^= spare


def _scramble(words: Tensor) -> Tensor:
    """Scramble each word by itself, one-to-one (murmur3's finaliser)."""
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
    """[BLOCK_WORDS] int64: a key for each place in a block, the same for all tensors and cached by device."""
    places = torch.arange(1, BLOCK_WORDS + 1, dtype=torch.int64, device=device)
    keys = _scramble(places * GOLDEN)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)  # later calls may run on other streams
    return keys
