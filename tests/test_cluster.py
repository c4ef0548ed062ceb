"""The manifests played: shards, two pods of two ranks, one lost, a domain added; as on one node."""

import json
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from launch.__main__ import main
from tests.cluster import ROOT, Node, Pod, Running, network, possible
from tests.gang import gang
from tests.kustomize import render
from tests.toy_run import here
from trainer import config as run_files
from trainer.adding import add_domain
from trainer.run_folder import RunFolder
from trainer.schedule import train

K8S = ROOT / "k8s"
# The manifests' run file in small.
SMALL = {
    "data.source.rows": 6000,
    "data.block_rows": 512,
    "reading.global_batch": 256,
    "backbone.hidden": [16, 8],
    "pretrain.max_epochs": 2,
    "pretrain.checkpoint_every": 2,
    "adapt.max_epochs": 1,
    "adapt.min_rows": 10,
    "tracking.wandb": "disabled",
    "tracking.pictures": False,
}
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
pytestmark = [pytest.mark.dist, pytest.mark.skipif(not possible(), reason="needs namespaces")]


def small_run_file() -> str:
    data: dict[str, Any] = tomllib.loads((K8S / "base" / "run.toml").read_text(encoding="utf-8"))
    for key, value in SMALL.items():
        *path, last = key.split(".")
        section = data
        for part in path:
            section = section[part]
        section[last] = value
    return tomli_w.dumps(data)


def of_kind(kustomization: str, kind: str) -> dict[str, Any]:
    (found,) = [one for one in render(K8S / kustomization) if one["kind"] == kind]
    return found


def play_job(node: Node, switch: int, kustomization: str) -> list[Pod]:
    """What the Job controller does: all indexes at once, in each the containers in turn."""
    job = of_kind(kustomization, "Job")
    name, spec = job["metadata"]["name"], job["spec"]["template"]["spec"]
    played: list[Pod] = []
    for container in spec.get("initContainers", []) + spec["containers"]:
        pods = [
            node.pod(f"{name}-{index}", spec, container, {"JOB_COMPLETION_INDEX": str(index)})
            for index in range(job["spec"].get("completions", 1))
        ]
        running = [Running(pod, switch) for pod in pods]
        for one in running:
            assert one.wait() == 0, one.told()
        played += pods
    return played


def pods_of_training(node: Node, overlay: str, restarts: int = 0) -> list[Pod]:
    """What the Trainer and JobSet make of a TrainJob, by the Trainer's torch plugin."""
    runtime, job = of_kind(overlay, "ClusterTrainingRuntime"), of_kind(overlay, "TrainJob")
    asked = job["spec"]["trainer"]
    plugin = {
        "PET_NNODES": str(asked["numNodes"]),
        "PET_NPROC_PER_NODE": str(asked["numProcPerNode"]),
        "PET_MASTER_ADDR": f"{job['metadata']['name']}-node-0-0.{job['metadata']['name']}",
        "PET_MASTER_PORT": "29400",
    }
    own_index = {"PET_NODE_RANK": "{index}"}
    spec = runtime["spec"]["template"]["spec"]
    return _pods_of_set(
        node, job["metadata"]["name"], spec, asked["numNodes"], plugin | own_index, restarts
    )


def pods_of_job_set(node: Node, overlay: str) -> list[Pod]:
    """What JobSet makes of its own object: nobody adds a variable to those of the manifest."""
    job_set = of_kind(overlay, "JobSet")
    (job,) = job_set["spec"]["replicatedJobs"]
    count = job["template"]["spec"]["completions"]
    return _pods_of_set(node, job_set["metadata"]["name"], job_set["spec"], count, {}, 0)


def _pods_of_set(
    node: Node, name: str, spec: dict[str, Any], count: int, added: dict[str, str], restarts: int
) -> list[Pod]:
    (job,) = spec["replicatedJobs"]
    template = job["template"]["spec"]["template"]["spec"]
    (container,) = template["containers"]
    pods = [
        node.pod(
            f"{name}-node-0-{index}",
            template,
            container,
            {
                "metadata.name": f"{name}-node-0-{index}-x",
                "metadata.labels['jobset.sigs.k8s.io/jobset-name']": name,
                "metadata.labels['jobset.sigs.k8s.io/restart-attempt']": str(restarts),
                INDEX: str(index),
            }
            | {key: value.format(index=index) for key, value in added.items()},
        )
        for index in range(count)
    ]
    for pod in pods:
        for other in pods:
            pod.hosts.update({other.name: other.address, f"{other.name}.{name}": other.address})
    return pods


@dataclass(frozen=True)
class Played:
    runs: Path
    data: Path
    interrupted: bool
    restarted: str
    writers: list[Pod]
    alone: Path
    node: Node
    switch: int


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "claims").mkdir()
    (folder / "pods").mkdir()
    node = Node(folder, small_run_file())
    data, runs = node.claim("banyan-data"), node.claim("banyan-runs")
    with network() as switch:
        writers = play_job(node, switch, "write-shards")
        first = [Running(pod, switch) for pod in pods_of_training(node, "overlays/multi-node")]
        saved = runs / "planted" / "checkpoints" / "latest"
        deadline = time.monotonic() + 120
        while not saved.exists() and time.monotonic() < deadline and not first[0].ended():
            time.sleep(0.02)
        first[1].kill()  # its node is lost, and JobSet takes down the other pod
        assert first[0].wait() == 1, "a lost node is no mistake: another start goes on"
        interrupted = saved.exists() and not (runs / "planted" / "trunk").exists()
        assert interrupted, first[0].told()
        again = [Running(pod, switch) for pod in pods_of_training(node, "overlays/multi-node", 1)]
        for one in again:
            assert one.wait() == 0, "\n".join(other.told() for other in again)
        play_job(node, switch, "add-domain")
        alone = _on_one_node(folder / "alone", node)
        told = again[0].told()
        yield Played(runs, data, interrupted, told, writers, alone, node, switch)


