"""What `kubectl kustomize` makes of a folder, for as much of kustomize as our overlays use."""

import copy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KEYS = {
    "apiVersion",
    "kind",
    "resources",
    "components",
    "configMapGenerator",
    "generatorOptions",
    "patches",
}


def render(folder: Path) -> list[Manifest]:
    """All manifests of a kustomization; ValueError for what this renderer does not know."""
    return _extend([], folder)


def _extend(found: list[Manifest], folder: Path) -> list[Manifest]:
    asked = _documents(folder / "kustomization.yaml")[0]
    if not asked.keys() <= KEYS or asked.get("generatorOptions", _AS_NAMED) != _AS_NAMED:
        raise ValueError(f"{folder}: more than is rendered here: {sorted(asked.keys() - KEYS)}")
    for name in asked.get("resources", []):
        path = folder / name
        found = found + (render(path) if path.is_dir() else _documents(path))
    found = found + [_config_map(folder, one) for one in asked.get("configMapGenerator", [])]
    for name in asked.get("components", []):
        found = _extend(found, folder / name)
    for patch in asked.get("patches", []):
        found = _patched(found, patch)
    return found


_AS_NAMED = {"disableNameSuffixHash": True}


def _documents(path: Path) -> list[Manifest]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def _config_map(folder: Path, asked: dict[str, Any]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": asked["name"], "namespace": asked["namespace"]},
        "data": {name: (folder / name).read_text(encoding="utf-8") for name in asked["files"]},
    }


def _patched(found: list[Manifest], patch: dict[str, Any]) -> list[Manifest]:
    kind, found = patch["target"]["kind"], copy.deepcopy(found)
    targets = [one for one in found if one["kind"] == kind]
    if patch["target"].keys() != {"kind"} or not targets:
        raise ValueError(f"patch of {patch['target']}: it names no manifest by kind alone")
    for target in targets:
        for operation in yaml.safe_load(patch["patch"]):
            _apply(target, **operation)
    return found


def _apply(target: Any, op: str, path: str, value: Any) -> None:
    """One operation of RFC 6902 on an existing place; `add` makes the last key."""
    *way, last = [int(part) if part.isdecimal() else part for part in path.split("/")[1:]]
    for part in way:
        target = target[part]
    if op == "test" and target[last] != value:
        raise ValueError(f"{path} is {target[last]!r}, not {value!r}")
    if op == "replace" and not (isinstance(last, int) or last in target):
        raise ValueError(f"{path} is not there")
    if op not in ("test", "replace", "add"):
        raise ValueError(f"operation {op} is not rendered here")
    if op != "test":
        target[last] = copy.deepcopy(value)
