"""The manifests without a cluster: rendered, checked against schemas, and held to our rules."""

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kube_schemas import problems
from tests.kustomize import Manifest, render
from trainer import config as run_files
from trainer.preemption import SAVED

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
STEPS = ("write-shards", "add-domain")
OVERLAYS = tuple(f"overlays/{path.name}" for path in sorted((K8S / "overlays").iterdir()))
ALL = STEPS + OVERLAYS
POD_OF = {
    "Job": "/spec/template",
    "JobSet": "/spec/replicatedJobs/0/template/spec/template",
    "ClusterTrainingRuntime": "/spec/template/spec/replicatedJobs/0/template/spec/template",
}
NODE = f"{POD_OF['ClusterTrainingRuntime']}/spec/containers/0"
JOBSET = "/spec/template/spec"
INJECTED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR")


@cache
def rendered(kustomization: str) -> tuple[Manifest, ...]:
    """Not to be changed."""
    return tuple(render(K8S / kustomization))


def at(manifest: Any, path: str) -> Any:
    for part in path.split("/")[1:]:
        manifest = manifest[int(part) if part.isdecimal() else part]
    return manifest


def of_kind(kustomization: str, kind: str) -> Manifest:
    (found,) = [one for one in rendered(kustomization) if one["kind"] == kind]
    return found


def pods(kustomization: str) -> Iterator[Manifest]:
    for one in rendered(kustomization):
        if one["kind"] in POD_OF:
            yield at(one, POD_OF[one["kind"]])


def containers(pod: Manifest) -> list[dict[str, Any]]:
    return pod["spec"].get("initContainers", []) + pod["spec"]["containers"]


