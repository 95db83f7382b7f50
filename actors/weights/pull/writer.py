"""Writes one part of a policy version into memory as it is read: casts, digests buckets and codes deltas.

Deltas are coded against the previous version. Where that lies in the same memory, it is overwritten piece by piece,
each piece after its comparison with the new content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.weights.manifest import DTYPE_BYTES, Manifest, TensorEntry, bucket_count, bucket_digest
from actors.weights.pull.delta import Bytes, Delta, DeltaEncoder
from actors.weights.pull.memory import Memory
from actors.weights.source import DTYPES, PolicyPartSource

if TYPE_CHECKING:
    from actors.weights.pull.server import HeldPart

SPARE_BYTES = 512 << 10
"""Bytes compared with the old content at once; a delta's pieces are multiples of it."""


class VersionWriter:
    """A sink that writes one version's tensors. Have the source read into it, then call :meth:`finish`."""

    def __init__(
        self, source: PolicyPartSource, memory: Memory, *, bucket_bytes: int, base: HeldPart | None = None
    ) -> None:
        """
        Args:
            source: the part to write, with its layout.
            memory: memory of at least its size, claimed by this process.
            bucket_bytes: size of a bucket.
            base: the previous version, in this memory or in another; where given, deltas are coded.
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
        self._piece_bytes = bucket_bytes if base is None else min(SPARE_BYTES, bucket_bytes)
        self._pieces_a_bucket = bucket_count(bucket_bytes, self._piece_bytes)
        # In place, new content is written to a spare piece and compared with the old before it replaces that; otherwise
        # it is written to its place at once. A bucket is digested while the next one is read.
        self._spare = np.empty(self._piece_bytes if self._is_in_place else 0, np.uint8)
        self._worker = ThreadPoolExecutor(1, "weights-writer")
        self._digests: list[Future[bytes]] = []
        self._encoder = DeltaEncoder(0)
        self._changed = 0
        self._counted = 0  # tensors whose changed elements are all counted
        self._complete = 0  # pieces
        self._written = 0

    def put(self, entry: TensorEntry, tensor: Tensor) -> None:
        """See :class:`actors.weights.source.TensorSink`."""
        flat, size = tensor.reshape(-1), DTYPE_BYTES[entry.dtype]
        for place, _ in self._places(self._written, entry.offset):
            place[:] = 0  # zero the gaps, so that equal weights are equal bytes
        for place, start in self._places(entry.offset, entry.offset + entry.nbytes):
            first = (start - entry.offset) // size
            torch.from_numpy(place).view(DTYPES[entry.dtype]).copy_(flat[first : first + len(place) // size])
        self._written = entry.offset + entry.nbytes

    def finish(self, epoch: int, version: int) -> tuple[Manifest, Delta | None]:
        """The manifest of what was written, and its delta where one was coded."""
        source = self._source
        self._complete_before(self._piece_of(source.nbytes - 1) + 1)
        digests = tuple(digest.result() for digest in self._digests)
        self._worker.shutdown()
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
        """Buffers for the bytes of a range, piece by piece, with the position of each."""
        while start < end:
            piece = self._piece_of(start)
            self._complete_before(piece)
            first, behind = self._span(piece)
            stop = min(end, behind)
            if self._is_in_place:
                yield self._spare[start - first : stop - first], start
            else:
                yield self._target[start:stop], start
            start = stop

    def _piece_of(self, position: int) -> int:
        bucket, offset = divmod(position, self._bucket_bytes)
        return bucket * self._pieces_a_bucket + offset // self._piece_bytes

    def _span(self, piece: int) -> tuple[int, int]:
        """Byte range [start, end) of a piece."""
        bucket, index = divmod(piece, self._pieces_a_bucket)
        start = bucket * self._bucket_bytes + index * self._piece_bytes
        return start, min(start + self._piece_bytes, (bucket + 1) * self._bucket_bytes, self._source.nbytes)

    def _complete_before(self, piece: int) -> None:
        """Complete all pieces before this one."""
        while self._complete < piece:
            start, end = self._span(self._complete)
            self._complete += 1
            bucket = start // self._bucket_bytes
            first, behind = bucket * self._bucket_bytes, min((bucket + 1) * self._bucket_bytes, self._source.nbytes)
            if self._delta is not None:
                if start == first:
                    self._encoder = DeltaEncoder(behind - first)
                self._compare(start, end)
            if end == behind:
                if self._digests:
                    self._digests[-1].result()  # bounds the memory of changes that wait to be coded
                self._digests.append(self._worker.submit(self._finish, bucket, self._encoder))

    def _compare(self, start: int, end: int) -> None:
        """Code the changes of a piece, then write it to its place."""
        content = self._target[start:end]
        new = self._spare[: end - start] if self._is_in_place else content
        differs = self._encoder.add(self._old[start:end], new)
        self._changed += self._changed_elements(differs, start, end)
        if self._is_in_place:
            content[:] = new

    def _finish(self, bucket: int, encoder: DeltaEncoder) -> bytes:
        """Code a bucket's delta and digest the bucket; runs in the worker thread."""
        if self._delta is not None and (packed := encoder.finish()) is not None:
            self._delta.buckets[bucket] = packed
        start = bucket * self._bucket_bytes
        return bucket_digest(self._target[start : start + self._bucket_bytes])

    def _changed_elements(self, differs: NDArray[np.bool_], start: int, end: int) -> int:
        """Number of tensor elements that differ in a piece, from which of its two-byte words differ."""
        count, entries = 0, self._source.entries
        while self._counted < len(entries) and entries[self._counted].offset < end:
            entry = entries[self._counted]
            first, behind = max(start, entry.offset), min(end, entry.offset + entry.nbytes)
            words = differs[(first - start) // 2 : (behind - start) // 2]
            count += int(np.count_nonzero(words if DTYPE_BYTES[entry.dtype] == 2 else words.view(np.uint16)))
            if entry.offset + entry.nbytes > end:
                break
            self._counted += 1
        return count


def _same_layout(base: Manifest, source: PolicyPartSource, bucket_bytes: int) -> bool:
    return base.bucket_bytes == bucket_bytes and base.tensors == source.entries and base.part == source.part


class PublishedComparison:
    """A sink that compares the source's tensors with the published ones.

    Attributes:
        different: names of tensors that differ or were not published.
    """

    def __init__(self, held_parts: Sequence[HeldPart]) -> None:
        """Args:
        held_parts: the published parts; where two have a tensor of one name, the later part counts.
        """
        self._published = {entry.name: (entry, held) for held in held_parts for entry in held.manifest.tensors}
        self.different: list[str] = []

    def put(self, entry: TensorEntry, tensor: Tensor) -> None:
        """See :class:`actors.weights.source.TensorSink`."""
        found = self._published.get(entry.name)
        if found is None:
            self.different.append(entry.name)
            return
        published, held = found
        content = held.memory.view[published.offset : published.offset + published.nbytes]
        own = torch.empty(tensor.numel(), dtype=DTYPES[entry.dtype]).copy_(tensor.reshape(-1))
        if own.view(torch.uint8).numpy().tobytes() != bytes(content):
            self.different.append(entry.name)
