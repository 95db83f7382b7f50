"""Device digests tell tensors apart bit by bit, in every memory layout; version digests tell versions apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.weights.push.device_digest import (
    BLOCK_WORDS,
    VersionDigests,
    as_integers,
    device_digest,
    digest_halves,
    version_digest,
)

DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
MASK = (1 << 64) - 1
dtypes = st.sampled_from(list(DTYPES))
seeds = st.integers(0, 2**32 - 1)


def random_bits(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Any bit pattern: NaN, infinities and denormals among them."""
    content = np.random.default_rng(seed).bytes(count * dtype.itemsize)
    return torch.frombuffer(bytearray(content), dtype=dtype) if count else torch.empty(0, dtype=dtype)


def fold(words: np.ndarray, bits: int) -> np.ndarray:
    return words ^ (words >> np.uint64(bits))


def scramble(words: np.ndarray) -> np.ndarray:
    """murmur3's finaliser."""
    mixed = fold(words, 33) * np.uint64(0xFF51AFD7ED558CCD)
    return fold(fold(mixed, 33) * np.uint64(0xC4CEB9FE1A85EC53), 33)


def by_the_book(content: bytes) -> int:
    """The algorithm again, in numpy's unsigned integers."""
    words = np.frombuffer(content + bytes(-len(content) % 8), dtype="<u8")
    keys = scramble(np.arange(1, BLOCK_WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    halves = np.zeros(2, np.uint64)
    for index in range(max(1, -(-len(words) // BLOCK_WORDS))):
        block = words[index * BLOCK_WORDS : (index + 1) * BLOCK_WORDS]
        low = fold(block ^ keys[: len(block)], 33) * np.uint64(0xFF51AFD7ED558CCD)
        low = fold(low, 33) * np.uint64(0xC4CEB9FE1A85EC53)
        high = fold(fold(low, 29) * np.uint64(0xBF58476D1CE4E5B9), 32)
        halves += scramble(np.stack([low.sum(), high.sum()]) ^ keys[2 * index : 2 * index + 2])
    one, other = scramble(halves + np.uint64(len(content))).tolist()
    return one | other << 64


@given(dtypes, st.integers(0, 70), seeds)
def test_a_device_digest_is_the_one_that_the_book_gives(dtype: torch.dtype, count: int, seed: int):
    tensor = random_bits(dtype, count, seed)
    assert device_digest(tensor) == by_the_book(tensor.view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("words", [BLOCK_WORDS, BLOCK_WORDS + 1, 5 * BLOCK_WORDS // 2])
def test_blocks_are_hashed_one_by_one_and_then_together(words: int):
    tensor = random_bits(torch.bfloat16, 4 * words + 1, seed=words)
    assert device_digest(tensor) == by_the_book(tensor.view(torch.uint8).numpy().tobytes())


def test_blocks_that_change_places_are_found():
    blocks = [random_bits(torch.float32, 2 * BLOCK_WORDS, seed) for seed in (1, 2)]
    assert device_digest(torch.cat(blocks)) != device_digest(torch.cat(blocks[::-1]))


@given(dtypes, st.integers(1, 3000), seeds, st.data())
def test_a_flipped_bit_is_always_found(dtype: torch.dtype, count: int, seed: int, data: st.DataObject):
    tensor = random_bits(dtype, count, seed)
    before = device_digest(tensor)
    place, bit = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 8 * dtype.itemsize - 1))
    content = tensor.view(torch.uint8)
    content[place * dtype.itemsize + bit // 8] ^= 1 << bit % 8
    after = device_digest(tensor)
    assert before & MASK != after & MASK  # each half finds it for itself
    assert before >> 64 != after >> 64


@given(dtypes, st.integers(2, 3000), seeds, st.data())
def test_two_elements_that_change_places_are_found(dtype: torch.dtype, count: int, seed: int, data: st.DataObject):
    tensor = random_bits(dtype, count, seed)
    one, other = data.draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True))
    bits = tensor.view(DTYPES[dtype])
    before = device_digest(tensor)
    bits[[one, other]] = bits[[other, one]].clone()
    assert (device_digest(tensor) == before) == bool(bits[one] == bits[other])


@given(dtypes, st.integers(1, 600))
def test_signs_that_change_places_among_zeros_are_found(dtype: torch.dtype, count: int):
    """Words that differ in their highest bit alone are what weak sums confuse."""
    seen = set()
    for place in range(count):
        tensor = torch.zeros(count, dtype=dtype)
        tensor[place] = -0.0
        seen.add(device_digest(tensor))
    assert len(seen) == count


@given(dtypes, st.integers(2, 3000), seeds, st.integers(1, 2999))
def test_a_shift_is_found(dtype: torch.dtype, count: int, seed: int, distance: int):
    tensor = random_bits(dtype, count, seed)
    shifted = tensor.roll(distance)
    same = torch.equal(tensor.view(torch.uint8), shifted.view(torch.uint8))
    assert (device_digest(tensor) == device_digest(shifted)) == same


@given(dtypes, st.integers(0, 100), st.integers(0, 100))
def test_zeros_of_different_number_differ(dtype: torch.dtype, one: int, other: int):
    same = device_digest(torch.zeros(one, dtype=dtype)) == device_digest(torch.zeros(other, dtype=dtype))
    assert same == (one == other)


@given(dtypes, st.integers(0, 300), seeds, st.integers(1, 15))
def test_the_place_in_memory_doesnt_matter(dtype: torch.dtype, count: int, seed: int, offset: int):
    tensor = random_bits(dtype, count, seed)
    buffer = torch.zeros((count + offset) * dtype.itemsize + 16, dtype=torch.uint8)
    start = offset * dtype.itemsize
    view = buffer[start : start + count * dtype.itemsize].view(dtype)
    view.view(torch.uint8).copy_(tensor.view(torch.uint8))
    assert device_digest(view) == device_digest(tensor)


def test_a_transposed_view_is_read_in_row_major_order():
    tensor = torch.arange(12.0).reshape(3, 4)
    assert device_digest(tensor.t()) == device_digest(tensor.t().contiguous()) != device_digest(tensor)


def test_a_scalar_and_a_gradient_are_no_hindrance():
    parameter = torch.nn.Parameter(torch.tensor(2.5))
    assert device_digest(parameter) == device_digest(torch.tensor([2.5]))


def test_many_device_digests_come_with_one_copy_to_the_host():
    tensors = [torch.full((count,), 1.5) for count in range(5)]
    assert as_integers([digest_halves(tensor) for tensor in tensors]) == [device_digest(tensor) for tensor in tensors]
    assert as_integers([]) == []


ROWS = (("a", "float32", (2, 3), 1 << 100), ("b", "bfloat16", (), 7))


def test_a_digest_doesnt_depend_on_the_order_of_the_tensors():
    assert version_digest(3, ROWS) == version_digest(3, reversed(ROWS))


@pytest.mark.parametrize(
    ("version", "row"),
    [
        (4, ROWS[0]),
        (3, ("c", "float32", (2, 3), 1 << 100)),
        (3, ("a", "float16", (2, 3), 1 << 100)),
        (3, ("a", "float32", (3, 2), 1 << 100)),
        (3, ("a", "float32", (2, 3), 1)),
    ],
)
def test_a_digest_stands_for_version_name_dtype_shape_and_content(version: int, row: tuple):
    assert version_digest(version, (row, ROWS[1])) != version_digest(3, ROWS)


def test_a_name_that_comes_twice_has_no_digest():
    with pytest.raises(ValueError, match="two tensors named a"):
        version_digest(3, (ROWS[0], ROWS[0]))


def test_a_versions_print_survives_packing():
    digests = VersionDigests(3, ROWS)
    assert VersionDigests.unpack(digests.pack()) == digests
    assert digests.digest == version_digest(3, ROWS)


@pytest.mark.parametrize("packed", [{}, {"version": 1, "tensors": [["a"]]}, {"version": "x", "tensors": []}, None])
def test_what_isnt_a_print_is_refused(packed: object):
    with pytest.raises(ValueError, match="not the device digests of a version"):
        VersionDigests.unpack(packed)