@pytest.mark.parametrize("kustomization", ALL)
def test_it_is_what_kubectl_renders(kustomization: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    command = ["kubectl", "kustomize", str(K8S / kustomization)]
    theirs = yaml.safe_load_all(subprocess.run(command, capture_output=True, check=True).stdout)
    assert _sorted(rendered(kustomization)) == _sorted(theirs)


def _sorted(manifests: Any) -> list[str]:
    return sorted(json.dumps(one, sort_keys=True) for one in manifests if one)


@pytest.mark.parametrize("kustomization", ALL)
def test_every_manifest_fits_its_schema(kustomization: str, k8s_crds: Path) -> None:
    for manifest in rendered(kustomization):
        assert problems(manifest, k8s_crds) == []


# Where in which manifest of the overlay `spot`, the key, a wrong value, and what is said of it.
MISTAKES = (
    ("ClusterTrainingRuntime", NODE, "imagePullPolice", "Always", "'imagePullPolice' was unexp"),
    ("ClusterTrainingRuntime", NODE, "ports", [{"containerPort": "many"}], "'many' is not of type"),
    ("ClusterTrainingRuntime", "/spec/mlPolicy/torch", "numProcPerNode", 2, "was unexpected"),
    ("ClusterTrainingRuntime", "/spec/mlPolicy/torch", "elasticPolicy", {}, "was unexpected"),
    ("ClusterTrainingRuntime", f"{JOBSET}/failurePolicy", "maxRestart", 3, "was unexpected"),
    ("ClusterTrainingRuntime", f"{JOBSET}/failurePolicy", "maxRestarts", "3", "is not of type"),
    ("TrainJob", "/spec", "podTemplateOverrides", [], "'podTemplateOverrides' was unexpected"),
    ("TrainJob", "/spec/trainer", "numNodes", "2", "'2' is not of type 'integer'"),
    ("TrainJob", "/spec/runtimeRef", "name", None, "None is not of type 'string'"),
    ("NetworkPolicy", "/spec", "ingres", [], "'ingres' was unexpected"),
    ("PersistentVolumeClaim", "/spec", "accessModes", "ReadWriteMany", "is not of type 'array'"),
    ("ConfigMap", "", "dat", {}, "'dat' was unexpected"),
)
# What only the definitions know, and not the models.
BY_CRD = (
    (f"{JOBSET}/failurePolicy/rules/0", "action", "Restart", "'Restart' is not one of"),
    (f"{JOBSET}/failurePolicy", "restartStrategy", "Replace", "'Replace' is not one of"),
)


def mistaken(kind: str, path: str, key: str, value: Any) -> Manifest:
    manifest = copy.deepcopy(next(one for one in rendered("overlays/spot") if one["kind"] == kind))
    at(manifest, path)[key] = value
    return manifest


@pytest.mark.parametrize(("kind", "path", "key", "value", "told"), MISTAKES)
def test_a_planted_mistake_is_caught(kind: str, path: str, key: str, value: Any, told: str) -> None:
    found = problems(mistaken(kind, path, key, value))
    assert found and all(told in line for line in found), found


@pytest.mark.parametrize(("path", "key", "value", "told"), BY_CRD)
def test_a_wrong_word_is_caught(path: str, key: str, value: str, told: str, k8s_crds: Path) -> None:
    (line,) = problems(mistaken("ClusterTrainingRuntime", path, key, value), k8s_crds)
    assert told in line


@pytest.mark.parametrize("kustomization", ALL)
def test_pods_are_restricted(kustomization: str) -> None:
    for pod in pods(kustomization):
        whole = pod["spec"]["securityContext"]
        assert whole["runAsNonRoot"] and whole["runAsUser"] == 1000 == whole["fsGroup"]
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is False
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("kustomization", ALL)
def test_mounts_have_volumes_of_a_size(kustomization: str) -> None:
    for pod in pods(kustomization):
        volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
        assert all(one.get("emptyDir", {"sizeLimit": 1})["sizeLimit"] for one in volumes.values())
        used = {mount["name"] for one in containers(pod) for mount in one["volumeMounts"]}
        assert used == volumes.keys()
        for one in containers(pod):
            assert {"/tmp", "/dev/shm"} <= {mount["mountPath"] for mount in one["volumeMounts"]}


@pytest.mark.parametrize("kustomization", ALL)
def test_what_is_named_is_there(kustomization: str) -> None:
    named = {(one["kind"], one["metadata"]["name"]) for one in rendered(kustomization)}
    for pod in pods(kustomization):
        assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in named
        for volume in pod["spec"]["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or ("PersistentVolumeClaim", claim) in named
            config = volume.get("configMap", {}).get("name")
            assert config is None or ("ConfigMap", config) in named


def test_a_secret_is_never_in_a_manifest() -> None:
    for kustomization in ALL:
        assert not [one for one in rendered(kustomization) if one["kind"] == "Secret"]
        for one in (one for pod in pods(kustomization) for one in containers(pod)):
            keys = [env for env in one.get("env", []) if "KEY" in env["name"]]
            assert all("secretKeyRef" in env["valueFrom"] for env in keys)


def test_adding_a_domain_can_write_its_adapter_alone() -> None:
    pod = of_kind("add-domain", "Job")["spec"]["template"]
    (add,), (write,) = pod["spec"]["containers"], pod["spec"]["initContainers"]
    domain = add["args"][2]
    writable = {
        mount["mountPath"]: mount.get("subPath")
        for mount in add["volumeMounts"]
        if not mount.get("readOnly") and mount["name"] not in ("tmp", "shm")
    }
    assert writable == {
        f"/runs/planted/adapters/mlora/{domain}": f"planted/adapters/mlora/{domain}",
        "/log": f"added/planted/{domain}",
    }
    (runs,) = [mount for mount in write["volumeMounts"] if mount["name"] == "runs"]
    assert runs["readOnly"] is True and "subPath" not in runs


def test_each_part_of_the_shards_is_written_once() -> None:
    spec = of_kind("write-shards", "Job")["spec"]
    (write,) = spec["template"]["spec"]["containers"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] <= spec["completions"]
    assert write["args"][-1] == f"$(JOB_COMPLETION_INDEX)/{spec['completions']}"


@pytest.mark.parametrize("kustomization", OVERLAYS)
def test_a_preemption_does_not_count_and_a_mistake_ends_the_run(kustomization: str) -> None:
    if kustomization == "overlays/slim":
        jobs = of_kind(kustomization, "JobSet")["spec"]
    else:
        jobs = of_kind(kustomization, "ClusterTrainingRuntime")["spec"]["template"]["spec"]
    (node,) = jobs["replicatedJobs"]
    mistake, saved, preempted = node["template"]["spec"]["podFailurePolicy"]["rules"]
    assert mistake["onExitCodes"]["values"] == [2]  # of launch/__main__.py
    assert saved["onExitCodes"]["values"] == [SAVED]
    assert preempted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert node["template"]["spec"]["backoffLimit"] == 0
    container = "Container node for pod banyan/planted-node-0-1 failed with exit code"
    told = {  # by Kubernetes' own job controller
        f"{container} 2 matching FailJob rule at index 0": "FailJobSet",
        f"{container} 75 matching FailJob rule at index 1": "RestartJobSetAndIgnoreMaxRestarts",
        "Pod banyan/planted-node-0-1 has condition DisruptionTarget matching FailJob rule at "
        "index 2": "RestartJobSetAndIgnoreMaxRestarts",
    }
    for message, action in told.items():
        taken = [
            rule["action"]
            for rule in jobs["failurePolicy"]["rules"]
            if any(re.search(text, message) for text in rule["onJobFailureMessagePatterns"])
        ]
        assert taken == [action]


@pytest.mark.parametrize("kustomization", OVERLAYS)
def test_a_job_ends_and_waits_for_its_queue(kustomization: str) -> None:
    slim = kustomization == "overlays/slim"
    job = of_kind(kustomization, "JobSet" if slim else "TrainJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "banyan"
    ends = at(job, "/spec/replicatedJobs/0/template/spec") if slim else job["spec"]
    assert ends["activeDeadlineSeconds"] > 0


def test_slim_makes_the_pods_that_the_operator_makes() -> None:
    slim, runtime = (
        copy.deepcopy(next(pods(f"overlays/{name}"))) for name in ("slim", "multi-node")
    )
    (node,) = slim["spec"]["containers"]
    given = [env for env in node["env"] if env["name"].startswith("PET_")]
    node["env"] = [env for env in node["env"] if env not in given]
    assert slim == runtime
    assert [env["name"] for env in given] == [*INJECTED, "PET_MASTER_PORT"]


@pytest.mark.parametrize("kustomization", OVERLAYS)
def test_the_operators_variables_are_left_to_it(kustomization: str) -> None:
    if kustomization != "overlays/slim":
        assert "PET_" not in json.dumps(rendered(kustomization))


@pytest.mark.parametrize("kustomization", ALL)
def test_the_network_is_closed_but_for_what_a_job_needs(kustomization: str) -> None:
    policies = {
        one["metadata"]["name"]: one["spec"]
        for one in rendered(kustomization)
        if one["kind"] == "NetworkPolicy"
    }
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ranks = policies["ranks-of-planted"]
    (own,) = [ranks["podSelector"]]
    assert own == {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": "planted"}}
    for rule, side in (("ingress", "from"), ("egress", "to")):
        (only,) = ranks[rule]
        assert only[side] == [{"podSelector": own}]
        assert only["ports"] == [{"protocol": "TCP", "port": 1024, "endPort": 65535}]
    for name in ("names", "storage", "metrics"):
        for pod in pods(kustomization):
            chosen = policies[name]["podSelector"]["matchLabels"].items()
            assert chosen <= pod["metadata"]["labels"].items()
    assert {port["port"] for port in policies["storage"]["egress"][0]["ports"]} == {443}


@pytest.mark.parametrize("kustomization", OVERLAYS)
def test_a_probe_sees_a_rank_that_stands_still(kustomization: str, tmp_path: Path) -> None:
    (pod,) = pods(kustomization)
    (node,) = pod["spec"]["containers"]
    command = [
        word.replace("/heartbeat", str(tmp_path))
        for word in node["livenessProbe"]["exec"]["command"]
    ]

    def alive() -> bool:
        return subprocess.run(command, check=False).returncode == 0

    assert alive()  # before the first beat
    for rank in ("0", "1"):
        (tmp_path / rank).touch()
    assert alive()
    an_hour_ago = (tmp_path / "1").stat().st_mtime - 3600
    os.utime(tmp_path / "1", (an_hour_ago, an_hour_ago))
    assert not alive()


def test_the_run_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(of_kind("write-shards", "ConfigMap")["data"]["run.toml"])
    config = run_files.load(tmp_path / "run.toml")
    assert str(config.folder) == "/runs/planted" and config.data.shards.startswith("/data/")
