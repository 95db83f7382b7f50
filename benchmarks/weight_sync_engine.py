"""Cases of the weight-sync benchmark with a real vLLM engine: a larger model without Ray, and the demo's with Ray."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from types import ModuleType
from typing import Any

from weight_sync_processes import DEADLINE_S, WARMUP, Arrival, Peer, Row, Sync, Trainer, Workload, interleaved, starting

from actors.config import DeadlineConfig, GeneratorConfig, ModelConfig, TrainerConfig, WeightsConfig
from actors.generator.vllm_engine import engine_environment, engine_processes
from actors.weights.offer import WeightsOffer
from actors.weights.source import DTYPES

ROOT = Path(__file__).resolve().parent.parent
GIB, MIB = 1 << 30, 1 << 20
SMALL_BYTES = GIB // 4
"""A model below this gets a small vocabulary and narrow layers."""
PAUSE_SHARE = 0.25
DEMO_S = 0.06
MAX_LENGTH = 256
PROMPT_IDS = [9, 8, 7]
FIRST_TOKENS = 5
"""Of a request that is watched, before its version comes."""
ENGINE = GeneratorConfig(enforce_eager=True, kv_cache_gib=0.25, max_sequences=32)
DEMO_ENGINE = GeneratorConfig(enforce_eager=True, kv_cache_gib=0.5)
DEMO_PARTS = ("gather", "transfer", "stage", "load", "pause", "verify", "other")


def engine_case(workload: Workload, repeats: int) -> list[Row]:
    """Time of a sync into a running vLLM engine, by shared memory and over the network, and its pause of generation."""
    rows, dtype = [], workload.dtype
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        with Peer(EngineModel) as maker:
            size = maker.call("write", folder, workload.nbytes, dtype)
        for way, maps_memory in (("shared memory", True), ("TCP, CURVE", False)):
            route = "memory" if maps_memory else "network"
            with contextlib.ExitStack() as stack:
                environment = engine_environment(ENGINE)
                engine = starting(stack, EngineSink, folder, dtype, maps_memory, environment=environment)
                before = engine.call("memory")
                sync = Sync(starting(stack, trainer_of, folder, dtype, workload.bucket_bytes), [engine])
                figures = interleaved({"sync": partial(sync.once, route)}, repeats)["sync"]
                kept = engine.call("memory") - before
                if maps_memory:
                    standstills = _standstills(sync, engine, repeats)
            name, whole = f"engine of {size / GIB:.2f} GiB, {way}, {dtype}", figures["seconds"]
            rows.append(Row(name, whole, size))
            rows += [Row(f"{name}: {part}", figures[part], size) for part in ("gather", "transfer", "stage", "load")]
            share = figures["pause"] / whole
            limit = f"the whole sync: {whole:.3f} s"
            rows.append(Row(f"{name}: pause", figures["pause"], None, limit, share, at_most=PAUSE_SHARE))
            limit = f"the model: {size / MIB:.0f} MiB; private, beyond its start: {kept / MIB:.0f} MiB"
            rows.append(Row(f"{name}: engine's memory", None, None, limit, kept / size))
    return rows + [replace(row, case=f"{row.case}, {dtype}") for row in standstills]


def _standstills(sync: Sync, engine: Peer, repeats: int) -> list[Row]:
    """Longest wait of a running request for its next token during a sync, staged and loaded in place."""
    rows = []
    for how, least in (("staged", 0), ("in place", None)):
        seen = []
        for _ in range(WARMUP + repeats):
            sync.version += 1
            sync.trainer.call("change", 1.0)
            offer = sync.trainer.call("publish", sync.version)[0]
            seen.append(engine.call("watch", offer, least))
        whole, longest, usual = (median(column) for column in zip(*seen[WARMUP:], strict=True))
        limit = f"the whole of it: {whole:.3f} s; a usual token: {usual:.3f} s"
        at_most = PAUSE_SHARE if how == "staged" else None
        rows.append(Row(f"longest wait for a token, {how}", longest, None, limit, longest / whole, at_most=at_most))
    return rows


def demo_case(versions: int) -> list[Row]:
    """Time of a sync of the demo's policy over Ray: gathered, published, loaded and verified after each step."""
    with Peer(DemoRun) as run:
        syncs: list[dict[str, float]] = run.call("syncs", versions)
    rows = []
    for name in ("seconds", *DEMO_PARTS):
        all_seconds = [sync[name] for sync in syncs]
        middle = median(all_seconds)
        most = quantiles(all_seconds, n=10)[-1] if len(all_seconds) > 1 else middle
        spread = f"p90: {1000 * most:.1f} ms, least: {1000 * min(all_seconds):.1f} ms"
        if name == "seconds":
            limit = f"{1000 * DEMO_S:g} ms; {spread}"
            rows.append(Row("demo, end to end, float32", middle, None, limit, middle / DEMO_S, at_most=1.0))
        else:
            rows.append(Row(f"demo, float32: {name}", middle, None, spread))
    return rows


