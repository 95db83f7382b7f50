"""Whether this machine has the memory and the GPUs that all roles of a run take together."""

from __future__ import annotations

from collections.abc import Iterator

import psutil

from orchestrator.preflight.finding import Finding, PlannedRun
from orchestrator.roles.table import AnyConfig, needed_roles

GIB = 1 << 30


def needed_memory(config: AnyConfig, parameters: int) -> int:
    """Bytes that all roles take together on one machine without GPUs, roughly, activations left out."""
    return sum(role.needed_bytes(config, parameters) for role in needed_roles(config))


def asked_gpus(config: AnyConfig) -> float:
    """GPUs that all actors of all roles ask Ray for together."""
    return sum(role.resources(config.cluster).gpus * role.replicas(config) for role in needed_roles(config))


def check_memory(run: PlannedRun) -> Iterator[Finding]:
    """The memory of this machine, where all roles run on it and use no GPU."""
    config = run.config
    if config.cluster.address is not None or asked_gpus(config) > 0:
        return
    needed, available = needed_memory(config, run.model.parameters), psutil.virtual_memory().available
    if needed > available:
        by_role = ", ".join(
            f"{role.name} {role.needed_bytes(config, run.model.parameters) / GIB:.1f}" for role in needed_roles(config)
        )
        yield Finding(
            "warning",
            f"the roles take about {needed / GIB:.1f} GiB of memory together ({by_role}), and {available / GIB:.1f} "
            "GiB are available. Lower generator.kv_cache_gib or the number of replicas, or use a smaller model.",
        )


def check_gpus(run: PlannedRun) -> Iterator[Finding]:
    """The GPUs of this machine, where all roles run on it."""
    config = run.config
    if config.cluster.address is not None:
        return  # the GPUs of a cluster are not this machine's
    asked = asked_gpus(config)
    needs_one = config.model.attention == "flash_attention_2"
    if asked == 0 and not needs_one:
        return
    import torch

    present = torch.cuda.device_count()
    if asked > present:
        yield Finding(
            "error",
            f"the roles ask for {asked:g} GPUs together (cluster.*.gpus), and this machine has {present}. Lower them, "
            "or set cluster.address to a cluster that has so many.",
        )
    elif needs_one and config.cluster.policy.gpus == 0:
        yield Finding(
            "error",
            "model.attention = flash_attention_2 needs a GPU, and cluster.policy.gpus is 0. Set model.attention to "
            "sdpa, or cluster.policy.gpus to 1.",
        )
