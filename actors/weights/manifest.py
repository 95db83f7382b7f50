"""What a policy version is made of on the wire: tensors, the buckets they lie in, and digests of both.

A manifest travels as MessagePack under a fixed schema; nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import msgpack

FORMAT = 1
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ManifestError(ValueError):
    """The bytes aren't a manifest, or they contradict themselves."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One parameter: its Hugging Face name and where its bytes lie (row-major, little-endian).

    Attributes:
        name: as in the model's Hugging Face checkpoint.
        dtype: "float32", "bfloat16" or "float16".
        shape: full shape, whatever the trainer's sharding.
        bucket: index of its bucket.
        offset: of its first byte in the bucket.
        nbytes: its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class BucketEntry:
    """One unit of transfer: its size and the BLAKE2b digest (16 bytes) of its content."""

    nbytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """All tensors of one policy version, bucket by bucket.

    Attributes:
        version: the policy version.
        tensors: in the order of their buckets.
        buckets: in order; bucket i starts at the sum of the sizes before it when they are laid end to end.
    """

    version: int
    tensors: tuple[TensorEntry, ...]
    buckets: tuple[BucketEntry, ...]

    @property
    def nbytes(self) -> int:
        """Size of all buckets together."""
        return sum(bucket.nbytes for bucket in self.buckets)

    @property
    def starts(self) -> tuple[int, ...]:
        """First byte of each bucket when they are laid end to end."""
        starts, position = [], 0
        for bucket in self.buckets:
            starts.append(position)
            position += bucket.nbytes
        return tuple(starts)

    @property
    def digest(self) -> str:
        """Hex digest of the packed manifest, which names every byte of the version through the buckets' digests."""
        return content_digest(self.pack()).hex()

    def pack(self) -> bytes:
        """The manifest as MessagePack; equal manifests give equal bytes."""
        content = {
            "format": FORMAT,
            "version": self.version,
            "tensors": [[t.name, t.dtype, list(t.shape), t.bucket, t.offset, t.nbytes] for t in self.tensors],
            "buckets": [[b.nbytes, b.digest] for b in self.buckets],
        }
        packed: bytes = msgpack.packb(content, use_bin_type=True)
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> Manifest:
        """Read and check a manifest.

        Raises:
            ManifestError: it isn't one, or a tensor doesn't fit its shape, its type or its bucket.
        """
        try:
            content: dict[str, Any] = msgpack.unpackb(packed, raw=False, strict_map_key=True)
            if content["format"] != FORMAT:
                raise ManifestError(f"manifest format {content['format']!r}, but this version reads {FORMAT}")
            tensors = tuple(
                TensorEntry(str(name), str(dtype), tuple(map(int, shape)), int(bucket), int(offset), int(nbytes))
                for name, dtype, shape, bucket, offset, nbytes in content["tensors"]
            )
            buckets = tuple(BucketEntry(int(nbytes), bytes(digest)) for nbytes, digest in content["buckets"])
            manifest = cls(int(content["version"]), tensors, buckets)
        except (msgpack.UnpackException, KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"not a manifest of weights: {error}") from error
        manifest._check()
        return manifest

    def _check(self) -> None:
        names = {tensor.name for tensor in self.tensors}
        if len(names) != len(self.tensors):
            raise ManifestError("a tensor is named twice in the manifest")
        for tensor in self.tensors:
            size = DTYPE_BYTES.get(tensor.dtype, 0) * prod(tensor.shape)
            if size != tensor.nbytes or min(tensor.shape, default=1) < 0:
                raise ManifestError(f"{tensor.name}: {tensor.nbytes} bytes for {tensor.dtype}{list(tensor.shape)}")
            fits = 0 <= tensor.bucket < len(self.buckets) and tensor.offset >= 0
            if not fits or tensor.offset + tensor.nbytes > self.buckets[tensor.bucket].nbytes:
                raise ManifestError(f"{tensor.name} lies outside its bucket")


def content_digest(content: bytes | memoryview) -> bytes:
    """BLAKE2b of 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def plan_buckets(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], bucket_bytes: int
) -> tuple[tuple[TensorEntry, ...], tuple[int, ...]]:
    """Lay tensors into buckets in their order; one larger than a bucket gets a bucket of its own.

    Args:
        tensors: name, dtype and shape of each.
        bucket_bytes: target size of a bucket.
    Returns:
        The entries, and the size of each bucket.
    """
    entries: list[TensorEntry] = []
    sizes: list[int] = []
    for name, dtype, shape in tensors:
        nbytes = DTYPE_BYTES[dtype] * prod(shape)
        if not sizes or (sizes[-1] and sizes[-1] + nbytes > bucket_bytes):
            sizes.append(0)
        entries.append(TensorEntry(name, dtype, tuple(shape), len(sizes) - 1, sizes[-1], nbytes))
        sizes[-1] += nbytes
    return tuple(entries), tuple(sizes)
