"""The coding of what changed in a bucket: lossless, small, in little memory, and safe against damage."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from actors.weights.pull.delta import (
    MAX_CHANGED_FRACTION,
    MAX_DELTA_FRACTION,
    PIECE_BYTES,
    UNCHANGED,
    Bytes,
    DeltaEncoder,
    apply_delta,
)
from tests.actors.weights.versions import array

MIB = 1 << 20


def delta_of(old: Bytes, new: Bytes, step: int = PIECE_BYTES) -> bytes | None:
    """What a publisher makes of them, taking in so many bytes at a time."""
    encoder = DeltaEncoder(len(old))
    for start in range(0, len(old), step):
        encoder.add(old[start : start + step], new[start : start + step])
    return encoder.finish()


def applied(packed: bytes, old: Bytes) -> Bytes:
    """The new content, in a copy."""
    content = old.copy()
    apply_delta(packed, content)
    return content


def changed_words(size: int, share: float, changes: Callable[[np.random.Generator, int], np.ndarray], seed: int = 0):
    """Random words of 2 bytes, and the same with a share of them changed at random places."""
    random = np.random.default_rng(seed)
    old = random.integers(0, 256, size).astype(np.uint8)
    new = old.copy()
    where = random.permutation(size // 2)[: int(share * size / 2)]
    new.view(np.uint16)[where] ^= changes(random, len(where)).astype(np.uint16)
    return old, new


def low_bits(random: np.random.Generator, count: int) -> np.ndarray:
    """Any change of a bfloat16's mantissa."""
    return random.integers(1, 128, count)


def any_bits(random: np.random.Generator, count: int) -> np.ndarray:
    return random.integers(1, 1 << 16, count)


def test_the_example_from_the_first_byte_to_the_last():
    # Words 2 and 300 of 512 change, by 0x0201 and 0x0100. Distances: 2 words lie before the first, 297 between them,
    # which are 255 and 42. First bytes 01 00, second bytes 02 01.
    old = np.zeros(1024, np.uint8)
    new = old.copy()
    new.view(np.uint16)[[2, 300]] = [0x0201, 0x0100]
    packed = delta_of(old, new)
    assert packed is not None
    sizes, streams = struct.unpack_from("<3I", packed), []
    start = 12
    for size in sizes:
        streams.append(zstandard.ZstdDecompressor().decompress(packed[start : start + size]))
        start += size
    assert streams == [bytes([2, 255, 42]), b"\x01\x00", b"\x02\x01"]
    assert start == len(packed)


@given(st.data(), st.integers(0, 3000))
def test_changes_are_lossless_both_ways(data, size):
    old = array(data.draw(st.binary(min_size=size, max_size=size)))
    new = old.copy()
    for place in data.draw(st.lists(st.integers(0, max(0, size - 1)), max_size=20 if size else 0)):
        new[place] ^= data.draw(st.integers(0, 255))
    packed = delta_of(old, new)
    if packed is None:
        return
    assert (packed == UNCHANGED) == bool((old == new).all())
    assert (applied(packed, old) == new).all()
    assert (applied(packed, new) == old).all()