def _on_one_node(folder: Path, node: Node) -> Path:
    """The same commands without a cluster; returns the runs' folder."""
    folder.mkdir()
    (folder / "run.toml").write_text(small_run_file(), encoding="utf-8")
    shards, runs = folder / "shards", folder / "runs"
    settings = [f"data.shards={shards}", f"output={runs}"]
    words = [word for one in settings for word in ("--set", one)]
    assert main(["write-shards", str(folder / "run.toml"), *words]) == 0
    gang(4, _train, folder / "run.toml", settings)
    d7 = node.claim("banyan-data") / "shards" / "d7"
    gang(1, _add, runs / "planted", d7)
    return folder


def _train(run_file: Path, settings: list[str]) -> None:
    train(run_files.load(run_file, settings), here())


def _add(run: Path, shards: Path) -> None:
    config = RunFolder.config(run)
    config = replace(config, adapt=replace(config.adapt, own_ids=True))
    add_domain(config, RunFolder(run), "d7", str(shards), here())


def adapters(run: Path) -> dict[str, str]:
    """What each adapter says its tensors and ids hash to."""
    files = sorted((run / "adapters" / "mlora").glob("*/1/adapter.json"))
    return {path.parts[-3]: json.loads(path.read_text())["sha256"] for path in files}


def test_shards_written_by_four_pods_are_those_of_one_machine(played: Played) -> None:
    ours, theirs = (
        json.loads((folder / "index.json").read_text(encoding="utf-8"))
        for folder in (played.data / "shards" / "planted", played.alone / "shards")
    )
    assert len(played.writers) == 4 and ours == theirs


def test_a_lost_pod_costs_no_bit(played: Played) -> None:
    ours, theirs = (
        json.loads((folder / "planted" / "summary.json").read_text(encoding="utf-8"))
        for folder in (played.runs, played.alone / "runs")
    )
    assert ours["trunk"] == theirs["trunk"] and ours["adapted"] == theirs["adapted"]
    assert "continues" in played.restarted


def test_adapters_are_those_of_one_node(played: Played) -> None:
    found = adapters(played.runs / "planted")
    assert found == adapters(played.alone / "runs" / "planted") and len(found) == 8


@pytest.mark.parametrize("overlay", ["slim", "spot"])
def test_other_overlays_end_with_the_bits_of_one_node(
    played: Played, tmp_path: Path, overlay: str
) -> None:
    for folder in ("claims", "pods"):
        (tmp_path / folder).mkdir()
    (tmp_path / "claims" / "banyan-data").symlink_to(played.data)
    node = Node(tmp_path, small_run_file())
    pods = (pods_of_job_set if overlay == "slim" else pods_of_training)(node, f"overlays/{overlay}")
    running = [Running(pod, played.switch) for pod in pods]
    for one in running:
        assert one.wait() == 0, "\n".join(other.told() for other in running)
    ours, theirs = (
        json.loads((runs / "planted" / "summary.json").read_text(encoding="utf-8"))
        for runs in (node.claim("banyan-runs"), played.alone / "runs")
    )
    assert ours["trunk"] == theirs["trunk"] and ours["adapted"] == theirs["adapted"]


def test_the_added_domains_notes_lie_beside_the_run(played: Played) -> None:
    (notes,) = (played.runs / "added" / "planted" / "d7" / "added").iterdir()
    assert json.loads(notes.read_text(encoding="utf-8"))["moved"] == []
    assert not (played.runs / "planted" / "added").exists()


def mounted(pod: Pod, place: str, **changes: Any) -> Pod:
    """The pod alone, with another mount at this place."""
    mounts = [replace(one, **changes) if one.place == place else one for one in pod.mounts]
    return replace(pod, mounts=mounts, environment=pod.environment | {"PET_NNODES": "1"})


def said(running: Running) -> list[str]:
    """The messages of a pod's log; but for those of libraries in C++ each is JSON with its pod."""
    told = running.told().splitlines()
    lines = [json.loads(line) for line in told if not line.startswith("[")]
    assert {line["pod"] for line in lines} == {f"{running.pod.name}-x"}
    return [line["message"] for line in lines]


def test_a_read_only_run_folder_is_told_before_ranks_start(played: Played) -> None:
    pod, _ = pods_of_training(played.node, "overlays/multi-node")
    running = Running(mounted(pod, "/runs", read_only=True), played.switch)
    assert running.wait() == 2
    (told,) = said(running)
    assert told.startswith("error: /runs/planted: /runs/planted cannot be written here")


def test_a_wrong_mount_is_the_last_word(played: Played, tmp_path: Path) -> None:
    pod, _ = pods_of_training(played.node, "overlays/multi-node")
    running = Running(mounted(pod, "/data", source=tmp_path), played.switch)
    assert running.wait() == 2
    told = said(running)
    start = next(at for at, line in enumerate(told) if "stopped the run (exit status 2)" in line)
    first, other = told[start + 1 :]
    rank = told[start].split()[1]
    assert first.startswith(f"rank {rank}: error")
    assert "/data/shards/planted/index.json: could not be read (Permission denied)" in first
    assert other.startswith(f"rank {1 - int(rank)}: ")


def test_every_rank_beats_for_its_probe(played: Played) -> None:
    beats = (played.node.folder / "pods").glob("*-planted-node-0-*/heartbeat/*")
    assert {(path.parts[-3].split("-", 1)[1], path.name) for path in beats} == {
        (f"planted-node-0-{pod}", f"{2 * pod + rank}") for pod in (0, 1) for rank in (0, 1)
    }
