"""What the KubeRay operator refuses although its schema lets it pass, and what the roles of a recipe need of a cluster.

Each function returns what is wrong, a sentence each; an empty list is a pass.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.config.schema import Config, RoleResources

Manifest = dict[str, Any]
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
RESOURCE_PARAMS = {"num-cpus", "num-gpus", "memory", "resources"}


def groups(job: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Head and worker groups by name."""
    cluster = job["spec"]["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def container(group: Manifest) -> Manifest:
    """Ray's container, the first of the pod."""
    return group["template"]["spec"]["containers"][0]


def custom_resources(group: Manifest) -> dict[str, float]:
    """What the shell makes of ``rayStartParams.resources``: the operator puts it unquoted on Ray's command line."""
    given = group.get("rayStartParams", {}).get("resources")
    if given is None:
        return {}
    words = shlex.split(f"--resources={given}")
    if len(words) != 1:
        raise ValueError(f"rayStartParams.resources = {given} is {len(words)} words to the shell")
    return {name: float(amount) for name, amount in json.loads(words[0].removeprefix("--resources=")).items()}


def operator_complaints(job: Manifest) -> list[str]:
    """The operator's own rules for a RayJob (KubeRay 1.7.0)."""
    spec, name, found = job["spec"], job["metadata"]["name"], []
    if len(name) > 47 or not DNS_1035.fullmatch(name):
        found.append(f"the name {name} is not a DNS-1035 label of at most 47 characters")
    for field in ("ttlSecondsAfterFinished", "suspend"):
        if spec.get(field) and not spec.get("shutdownAfterJobFinishes"):
            found.append(f"{field} needs shutdownAfterJobFinishes")
    if spec.get("backoffLimit") and spec.get("clusterSelector"):
        found.append("backoffLimit excludes clusterSelector")
    head = spec["rayClusterSpec"]["headGroupSpec"]
    names = {entry["name"] for entry in container(head).get("env", [])}
    if spec["rayClusterSpec"].get("gcsFaultToleranceOptions") is not None and "REDIS_PASSWORD" in names:
        found.append("REDIS_PASSWORD is given beside gcsFaultToleranceOptions")
    for group_name, group in groups(job):
        params = group.get("rayStartParams", {})
        if RESOURCE_PARAMS & set(params) and group.get("resources"):
            found.append(f"group {group_name} gives resources both in rayStartParams and in resources")
        # 0 is the way to keep actors off the head; any other amount is the container's to say.
        for param in {"num-cpus", "num-gpus", "memory"} & set(params):
            if params[param] != "0":
                found.append(f"group {group_name} gives {param} in rayStartParams and in its container")
        try:
            custom_resources(group)
        except ValueError as error:
            found.append(f"group {group_name}: {error}")
    return found


def roles(config: Config) -> dict[str, tuple[int, RoleResources]]:
    """Actors of each role, and what one of them asks for."""
    cluster = config.cluster
    references = config.reference.replicas if config.algorithm.kl.coefficient > 0 else 0
    return {
        "policy": (config.trainer.ranks, cluster.policy),
        "generator": (config.generator.replicas, cluster.generator),
        "reference": (references, cluster.reference),
        "reward": (1, cluster.reward),
    }


def placement_complaints(job: Manifest, config: Config) -> list[str]:
    """Whether each role's actors find room in the groups that their custom resources pin them to, and only there."""
    found, homes = [], {}
    offered = {name: custom_resources(group) for name, group in groups(job)}
    asked_names = {resource for count, role in roles(config).values() if count for resource in role.custom}
    for name, resources in offered.items():
        found += [f"group {name} offers {r}, which no role asks for" for r in resources if r not in asked_names]
    for role, (count, asked) in roles(config).items():
        if not asked.custom:
            found.append(f"role {role} is pinned to no group")
        fitting = [name for name, resources in offered.items() if count and set(asked.custom) <= set(resources)]
        if count and len(fitting) != 1:
            found.append(f"role {role} fits {len(fitting)} groups: {fitting}")
        elif count:
            homes[role] = fitting[0]
    for name, group in groups(job):
        found += _room_complaints(name, group, [roles(config)[r] for r, home in homes.items() if home == name])
    return found


def _room_complaints(name: str, group: Manifest, tenants: list[tuple[int, RoleResources]]) -> list[str]:
    """Pods of a group against the sum of what its roles ask for."""
    pods = group.get("replicas", 1)
    limits = container(group)["resources"]["limits"]
    room = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0)), **custom_resources(group)}
    wanted: dict[str, float] = {}
    for count, asked in tenants:
        for resource, amount in {"CPU": asked.cpus, "GPU": asked.gpus, **asked.custom}.items():
            wanted[resource] = wanted.get(resource, 0.0) + count * amount
    short = [r for r, amount in wanted.items() if amount > pods * room.get(r, 0.0)]
    idle = [r for r in room if r != "CPU" and pods * room[r] > wanted.get(r, 0.0)]
    return [
        *(f"group {name} has {pods * room.get(r, 0.0):g} {r} and its roles ask for {wanted[r]:g}" for r in short),
        *(f"group {name} has {pods * room[r]:g} {r} and its roles ask for {wanted.get(r, 0.0):g} only" for r in idle),
    ]


def unmounted(group: Manifest, paths: list[Path]) -> list[str]:
    """Paths that no persistent volume of the group's pod holds."""
    pod = group["template"]["spec"]
    claims = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    mounts = [Path(mount["mountPath"]) for mount in container(group)["volumeMounts"] if mount["name"] in claims]
    return [str(path) for path in paths if not any(path.is_relative_to(mount) for mount in mounts)]