@pytest.mark.parametrize("size", [PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, PIECE_BYTES + 2, 2 * PIECE_BYTES])
@pytest.mark.parametrize("places", [[0], [-1], [0, -1], [PIECE_BYTES // 2, -2], [510, 511, 512, 1022, 1024]])
def test_wherever_something_changes_it_is_found_there(size, places):
    old = np.zeros(size, np.uint8)
    new = old.copy()
    new[places] = range(1, len(places) + 1)
    packed = delta_of(old, new)
    assert packed is not None
    assert len(packed) < 150
    assert (applied(packed, old) == new).all()


@given(st.integers(0, 9), st.sampled_from([0.0, 1e-4, 0.01, 0.1, 0.2]), st.sampled_from([4096, 65_536, 262_144]))
def test_the_delta_is_the_same_whatever_is_taken_in_at_a_time(seed, share, step):
    old, new = changed_words(PIECE_BYTES + 4096, share, low_bits, seed)
    packed = delta_of(old, new)
    assert packed is not None
    assert delta_of(old, new, step) == packed
    assert (applied(packed, old) == new).all()
    assert (applied(packed, new) == old).all()


def test_what_is_added_comes_back_as_the_words_that_differ():
    old, new = changed_words(4096, 0.1, any_bits)
    differs = DeltaEncoder(4096).add(old, new)
    assert differs.tolist() == (old.view(np.uint16) != new.view(np.uint16)).tolist()


def test_an_empty_bucket_is_unchanged():
    assert DeltaEncoder(0).finish() == UNCHANGED
    apply_delta(UNCHANGED, np.empty(0, np.uint8))


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        # Places alone: H(0.01) = 0.081 bits a word, 0.5% of its 16; the changes: 1% of 7 bits of 16, 0.44%.
        (low_bits, 0.01),
        # Changes of 16 bits, which nothing makes smaller: 1%.
        (any_bits, 0.0155),
    ],
)
def test_one_percent_of_the_words_changed_takes_about_one_percent_of_the_bytes(changes, most):
    old, new = changed_words(4 * MIB, 0.01, changes)
    packed = delta_of(old, new)
    assert packed is not None
    assert len(packed) < most * len(old)


def test_only_deltas_below_a_quarter_of_the_bucket_are_kept():
    kept = []
    for percent in range(30):
        old, new = changed_words(65_536, percent / 100, any_bits)
        packed = delta_of(old, new)
        kept += [percent] if packed is not None else []
        assert packed is None or len(packed) < MAX_DELTA_FRACTION * 65_536
    # 20% of the words are 20% of the bytes, and H(0.2) = 0.72 bits a word tell where they are, 4.5%; with 21% it is
    # 21% and 4.6%.
    assert kept == list(range(21))


@pytest.mark.parametrize("share", [MAX_CHANGED_FRACTION + 0.01, 1.0])
def test_where_much_has_changed_nothing_is_kept_however_well_it_could_be_compressed(share):
    old, new = changed_words(65_536, share, lambda _, count: np.ones(count))
    assert delta_of(old, new) is None


def test_a_bucket_goes_whole_if_one_piece_of_it_has_changed_much_though_others_have_not_at_all():
    old, _ = changed_words(4 * PIECE_BYTES, 0, low_bits)
    for piece in range(4):
        new = old.copy()
        new[piece * PIECE_BYTES : (piece + 1) * PIECE_BYTES] += 1
        assert delta_of(old, new) is None


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that numpy and Python have taken at most during a call."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("share", "most_encoding", "most_applying"),
    [
        (0.0, 1, 1),
        # Of 8,388,608 words 83,886 change: 6 bytes each until the bucket is coded.
        (0.01, 1.5, 1),
        # 1,677,721 of them: 9.6 MiB, and twice the 2.1 MiB that they are coded to.
        (0.2, 16, 4),
        # The first 256 KiB, before they are found to be too many: 131,072 places of 8 bytes, a few times over.
        (1.0, 4, 1),
    ],
)
def test_neither_side_takes_memory_of_the_size_of_the_bucket(share, most_encoding, most_applying):
    old, new = changed_words(16 * MIB, share, low_bits)
    packed = delta_of(old, new)
    assert (packed is None) == (share == 1.0)
    assert peak_of(lambda: delta_of(old, new, 256 << 10)) < most_encoding * MIB
    assert peak_of(lambda: apply_delta(packed or UNCHANGED, old)) < most_applying * MIB


def frame(content: bytes, *, tells_size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=tells_size).compress(content)


def piece(*streams: bytes) -> bytes:
    """As a sender might put it together."""
    return struct.pack(f"<{len(streams)}I", *map(len, streams)) + b"".join(streams)