def digits() -> ModuleType:
    """The demo's module, for its model, tokenizer and prompts."""
    spec = importlib.util.spec_from_file_location("digits_recipe", ROOT / "recipes" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class EngineModel:
    """Makes the vLLM engine's model, in a process of its own."""

    def write(self, folder: Path, nbytes: int, dtype: str) -> int:
        """Write a Llama of about `nbytes` bytes with the demo's tokenizer. Returns its exact size."""
        from transformers import LlamaConfig, LlamaForCausalLM

        is_small = nbytes < SMALL_BYTES
        width, inner, vocabulary = (128, 352, 512) if is_small else (1024, 2816, 49_152)
        heads = width // 64
        a_layer = 3 * width * width + 3 * width * inner + 2 * width
        layers = max(1, round((nbytes / DTYPES[dtype].itemsize - vocabulary * width) / a_layer))
        tokenizer = digits().make_tokenizer()
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config).to(DTYPES[dtype])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return sum(parameter.nbytes for parameter in model.parameters())


def trainer_of(folder: Path, dtype: str, bucket_bytes: int) -> Trainer:
    """A trainer of that model."""
    from transformers import LlamaForCausalLM

    return Trainer(LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]), dtype, bucket_bytes)


class EngineSink:
    """A generator with its vLLM engine, without Ray."""

    def __init__(self, folder: Path, dtype: str, maps_memory: bool) -> None:
        from actors.generator.generator import Generator
        from actors.generator.spec import GeneratorSpec

        self._runner = asyncio.Runner()
        spec = GeneratorSpec(
            ModelConfig(path=folder, precision=dtype, max_length=MAX_LENGTH),
            ENGINE,
            DeadlineConfig(sync_s=DEADLINE_S),
            folder / "media",
            weights=WeightsConfig(canaries=0, shared_memory=maps_memory),
        )
        self._generator = Generator(spec)
        self._runner.run(self._generator.ready())

    def receive(self, offer: WeightsOffer) -> Arrival:
        """Receive a version and load it."""
        receipt = self._runner.run(self._generator.load_weights(offer))
        parts = {"transfer": receipt.transfer_s, "stage": receipt.stage_s}
        parts |= {"load": receipt.load_s, "pause": receipt.pause_s}
        return Arrival(time.perf_counter(), receipt.route, receipt.received_bytes, parts)

    def memory(self) -> int:
        """Private memory of the engine's process, in bytes. It keeps freed memory, so this is also its peak."""
        (process,) = (p for p in engine_processes(self._generator._engine) if "EngineCore" in " ".join(p.cmdline()))
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    def watch(self, offer: WeightsOffer, stage_from_mib: int | None) -> tuple[float, float, float]:
        """Receive a version and load it while a request is sampled.

        Returns:
            Seconds of all that, of its longest wait for a token meanwhile, and of a usual wait before.
        """
        return self._runner.run(self._watched(offer, stage_from_mib))

    async def _watched(self, offer: WeightsOffer, stage_from_mib: int | None) -> tuple[float, float, float]:
        held, before = self._generator._weights, self._generator._weights.config
        held.config = before.model_copy(update={"stage_from_mib": stage_from_mib})
        moments: list[float] = []
        sampling = asyncio.create_task(self._sample(moments, f"watched-{offer.version}"))
        try:
            await _until(lambda: len(moments) > FIRST_TOKENS)
            started = time.perf_counter()
            await self._generator.load_weights(offer)
            ended, count = time.perf_counter(), len(moments)
            await _until(lambda: len(moments) > count)
        finally:
            held.config = before
            sampling.cancel()
        steps = list(pairwise(moments))
        longest = max(later - earlier for earlier, later in steps if later >= started)
        return ended - started, longest, median(later - earlier for earlier, later in steps if later < started)

    async def _sample(self, moments: list[float], request_id: str) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        tokens = MAX_LENGTH - len(PROMPT_IDS)
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        async for _ in self._generator._engine.generate({"prompt_token_ids": PROMPT_IDS}, params, request_id):
            moments.append(time.perf_counter())

    def close(self) -> None:
        self._runner.run(self._generator.stop())
        self._runner.close()


