"""Deltas: the words of a bucket that changed since the previous version, and their changed bits.

At small learning rates few words change, so only those are coded: the distance of each from the previous one in a byte,
and the exclusive or of old and new, byte plane by byte plane. Each of these streams is compressed separately. A bucket
is coded piece by piece and changed in place, so that no second bucket is needed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

MAX_DELTA_FRACTION = 0.25
"""Largest size of a delta, as a fraction of its bucket; beyond it, the whole bucket is sent."""
MAX_CHANGED_FRACTION = 0.25
"""Largest fraction of changed words in a piece; beyond it, sending the whole bucket is faster than coding it."""
UNCHANGED = b""
"""The delta of a bucket that is the same in both versions."""
PIECE_BYTES = 1 << 20
"""Size of the pieces of a bucket that are coded separately; part of the format."""
LEVEL = 1
"""zstandard's level: the lowest that also codes the entropy of data without repetitions."""
FAR = 255
"""An escape distance: advance by so many words without a change."""
Bytes = NDArray[np.uint8]
Words = NDArray[Any]
Places = NDArray[np.uint32]


@dataclass(frozen=True)
class Delta:
    """The changes of a version from the previous one.

    Attributes:
        base: digest of the previous version's manifest.
        buckets: delta by bucket; a bucket without one is sent whole.
        changed_words: number of elements that differ.
        words: number of all elements.
    """

    base: str
    buckets: dict[int, bytes] = field(default_factory=dict)
    changed_words: int = 0
    words: int = 0


class DeltaEncoder:
    """Codes the delta of one bucket: :meth:`add` both contents from the first byte to the last, then :meth:`finish`."""

    def __init__(self, nbytes: int) -> None:
        """Args:
        nbytes: size of the bucket.
        """
        self._nbytes = nbytes
        self._word = _word(nbytes)
        self._piece_words = PIECE_BYTES // self._word.itemsize
        self._most = MAX_CHANGED_FRACTION * min(nbytes // self._word.itemsize, self._piece_words)
        self._pieces: list[list[tuple[Places, Words]]] = []
        self._is_kept = True
        self._is_changed = False
        self._position = 0
        self._count = 0  # changed words of the current piece so far

    def add(self, old: Bytes, new: Bytes) -> NDArray[np.bool_]:
        """Add the next bytes of both contents, up to the end of a piece at most.

        Returns:
            [words] bool: which words differ. A word has two bytes, in a bucket of odd size one.
        """
        before, after = old.view(self._word), new.view(self._word)
        differs = before != after
        position = self._position % self._piece_words
        self._position += len(differs)
        if position == 0:
            self._pieces.append([])
            self._count = 0
        self._count += int(np.count_nonzero(differs))
        self._is_changed |= self._count > 0
        if self._count > self._most:
            self._is_kept = False
        if not self._is_kept:
            self._pieces.clear()
            return differs
        where = _positions(differs)
        self._pieces[-1].append(((where + position).astype(np.uint32), before[where] ^ after[where]))
        return differs

    def finish(self) -> bytes | None:
        """The coded delta; None where the whole bucket should be sent."""
        if not self._is_changed:
            return UNCHANGED
        packed: list[bytes] = []
        room = MAX_DELTA_FRACTION * self._nbytes if self._is_kept else 0.0
        for piece in self._pieces:
            packed.append(_packed(piece))
            room -= len(packed[-1])
            if room <= 0:
                break
        return b"".join(packed) if room > 0 else None


def apply_delta(packed: bytes | memoryview, content: Bytes) -> None:
    """Apply a delta to a bucket in place.

    Raises:
        ValueError: it is no delta of a bucket of that size. The bucket's content is then undefined.
    """
    left, words = memoryview(packed), content.view(_word(len(content)))
    if len(left) == 0:
        return
    size = PIECE_BYTES // words.itemsize
    for start in range(0, len(words), size):
        left = _apply(left, words[start : start + size])
    if len(left):
        raise ValueError(f"{len(left)} excess bytes after a delta")


def _word(nbytes: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if nbytes % 2 == 0 else np.uint8)


def _positions(differs: NDArray[np.bool_]) -> NDArray[np.int64]:
    """np.flatnonzero, faster where few are set: it tests eight at a time."""
    packed = np.packbits(differs)
    eights = np.flatnonzero(packed != 0)
    inside = np.flatnonzero(np.unpackbits(packed[eights]).view(np.bool_))
    return eights[inside // 8] * 8 + inside % 8


def _distances(where: Places) -> Bytes:
    """Words between each change and the previous one, as bytes with escapes."""
    between = np.diff(where.astype(np.int64), prepend=-1) - 1
    far = np.flatnonzero(between >= FAR)
    times, between[far] = np.divmod(between[far], FAR)
    return np.insert(between.astype(np.uint8), np.repeat(far, times), FAR)


def _packed(piece: list[tuple[Places, Words]]) -> bytes:
    """Compressed sizes of the streams, then the streams: distances, first bytes of the changes, second bytes."""
    where, changes = (np.concatenate(parts) for parts in zip(*piece, strict=True))
    planes = changes.view(np.uint8).reshape(len(changes), changes.itemsize)
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    streams = (_distances(where), *planes.T)
    packed = [compressor.compress(stream.tobytes()) if len(stream) else b"" for stream in streams]
    return struct.pack(f"<{len(packed)}I", *map(len, packed)) + b"".join(packed)


def _apply(left: memoryview, words: Words) -> memoryview:
    """Apply the changes of one piece. Returns the rest of the delta."""
    header = struct.Struct(f"<{1 + words.itemsize}I")
    if len(left) < header.size:
        raise ValueError(f"a delta ends within the sizes of a piece ({len(left)} of {header.size} bytes)")
    sizes, left = header.unpack_from(left), left[header.size :]
    if sum(sizes) > len(left):
        raise ValueError(f"a delta ends within a piece ({len(left)} of {sum(sizes)} bytes)")
    streams = []
    for size in sizes:
        streams.append(_stream(left[:size], len(words)))
        left = left[size:]
    distances, *planes = streams
    is_change = distances != FAR
    behind = np.cumsum(distances + is_change, dtype=np.uint32)  # each summand is at most FAR, so the sum fits a byte
    where = behind[is_change] - 1
    if any(len(plane) != len(where) for plane in planes):
        raise ValueError(f"{len(where)} changed words have {[len(plane) for plane in planes]} bytes of changes")
    if len(behind) and behind[-1] > len(words):
        raise ValueError(f"word {behind[-1]} of {len(words)} is changed")
    words[where] ^= np.stack(planes, axis=1).view(words.dtype).reshape(-1)
    return left


def _stream(packed: memoryview, most: int) -> Bytes:
    """Decompress a stream of at most `most` bytes; a longer one is refused before decompression."""
    if len(packed) == 0:
        return np.empty(0, np.uint8)
    try:
        size = zstandard.frame_content_size(packed)
        if not 0 <= size <= most:
            raise ValueError(f"a stream of a delta has {size} bytes, at most {most} are allowed")
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a delta: {error}") from error
