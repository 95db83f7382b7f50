"""What is written into memory, and what the delta says of it."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.weights.manifest import WeightsPart, bucket_digest
from actors.weights.pull.delta import MAX_DELTA_FRACTION, apply_delta
from actors.weights.pull.memory import Memory
from actors.weights.pull.server import HeldPart
from actors.weights.pull.writer import PublishedComparison
from actors.weights.source import DTYPES
from tests.actors.weights.versions import array, bytes_of, changed, random_tensors, source_of, tensor_in, written

PRECISIONS = st.sampled_from(sorted(DTYPES))
BUCKETS = st.integers(1, 8).map(lambda count: 64 * count)
SHAPES = st.lists(st.integers(0, 12), max_size=3)
MIB = 1 << 20


@pytest.fixture(params=["at once", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets are compared and coded at once, or 64 and 128 bytes at a time."""
    if request.param == "in pieces":
        monkeypatch.setattr("actors.weights.pull.writer.SPARE_BYTES", 64)
        monkeypatch.setattr("actors.weights.pull.delta.PIECE_BYTES", 128)


IN_PIECES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it is the same in every example


@st.composite
def tensors(draw: st.DrawFn) -> list[torch.Tensor]:
    """Tensors of every kind: of several buckets, empty, scalar, transposed, strided, expanded."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    found = []
    for shape in draw(st.lists(SHAPES, min_size=1, max_size=6)):
        plain = torch.randn(shape, generator=generator)
        kind = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
        if kind == "transposed":
            plain = plain.permute(tuple(reversed(range(plain.dim()))))
        elif kind == "strided" and plain.dim():
            plain = torch.cat([plain, plain], dim=-1)[..., ::2]
        elif kind == "expanded":
            plain = plain.unsqueeze(0).expand(3, *plain.shape)
        found.append(plain.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))))
    return found


def dirty_memory(nbytes: int) -> Memory:
    """As it is when another version lay there."""
    memory = Memory.create(nbytes)
    memory.view[:] = b"\xa5" * nbytes
    return memory


def test_tensors_are_cast_to_the_generators_dtype_and_the_rest_is_zero():
    # 1 + 2**-8 lies halfway between two bfloat16 numbers and is rounded to the even one, 1; 3 bfloat16 take 6 bytes,
    # so 58 zeros follow up to the next tensor, which is a scalar of 2 bytes.
    source = source_of([torch.tensor([1.0, 1 + 2**-8, -2.5]), torch.tensor(7.0)], precision="bfloat16")
    memory = dirty_memory(source.nbytes)
    manifest, delta = written(source, memory)
    assert tensor_in(memory, manifest.tensors[0]).tolist() == [1.0, 1.0, -2.5]
    assert bytes(memory.view[6:64]) == bytes(58)
    assert tensor_in(memory, manifest.tensors[1]).item() == 7.0
    assert (memory.nbytes, delta) == (66, None)


@given(tensors(), PRECISIONS, BUCKETS)
def test_what_is_written_is_what_the_tensors_are_whatever_the_layout_and_the_buckets(values, precision, bucket_bytes):
    source = source_of(values, precision=precision)
    memory = dirty_memory(source.nbytes)
    manifest, _ = written(source, memory, bucket_bytes)
    for value, entry in zip(values, manifest.tensors, strict=True):
        assert torch.equal(tensor_in(memory, entry), value.to(DTYPES[precision]))
    assert bytes(memory.view) == bytes_of(source)
    spans = [manifest.span(i) for i in range(len(manifest.digests))]
    assert manifest.digests == tuple(bucket_digest(memory.view[start:end]) for start, end in spans)


@given(tensors(), PRECISIONS, BUCKETS)
def test_equal_weights_are_equal_bytes_and_have_equal_digests(values, precision, bucket_bytes):
    source = source_of(values, precision=precision)
    clean, dirty = Memory.create(source.nbytes), dirty_memory(source.nbytes)
    first, second = written(source, clean, bucket_bytes), written(source, dirty, bucket_bytes)
    assert bytes(clean.view) == bytes(dirty.view)
    assert first[0].packed == second[0].packed


def test_the_marks_of_what_lay_there_before_are_gone():
    source = source_of(random_tensors(100))
    memory = Memory.create(source.nbytes)
    manifest, _ = written(source, memory)
    memory.mark_checked(1, manifest.digests[1])
    written(source, memory)
    assert not memory.is_checked(1, manifest.digests[1])


@st.composite
def successors(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors, and the same with a few, many or no elements changed."""
    old = draw(tensors())
    count = sum(tensor.numel() for tensor in old)
    places = draw(st.lists(st.integers(0, max(0, count - 1)), max_size=12))
    kind = draw(st.sampled_from(["some", "all", "other"]))
    new = {"some": lambda: changed(old, *places), "all": lambda: [-2 * t for t in old], "other": lambda: [*old[::-1]]}
    return old, new[kind]()