async def _until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not happened():
            await asyncio.sleep(0.002)


class DemoRun:
    """The demo without rollouts: a trainer, a generator and the sync between them."""

    def syncs(self, versions: int) -> list[dict[str, float]]:
        """Seconds of each sync after the warm-up, by part."""
        with tempfile.TemporaryDirectory() as place:
            return asyncio.run(self._syncs(Path(place), versions))

    async def _syncs(self, folder: Path, versions: int) -> list[dict[str, float]]:
        from orchestrator.step.publish import proof_prompts, publish
        from rollout.media import MediaStore
        from tests.actors.training_samples import make_samples

        demo = digits()
        demo.build(folder / "model", seed=0)
        media = folder / "media"
        prompts = proof_prompts(list(demo.digits_sum(MediaStore(media), "train", pairs=8)), WeightsConfig().canaries)
        samples = make_samples(folder / "model", media, 8)
        found = []
        async with _roles(folder, versions) as (policy, fleet):
            for version in range(1 + WARMUP + versions):
                if version:
                    await policy.update(samples, kl_coefficient=0.0)
                started = time.perf_counter()
                told = await publish(policy, fleet, version, prompts)
                seconds = time.perf_counter() - started
                parts = {"gather": told.gather_s, "transfer": told.transfer_s, "stage": told.stage_s}
                parts |= {"load": told.load_s, "pause": told.pause_s, "verify": told.verify_s}
                beside = told.gather_s + told.transfer_s + told.stage_s + told.verify_s
                other = seconds - beside - told.pause_s
                if version > WARMUP:
                    found.append({"seconds": seconds, **parts, "other": other})
        return found


@contextlib.asynccontextmanager
async def _roles(folder: Path, versions: int) -> AsyncIterator[tuple[Any, Any]]:
    """The trainer and a fleet of one generator over Ray, started as in a run."""
    from actors.generator.handle import GeneratorHandle
    from actors.generator.spec import GeneratorSpec
    from actors.trainer.policy import PolicyGroup
    from actors.trainer.spec import PolicySpec
    from algorithms.config import AlgorithmConfig
    from orchestrator.cluster import ray_cluster
    from orchestrator.config.schema import ClusterConfig
    from orchestrator.roles.fleet import GeneratorFleet

    model = ModelConfig(path=folder / "model", precision="float32", max_length=96)
    deadlines, media = DeadlineConfig(), folder / "media"
    policy_spec = PolicySpec(
        model=model,
        trainer=TrainerConfig(learning_rate=4e-4, micro_batch_tokens=12_288),
        algorithm=AlgorithmConfig(),
        deadlines=deadlines,
        temperature=1.0,
        media_folder=media,
        seed=0,
        total_updates=versions + WARMUP,
    )

    async def launch(name: str) -> GeneratorHandle:
        return await GeneratorHandle.start(GeneratorSpec(model, DEMO_ENGINE, deadlines, media, name=name))

    def on_event(kind: str, **data: Any) -> None:
        raise RuntimeError(f"{kind}: {data}")

    fleet = GeneratorFleet(launch, deadlines.start_s, on_event)
    async with ray_cluster(ClusterConfig(), deadlines):
        policy, _ = await asyncio.gather(PolicyGroup.start(policy_spec), fleet.start(1))
        try:
            yield policy, fleet
        finally:
            await asyncio.gather(fleet.stop(), policy.stop())
