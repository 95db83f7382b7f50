"""Writes one part of a policy version into memory as the source hands it over: casts, digests, and the delta.

Where the version before is at hand, what changed is kept as the exclusive or of old and new bytes, compressed: at small
learning rates few 16-bit words change, so it is mostly zeros. It may lie in the same memory: then it is overwritten
bucket by bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import lz4.block
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.weights.manifest import DTYPE_BYTES, Manifest, TensorEntry, bucket_count, bucket_digest
from actors.weights.memory import Memory
from actors.weights.source import DTYPES, WeightSource

if TYPE_CHECKING:
    from actors.weights.server import Holding

DELTA_SHARE = 0.25
"""A delta larger than this share of its bucket isn't kept: the bucket itself is sent."""
UNCHANGED = b""
"""The delta of a bucket that is the same in both versions."""
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Delta:
    """What changed since the version before.

    Attributes:
        base: digest of the manifest it starts from.
        buckets: compressed exclusive or by bucket; buckets that are left out are sent whole.
        changed_words: elements that differ.
        words: elements in all.
    """

    base: str
    buckets: dict[int, bytes] = field(default_factory=dict)
    changed_words: int = 0
    words: int = 0

    @property
    def nbytes(self) -> int:
        """Size of all compressed buckets."""
        return sum(map(len, self.buckets.values()))


def encode_delta(exclusive_or: Bytes) -> bytes | None:
    """A bucket's changes for the wire; None where the bucket itself is the better way."""
    if not exclusive_or.any():
        return UNCHANGED
    packed: bytes = lz4.block.compress(exclusive_or, store_size=False)
    return packed if len(packed) < DELTA_SHARE * len(exclusive_or) else None


def apply_delta(packed: bytes | memoryview, old: Bytes) -> Bytes:
    """The new content of a bucket.

    Raises:
        ValueError: these aren't the changes of a bucket of that size.
    """
    if len(packed) == 0:
        return old
    try:
        plain = lz4.block.decompress(packed, uncompressed_size=len(old), return_bytearray=True)
    except lz4.block.LZ4BlockError as error:
        raise ValueError(f"not a delta: {error}") from error
    if len(plain) != len(old):
        raise ValueError(f"a delta of {len(plain)} bytes for a bucket of {len(old)}")
    changes = np.frombuffer(plain, dtype=np.uint8)
    return np.bitwise_xor(old, changes, out=changes)


