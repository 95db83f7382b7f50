"""The ipc backend up to the CUDA handle, which needs a GPU: what is sent, in which form, and who hears of a failure."""

from __future__ import annotations

import inspect
import pickle
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from actors.weights.push.device_digest import VersionDigests
from actors.weights.push.device_tensors import PushSource
from actors.weights.push.group import Deadline
from actors.weights.push.ipc_handles import HandleError, from_plain, to_plain
from actors.weights.push.recipients import PhaseDeadlines, PushFailedError, PushRecipients, RecipientState
from actors.weights.push.sender import CheckedIpcSender, DeviceSender, PushSettings
from actors.weights.push.vllm_backends import CheckedIpcBackend, DigestingModel, NotLoadedError
from tests.actors.weights.push.push_peer import ToyModel, policy_tensors

CPU = torch.device("cpu")


ARGUMENTS = {
    "tensor_cls": torch.Tensor,
    "tensor_size": torch.Size((2, 3)),
    "tensor_stride": (3, 1),
    "tensor_offset": 4,
    "storage_cls": torch.storage.TypedStorage,
    "dtype": torch.uint8,
    "storage_device": 0,
    "storage_handle": b"\x00handle\xff",
    "storage_size_bytes": 1 << 40,
    "storage_offset_bytes": 512,
    "requires_grad": False,
    "ref_counter_handle": b"\x01counter",
    "ref_counter_offset": 8,
    "event_handle": b"\x02event",
    "event_sync_required": True,
}


def handle(**changes: Any) -> dict[str, tuple[Any, ...]]:
    """What torch's reduce_tensor gives for a CUDA tensor, by the GPU's UUID."""
    return {"GPU-1": tuple((ARGUMENTS | changes).values())}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_a_handle_survives_the_control_channel_without_pickle(dtype: torch.dtype):
    sent = msgspec.msgpack.encode(to_plain(handle(dtype=dtype)))
    assert from_plain(msgspec.msgpack.decode(sent)) == handle(dtype=dtype)


def test_a_handle_has_the_fields_that_torch_rebuilds_a_tensor_from():
    assert list(inspect.signature(rebuild_cuda_tensor).parameters) == list(ARGUMENTS)


def test_vllms_control_channel_carries_a_plain_handle_and_not_vllms_own(monkeypatch: pytest.MonkeyPatch):
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    plain = {"ipc_handles": to_plain(handle())}
    assert MsgpackDecoder().decode(MsgpackEncoder().encode(plain)) == plain
    with pytest.raises(TypeError, match="VLLM_ALLOW_INSECURE_SERIALIZATION"):
        MsgpackEncoder().encode({"ipc_handles": handle()})


@pytest.mark.parametrize(
    "changes", [{"tensor_cls": torch.nn.Parameter}, {"requires_grad": True}, {"dtype": torch.int64}]
)
def test_the_handle_of_anything_but_a_plain_weight_is_refused(changes: dict[str, Any]):
    with pytest.raises(HandleError, match="cannot be sent"):
        to_plain(handle(**changes))


@pytest.mark.parametrize("plain", [{"GPU-1": {}}, {"GPU-1": None}, {"GPU-1": {"dtype": "object"}}])
def test_values_that_are_no_handle_are_refused(plain: Any):
    with pytest.raises(HandleError, match="not the handle"):
        from_plain(plain)


def ipc_engine() -> CheckedIpcBackend:
    parallel = SimpleNamespace(pipeline_parallel_size=1, enable_expert_parallel=False)
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(dtype=torch.float32))
    return CheckedIpcBackend(config, config, CPU, ToyModel())


def test_an_engine_reads_a_plain_chunk_as_vllms_own():
    chunk = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[2, 3]], "tensor_sizes": [24]}
    info = ipc_engine().parse_update_info(chunk | {"ipc_handles": to_plain(handle())})
    assert info.ipc_handles == handle()
    info = ipc_engine().parse_update_info(chunk | {"ipc_handles": [to_plain(handle())]})
    assert info.ipc_handles == [handle()]


def test_a_pickled_handle_is_never_opened():
    opened: list[int] = []
    bomb = pickle.dumps(opened)
    chunk = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[2, 3]], "ipc_handles_pickled": bomb}
    with pytest.raises(ValueError, match="pickled IPC handles are refused"):
        ipc_engine().parse_update_info(chunk)


def test_an_error_in_a_chunk_puts_the_layers_back_and_says_that_nothing_was_loaded():
    engine = ipc_engine()
    engine.start_weight_update()
    with pytest.raises(NotLoadedError, match=r"\[untouched\] ValueError: pickled"):
        engine.update_weights({"names": ["a"], "ipc_handles_pickled": ""})


