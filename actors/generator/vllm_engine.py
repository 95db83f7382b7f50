"""Arguments, environment and processes of a generator's vLLM engine. vLLM is imported only when an engine is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil

from actors.config import GeneratorConfig, ModelConfig
from actors.generator.spec import GeneratorSpec

CPU_BATCHED_TOKENS = 8192
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Maximum ranks that vLLM accepts (`max_lora_rank`)."""
GIB = 1 << 30


def engine_environment(config: GeneratorConfig) -> dict[str, str]:
    """Environment variables of a generator's process and its vLLM engine, set before vLLM is imported."""
    return {
        "OMP_NUM_THREADS": str(config.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker runs in the engine core's process, which saves a start-up
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are shared with the trainer
        "VLLM_LOGGING_LEVEL": "WARNING",
        # keep freed memory: a weight update on CPU reallocates every layer, and fresh pages cost more than the copies
        "MALLOC_MMAP_THRESHOLD_": str(GIB),
        "MALLOC_TRIM_THRESHOLD_": str(64 * GIB),
        "MALLOC_ARENA_MAX": "1",  # so that the staging thread reuses the memory that an older version has freed
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def engine_args(spec: GeneratorSpec, banned_token_ids: Sequence[int]) -> Any:
    """vLLM's AsyncEngineArgs for a generator, on the platform of the installed vLLM."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from actors.generator.token_mask import CONFIG_KEY
    from actors.weights.plugin import IPC_BACKEND, NCCL_BACKEND, ZMQ_BACKEND

    model, config = spec.model, spec.config
    backends = {"zmq": ZMQ_BACKEND, "nccl": NCCL_BACKEND, "ipc": IPC_BACKEND}
    platform: dict[str, Any] = {
        "gpu_memory_utilization": config.gpu_memory_share,
        "enable_sleep_mode": config.sleep_level > 0,
    }
    if current_platform.is_cpu():
        platform = {
            "kv_cache_memory_bytes": int(config.kv_cache_gib * GIB),
            "skip_mm_profiling": True,
            # vLLM's CPU sampler cannot rewind a seeded request whose prompt is prefilled in chunks
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(model.max_length, CPU_BATCHED_TOKENS),
        }
    return AsyncEngineArgs(
        model=str(model.path),
        dtype=model.precision,
        max_model_len=model.max_length,
        max_num_seqs=config.max_sequences,
        tensor_parallel_size=config.tensor_parallel,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=config.prefix_caching,
        limit_mm_per_prompt={"image": config.max_images, "video": 0, "audio": 0},
        trust_remote_code=model.trust_remote_code,
        seed=spec.seed,
        logprobs_mode="processed_logprobs",
        logits_processors=["actors.generator.token_mask:BannedTokens"],
        additional_config={CONFIG_KEY: list(banned_token_ids)},
        weight_transfer_config=WeightTransferConfig(backend=backends[spec.weights.backend]),
        worker_extension_cls="actors.weights.worker.transfer_backend.WeightsExtension",
        scheduler_cls="actors.generator.vllm_scheduler.make_scheduler",
        generation_config="vllm",
        disable_log_stats=True,
        **_lora_args(model),
        **platform,
    )


def _lora_args(model: ModelConfig) -> dict[str, Any]:
    """Arguments for the one adapter that all requests share; empty where generators receive whole weights."""
    if model.lora is None or model.lora.sync != "adapter":
        return {}
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(rank for rank in LORA_RANKS if rank >= model.lora.rank),
        "lora_target_modules": [target.rsplit(".", 1)[-1] for target in model.lora.targets],
    }


def engine_processes(engine: Any) -> list[psutil.Process]:
    """The vLLM engine's processes. Other children of this process are left out."""
    manager = getattr(engine.engine_core.resources, "engine_manager", None)
    own: list[psutil.Process] = []
    for process in getattr(manager, "processes", ()):
        try:
            root = psutil.Process(process.pid)
            own.extend([root, *root.children(recursive=True)])
        except psutil.NoSuchProcess:
            continue
    return own


def end_processes(processes: list[psutil.Process], deadline_s: float) -> None:
    """Kill the processes that still run and wait for their end, at most `deadline_s`."""
    alive = [process for process in processes if process.is_running()]
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=deadline_s)