@pytest.mark.usefixtures("pieces")
@given(successors(), PRECISIONS, BUCKETS, st.booleans())
@IN_PIECES
def test_writing_after_the_version_before_gives_the_same_as_writing_anew(pair, precision, bucket_bytes, is_in_place):
    old, new = source_of(pair[0], precision=precision), source_of(pair[1], precision=precision)
    memory = Memory.create(max(old.nbytes, new.nbytes))
    base = HeldPart(written(old, memory, bucket_bytes)[0], memory)
    before = bytes(memory.view)
    target = memory if is_in_place else dirty_memory(memory.nbytes)
    manifest, _ = written(new, target, bucket_bytes, base, version=2)
    anew = dirty_memory(new.nbytes)
    assert written(new, anew, bucket_bytes, version=2)[0].packed == manifest.packed
    assert bytes(target.view[: new.nbytes]) == bytes(anew.view)
    assert is_in_place or bytes(memory.view) == before


@pytest.mark.usefixtures("pieces")
@given(successors(), PRECISIONS, BUCKETS, st.booleans())
@IN_PIECES
def test_the_delta_makes_the_new_version_of_the_old_one(pair, precision, bucket_bytes, is_in_place):
    old, new = source_of(pair[0], precision=precision), source_of(pair[1], precision=precision)
    memory = Memory.create(max(old.nbytes, new.nbytes))
    base = HeldPart(written(old, memory, bucket_bytes)[0], memory)
    before = bytes(memory.view)
    target = memory if is_in_place else dirty_memory(memory.nbytes)
    manifest, delta = written(new, target, bucket_bytes, base, version=2)
    assert (delta is not None) == (old.entries == new.entries)
    for bucket, packed in delta.buckets.items() if delta is not None else ():
        start, end = manifest.span(bucket)
        assert len(packed) < MAX_DELTA_FRACTION * (end - start)
        content = array(before[start:end])
        apply_delta(packed, content)
        assert bytes(content) == bytes(target.view[start:end])
    if delta is not None:
        assert delta.base == base.manifest.digest


@pytest.mark.usefixtures("pieces")
@given(st.data(), PRECISIONS, BUCKETS)
@IN_PIECES
def test_the_share_of_changed_elements_is_exact(data, precision, bucket_bytes):
    sizes = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=5))
    old = random_tensors(*sizes, dtype=DTYPES[precision])
    places = data.draw(st.sets(st.integers(0, sum(sizes) - 1), max_size=30))
    memory = Memory.create(source_of(old).nbytes)
    base = HeldPart(written(source_of(old), memory, bucket_bytes)[0], memory)
    new = changed(old, *places)
    _, delta = written(source_of(new), memory, bucket_bytes, base)
    assert delta is not None
    differ = sum(int((a != b).sum()) for a, b in zip(old, new, strict=True))
    assert Fraction(delta.changed_words, delta.words) == Fraction(differ, sum(sizes))


