"""vLLM with a LoRA adapter from the folder that actors/model/lora.py writes, against transformers with it.

In float32, to 1e-5 nats. The engines are started with the generator's own arguments.
"""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image
from torch import Tensor

from actors.config import DeadlineConfig, GeneratorConfig, LoraConfig, ModelConfig
from actors.generator.spec import GeneratorSpec
from actors.generator.vllm_engine import end_processes, engine_args, engine_environment, engine_processes
from actors.model.loading import load_model
from actors.model.lora import (
    adapter_config,
    adapter_parameters,
    add_adapters,
    write_adapter_folder,
    write_empty_adapter,
)
from actors.trainer.policy_weights import adapter_tensors
from rollout.encoding import PromptEncoder
from rollout.media import MediaStore
from rollout.prompts import MediaPart, Message, Prompt, TextPart
from tests.forks import forked_cores
from tests.tiny_model import build_tiny_lm, build_tiny_vlm

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

LORA = LoraConfig(rank=6, alpha=9.0, use_rslora=True)
TOLERANCE = 1e-5
ADAPTER_ID = 1


@dataclass
class Setup:
    """A policy with adapters, and an engine that has the same."""

    model: ModelConfig
    module: Any
    engine: Any
    encoder: PromptEncoder
    media: MediaStore
    root: Path
    version: int = 0

    def request(self, *, load_inplace: bool = False) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest("policy", ADAPTER_ID, str(self.root / "adapter"), load_inplace=load_inplace)

    def perturb(self) -> None:
        """Other adapters, written for the engine to load."""
        self.version += 1
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for parameter in adapter_parameters(self.module).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        values = [(tensor.name, tensor.read()) for tensor in adapter_tensors(self.module, "float32")]
        write_adapter_folder(self.root / "adapter", adapter_config(LORA, self.module), values)

    async def update(self) -> None:
        """Replace the adapter as a generator does: while nothing runs, and with the version that tokens carry."""
        self.perturb()
        await self.engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
        assert await self.engine.add_lora(self.request(load_inplace=True))
        await self.engine.update_weight_version(str(self.version))
        await self.engine.resume_generation()

    def prompt(self, text: str, images: int = 0) -> Prompt:
        rng = np.random.default_rng(images)
        pictures = [Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)) for _ in range(images)]
        parts = [MediaPart(self.media.put_image(picture)) for picture in pictures]
        return Prompt((Message("user", (*parts, TextPart(text))),))

    async def sample(self, prompt: Prompt, tokens: int = 40, salt: str | None = None) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        encoded = self.encoder.encode(prompt)
        request: dict[str, Any] = {"prompt_token_ids": encoded.token_ids.tolist()}
        request["cache_salt"] = salt or str(self.version)
        if encoded.images:
            request["multi_modal_data"] = {"image": encoded.images}
        params = SamplingParams(
            n=2, temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0, flat_logprobs=True, seed=5,
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        output = None
        async for latest in self.engine.generate(request, params, os.urandom(8).hex(), lora_request=self.request()):
            output = latest
        assert output is not None
        return output

    def log_probs(self, logits: Tensor, completion: Any) -> Tensor:
        """[tokens] of the completion, under logits that predict them."""
        logits = logits.index_fill(-1, torch.tensor(self.encoder.banned_token_ids, dtype=torch.int64), float("-inf"))
        return logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]

    def gap(self, prompt: Prompt, output: Any, module: Any = None) -> float:
        """Greatest difference between the engine's log-probabilities and the policy's, or another module's."""
        worst = 0.0
        expanded = self.encoder.expand(prompt)
        start = len(expanded.token_ids)
        assert output.prompt_token_ids == expanded.token_ids.tolist()
        for completion in output.outputs:
            ids = torch.tensor([[*output.prompt_token_ids, *completion.token_ids]])
            features = dict(expanded.features)
            if features:
                types = torch.zeros_like(ids)
                types[:, :start] = features["mm_token_type_ids"]
                features["mm_token_type_ids"] = types
            with torch.no_grad():
                logits = (module or self.module)(input_ids=ids, **features).logits[0]
            expected = self.log_probs(logits[start - 1 : -1], completion)
            worst = max(worst, float((torch.tensor(completion.logprobs.logprobs) - expected).abs().max()))
        return worst


async def start(folder: Path, root: Path) -> Setup:
    from vllm.v1.engine.async_llm import AsyncLLM

    config = GeneratorConfig(enforce_eager=True, kv_cache_gib=0.25)
    os.environ.update(engine_environment(config))
    model = ModelConfig(path=folder, precision="float32", max_length=256, lora=LORA)
    module = load_model(model).eval()
    add_adapters(module, LORA)
    media = MediaStore(root / "media")
    encoder = PromptEncoder.from_pretrained(folder, media)
    spec = GeneratorSpec(model, config, DeadlineConfig(), media.folder)
    with forked_cores():
        engine = AsyncLLM.from_engine_args(engine_args(spec, encoder.banned_token_ids))
    await engine.update_weight_version("0")
    write_empty_adapter(root / "adapter", model)
    return Setup(model, module, engine, encoder, media, root)


