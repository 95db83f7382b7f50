"""Writes one part of a policy version into memory as the source hands it over: casts, digests, and the delta.

Where the version before is at hand, what changed is kept. It may lie in the same memory: then it is overwritten piece
by piece, each once it has been compared with the new one.
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
from actors.weights.source import DTYPES, WeightSource

if TYPE_CHECKING:
    from actors.weights.pull.server import Holding

SPARE_BYTES = 512 << 10
"""Of new content, compared with the old at a time; the pieces that a delta is coded in are multiples of it."""


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
        self._piece_bytes = bucket_bytes if base is None else min(SPARE_BYTES, bucket_bytes)
        self._pieces_a_bucket = bucket_count(bucket_bytes, self._piece_bytes)
        # Where the old content is still there, the new one waits in a spare piece for it to be compared; elsewhere, it
        # is written where it stays. A bucket is finished beside the reading of the next one.
        self._spare = np.empty(self._piece_bytes if self._is_in_place else 0, np.uint8)
        self._worker = ThreadPoolExecutor(1, "weights-writer")
        self._digests: list[Future[bytes]] = []
        self._encoder = DeltaEncoder(0)
        self._changed = 0
        self._counted = 0  # tensors whose changed elements are all counted
        self._complete = 0  # pieces
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
        """Where the bytes of a range are to be written, piece by piece, and the first of each."""
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
        """First byte of a piece, and the first behind it."""
        bucket, index = divmod(piece, self._pieces_a_bucket)
        start = bucket * self._bucket_bytes + index * self._piece_bytes
        return start, min(start + self._piece_bytes, (bucket + 1) * self._bucket_bytes, self._source.nbytes)

    def _complete_before(self, piece: int) -> None:
        """All of every piece before this one has been read."""
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
                    self._digests[-1].result()  # changes that wait to be coded take memory
                self._digests.append(self._worker.submit(self._finish, bucket, self._encoder))

    def _compare(self, start: int, end: int) -> None:
        """Take the changes of a piece, then write it where it stays."""
        content = self._target[start:end]
        new = self._spare[: end - start] if self._is_in_place else content
        differs = self._encoder.add(self._old[start:end], new)
        self._changed += self._changed_elements(differs, start, end)
        if self._is_in_place:
            content[:] = new

    def _finish(self, bucket: int, encoder: DeltaEncoder) -> bytes:
        """The worker's part: code the changes of a bucket, and digest it."""
        if self._delta is not None and (packed := encoder.finish()) is not None:
            self._delta.buckets[bucket] = packed
        start = bucket * self._bucket_bytes
        return bucket_digest(self._target[start : start + self._bucket_bytes])

    def _changed_elements(self, differs: NDArray[np.bool_], start: int, end: int) -> int:
        """How many elements of the tensors differ in a piece, by which of its words of two bytes do."""
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


def _same_layout(base: Manifest, source: WeightSource, bucket_bytes: int) -> bool:
    return base.bucket_bytes == bucket_bytes and base.tensors == source.entries and base.part == source.part


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