@pytest.mark.usefixtures("pieces")
@given(st.data(), BUCKETS)
@IN_PIECES
def test_the_share_is_exact_where_elements_differ_in_size(data, bucket_bytes):
    old = [
        tensor
        for seed, dtype in enumerate(data.draw(st.permutations(sorted(DTYPES))))
        for tensor in random_tensors(data.draw(st.integers(0, 100)), seed=seed, dtype=DTYPES[dtype])
    ]
    new = changed(old, *data.draw(st.sets(st.integers(0, sum(map(len, old))), max_size=30)))
    memory = Memory.create(source_of(old).nbytes)
    base = HeldPart(written(source_of(old), memory, bucket_bytes)[0], memory)
    _, delta = written(source_of(new), memory, bucket_bytes, base)
    assert delta is not None
    differ = sum(int((a != b).sum()) for a, b in zip(old, new, strict=True))
    assert (delta.changed_words, delta.words) == (differ, sum(map(len, old)))


@pytest.mark.parametrize("is_in_place", [True, False])
def test_no_memory_of_the_size_of_a_bucket_is_taken(is_in_place):
    words = torch.arange(16 * MIB, dtype=torch.int16)
    source = source_of([words.view(torch.bfloat16)])
    memory = Memory.create(source.nbytes)
    base = HeldPart(written(source, memory, 16 * MIB)[0], memory)
    target = memory if is_in_place else Memory.create(source.nbytes)
    words[::100] += 1
    tracemalloc.start()
    try:
        _, delta = written(source, target, 16 * MIB, base)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert delta is not None
    assert sorted(delta.buckets) == [0, 1]
    assert peak - sum(map(len, delta.buckets.values())) < 2 * MIB


def test_another_layout_bucket_size_or_part_has_no_delta():
    source = source_of(random_tensors(100, 30))
    memory = Memory.create(source.nbytes)
    base, _ = written(source, memory)
    others = [
        replace(base, bucket_bytes=2 * base.bucket_bytes),
        replace(base, part=WeightsPart.FROZEN),
        replace(base, tensors=base.tensors[:1]),
    ]
    assert [written(source, memory, base=HeldPart(other, memory))[1] for other in others] == [None] * 3
    assert written(source, memory, base=HeldPart(base, memory))[1] is not None


def test_attributes_travel_with_the_part():
    source = source_of(random_tensors(3))
    source.attributes = json.dumps({"r": 8})
    manifest, _ = written(source, Memory.create(source.nbytes))
    assert manifest.attributes == '{"r": 8}'


def held(values: list[torch.Tensor], **fields: str) -> HeldPart:
    source = source_of(values, **fields)
    memory = Memory.create(source.nbytes)
    return HeldPart(written(source, memory)[0], memory)


def test_a_comparison_names_what_differs_from_what_was_published():
    values = random_tensors(10, 20, 0, 30, dtype=torch.bfloat16)
    published = held(values)
    for places, names in (((), []), ((10,), ["t1"]), ((9, 59), ["t0", "t3"])):
        comparison = PublishedComparison([published])
        source_of([t.float() for t in changed(values, *places)], precision="bfloat16").read(comparison)
        assert comparison.different == names


def test_a_comparison_names_what_was_never_published_and_prefers_what_was_published_later():
    values = random_tensors(10, 20)
    later = changed(values, 0)
    comparison = PublishedComparison([held(values), held(later, prefix="t")])
    source_of(later).read(comparison)
    source_of(values[:1], prefix="new").read(comparison)
    assert comparison.different == ["new0"]


@given(tensors(), PRECISIONS)
def test_a_comparison_finds_no_difference_where_there_is_none(values, precision):
    comparison = PublishedComparison([held(values, precision=precision)])
    source_of(values, precision=precision).read(comparison)
    assert comparison.different == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_numbers_that_equal_nothing_or_something_else_are_carried_bit_by_bit(value):
    plain = torch.zeros(40)
    special = plain.clone()
    special[7] = value
    memory = Memory.create(source_of([plain]).nbytes)
    base = HeldPart(written(source_of([plain]), memory)[0], memory)
    before = bytes(memory.view)
    manifest, delta = written(source_of([special]), memory, base=base)
    assert delta is not None
    assert delta.changed_words == 1
    assert bytes(memory.view) == bytes_of(source_of([special])) != before
    comparison = PublishedComparison([HeldPart(manifest, memory)])
    source_of([special]).read(comparison)
    assert comparison.different == []