def test_a_chunk_that_repeats_a_tensor_is_refused():
    digesting = DigestingModel(ToyModel(), set(), is_part=False)
    digesting.load_weights([("a", torch.ones(2))])
    with pytest.raises(NotLoadedError, match="a arrived twice"):
        digesting.load_weights([("a", torch.ones(2))])


def test_a_stage_of_a_pipeline_may_ignore_what_isnt_its_own():
    with pytest.raises(NotLoadedError, match="ignores stranger"):
        DigestingModel(ToyModel(), set(), is_part=False).load_weights([("stranger", torch.ones(2))])
    assert DigestingModel(ToyModel(), set(), is_part=True).load_weights([("stranger", torch.ones(2))]) == set()


class Port:
    """A generator that answers as it is told, and notes what it was asked."""

    workers = 1
    incarnation = "first"

    def __init__(self, name: str, fails_at: int = -1) -> None:
        self.name = name
        self.fails_at = fails_at
        self.asked: list[Any] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Future[Any]:
        return self._answer(init_info)

    def start_weight_update(self) -> Future[Any]:
        return self._answer("start")

    def update_weights(self, update_info: dict[str, Any]) -> Future[Any]:
        return self._answer(update_info)

    def finish_weight_update(self, version: int, digest: str) -> Future[Any]:
        return self._answer((version, digest))

    def _answer(self, asked: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if len(self.asked) == self.fails_at:
            future.set_exception(RuntimeError(f"{self.name} is ill"))
        else:
            future.set_result(asked)
        self.asked.append(asked)
        return future


class HandleSender(CheckedIpcSender):
    """The trainer's side where there is no GPU: every chunk of one tensor, under a made-up handle."""

    def __init__(self, client: PushRecipients, source: PushSource) -> None:
        self.client, self.source = client, source
        self.is_sender = self.packed = self._is_new = True
        self._failure = None
        self.passed: list[str] = []

    def _send(self, source: Any) -> None:
        for name, tensor in source:
            self.passed.append(name)
            self._do_send([name], ["float32"], [list(tensor.shape)], handle(), [tensor.nbytes])

    @staticmethod
    def _post_send_sync() -> None:
        pass


@pytest.fixture
def source() -> PushSource:
    return PushSource(policy_tensors(), device=CPU, gather_bytes=1 << 20)


def begun(source: PushSource, *ports: Port) -> PushRecipients:
    client = PushRecipients(ports, is_collective=False)
    client.begin(Deadline(5.0), PhaseDeadlines(1.0, 1.0, 1.0), lambda: source.digests_of(7), lambda why: None)
    return client


def test_the_steps_come_in_order_with_chunks_as_plain_values(source: PushSource):
    port = Port("only")
    client = begun(source, port)
    HandleSender(client, source).send_weights()
    first, start, *chunks, check, finish = port.asked
    assert first == {"packed": True}
    assert start == "start"
    assert [chunk["names"] for chunk in chunks] == [[meta.name] for meta in source.metadata()]
    assert all(chunk["ipc_handles"] == to_plain(handle()) for chunk in chunks)
    assert VersionDigests.unpack(check["verify"]) == source.digests_of(7)
    assert finish == (7, check["digest"])
    assert client.results["only"].state is RecipientState.CURRENT


@pytest.mark.parametrize(
    ("fails_at", "state"), [(1, RecipientState.UNTOUCHED), (3, RecipientState.STALE), (6, RecipientState.STALE)]
)
def test_a_generator_that_fails_doesnt_stop_the_others(source: PushSource, fails_at: int, state: RecipientState):
    well, ill = Port("well"), Port("ill", fails_at)
    client = begun(source, well, ill)
    with pytest.raises(PushFailedError, match="ill is ill"):
        HandleSender(client, source).send_weights()
    assert client.results["well"].state is RecipientState.CURRENT
    assert client.results["ill"].state is state
    assert len(ill.asked) == fails_at + 1  # it isn't asked again


def test_every_rank_comes_to_the_end_of_its_pass_where_all_generators_have_failed(source: PushSource):
    trainer = HandleSender(begun(source, Port("ill", 2)), source)
    with pytest.raises(PushFailedError, match="ill is ill"):
        trainer.send_weights()
    assert trainer.passed == [meta.name for meta in source.metadata()]


def test_a_trainer_without_a_gpu_cant_push_over_ipc():
    settings = PushSettings("ipc", "127.0.0.1", 5.0, gather_bytes=1 << 20)
    with pytest.raises(ValueError, match="shares a GPU's memory, but this trainer runs on cpu"):
        DeviceSender(policy_tensors(), settings, rank=0, device=CPU)
