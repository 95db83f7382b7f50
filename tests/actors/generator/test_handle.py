"""The driver's side of a generator, with Ray and a real engine: answers, deaths, and what is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from actors.config import DeadlineConfig, GeneratorConfig, ModelConfig
from actors.generator.handle import GeneratorHandle
from actors.generator.spec import GeneratorSpec
from rollout.config import SamplingConfig
from rollout.failures import Failure, FailureError, FailureKind
from rollout.prompts import Message, Prompt, TextPart
from rollout.samples import Generation
from tests.tiny_model import build_tiny_vlm

engine_test = pytest.mark.asyncio(loop_scope="module")
LONG = SamplingConfig(max_tokens=200, ignore_eos=True)


def prompt(text: str) -> Prompt:
    return Prompt((Message("user", (TextPart(text),)),))


def test_the_drivers_side_imports_neither_torch_nor_vllm():
    code = "import sys, actors.generator.handle; print({'torch', 'vllm', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def handle(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GeneratorHandle]:
    root = tmp_path_factory.mktemp("handle")
    spec = GeneratorSpec(
        ModelConfig(path=build_tiny_vlm(root / "model"), precision="float32", max_length=256),
        GeneratorConfig(enforce_eager=True, kv_cache_gib=0.25),
        DeadlineConfig(start_s=300.0, generate_s=120.0, sync_s=60.0, stop_s=10.0),
        Path(root / "media"),
        name="generator-7",
    )
    started = await GeneratorHandle.start(spec)
    yield started
    await started.stop()


@pytest.mark.engine
@engine_test
async def test_the_handle_generates_and_tells_what_the_prompt_is_at_fault_for(handle: GeneratorHandle):
    answer = await handle.generate(prompt("which?"), 2, SamplingConfig(max_tokens=4), 1, "a")
    assert isinstance(answer, Generation)
    assert answer.generator == "generator-7"
    refused = await handle.generate(prompt("x" * 300), 2, SamplingConfig(max_tokens=4), 1, "b")
    assert isinstance(refused, Failure)
    assert len(answer.completions) == 2


@pytest.mark.engine
@engine_test
async def test_a_killed_generator_fails_by_name_and_its_engine_dies_with_it(handle: GeneratorHandle):
    children = psutil.Process().children(recursive=True)
    (target,) = [process for process in children if "ray::Generator" in " ".join(process.cmdline())]
    engine = target.children(recursive=True)
    assert engine
    waiting = asyncio.create_task(handle.generate(prompt("a long story"), 2, LONG, 1, "c"))
    await asyncio.sleep(0.1)
    os.kill(target.pid, signal.SIGKILL)
    with pytest.raises(FailureError, match="generator-7") as caught:
        await waiting
    assert caught.value.failure.kind is FailureKind.INFRASTRUCTURE
    _, alive = await asyncio.to_thread(psutil.wait_procs, engine, 10)
    assert not alive
