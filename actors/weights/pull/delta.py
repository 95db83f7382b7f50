"""What changed in a bucket since the version before: which words, and by which bits.

At small learning rates few words change, so only those are coded: the distance of each from the one before in a byte,
and the exclusive or of old and new, byte by byte of the word. Each of these streams is compressed by itself. A bucket
is coded piece by piece and changed where it lies, so that nobody needs room for a second one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

DELTA_SHARE = 0.25
"""A delta larger than this share of its bucket isn't kept: the bucket itself is sent."""
CHANGED_SHARE = 0.25
"""Where more words have changed than this share of a piece, its bucket isn't coded to the end: sending it is faster."""
UNCHANGED = b""
"""The delta of a bucket that is the same in both versions."""
PIECE_BYTES = 1 << 20
"""Of a bucket, coded by themselves; part of the format."""
LEVEL = 1
"""Of zstandard: the lowest that also compresses what doesn't repeat."""
FAR = 255
"""A distance that says: so many words further on, and nothing has changed up to there."""
Bytes = NDArray[np.uint8]
Words = NDArray[Any]
Places = NDArray[np.uint32]


@dataclass(frozen=True)
class Delta:
    """What changed since the version before.

    Attributes:
        base: digest of the manifest it starts from.
        buckets: changes by bucket; buckets that are left out are sent whole.
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


class DeltaEncoder:
    """The delta of one bucket. Give it all of both contents, from the first byte to the last, then :meth:`finish`."""

    def __init__(self, nbytes: int) -> None:
        """Args:
        nbytes: size of the bucket.
        """
        self._nbytes = nbytes
        self._word = _word(nbytes)
        self._piece_words = PIECE_BYTES // self._word.itemsize
        self._most = CHANGED_SHARE * min(nbytes // self._word.itemsize, self._piece_words)
        self._pieces: list[list[tuple[Places, Words]]] = []
        self._is_kept = True
        self._is_changed = False
        self._position = 0
        self._count = 0  # changed words of the piece so far

    def add(self, old: Bytes, new: Bytes) -> NDArray[np.bool_]:
        """Take in what comes next of both, not beyond the end of a piece.

        Returns:
            Which of its words differ; a word has two bytes, in a bucket of an odd size one.
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
        """The changes for the wire; None where the bucket itself is the better way."""
        if not self._is_changed:
            return UNCHANGED
        packed: list[bytes] = []
        room = DELTA_SHARE * self._nbytes if self._is_kept else 0.0
        for piece in self._pieces:
            packed.append(_packed(piece))
            room -= len(packed[-1])
            if room <= 0:
                break
        return b"".join(packed) if room > 0 else None


def apply_delta(packed: bytes | memoryview, content: Bytes) -> None:
    """Make a bucket's new content of the old one, where it lies.

    Raises:
        ValueError: these aren't the changes of a bucket of that size; its content is neither the one nor the other now.
    """
    left, words = memoryview(packed), content.view(_word(len(content)))
    if len(left) == 0:
        return
    size = PIECE_BYTES // words.itemsize
    for start in range(0, len(words), size):
        left = _apply(left, words[start : start + size])
    if len(left):
        raise ValueError(f"{len(left)} bytes behind the end of a delta")


def _word(nbytes: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if nbytes % 2 == 0 else np.uint8)


def _positions(differs: NDArray[np.bool_]) -> NDArray[np.int64]:
    """np.flatnonzero, quicker where few are: it looks at eight at a time first."""
    packed = np.packbits(differs)
    eights = np.flatnonzero(packed != 0)
    inside = np.flatnonzero(np.unpackbits(packed[eights]).view(np.bool_))
    return eights[inside // 8] * 8 + inside % 8


def _distances(where: Places) -> Bytes:
    """How many words lie between each change and the one before, in bytes."""
    between = np.diff(where.astype(np.int64), prepend=-1) - 1
    far = np.flatnonzero(between >= FAR)
    times, between[far] = np.divmod(between[far], FAR)
    return np.insert(between.astype(np.uint8), np.repeat(far, times), FAR)


def _packed(piece: list[tuple[Places, Words]]) -> bytes:
    """Sizes of the streams when compressed, then the streams: distances, first bytes of the changes, second bytes."""
    where, changes = (np.concatenate(parts) for parts in zip(*piece, strict=True))
    planes = changes.view(np.uint8).reshape(len(changes), changes.itemsize)
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    streams = (_distances(where), *planes.T)
    packed = [compressor.compress(stream.tobytes()) if len(stream) else b"" for stream in streams]
    return struct.pack(f"<{len(packed)}I", *map(len, packed)) + b"".join(packed)


def _apply(left: memoryview, words: Words) -> memoryview:
    """Change one piece. Returns what comes after its changes."""
    header = struct.Struct(f"<{1 + words.itemsize}I")
    if len(left) < header.size:
        raise ValueError(f"{len(left)} bytes of a delta, where the sizes of a piece belong")
    sizes, left = header.unpack_from(left), left[header.size :]
    if sum(sizes) > len(left):
        raise ValueError(f"{len(left)} bytes of a delta, where {sum(sizes)} belong")
    streams = []
    for size in sizes:
        streams.append(_stream(left[:size], len(words)))
        left = left[size:]
    distances, *planes = streams
    is_change = distances != FAR
    behind = np.cumsum(distances + is_change, dtype=np.uint32)  # a sum is at most FAR, so it stays a byte
    where = behind[is_change] - 1
    if any(len(plane) != len(where) for plane in planes):
        raise ValueError(f"{len(where)} places of changes, and {[len(plane) for plane in planes]} bytes of them")
    if len(behind) and behind[-1] > len(words):
        raise ValueError(f"a change of word {behind[-1]}, of {len(words)}")
    words[where] ^= np.stack(planes, axis=1).view(words.dtype).reshape(-1)
    return left


def _stream(packed: memoryview, most: int) -> Bytes:
    """A stream as it was. It is never longer than the piece has words: more isn't even decompressed."""
    if len(packed) == 0:
        return np.empty(0, np.uint8)
    try:
        size = zstandard.frame_content_size(packed)
        if not 0 <= size <= most:
            raise ValueError(f"{size} bytes in a stream of a delta, of at most {most}")
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a delta: {error}") from error
