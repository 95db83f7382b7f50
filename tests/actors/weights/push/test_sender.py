"""A push into a real vLLM engine (CPU, gloo): it counts where log-probabilities agree with the trainer's.

The engine's core is a process of its own; the trainer is this one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image
from torch import nn

from actors.config import GeneratorConfig
from actors.generator.vllm_engine import end_processes, engine_environment, engine_processes
from actors.weights.manifest import ALIGNMENT, Manifest, WeightsPart, bucket_count, plan_layout
from actors.weights.plugin import IPC_BACKEND, NCCL_BACKEND
from actors.weights.push.recipients import PushReport, RecipientState
from actors.weights.push.sender import DeviceSender, PushSettings
from actors.weights.source import SourceTensor, module_tensors
from rollout.encoding import PromptEncoder
from rollout.media import MediaStore
from rollout.prompts import MediaPart, Message, Prompt, TextPart
from tests.actors.weights.push.push_peer import PeerTarget, die
from tests.forks import forked_cores
from tests.tiny_model import VOCABULARY, build_tiny_vlm

CPU = torch.device("cpu")
DEADLINE_S = 60.0
engine_test = pytest.mark.asyncio(loop_scope="module")


@dataclass
class EngineTarget:
    """A generator, as far as a push needs one: it pauses, updates and resumes a real engine."""

    engine: Any
    loop: asyncio.AbstractEventLoop
    name: str = "engine"
    incarnation: str = "first"
    workers: int = 1

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Future[Any]:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        return self._run(self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)))

    def start_weight_update(self) -> Future[Any]:
        async def start() -> None:
            await self.engine.pause_generation(mode="keep", clear_cache=False)
            await self.engine.start_weight_update()

        return self._run(start())

    def update_weights(self, update_info: dict[str, Any]) -> Future[Any]:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        return self._run(self.engine.update_weights(WeightTransferUpdateRequest(update_info=update_info)))

    def finish_weight_update(self, version: int, digest: str) -> Future[Any]:
        async def finish() -> str:
            await self.engine.finish_weight_update(str(version))
            await self.engine.reset_encoder_cache()
            await self.engine.reset_prefix_cache()
            await self.engine.resume_generation()
            return str(await self.engine.get_weight_version())

        return self._run(finish())

    def _run(self, call: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(call, self.loop)


@dataclass
class Setup:
    engine: Any
    target: EngineTarget
    module: Any
    encoder: PromptEncoder
    media: MediaStore
    version: int = 0
    senders: list[DeviceSender] = field(default_factory=list)

    def sender(self, tensors: list[SourceTensor] | None = None, **settings: Any) -> DeviceSender:
        tensors = module_tensors(self.module, "float32") if tensors is None else tensors
        given = PushSettings("nccl", "127.0.0.1", DEADLINE_S, gather_bytes=1 << 20, **settings)
        self.senders.append(DeviceSender(tensors, given, rank=0, device=CPU))
        return self.senders[-1]

    async def push(self, sender: DeviceSender, *others: PeerTarget) -> PushReport:
        """Every weight changed, as the next version."""
        self.version += 1
        random = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.02)
        report = await asyncio.to_thread(sender.push, self.version, (self.target, *others))
        assert report is not None
        return report

    def prompt(self, text: str, images: int) -> Prompt:
        random = np.random.default_rng(images)
        pictures = [Image.fromarray(random.integers(0, 255, (56, 56, 3), dtype=np.uint8)) for _ in range(images)]
        parts = [MediaPart(self.media.put_image(picture)) for picture in pictures]
        return Prompt((Message("user", (*parts, TextPart(text))),))

    async def log_prob_gap(self, prompt: Prompt) -> float:
        """Greatest difference in log-probability of sampled tokens between the engine and transformers, in nats."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        encoded = self.encoder.encode(prompt)
        request: dict[str, Any] = {"prompt_token_ids": encoded.token_ids.tolist()}
        if encoded.images:
            request["multi_modal_data"] = {"image": encoded.images}
        banned = {VOCABULARY["<|image_pad|>"]: -100.0, VOCABULARY["<|video_pad|>"]: -100.0}
        params = SamplingParams(
            max_tokens=12,
            ignore_eos=True,
            logprobs=0,
            seed=7,
            output_kind=RequestOutputKind.FINAL_ONLY,
            logit_bias=banned,
        )
        answer = self.engine.generate(request, params, os.urandom(4).hex())
        completion = [output async for output in answer][-1].outputs[0]
        sampled = [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        expanded = self.encoder.expand(prompt)
        ids = torch.from_numpy(np.concatenate([expanded.token_ids, completion.token_ids]).astype(np.int64))[None]
        features = dict(expanded.features)
        if "mm_token_type_ids" in features:
            features["mm_token_type_ids"] = nn.functional.pad(features["mm_token_type_ids"], (0, len(sampled)))
        with torch.no_grad():
            logits = self.module(input_ids=ids, **features).logits[0, -len(sampled) - 1 : -1].float()
        for token, bias in banned.items():
            logits[:, token] += bias
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        return float((torch.tensor(sampled) - expected).abs().max())

    async def agrees(self) -> bool:
        gaps = [await self.log_prob_gap(self.prompt("which digit?", images)) for images in (0, 1)]
        return max(gaps) < 1e-5


def make_engine(folder: Path, backend: str) -> Any:
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(folder),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 27,
        skip_mm_profiling=True,
        enable_chunked_prefill=False,
        max_num_batched_tokens=1024,
        limit_mm_per_prompt={"image": 1, "video": 0, "audio": 0},
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend=backend),
    )
    with forked_cores():
        return AsyncLLM.from_engine_args(arguments)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def setup(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    from transformers import Qwen2_5_VLForConditionalGeneration

    root = tmp_path_factory.mktemp("push")
    folder = build_tiny_vlm(root / "model")
    os.environ.update(engine_environment(GeneratorConfig(enforce_eager=True)))
    engine = make_engine(folder, NCCL_BACKEND)
    processes = engine_processes(engine)
    media = MediaStore(root / "media")
    module = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    target = EngineTarget(engine, asyncio.get_running_loop())
    made = Setup(engine, target, module, PromptEncoder.from_pretrained(folder, media), media)
    yield made
    for sender in made.senders:
        sender.close()
    engine.output_handler and engine.output_handler.cancel()
    await asyncio.to_thread(engine.shutdown, timeout=5)
    await asyncio.to_thread(end_processes, processes, 5)


@pytest.mark.engine
@engine_test
@pytest.mark.parametrize("packed", [False, True])
async def test_after_a_push_log_probs_agree_with_the_trainers(setup: Setup, packed: bool):
    sender = setup.sender(packed=packed, buffer_bytes=300_000)
    for _ in range(2):
        report = await setup.push(sender)
        assert report.is_whole, str(report)
        assert report.results[0].answer == str(setup.version)
        assert await setup.agrees()


@pytest.mark.engine
@engine_test
async def test_a_bit_that_flips_on_the_way_is_named_and_the_next_push_heals_it(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
):
    sender = setup.sender(packed=False)
    assert (await setup.push(sender)).is_whole
    victim = "model.language_model.layers.1.mlp.up_proj.weight"
    group: Any = sender._sender.model_update_group  # type: ignore[union-attr]
    names, send = iter([meta.name for meta in sender._source.metadata()]), group.broadcast

    def damage(tensor: torch.Tensor, src: int) -> None:
        if next(names) == victim:
            tensor = tensor.detach().clone()
            tensor.view(-1).view(torch.int32)[1234] ^= 1
        send(tensor, src)

    monkeypatch.setattr(group, "broadcast", damage)
    report = await setup.push(sender)
    assert report.results[0].state is RecipientState.STALE
    assert f"damaged in transfer: {victim}" in report.results[0].why
    assert (await setup.push(sender)).is_whole
    assert await setup.agrees()


@pytest.mark.engine
@engine_test
async def test_when_a_peer_dies_the_engine_is_told_and_serves_again_after_the_next_push(setup: Setup):
    sender, peer = setup.sender(packed=False), PeerTarget("peer", in_process=True)
    try:
        await asyncio.to_thread(peer.when, "model.language_model.layers.0.mlp.up_proj.weight", die)
        report = await setup.push(sender, peer)
    finally:
        peer.stop()
    ours, theirs = report.results
    assert (ours.state, ours.is_at_fault) == (RecipientState.STALE, False)
    assert (theirs.state, theirs.is_at_fault) == (RecipientState.LOST, True)
    assert (await setup.push(sender)).is_whole
    assert await setup.agrees()


@pytest.mark.engine
@engine_test
async def test_a_tensor_that_the_model_doesnt_take_is_named(setup: Setup):
    stranger = nn.Parameter(torch.ones(3))
    odd = SourceTensor("model.stranger", "float32", (3,), (stranger,), lambda: stranger)
    report = await setup.push(setup.sender([*module_tensors(setup.module, "float32"), odd]))
    assert report.results[0].state is RecipientState.STALE
    assert "stranger" in report.results[0].why
    assert (await setup.push(setup.sender())).is_whole
    assert await setup.agrees()


@pytest.mark.engine
@engine_test
async def test_a_push_that_is_called_off_before_it_began_leaves_the_engine_as_it_was(setup: Setup):
    assert (await setup.push(setup.sender())).is_whole
    await setup.engine.start_weight_update()
    with pytest.raises(Exception, match=r"\[untouched\].*another died"):
        await asyncio.wrap_future(setup.target.update_weights({"abandon": "another died"}))
    assert await setup.agrees()


@pytest.mark.engine
@engine_test
async def test_an_engine_that_missed_pushes_catches_up_by_pulling(setup: Setup, tmp_path: Path):
    with torch.no_grad():
        for parameter in setup.module.parameters():
            parameter.mul_(1.02)
    manifest = written(module_tensors(setup.module, "float32"), tmp_path / "version")
    await setup.engine.start_weight_update()
    await asyncio.wrap_future(setup.target.update_weights({"parts": [(manifest.packed, str(tmp_path / "version"))]}))
    await setup.engine.finish_weight_update("77")
    await setup.engine.reset_encoder_cache()
    await setup.engine.reset_prefix_cache()
    assert await setup.agrees()


def written(tensors: Iterable[SourceTensor], path: Path) -> Manifest:
    tensors = list(tensors)
    entries, nbytes = plan_layout([(t.name, t.dtype, t.shape) for t in tensors])
    content = np.zeros(nbytes, np.uint8)
    for entry, tensor in zip(entries, tensors, strict=True):
        read = tensor.read().detach().reshape(-1).view(torch.uint8).numpy()
        content[entry.offset : entry.offset + entry.nbytes] = read
    path.write_bytes(content.tobytes())
    bucket_bytes = ALIGNMENT << 20
    digests = tuple(bytes(16) for _ in range(bucket_count(nbytes, bucket_bytes)))
    return Manifest(0, 77, WeightsPart.TRAINED, nbytes, bucket_bytes, entries, digests)


@pytest.mark.engine
@engine_test
async def test_weights_that_were_never_compared_are_not_served(setup: Setup):
    """The session of a caller that forgets to verify, up to the call that refuses it."""
    await setup.engine.start_weight_update()
    with pytest.raises(Exception, match=r"\[stale\].*not compared"):
        await setup.engine.finish_weight_update("78")
    with pytest.raises(Exception, match="abandoned: forgotten"):
        await asyncio.wrap_future(setup.target.update_weights({"abandon": "forgotten"}))
    assert (await setup.push(setup.sender())).is_whole
    assert await setup.agrees()


@pytest.mark.engine
@engine_test
async def test_an_ipc_engine_without_a_gpu_says_so(tmp_path: Path):
    engine = make_engine(build_tiny_vlm(tmp_path / "model"), IPC_BACKEND)
    processes = engine_processes(engine)
    try:
        target = EngineTarget(engine, asyncio.get_running_loop())
        with pytest.raises(Exception, match="shares a GPU's memory, but this vLLM engine runs on cpu"):
            await asyncio.wrap_future(target.init_weight_transfer_engine({"packed": True}))
    finally:
        engine.output_handler and engine.output_handler.cancel()
        await asyncio.to_thread(engine.shutdown, timeout=5)
        await asyncio.to_thread(end_processes, processes, 5)
