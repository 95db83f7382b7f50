"""The manifests as they would be applied: against the schemas, the operator's rules, and the recipes they run."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.loading import load_config
from orchestrator.config.schema import Config, SFTConfig
from tests.k8s import kustomize
from tests.k8s.rules import (
    container,
    custom_resources,
    groups,
    operator_complaints,
    placement_complaints,
    roles,
    unmounted,
)

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("cpu", "gpu")
SCHEMAS = os.environ.get("COUNTERPOINT_SCHEMAS")
KUBERNETES = "1.33.0"
DEMO_RECIPE = "/app/recipes/digits.yaml"

pytestmark = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.fixture
def manifests(overlay: str) -> list[dict[str, Any]]:
    return copy.deepcopy(kustomize.render(K8S / "overlays" / overlay))


@pytest.fixture
def job(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == "RayJob"]
    return found


@pytest.fixture
def config(job: dict[str, Any]) -> Config:
    return training_config(job)


def training_command(job: dict[str, Any]) -> tuple[Path, str, list[str]]:
    """Run folder, recipe and overrides of the job's entrypoint."""
    script, folder, *rest = shlex.split(job["spec"]["entrypoint"])
    if Path(script).name == "demo.sh":
        return (
            Path(folder),
            DEMO_RECIPE,
            [f"model.path={folder}/warm-start", *re.findall(r"weights\.\S+=\S+", (K8S / "demo.sh").read_text()), *rest],
        )
    return Path(folder), rest[0], rest[1:]


def training_config(job: dict[str, Any]) -> Config:
    folder, recipe, overrides = training_command(job)
    return load_config(in_repository(recipe), [f"run.folder={folder}", *overrides])


def in_repository(path: str) -> Path:
    """A path of the image, whose /app is the repository."""
    assert path.startswith("/app/"), path
    return ROOT / path.removeprefix("/app/")


def strict(node: Any) -> Any:
    """A CRD's schema made to refuse unknown fields, and readable by jsonschema."""
    if isinstance(node, list):
        return [strict(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    node = {key: strict(value) for key, value in node.items()}
    if node.get("x-kubernetes-int-or-string") is True:
        node.pop("type", None)
    if isinstance(node.get("properties"), dict) and "additionalProperties" not in node:
        node["additionalProperties"] = bool(node.get("x-kubernetes-preserve-unknown-fields"))
    return node


def ray_validator() -> jsonschema.Draft202012Validator:
    schema = strict(json.loads((Path(str(SCHEMAS)) / "rayjob-v1.json").read_text(encoding="utf-8")))
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def test_core_manifests_are_valid_kubernetes(manifests: list[dict[str, Any]]) -> None:
    core = [manifest for manifest in manifests if not manifest["apiVersion"].startswith("ray.io/")]
    assert {"Namespace", "Deployment", "Service", "PersistentVolumeClaim", "NetworkPolicy"} <= {m["kind"] for m in core}
    for manifest in core:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_pod_templates_of_the_job_are_valid_kubernetes(job: dict[str, Any]) -> None:
    templates = [job["spec"]["submitterPodTemplate"], *(group["template"] for _, group in groups(job))]
    for template in templates:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES, strict=True)


@pytest.mark.skipif(SCHEMAS is None, reason="COUNTERPOINT_SCHEMAS names no folder with KubeRay's schemas")
def test_the_job_is_valid_by_kuberays_schema(job: dict[str, Any]) -> None:
    ray_validator().validate(job)


@pytest.mark.skipif(SCHEMAS is None, reason="COUNTERPOINT_SCHEMAS names no folder with KubeRay's schemas")
def test_the_strict_schema_refuses_a_misspelt_field(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        ray_validator().validate(job)


def test_the_operator_accepts_the_job(job: dict[str, Any]) -> None:
    assert operator_complaints(job) == []
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["backoffLimit"] > 0


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("metadata", "name"), "x" * 48, "47 characters"),
        (("metadata", "name"), "7-roles", "DNS-1035"),
        (("spec", "shutdownAfterJobFinishes"), False, "ttlSecondsAfterFinished"),
        (("spec", "clusterSelector"), {"ray.io/cluster": "mine"}, "clusterSelector"),
        (("spec", "rayClusterSpec", "headGroupSpec", "resources"), {"CPU": "2"}, "both in rayStartParams"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-gpus"), "1", "num-gpus"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "resources"), '{"a": 1}', "resources"),
    ],
)
def test_a_job_that_the_operator_refuses_is_found(
    job: dict[str, Any], path: tuple[str, ...], value: Any, complaint: str
) -> None:
    node = job
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    assert any(complaint in found for found in operator_complaints(job))


