"""What a trainer rank reads in a pass, and what a worker's engine accepts in a session."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actors.weights.push.device_digest import VersionDigests, device_digest
from actors.weights.push.device_tensors import PushSource
from actors.weights.push.vllm_backends import CheckedNcclBackend, NotLoadedError
from actors.weights.source import SourceTensor
from tests.actors.weights.push.push_peer import ToyModel, policy_tensors

CPU = torch.device("cpu")


def source_of(tensors: list[SourceTensor], gather_bytes: int = 1 << 20, **settings: Any) -> PushSource:
    return PushSource(tensors, device=CPU, gather_bytes=gather_bytes, **settings)


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=30), st.integers(1, 400))
def test_no_more_is_gathered_at_once_than_asked_for(sizes: list[tuple[int, bool]], gather_bytes: int):
    """A tensor may share its first parameter with the one before; a tensor that is larger comes alone."""
    tensors: list[SourceTensor] = []
    for number, (size, is_shared) in enumerate(sizes):
        own = nn.Parameter(torch.zeros(size))
        shared = tensors[-1].parameters[:1] if is_shared and tensors else ()
        tensors.append(SourceTensor(f"{number}", "float32", (size,), (*shared, own), partial(torch.zeros, size)))
    source = source_of(tensors, gather_bytes)
    assert [tensor for group in source._groups for tensor in group] == tensors
    for group in source._groups:
        whole = {id(parameter): parameter.nbytes for tensor in group for parameter in tensor.parameters}
        assert len(group) == 1 or sum(whole.values()) <= gather_bytes


def test_a_pass_yields_what_was_declared_and_its_print():
    tensors = policy_tensors()
    source = source_of(tensors)
    yielded = list(source)
    assert [(name, t.dtype, tuple(t.shape)) for name, t in yielded] == [
        (meta.name, meta.dtype, meta.shape) for meta in source.metadata()
    ]
    rows = tuple((t.name, t.dtype, t.shape, device_digest(t.read())) for t in tensors)
    assert source.digests_of(5) == VersionDigests(5, rows)


def test_a_pass_that_is_drained_reads_nothing_more_and_has_no_print():
    source = source_of(policy_tensors(), gather_bytes=1)
    one_pass = iter(source)
    next(one_pass)
    one_pass.drain()
    assert list(one_pass) == []
    with pytest.raises(RuntimeError, match="1 of 4 tensors"):
        source.digests_of(5)


def test_a_rank_that_doesnt_send_reads_nothing():
    assert list(source_of(policy_tensors(), is_read=False, takes_digests=False)) == []


def test_nothing_to_send_is_an_error():
    with pytest.raises(ValueError, match="no tensor to send"):
        source_of([])


@pytest.fixture
def engine() -> CheckedNcclBackend:
    """In a session, with two tensors received."""
    parallel = SimpleNamespace(pipeline_parallel_size=1, enable_expert_parallel=False)
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(dtype=torch.float32))
    made = CheckedNcclBackend(config, config, CPU, ToyModel())
    made.start_weight_update()
    made._digesting.load_weights([("a", torch.ones(2)), ("b", torch.zeros(3, dtype=torch.bfloat16))])
    return made


def rows(**changes: Any) -> tuple[tuple[str, str, tuple[int, ...], int], ...]:
    """What was sent: the two tensors, changed."""
    sent = {
        "a": ("float32", (2,), device_digest(torch.ones(2))),
        "b": ("bfloat16", (3,), device_digest(torch.zeros(3, dtype=torch.bfloat16))),
    } | changes
    return tuple((name, *rest) for name, rest in sent.items() if rest is not None)


def verify(engine: CheckedNcclBackend, sent: VersionDigests, digest: str | None = None) -> None:
    engine.update_weights({"verify": sent.pack(), "digest": digest or sent.digest})


def test_what_agrees_with_the_trainer_may_be_finished(engine: CheckedNcclBackend):
    verify(engine, VersionDigests(5, rows()))
    engine.finish_weight_update()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"c": ("float32", (2,), 1)}, "arrived without c"),
        ({"a": None}, "arrived with a, which the trainer did not send"),
        ({"a": ("float32", (2,), 1)}, "damaged in transfer: a"),
        ({"b": ("bfloat16", (1, 3), device_digest(torch.zeros(3, dtype=torch.bfloat16)))}, "damaged in transfer: b"),
        ({"b": ("float16", (3,), device_digest(torch.zeros(3, dtype=torch.bfloat16)))}, "damaged in transfer: b"),
    ],
)
def test_what_disagrees_is_named_and_cant_be_finished(engine: CheckedNcclBackend, changes: dict[str, Any], said: str):
    with pytest.raises(NotLoadedError, match=rf"\[stale\].*policy version 5.*{said}"):
        verify(engine, VersionDigests(5, rows(**changes)))
    with pytest.raises(NotLoadedError, match="not compared"):
        engine.finish_weight_update()


def test_a_digest_of_another_version_is_refused(engine: CheckedNcclBackend):
    with pytest.raises(NotLoadedError, match="was announced"):
        verify(engine, VersionDigests(5, rows()), VersionDigests(6, rows()).digest)


def test_a_verified_session_doesnt_vouch_for_the_next(engine: CheckedNcclBackend):
    verify(engine, VersionDigests(5, rows()))
    engine.finish_weight_update()
    engine.start_weight_update()
    with pytest.raises(NotLoadedError, match="not compared"):
        engine.finish_weight_update()


def test_a_worker_in_no_group_says_which_call_comes_first(engine: CheckedNcclBackend):
    engine.start_weight_update()
    with pytest.raises(NotLoadedError, match=r"\[untouched\].*Call init_weight_transfer_engine first"):
        engine.update_weights({"names": ["a"], "dtype_names": ["float32"], "shapes": [[2]]})