ONE = frame(b"\x01")
LYING = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 50) + b"\x01\x00\x00"
"""A frame that says it has a petabyte."""


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"\x00" * 11, "sizes of a piece"),
        (struct.pack("<3I", 1, 0, 0), r"within a piece \(0 of 1 bytes"),
        (struct.pack("<3I", *3 * [2**32 - 1]), r"of 12884901885 bytes"),
        (piece(ONE, ONE, ONE) + b"\x00", "1 excess bytes"),
        (piece(b"no zstandard", ONE, ONE), "not a delta"),
        (piece(ONE[:-1], ONE, ONE), "not a delta"),
        (piece(ONE + ONE, ONE, ONE), "not a delta"),
        (piece(frame(b"\x01", tells_size=False), ONE, ONE), "a stream of a delta has -1 bytes"),
        (piece(LYING, ONE, ONE), f"{1 << 50} bytes, at most 100 are allowed"),
        (piece(frame(bytes(101)), ONE, ONE), "101 bytes, at most 100 are allowed"),
        (piece(frame(b"\x64"), ONE, ONE), "word 101 of 100"),
        (piece(frame(b"\x63\x00"), frame(b"\x01\x01"), frame(b"\x01\x01")), "word 101 of 100"),
        (piece(frame(b"\xff"), b"", b""), "word 255 of 100"),
        (piece(ONE, ONE, b""), r"1 changed words have \[1, 0\] bytes"),
        (piece(ONE, frame(b"\x01\x01"), ONE), r"1 changed words have \[2, 1\] bytes"),
        (piece(b"", ONE, ONE), r"0 changed words have \[1, 1\] bytes"),
    ],
)
def test_what_is_no_delta_of_such_a_bucket_is_refused(packed, message):
    around = np.full(400, 7, np.uint8)
    with pytest.raises(ValueError, match=message):
        apply_delta(packed, around[100:300])
    assert (around[:100] == 7).all()
    assert (around[300:] == 7).all()


def test_a_delta_of_a_larger_bucket_is_refused():
    old, new = changed_words(4096, 0.01, low_bits)
    packed = delta_of(old, new)
    assert packed is not None
    last = 2 * int(np.flatnonzero(old.view(np.uint16) != new.view(np.uint16))[-1])
    with pytest.raises(ValueError, match="is changed"):
        apply_delta(packed, old[:last])
    with pytest.raises(ValueError, match="delta"):
        apply_delta(packed, old[: last + 1])


def test_bytes_of_a_bomb_are_never_decompressed():
    bomb = piece(frame(bytes(1 << 28)), frame(b""), frame(b""))
    assert len(bomb) < 32 * 1024

    content = np.zeros(PIECE_BYTES, np.uint8)

    def refused() -> None:
        with pytest.raises(ValueError, match="has 268435456 bytes"):
            apply_delta(bomb, content)

    assert peak_of(refused) < MIB


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A real delta, cut short or with some bytes flipped, or bytes of any kind, also in well-formed pieces."""
    kind = draw(st.sampled_from(["cut", "flipped", "bytes", "streams"]))
    if kind == "bytes":
        return draw(st.binary(max_size=300))
    if kind == "streams":
        return piece(*(frame(draw(st.binary(max_size=30))) for _ in range(draw(st.sampled_from([2, 3])))))
    packed = bytearray(delta_of(*changed_words(2000, draw(st.sampled_from([0.002, 0.01, 0.1])), any_bits)) or b"")
    if kind == "cut":
        return bytes(packed[: draw(st.integers(1, len(packed) - 1))])
    for place in draw(st.lists(st.integers(0, len(packed) - 1), min_size=1, max_size=4)):
        packed[place] ^= draw(st.integers(1, 255))
    return bytes(packed)


@given(damaged(), st.one_of(st.integers(0, 600), st.just(2000)))
def test_damage_is_refused_or_gives_other_content_and_nothing_outside_is_written(packed, size):
    around = np.full(size + 200, 7, np.uint8)
    with contextlib.suppress(ValueError):
        apply_delta(packed, around[100 : 100 + size])
    assert (around[:100] == 7).all()
    assert (around[100 + size :] == 7).all()


@given(st.data())
def test_a_delta_that_is_cut_short_is_refused(data):
    old, new = changed_words(PIECE_BYTES + 4096, 0.001, low_bits)
    packed = delta_of(old, new)
    assert packed is not None
    with pytest.raises(ValueError, match=r"delta"):
        apply_delta(packed[: data.draw(st.integers(1, len(packed) - 1))], old)
