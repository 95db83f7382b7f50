"""The part of kustomize that k8s/ uses, so that its overlays can be rendered where there is no kustomize.

Resources and bases, the namespace, JSON patches with a target, and images. Anything else in a kustomization is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "patches", "images"}
CLUSTER_SCOPED = {"Namespace", "PriorityClass"}


def render(folder: Path) -> list[Manifest]:
    """The manifests that ``kubectl kustomize folder`` prints, in the order of the resources."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    if unknown := set(kustomization) - KNOWN:
        raise ValueError(f"{folder}: this renderer doesn't know {', '.join(sorted(unknown))}")
    manifests: list[Manifest] = []
    for name in kustomization.get("resources", []):
        path = (folder / name).resolve()
        manifests += render(path) if path.is_dir() else load(path)
    for patch in kustomization.get("patches", []):
        operations = yaml.safe_load((folder / patch["path"]).read_text(encoding="utf-8"))
        targets = [manifest for manifest in manifests if _is_target(manifest, patch["target"])]
        if not targets:
            raise ValueError(f"{folder}: {patch['path']} has no target")
        for manifest in targets:
            for operation in operations:
                _apply(manifest, operation)
    for manifest in manifests:
        if manifest["kind"] not in CLUSTER_SCOPED:
            manifest["metadata"]["namespace"] = kustomization["namespace"]
        for image in kustomization.get("images", []):
            _rename(manifest, image)
    return manifests


def load(path: Path) -> list[Manifest]:
    """The documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def _is_target(manifest: Manifest, target: dict[str, str]) -> bool:
    group, _, version = manifest["apiVersion"].rpartition("/")
    found = {"group": group, "version": version, "kind": manifest["kind"], "name": manifest["metadata"]["name"]}
    return all(found[key] == value for key, value in target.items())


def _apply(manifest: Manifest, operation: dict[str, Any]) -> None:
    *parents, last = operation["path"].lstrip("/").split("/")
    node: Any = manifest
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    key: Any = int(last) if isinstance(node, list) else last
    if operation["op"] == "replace" and (key not in node if isinstance(node, dict) else key >= len(node)):
        raise ValueError(f"{operation['path']} is not there to be replaced")
    if operation["op"] not in ("add", "replace") or isinstance(node, list):
        raise ValueError(f"this renderer doesn't know {operation['op']} at {operation['path']}")
    node[key] = operation["value"]


def _rename(node: Any, image: dict[str, str]) -> None:
    if isinstance(node, list):
        for entry in node:
            _rename(entry, image)
    elif isinstance(node, dict):
        for container in [*node.get("containers", []), *node.get("initContainers", [])]:
            name, _, tag = container["image"].partition(":")
            if name == image["name"]:
                container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
        for value in node.values():
            _rename(value, image)