def test_a_redis_password_beside_fault_tolerance_is_found(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    cluster["gcsFaultToleranceOptions"] = {"redisAddress": "redis:6379"}
    assert operator_complaints(job) == []
    container(cluster["headGroupSpec"])["env"].append({"name": "REDIS_PASSWORD", "value": "x"})
    assert any("REDIS_PASSWORD" in found for found in operator_complaints(job))


def test_every_role_has_exactly_the_room_its_recipe_asks_for(job: dict[str, Any], config: Config) -> None:
    assert placement_complaints(job, config) == []


def test_a_role_without_room_is_found(job: dict[str, Any], config: Config) -> None:
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    offered = custom_resources(group)
    name = next(iter(offered))
    short = json.dumps(json.dumps({**offered, name: offered[name] - 1}))
    group["rayStartParams"]["resources"] = short
    assert any("ask for" in found for found in placement_complaints(job, config))
    group["rayStartParams"]["resources"] = json.dumps(json.dumps({"elsewhere": 1}))
    assert any("fits 0 groups" in found for found in placement_complaints(job, config))
    assert any("no role asks for" in found for found in placement_complaints(job, config))


def test_the_driver_and_nothing_else_is_on_the_head(job: dict[str, Any]) -> None:
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert not {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"} & set(job["spec"])


def test_one_actor_fits_one_pod(job: dict[str, Any], config: Config) -> None:
    offered = {resource: container(group) for _, group in groups(job) for resource in custom_resources(group)}
    for count, asked in roles(config).values():
        limits = offered[next(iter(asked.custom))]["resources"]["limits"]
        assert count
        assert asked.cpus <= float(limits["cpu"])
        assert asked.gpus <= float(limits.get("nvidia.com/gpu", 0))
    assert config.generator.tensor_parallel <= max(1.0, config.cluster.generator.gpus)


def test_groups_have_a_fixed_size_and_guaranteed_resources(job: dict[str, Any]) -> None:
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    for _, group in groups(job):
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]


def test_whatever_the_run_reads_and_writes_is_on_a_volume_of_every_node(job: dict[str, Any], config: Config) -> None:
    paths = [config.run.folder, config.model.path]
    paths += [data.path for data in (config.data.train, config.data.evaluation) if data and data.path]
    for _, group in groups(job):
        assert unmounted(group, paths) == []
    volumes = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"] = [
        {"name": volume["name"], "emptyDir": {}} for volume in volumes
    ]
    assert unmounted(job["spec"]["rayClusterSpec"]["headGroupSpec"], paths) != []