async def stop(setup: Setup) -> None:
    children = engine_processes(setup.engine)
    setup.engine.output_handler.cancel()
    await asyncio.to_thread(setup.engine.shutdown, timeout=2.0)
    await asyncio.to_thread(end_processes, children, 2.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vlm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    root = tmp_path_factory.mktemp("vlm")
    made = await start(build_tiny_vlm(root / "model"), root)
    yield made
    await stop(made)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    root = tmp_path_factory.mktemp("lm")
    made = await start(build_tiny_lm(root / "model", tied=False), root)
    yield made
    await stop(made)


@pytest.mark.parametrize(
    ("lora", "rank"),
    [
        (LoraConfig(rank=1), 1),
        (LoraConfig(rank=6), 8),
        (LoraConfig(rank=257), 320),
        (LoraConfig(rank=16, sync="merged"), None),
        (None, None),
    ],
)
async def test_an_engine_makes_room_for_the_adapter_where_it_gets_one(
    lora: LoraConfig | None, rank: int | None, tmp_path: Path
) -> None:
    spec = GeneratorSpec(ModelConfig(path=tmp_path, lora=lora), GeneratorConfig(), DeadlineConfig(), tmp_path)
    made = engine_args(spec, ())
    assert made.enable_lora == (rank is not None)
    assert rank is None or (made.max_loras, made.max_lora_rank) == (1, rank)


async def test_a_vision_language_model_agrees_with_an_empty_adapter_and_with_each_that_replaces_it(vlm: Setup) -> None:
    base = load_model(vlm.model).eval()
    for update in range(3):
        if update:
            await vlm.update()
        for text, images in (("which digit?", 0), ("what sum?", 1), ("both?", 2)):
            prompt = vlm.prompt(text, images)
            output = await vlm.sample(prompt)
            assert vlm.gap(prompt, output) < TOLERANCE
            assert (vlm.gap(prompt, output, base) > 0.1) == (update > 0)


async def test_a_text_model_agrees_with_an_empty_adapter_and_with_each_that_replaces_it(lm: Setup) -> None:
    prompt = lm.prompt("which digit?")
    assert lm.gap(prompt, await lm.sample(prompt)) < TOLERANCE
    for _ in range(2):
        await lm.update()
        assert lm.gap(prompt, await lm.sample(prompt)) < TOLERANCE
    assert set(await lm.engine.list_loras()) == {ADAPTER_ID}


async def test_a_running_sequence_goes_on_with_the_new_adapter_right_at_the_seam(lm: Setup) -> None:
    """The engine's own arithmetic, redone: the old adapter up to the seam, the new one after it on the old cache."""
    await lm.update()
    old, prompt = copy.deepcopy(lm.module), lm.prompt("a long story")
    generating = asyncio.create_task(lm.sample(prompt, 200))
    while not lm.engine.output_processor.get_num_unfinished_requests():
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.3)
    await lm.update()
    output = await generating
    for completion in output.outputs:
        before, after = completion.weight_versions
        assert (before.version, after.version) == (str(lm.version - 1), str(lm.version))
        ids = torch.tensor([[*output.prompt_token_ids, *completion.token_ids]])
        split = (
            len(output.prompt_token_ids) + after.start - 1
        )  # the first new token read its predecessor with new weights
        with torch.no_grad():
            first = old(input_ids=ids[:, :split], use_cache=True)
            second = lm.module(input_ids=ids[:, split:], past_key_values=first.past_key_values)
        logits = torch.cat([first.logits[0], second.logits[0]])[len(output.prompt_token_ids) - 1 : -1]
        gap = torch.tensor(completion.logprobs.logprobs) - lm.log_probs(logits, completion)
        assert float(gap.abs().max()) < TOLERANCE


async def test_a_prefix_that_was_cached_under_an_older_adapter_is_found_by_its_salt_alone(lm: Setup) -> None:
    """Why generators salt prompts with the version: for vLLM, an adapter of the same name is the same adapter."""
    prompt = lm.prompt("a question " * 12)
    await lm.update()
    assert lm.gap(prompt, await lm.sample(prompt, salt="before")) < TOLERANCE
    await lm.update()
    assert lm.gap(prompt, await lm.sample(prompt, salt="before")) > 0.01
    assert lm.gap(prompt, await lm.sample(prompt, salt="after")) < TOLERANCE


async def test_an_adapter_that_does_not_fit_is_refused_and_the_old_one_serves_on(lm: Setup) -> None:
    await lm.update()
    strange = [("base_model.model.model.layers.0.self_attn.strange.lora_A.weight", torch.zeros(6, 128))]
    write_adapter_folder(lm.root / "adapter", adapter_config(LORA, lm.module), strange)
    with pytest.raises(Exception, match="strange"):
        await lm.engine.add_lora(lm.request(load_inplace=True))
    prompt = lm.prompt("still there?")
    assert lm.gap(prompt, await lm.sample(prompt)) < TOLERANCE
