"""Manifests: the layout they describe, the way they travel, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.weights.manifest import (
    ALIGNMENT,
    DIGEST_BYTES,
    DTYPE_BYTES,
    Manifest,
    ManifestError,
    TensorEntry,
    WeightsPart,
    bucket_count,
    bucket_digest,
    plan_layout,
)

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
LAYOUTS = st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), SHAPES), min_size=1, max_size=6)


def manifest_of(
    layout: list[tuple[str, tuple[int, ...]]], bucket_bytes: int = 2 * ALIGNMENT, **fields: Any
) -> Manifest:
    entries, nbytes = plan_layout([(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(layout)])
    digests = tuple(bucket_digest(bytes([i])) for i in range(bucket_count(nbytes, bucket_bytes)))
    values = {"epoch": 5, "version": 3, "part": WeightsPart.TRAINED, "attributes": "{}", **fields}
    return Manifest(nbytes=nbytes, bucket_bytes=bucket_bytes, tensors=entries, digests=digests, **values)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    return manifest_of(
        draw(LAYOUTS),
        draw(st.integers(1, 4)) * ALIGNMENT,
        epoch=draw(st.integers(0, 2**63)),
        version=draw(st.integers(0, 10**6)),
        part=draw(st.sampled_from(WeightsPart)),
        attributes=draw(st.text(max_size=9)),
    )


EXAMPLE = manifest_of([("float32", (10,)), ("bfloat16", (7, 9)), ("float16", (0, 4)), ("float32", ())])


def assert_consistent(manifest: Manifest) -> None:
    """What whoever reads a manifest may rely on."""
    assert manifest.bucket_bytes % ALIGNMENT == 0
    assert len(manifest.digests) == -(-manifest.nbytes // manifest.bucket_bytes)
    assert all(len(digest) == DIGEST_BYTES for digest in manifest.digests)
    assert len({tensor.name for tensor in manifest.tensors}) == len(manifest.tensors)
    end = 0
    for tensor in manifest.tensors:
        assert tensor.nbytes == DTYPE_BYTES[tensor.dtype] * prod(tensor.shape)
        assert all(size >= 0 for size in tensor.shape)
        assert tensor.offset % ALIGNMENT == 0
        assert end <= tensor.offset <= tensor.offset + tensor.nbytes <= manifest.nbytes
        end = tensor.offset + tensor.nbytes
    assert Manifest.unpack(manifest.packed) == manifest


def test_tensors_lie_end_to_end_each_at_a_multiple_of_64():
    # 10 floats are 40 bytes, so the next begins at 64; it has 7 x 9 x 2 = 126 bytes and ends at 190, so the next one
    # begins at 192; that has none, so the last, a scalar, begins there too, and the whole ends 4 bytes later.
    assert [(t.name, t.offset, t.nbytes) for t in EXAMPLE.tensors] == [
        ("t0", 0, 40),
        ("t1", 64, 126),
        ("t2", 192, 0),
        ("t3", 192, 4),
    ]
    assert EXAMPLE.nbytes == 196


def test_a_tensor_larger_than_a_bucket_lies_in_several():
    manifest = manifest_of([("float32", (16,)), ("float32", (80,)), ("float32", (1,))], bucket_bytes=128)
    # 64 bytes; 320 from 64 to 384; 4 from 384 to 388: buckets of 128 bytes end at 128, 256, 384 and 388
    assert [manifest.span(i) for i in range(4)] == [(0, 128), (128, 256), (256, 384), (384, 388)]
    assert len(manifest.digests) == 4
    large = manifest.tensors[1]
    assert (large.offset // 128, (large.offset + large.nbytes - 1) // 128) == (0, 2)


@given(LAYOUTS, st.integers(1, 4))
def test_no_element_lies_in_two_buckets(layout, alignments):
    manifest = manifest_of(layout, alignments * ALIGNMENT)
    for tensor in manifest.tensors:
        size = DTYPE_BYTES[tensor.dtype]
        for start in range(tensor.offset, tensor.offset + tensor.nbytes, size):
            assert start // manifest.bucket_bytes == (start + size - 1) // manifest.bucket_bytes


@given(manifests())
def test_buckets_cover_every_byte_once(manifest):
    spans = [manifest.span(i) for i in range(len(manifest.digests))]
    assert [start for start, _ in spans] == list(range(0, manifest.nbytes, manifest.bucket_bytes))
    assert sum(end - start for start, end in spans) == manifest.nbytes


@given(manifests())
def test_a_manifest_survives_its_way(manifest):
    assert_consistent(manifest)
    assert Manifest.unpack(manifest.packed).digest == manifest.digest


@given(manifests(), st.data())
def test_any_change_changes_the_digest(manifest, data):
    entry = manifest.tensors[0]
    others = {
        "epoch": st.just(manifest.epoch + 1),
        "version": st.just(manifest.version + 1),
        "part": st.sampled_from([part for part in WeightsPart if part is not manifest.part]),
        "nbytes": st.just(manifest.nbytes + 1),
        "bucket_bytes": st.just(manifest.bucket_bytes + ALIGNMENT),
        "tensors": st.sampled_from(
            [
                (),
                *(
                    (replace(entry, **{field: value}), *manifest.tensors[1:])
                    for field, value in {
                        "name": "other",
                        "dtype": "int8",
                        "shape": (*entry.shape, 1),
                        "offset": entry.offset + 1,
                        "nbytes": entry.nbytes + 1,
                    }.items()
                ),
            ]
        ),
        "digests": st.just((*manifest.digests, bytes(DIGEST_BYTES))),
        "attributes": st.just(manifest.attributes + " "),
    }
    field = data.draw(st.sampled_from(sorted(others)))
    other = replace(manifest, **{field: data.draw(others[field])})
    assert other.digest != manifest.digest


def test_the_digest_covers_every_byte_of_the_weights_through_the_buckets():
    content = bytearray(EXAMPLE.nbytes)
    seen = set()
    for position in (None, 0, 127, 128, EXAMPLE.nbytes - 1):
        changed = bytearray(content)
        if position is not None:
            changed[position] ^= 1
        spans = [EXAMPLE.span(i) for i in range(len(EXAMPLE.digests))]
        seen.add(replace(EXAMPLE, digests=tuple(bucket_digest(changed[a:b]) for a, b in spans)).digest)
    assert len(seen) == 5


def entry_with(**fields: Any) -> list[Any]:
    t: TensorEntry = replace(EXAMPLE.tensors[0], **fields)
    return [t.name, t.dtype, list(t.shape), t.offset, t.nbytes]


def content_with(**fields: Any) -> bytes:
    return msgpack.packb(msgpack.unpackb(EXAMPLE.packed) | fields)


REST = [[t.name, t.dtype, list(t.shape), t.offset, t.nbytes] for t in EXAMPLE.tensors[1:]]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("format", 1, "format is 1"),
        ("format", None, "format is None"),
        ("epoch", "5", "str instead of int"),
        ("epoch", 5.0, "float instead of int"),
        ("version", None, "NoneType instead of int"),
        ("version", True, "bool instead of int"),
        ("part", "head", "not a valid WeightsPart"),
        ("part", ["trained"], "not a valid WeightsPart"),
        ("nbytes", -1, "-1 bytes"),
        ("nbytes", EXAMPLE.nbytes - 1, "t3 overlaps"),
        ("nbytes", 10**9, "digests for"),
        ("bucket_bytes", 0, "buckets of 0"),
        ("bucket_bytes", -64, "buckets of -64"),
        ("bucket_bytes", ALIGNMENT + 1, "buckets of 65"),
        ("bucket_bytes", ALIGNMENT, "2 digests for"),
        ("digests", b"", "0 digests"),
        ("digests", bytes(3 * DIGEST_BYTES), "3 digests"),
        ("digests", bytes(2 * DIGEST_BYTES - 1), "bytes of digests"),
        ("digests", "digests", "str instead of bytes"),
        ("digests", 1 << 50, "int instead of bytes"),
        ("attributes", None, "NoneType instead of str"),
        ("tensors", [entry_with(name="t1"), *REST], "named twice"),
        ("tensors", [entry_with(dtype="float64"), *REST], "float64"),
        ("tensors", [entry_with(dtype="int8", shape=(0,), nbytes=0), *REST], "int8"),
        ("tensors", [entry_with(shape=(11,)), *REST], r"\[11\]"),
        ("tensors", [entry_with(shape=(-2, -5)), *REST], r"\[-2, -5\]"),
        ("tensors", [entry_with(offset=1), *REST], "overlaps another tensor"),
        ("tensors", [entry_with(offset=-64), *REST], "overlaps another tensor"),
        ("tensors", [entry_with(offset=64), *REST], "t1 overlaps"),
        ("tensors", [entry_with(nbytes=41), *REST], "41 bytes"),
        ("tensors", [entry_with()[:4], *REST], "not enough values"),
        ("tensors", [["a", "b", "1", 0, 0], *REST], "str instead of list"),
        ("tensors", ["ab100", *REST], "str instead of list"),
        ("tensors", {"t0": 1}, "dict instead of list"),
    ],
)
def test_a_manifest_with_one_wrong_field_is_refused_in_words(field, value, words):
    with pytest.raises(ManifestError, match=words):
        Manifest.unpack(content_with(**{field: value}))


@pytest.mark.parametrize("field", sorted(msgpack.unpackb(EXAMPLE.packed)))
def test_a_manifest_without_one_of_its_fields_is_refused(field):
    content = msgpack.unpackb(EXAMPLE.packed)
    del content[field]
    with pytest.raises(ManifestError, match=field):
        Manifest.unpack(msgpack.packb(content))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A manifest with one place changed, anywhere in its tree or in its bytes."""
    content = msgpack.unpackb(draw(manifests()).packed)
    if draw(st.booleans()):
        packed = bytearray(msgpack.packb(content))
        packed[draw(st.integers(0, len(packed) - 1))] = draw(st.integers(0, 255))
        return bytes(packed[: draw(st.integers(0, 2 * len(packed)))])
    place: Any = content
    key: Any = draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], list) and place[key] and draw(st.integers(0, 4)):
        place, key = place[key], draw(st.integers(0, len(place[key]) - 1))
    near = st.integers(-65, 65).map(lambda d: max(-(2**63), min(2**64 - 1, place[key] + d)))
    is_number = isinstance(place[key], int)
    place[key] = draw(near | ANYTHING if is_number else ANYTHING)
    return msgpack.packb(content)


@given(mutated() | ANYTHING.map(msgpack.packb) | st.binary())
def test_whatever_arrives_is_a_consistent_manifest_or_refused(packed):
    try:
        manifest = Manifest.unpack(packed)
    except ManifestError:
        return
    assert_consistent(manifest)