def test_volume_claims_exist_and_fit_their_use(manifests: list[dict[str, Any]], job: dict[str, Any]) -> None:
    claims = {
        m["metadata"]["name"]: m["spec"]["accessModes"] for m in manifests if m["kind"] == "PersistentVolumeClaim"
    }
    used: dict[str, set[str]] = {}
    for name, group in groups(job):
        for volume in group["template"]["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume:
                used.setdefault(volume["persistentVolumeClaim"]["claimName"], set()).add(name)
    assert claims["shared"] == ["ReadWriteMany"]
    assert used["shared"] == {name for name, _ in groups(job)}
    assert claims["driver"] == ["ReadWriteOncePod"]
    assert used["driver"] == {"head"}
    head = container(job["spec"]["rayClusterSpec"]["headGroupSpec"])
    mounts = {mount["name"]: mount["mountPath"] for mount in head["volumeMounts"]}
    environment = {entry["name"]: entry["value"] for entry in head["env"]}
    assert environment["COUNTERPOINT_DRIVER_VOLUME"] == mounts["driver"]


def test_scripts_that_pods_call_are_in_the_image_and_executable(job: dict[str, Any]) -> None:
    called = [shlex.split(job["spec"]["entrypoint"])[0]]
    for _, group in groups(job):
        stop = container(group).get("lifecycle", {}).get("preStop")
        called += [stop["exec"]["command"][0]] if stop else []
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for script in called:
        path = in_repository(script)
        assert os.access(path, os.X_OK), script
        assert path.relative_to(ROOT).parts[0] not in ignored


def test_a_pod_is_given_longer_than_its_drain_takes(job: dict[str, Any]) -> None:
    stops = 0
    for _, group in groups(job):
        stop = container(group).get("lifecycle", {}).get("preStop")
        if stop:
            stops += 1
            assert int(stop["exec"]["command"][2]) < group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert stops == 2  # the driver's pod and the trainer's


def test_the_supervised_recipe_takes_the_jobs_overrides(job: dict[str, Any], overlay: str) -> None:
    script, folder, *overrides = shlex.split(job["spec"]["entrypoint"])
    if overlay == "gpu":
        assert Path(script).name == "entrypoint.sh"  # starts from a model that is there
        return
    config = load_config(ROOT / "recipes" / "digits-sft.yaml", [f"run.folder={folder}/sft", *overrides], SFTConfig)
    assert config.cluster.policy.custom == {"role": 1.0}
    assert config.cluster.address == "auto"


def test_the_run_joins_the_jobs_cluster_and_its_mlflow(manifests: list[dict[str, Any]], config: Config) -> None:
    (service,) = [manifest for manifest in manifests if manifest["kind"] == "Service"]
    (deployment,) = [manifest for manifest in manifests if manifest["kind"] == "Deployment"]
    port = service["spec"]["ports"][0]["port"]
    assert config.cluster.address == "auto"
    assert config.tracking.uri == f"http://{service['metadata']['name']}:{port}"
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    (hosts,) = [a.partition("=")[2].split(",") for a in arguments if a.startswith("--allowed-hosts=")]
    assert config.tracking.uri.removeprefix("http://") in hosts
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_commands_of_the_scripts_exist(overlay: str) -> None:
    for script in K8S.glob("*.sh"):
        for command in re.findall(r"\bcounterpoint ([a-z]+) ", script.read_text(encoding="utf-8")):
            result = CliRunner().invoke(app, [command, "--help"])
            assert result.exit_code == 0, f"{script.name}: counterpoint {command}"
    (train,) = [command.callback for command in app.registered_commands if command.name == "train"]
    assert train is not None
    assert "resume" in train.__annotations__


def test_weights_are_offered_to_other_nodes(config: Config) -> None:
    assert config.weights.listen == "node"


def test_images_of_one_job_agree(manifests: list[dict[str, Any]], job: dict[str, Any], overlay: str) -> None:
    submitter = job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"]
    images = {submitter, *(container(group)["image"] for _, group in groups(job))}
    assert images == {f"counterpoint-{overlay}:0.1.0"}
    kustomization = yaml.safe_load((K8S / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8"))
    named = {f"{image['newName']}:{image['newTag']}" for image in kustomization["images"]}
    assert images <= named
    assert (K8S / "docker" / f"Dockerfile.{overlay}").is_file()
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert all(image.endswith(f":{version[1]}") for image in named)


def test_the_cluster_runs_the_ray_that_is_required(job: dict[str, Any]) -> None:
    required = re.search(r'"ray\[default\]>=(\d+\.\d+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert required is not None
    assert job["spec"]["rayClusterSpec"]["rayVersion"].startswith(f"{required[1]}.")


def test_no_pod_runs_as_root_or_gains_privileges(manifests: list[dict[str, Any]], job: dict[str, Any]) -> None:
    pods = [m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "Deployment"]
    pods += [job["spec"]["submitterPodTemplate"]["spec"], *(group["template"]["spec"] for _, group in groups(job))]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for each in pod["containers"]:
            assert each["securityContext"]["allowPrivilegeEscalation"] is False
            assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_nodes_of_a_run_reach_every_port_of_each_other_that_is_bound(
    manifests: list[dict[str, Any]], job: dict[str, Any]
) -> None:
    (policy,) = [m for m in manifests if m["kind"] == "NetworkPolicy" and m["metadata"]["name"] == "ray"]
    peers = policy["spec"]["ingress"][0]
    open_ports = [range(entry["port"], entry.get("endPort", entry["port"]) + 1) for entry in peers["ports"]]
    label = policy["spec"]["podSelector"]["matchLabels"]
    for _, group in groups(job):
        assert label.items() <= group["template"]["metadata"]["labels"].items()
        params, pod = group["rayStartParams"], group["template"]["spec"]
        (kernel,) = [s["value"] for s in pod["securityContext"]["sysctls"] if s["name"].endswith("local_port_range")]
        bound = [tuple(map(int, kernel.split())), (int(params["min-worker-port"]), int(params["max-worker-port"]))]
        for low, high in [*bound, (6379, 6379), (8265, 8265)]:
            assert any(low in ports and high in ports for ports in open_ports), (low, high)


def test_disruption_budgets_and_priorities_name_what_is_there(
    manifests: list[dict[str, Any]], job: dict[str, Any]
) -> None:
    labels = [group["template"]["metadata"]["labels"].items() for _, group in groups(job)]
    for budget in (m for m in manifests if m["kind"] == "PodDisruptionBudget"):
        assert any(budget["spec"]["selector"]["matchLabels"].items() <= label for label in labels)
        assert isinstance(budget["spec"]["minAvailable"], int)  # all that counts for pods without a scale subresource
    known = {m["metadata"]["name"] for m in manifests if m["kind"] == "PriorityClass"}
    used = {group["template"]["spec"].get("priorityClassName") for _, group in groups(job)} - {None}
    assert used == known


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_renders_the_same(manifests: list[dict[str, Any]], overlay: str) -> None:
    command = ["kubectl", "kustomize", str(K8S / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    rendered = [document for document in yaml.safe_load_all(done.stdout) if document]

    def key(manifest: dict[str, Any]) -> tuple[str, str]:
        return manifest["kind"], manifest["metadata"]["name"]

    assert sorted(rendered, key=key) == sorted(manifests, key=key)
