"""The manifest of a policy version: its tensors laid end to end, cut into buckets, with a digest of each bucket.

A version has up to two parts: the trained weights, sent with every version, and the frozen ones, sent once. Each part
has its own manifest. A manifest travels as MessagePack under a fixed schema; nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import msgpack
import xxhash

T = TypeVar("T")
FORMAT = 2
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DIGEST_BYTES = 16
ALIGNMENT = 64
"""Bytes. Tensors start at multiples of it and buckets are multiples of it, so that no element lies in two buckets."""


class ManifestError(ValueError):
    """The bytes are no manifest, or contradict themselves."""


class WeightsPart(StrEnum):
    """The part of the policy that a manifest describes."""

    TRAINED = "trained"
    """The weights that training changes, under their checkpoint names."""
    FROZEN = "frozen"
    """All other weights. They never change, so a generator receives them once."""
    ADAPTER = "adapter"
    """The matrices of a LoRA adapter, under the names of its own checkpoint."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its checkpoint name and the place of its bytes (row-major, little-endian).

    Attributes:
        name: as in the model's Hugging Face checkpoint.
        dtype: "float32", "bfloat16" or "float16".
        shape: full shape, independent of the trainer's sharding.
        offset: position of its first byte.
        nbytes: size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Manifest:
    """All tensors of one part of a policy version.

    Attributes:
        epoch: number of the publisher; a later publisher has a greater one.
        version: the policy version.
        part: the part of the policy.
        nbytes: size of the part.
        bucket_bytes: size of each bucket but the last: bucket i starts at byte i x bucket_bytes.
        tensors: entries in the order of their offsets.
        digests: XXH3 (128 bits) of each bucket.
        attributes: JSON that accompanies the part (an adapter's configuration), or "".
    """

    epoch: int
    version: int
    part: WeightsPart
    nbytes: int
    bucket_bytes: int
    tensors: tuple[TensorEntry, ...]
    digests: tuple[bytes, ...]
    attributes: str = ""

    @cached_property
    def packed(self) -> bytes:
        """The manifest as MessagePack; equal manifests give equal bytes."""
        content = {
            "format": FORMAT,
            "epoch": self.epoch,
            "version": self.version,
            "part": str(self.part),
            "nbytes": self.nbytes,
            "bucket_bytes": self.bucket_bytes,
            "tensors": [[t.name, t.dtype, list(t.shape), t.offset, t.nbytes] for t in self.tensors],
            "digests": b"".join(self.digests),
            "attributes": self.attributes,
        }
        packed: bytes = msgpack.packb(content, use_bin_type=True)
        return packed

    @cached_property
    def digest(self) -> str:
        """Hex digest (BLAKE2b, 128 bits) of the packed manifest; through the buckets' digests it covers every byte."""
        return hashlib.blake2b(self.packed, digest_size=16).hexdigest()

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: a later version is greater."""
        return self.epoch, self.version

    def span(self, bucket: int) -> tuple[int, int]:
        """Byte range [start, end) of a bucket."""
        start = bucket * self.bucket_bytes
        return start, min(start + self.bucket_bytes, self.nbytes)

    @classmethod
    def unpack(cls, packed: bytes) -> Manifest:
        """Read and check a manifest.

        Raises:
            ManifestError: it is no manifest, or a tensor contradicts its shape, its dtype or its place.
        """
        try:
            content: dict[str, Any] = msgpack.unpackb(packed, raw=False, strict_map_key=True)
            if content["format"] != FORMAT:
                raise ManifestError(
                    f"manifest format is {content['format']!r}, this version of Counterpoint reads {FORMAT}"
                )
            manifest = cls(
                epoch=exactly(int, content["epoch"]),
                version=exactly(int, content["version"]),
                part=WeightsPart(content["part"]),
                nbytes=exactly(int, content["nbytes"]),
                bucket_bytes=exactly(int, content["bucket_bytes"]),
                tensors=tuple(map(_entry, exactly(list, content["tensors"]))),
                digests=tuple(_pieces(exactly(bytes, content["digests"]), DIGEST_BYTES)),
                attributes=exactly(str, content["attributes"]),
            )
        except (msgpack.UnpackException, KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"not a manifest of weights: {error}") from error
        manifest._check()
        return manifest

    def _check(self) -> None:
        if self.nbytes < 0 or self.bucket_bytes < ALIGNMENT or self.bucket_bytes % ALIGNMENT:
            raise ManifestError(f"{self.nbytes} bytes cannot lie in buckets of {self.bucket_bytes}")
        if len(self.digests) != bucket_count(self.nbytes, self.bucket_bytes):
            raise ManifestError(f"{len(self.digests)} digests for {self.nbytes} bytes in {self.bucket_bytes} a bucket")
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise ManifestError("a tensor is named twice in the manifest")
        end = 0
        for tensor in self.tensors:
            size = DTYPE_BYTES.get(tensor.dtype, 0) * prod(tensor.shape)
            if size != tensor.nbytes or min(tensor.shape, default=1) < 0 or tensor.dtype not in DTYPE_BYTES:
                raise ManifestError(f"{tensor.name}: {tensor.nbytes} bytes for {tensor.dtype}{list(tensor.shape)}")
            if tensor.offset < end or tensor.offset % ALIGNMENT or tensor.offset + size > self.nbytes:
                raise ManifestError(f"{tensor.name} overlaps another tensor, is misaligned or ends behind the part")
            end = tensor.offset + size


def bucket_digest(content: Any) -> bytes:
    """Digest of a bucket: XXH3 of 128 bits, at memory speed. It detects damage; the transport's authentication is what
    excludes forgery."""
    digest: bytes = xxhash.xxh3_128_digest(content)
    return digest


def bucket_count(nbytes: int, bucket_bytes: int) -> int:
    """Number of buckets that hold `nbytes` bytes."""
    return -(-nbytes // bucket_bytes)


def plan_layout(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[tuple[TensorEntry, ...], int]:
    """Lay tensors end to end in their order, each aligned to ALIGNMENT.

    Args:
        tensors: name, dtype and shape of each.
    Returns:
        The entries, and the total size in bytes.
    """
    entries, position = [], 0
    for name, dtype, shape in tensors:
        position = -(-position // ALIGNMENT) * ALIGNMENT
        nbytes = DTYPE_BYTES[dtype] * prod(shape)
        entries.append(TensorEntry(name, dtype, tuple(shape), position, nbytes))
        position += nbytes
    return tuple(entries), position


def exactly(kind: type[T], value: Any) -> T:
    """The value, if it is of exactly this type; nothing is converted. Raises TypeError otherwise."""
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} instead of {kind.__name__}")
    return value


def _entry(fields: Any) -> TensorEntry:
    name, dtype, shape, offset, nbytes = exactly(list, fields)
    sizes = tuple(exactly(int, size) for size in exactly(list, shape))
    return TensorEntry(exactly(str, name), exactly(str, dtype), sizes, exactly(int, offset), exactly(int, nbytes))


def _pieces(content: bytes, size: int) -> Iterator[bytes]:
    if len(content) % size:
        raise ManifestError(f"{len(content)} bytes of digests are no multiple of {size}")
    return (content[start : start + size] for start in range(0, len(content), size))
