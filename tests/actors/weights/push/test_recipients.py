"""A push to several generators at once: who gets what, who is named when it fails, and how the others fare.

The generators are real worker-side engines around a toy model, over gloo (see push_peer.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actors.trainer.deepspeed_engine import open_store
from actors.weights.push.recipients import PushReport, RecipientState
from actors.weights.push.sender import DeviceSender, PushSettings
from actors.weights.source import SourceTensor
from tests.actors.weights.push import push_ranks
from tests.actors.weights.push.push_peer import SHAPES, PeerTarget, die, policy_tensors
from tests.actors.weights.push.push_ranks import RANKS
from tests.forks import run_ranks
from tests.tiny_model import build_tiny_lm

CPU = torch.device("cpu")
DEADLINE_S = 8.0
Start = Callable[..., Any]


@pytest.fixture
def peers() -> Iterator[Callable[..., PeerTarget]]:
    """Starts generators, and ends them."""
    started: list[PeerTarget] = []

    def start(name: str, workers: int = 1, **settings: Any) -> PeerTarget:
        started.append(PeerTarget(name, workers, **settings))
        return started[-1]

    yield start
    for target in started:
        target.stop()


@pytest.fixture
def sender() -> Iterator[Callable[..., DeviceSender]]:
    """Makes senders of rank 0, and closes them."""
    made: list[DeviceSender] = []

    def make(tensors: list[SourceTensor], *, deadline_s: float = DEADLINE_S, **settings: Any) -> DeviceSender:
        given = PushSettings("nccl", "127.0.0.1", deadline_s, gather_bytes=1 << 20, **settings)
        made.append(DeviceSender(tensors, given, rank=0, device=CPU))
        return made[-1]

    yield make
    for one in made:
        one.close()


def pushed(sender: DeviceSender, version: int, *targets: PeerTarget) -> PushReport:
    report = sender.push(version, targets)
    assert report is not None
    assert [result.name for result in report.results] == [target.name for target in targets]
    return report


def states(report: PushReport) -> dict[str, RecipientState]:
    return {result.name: result.state for result in report.results}


def at_fault(report: PushReport) -> list[str]:
    return [result.name for result in report.results if result.is_at_fault]


@pytest.mark.parametrize("settings", [{"packed": False}, {"buffer_bytes": 8192}, {"buffer_bytes": 8500}, {}])
def test_every_worker_of_every_generator_holds_what_was_sent(peers: Start, sender: Start, settings: dict[str, Any]):
    tensors = policy_tensors()
    narrow, wide = peers("narrow"), peers("wide", 2)
    push = sender(tensors, **settings)
    report = pushed(push, 1, narrow, wide)
    assert report.current == ("narrow", "wide"), str(report)
    assert {result.answer for result in report.results} == {(1, report.digest)}
    assert narrow.holds(tensors)
    assert wide.holds(tensors)


def test_a_group_is_used_push_after_push_and_the_digest_follows_the_weights(peers: Start, sender: Start):
    tensors, target = policy_tensors(), peers("only")
    push = sender(tensors)
    digests = [pushed(push, 1, target).digest]
    with torch.no_grad():
        tensors[0].parameters[0].add_(1.0)
    digests += [pushed(push, 2, target).digest, pushed(push, 2, target).digest]
    assert target.holds(tensors)
    assert len(set(digests)) == 2
    assert target.calls.count("init_weight_transfer_engine") == 1


def test_tensors_are_cast_to_the_dtype_of_the_wire(peers: Start, sender: Start):
    target = peers("only")
    plain = policy_tensors()
    cast = [SourceTensor(t.name, "bfloat16", t.shape, t.parameters, t.read) for t in plain[:1]] + plain[1:]
    assert pushed(sender(cast), 1, target).is_whole
    (held,) = target.ask("held")
    assert torch.equal(held[cast[0].name], plain[0].read().to(torch.bfloat16))


def test_a_generator_that_dies_in_the_middle_is_named_and_the_others_go_on_without_it(peers: Start, sender: Start):
    tensors = policy_tensors()
    well, doomed = peers("well"), peers("doomed", in_process=True)
    push = sender(tensors, packed=False)
    doomed.when("second.weight", die)
    report = pushed(push, 1, well, doomed)
    assert states(report) == {"well": RecipientState.STALE, "doomed": RecipientState.LOST}
    assert at_fault(report) == ["doomed"]
    assert pushed(push, 1, well).is_whole
    assert well.holds(tensors)


def test_a_generator_that_stands_still_is_named_within_the_deadline(peers: Start, sender: Start):
    tensors = policy_tensors()
    well, still = peers("well"), peers("still")
    push = sender(tensors, packed=False, deadline_s=3.0)
    wake = threading.Event()
    still.when("first.bias", wake.wait)
    report = pushed(push, 1, well, still)
    assert states(report) == {"well": RecipientState.STALE, "still": RecipientState.LOST}
    assert at_fault(report) == ["still"]
    wake.set()
    assert pushed(push, 1, well).is_whole


def test_a_generator_that_cant_start_leaves_the_others_on_their_former_version(peers: Start, sender: Start):
    tensors = policy_tensors()
    well, odd = peers("well"), peers("odd")
    push = sender(tensors)
    assert pushed(push, 1, well, odd).is_whole
    before = well.ask("held")
    odd.refuse("start_weight_update", RuntimeError("a session is open"))
    with torch.no_grad():
        tensors[0].parameters[0].add_(1.0)
    report = pushed(push, 2, well, odd)
    assert states(report) == {"well": RecipientState.UNTOUCHED, "odd": RecipientState.UNTOUCHED}
    assert at_fault(report) == ["odd"]
    assert "a session is open" in str(report)
    assert all(torch.equal(before[0][name], held) for name, held in well.ask("held")[0].items())
    assert pushed(push, 2, well).is_whole


def test_a_generator_that_doesnt_come_to_the_rendezvous_is_named_and_holds_up_no_other_push(
    peers: Start, sender: Start
):
    tensors = policy_tensors()
    well, absent = peers("well"), peers("absent")
    absent.refuse("init_weight_transfer_engine", RuntimeError("it is restarting"))
    push = sender(tensors)
    report = pushed(push, 1, well, absent)
    assert states(report) == {"well": RecipientState.UNTOUCHED, "absent": RecipientState.UNTOUCHED}
    assert at_fault(report) == ["absent"]
    assert "names" not in well.calls
    assert pushed(push, 1, well).is_whole


def test_a_generator_that_took_anothers_place_is_met_anew(peers: Start, sender: Start):
    tensors = policy_tensors()
    push = sender(tensors)
    assert pushed(push, 1, peers("one")).is_whole
    successor = peers("one", incarnation="second")
    assert pushed(push, 2, successor).is_whole
    assert successor.holds(tensors)


@pytest.mark.parametrize("packed", [True, False])
def test_a_bit_that_flips_on_the_way_to_one_generator_is_found_and_named(peers: Start, sender: Start, packed: bool):
    tensors = policy_tensors()
    well, hit = peers("well"), peers("hit")
    push = sender(tensors, packed=packed)
    assert pushed(push, 1, well, hit).is_whole
    _flip_a_bit(hit, "first.bias", packed)
    report = pushed(push, 2, well, hit)
    assert states(report) == {"well": RecipientState.CURRENT, "hit": RecipientState.STALE}
    assert "damaged in transfer: first.bias" in str(report)
    assert "first.weight" not in str(report)
    assert pushed(push, 2, well, hit).is_whole
    assert hit.holds(tensors)


def test_a_generator_of_which_one_worker_is_hit_takes_the_next_push_with_all_of_them(peers: Start, sender: Start):
    tensors, wide = policy_tensors(), peers("wide", 2)
    push = sender(tensors)
    assert pushed(push, 1, wide).is_whole
    _flip_a_bit(wide, "second.weight", packed=True)
    assert states(pushed(push, 2, wide)) == {"wide": RecipientState.STALE}
    assert pushed(push, 3, wide).is_whole
    assert wide.holds(tensors)


def _flip_a_bit(target: PeerTarget, name: str, packed: bool) -> None:
    """In what arrives next for this tensor, on a group that lives until the next push."""
    group: Any = target.threads[0].engine.model_update_group
    receive, arrived = group.broadcast, []
    starts = {
        tensor: 4 * sum(torch.Size(shape).numel() for shape in list(SHAPES.values())[:index])
        for index, tensor in enumerate(SHAPES)
    }

    def broadcast(tensor: torch.Tensor, src: int) -> None:
        receive(tensor, src)
        arrived.append(tensor)
        if packed or len(arrived) == list(SHAPES).index(name) + 1:
            tensor[starts[name] + 7 if packed else 7] ^= 0x40

    group.broadcast = broadcast


def test_a_tensor_that_the_model_ignores_is_named(peers: Start, sender: Start):
    report = pushed(sender(policy_tensors({"stranger": (3,)})), 1, peers("only"))
    assert states(report) == {"only": RecipientState.STALE}
    assert "ignores stranger" in str(report)


def test_a_trainer_that_fails_while_it_sends_frees_the_generators_at_once(peers: Start, sender: Start):
    tensors, target = policy_tensors(), peers("only")
    push = sender(tensors, packed=False, deadline_s=60.0)
    assert pushed(push, 1, target).is_whole
    wrong = nn.Parameter(torch.zeros(9))
    push = sender([*tensors[:2], SourceTensor("second.weight", "float32", (8, 64), (wrong,), lambda: wrong)])
    with pytest.raises(ValueError, match=r"second.weight has shape \[9\], but was declared with \[8, 64\]"):
        push.push(2, [target])
    assert pushed(sender(tensors), 3, target).is_whole


def test_a_push_to_nobody_says_so(sender: Start):
    report = pushed(sender(policy_tensors()), 1)
    assert report.results == ()
    assert report.digest == ""


def test_two_tensors_of_one_name_are_refused(sender: Start):
    with pytest.raises(ValueError, match="two tensors of one name"):
        sender(policy_tensors() + policy_tensors())


@pytest.mark.engine
def test_under_zero_3_a_generator_that_fails_doesnt_hold_up_the_trainers_ranks(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    folder, store, out = build_tiny_lm(tmp_path / "model"), open_store(120.0, RANKS), tmp_path / "result.pt"
    run_ranks(push_ranks.main, [(folder, store.port, rank, out) for rank in range(RANKS)], 300)
    result = torch.load(out)
    assert {name: is_whole for name, (is_whole, _, _) in result.items()} == {
        "well": True,
        "ill": False,
        "well again": True,
    }
    assert "out of memory" in result["ill"][1]
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = {name: parameter.detach().bfloat16() for name, parameter in module.named_parameters()}
    for name in ("well", "well again"):
        held = result[name][2]
        assert held.keys() == expected.keys()
        assert all(torch.equal(held[key], expected[key]) for key in expected)