class VersionWriter:
    """A sink of one version's tensors. Make it, let the source read into it, then :meth:`finish`."""

    def __init__(self, source: WeightSource, memory: Memory, *, bucket_bytes: int, base: Holding | None = None) -> None:
        """
        Args:
            source: whose layout it is.
            memory: of at least its size; claimed by this process.
            bucket_bytes: size of a bucket.
            base: the version before, in this memory or in another; with it, the delta is made.
        """
        self._source = source
        self._bucket_bytes = bucket_bytes
        self._target = np.frombuffer(memory.view, dtype=np.uint8)[: source.nbytes]
        memory.clear_checked()
        if base is not None and not _same_layout(base.manifest, source, bucket_bytes):
            base = None
        self._delta = Delta(base.manifest.digest) if base is not None else None
        self._old = np.frombuffer(base.memory.view, dtype=np.uint8) if base is not None else self._target
        self._is_in_place = base is not None and base.memory is memory
        self._count = bucket_count(source.nbytes, bucket_bytes)
        self._digests: list[Future[bytes]] = []
        # Buckets are finished beside the reading of the next one. Where the old content is still there, the new one
        # waits in one of two spare buckets for it to be compared; elsewhere, it is written where it stays.
        self._worker = ThreadPoolExecutor(1, "weights-writer")
        self._spare = [np.empty(bucket_bytes, np.uint8) for _ in range(2)] if base is not None else []
        self._changed = 0
        self._written = 0

    def put(self, entry: TensorEntry, tensor: Tensor) -> None:
        """See :class:`actors.weights.source.Sink`."""
        flat, size = tensor.reshape(-1), DTYPE_BYTES[entry.dtype]
        for place, _ in self._places(self._written, entry.offset):
            place[:] = 0  # between tensors, so that equal weights are equal bytes
        for place, start in self._places(entry.offset, entry.offset + entry.nbytes):
            first = (start - entry.offset) // size
            torch.from_numpy(place).view(DTYPES[entry.dtype]).copy_(flat[first : first + len(place) // size])
        self._written = entry.offset + entry.nbytes

    def finish(self, epoch: int, version: int) -> tuple[Manifest, Delta | None]:
        """The manifest of what was written, and the delta if one was made."""
        self._finish_before(self._count)
        digests = tuple(digest.result() for digest in self._digests)
        self._worker.shutdown()
        source = self._source
        manifest = Manifest(
            epoch,
            version,
            source.part,
            source.nbytes,
            self._bucket_bytes,
            source.entries,
            digests,
            source.attributes,
        )
        if self._delta is None:
            return manifest, None
        words = sum(entry.nbytes // DTYPE_BYTES[entry.dtype] for entry in source.entries)
        return manifest, Delta(self._delta.base, self._delta.buckets, self._changed, words)

    def _places(self, start: int, end: int) -> Iterator[tuple[Bytes, int]]:
        """Where the bytes of a range are to be written, bucket by bucket, and the first of each piece."""
        while start < end:
            bucket = start // self._bucket_bytes
            self._finish_before(bucket)
            offset = bucket * self._bucket_bytes
            stop = min(end, offset + self._bucket_bytes)
            if self._is_in_place:
                yield self._spare[bucket % 2][start - offset : stop - offset], start
            else:
                yield self._target[start:stop], start
            start = stop

    def _finish_before(self, bucket: int) -> None:
        """Every bucket before this one is complete."""
        while len(self._digests) < bucket:
            index = len(self._digests)
            if self._is_in_place and index >= 1:
                self._digests[index - 1].result()  # its spare bucket is the next one's
            self._digests.append(self._worker.submit(self._finish, index))

    def _finish(self, index: int) -> bytes:
        start = index * self._bucket_bytes
        content = self._target[start : start + self._bucket_bytes]
        if self._delta is not None:
            old, spare = self._old[start : start + len(content)], self._spare[index % 2][: len(content)]
            new, difference = (spare, content) if self._is_in_place else (content, spare)
            np.bitwise_xor(old, new, out=difference)
            self._changed += _changed_words(difference, self._source.entries[0].dtype)
            packed = encode_delta(difference)
            if packed is not None:
                self._delta.buckets[index] = packed
            if self._is_in_place:
                content[:] = new
        return bucket_digest(content)


def _same_layout(base: Manifest, source: WeightSource, bucket_bytes: int) -> bool:
    return base.bucket_bytes == bucket_bytes and base.tensors == source.entries and base.part == source.part


def _changed_words(exclusive_or: Bytes, dtype: str) -> int:
    size = DTYPE_BYTES[dtype]
    whole = exclusive_or[: len(exclusive_or) // size * size]
    return int(np.count_nonzero(whole.view({2: np.uint16, 4: np.uint32}[size])))


class Comparison:
    """A sink that holds the source's tensors against what was published.

    Attributes:
        different: names of tensors that differ, or were never published.
    """

    def __init__(self, holdings: Sequence[Holding]) -> None:
        """Args:
        holdings: a later one counts where both have a tensor of that name.
        """
        self._published = {entry.name: (entry, held) for held in holdings for entry in held.manifest.tensors}
        self.different: list[str] = []

    def put(self, entry: TensorEntry, tensor: Tensor) -> None:
        """See :class:`actors.weights.source.Sink`."""
        found = self._published.get(entry.name)
        if found is None:
            self.different.append(entry.name)
            return
        published, holding = found
        content = holding.memory.view[published.offset : published.offset + published.nbytes]
        own = torch.empty(tensor.numel(), dtype=DTYPES[entry.dtype]).copy_(tensor.reshape(-1))
        if own.view(torch.uint8).numpy().tobytes() != bytes(content):
            self.different.append(entry.name)
