"""What the manifests' training pods ask for is what `launch plan` says of their run file."""

from pathlib import Path
from typing import Any

import pytest

from data_shards.sources.planted_rows import PlantedConfig
from embeddings import Place
from launch.plan import GIB
from tests.test_manifests import OVERLAYS, of_kind, pods
from trainer import config as run_files
from trainer.footprint import dense_part, footprint

LIBRARIES = 1.0  # GiB of a rank: torch and its company, what glibc keeps, and the shards it reads
HEADROOM = 2


@pytest.mark.parametrize("kustomization", OVERLAYS)
def test_pods_ask_for_what_the_plan_says(kustomization: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(of_kind(kustomization, "ConfigMap")["data"]["run.toml"])
    config = run_files.load(tmp_path / "run.toml")
    nodes, ranks, asked = _asked(kustomization)
    assert isinstance(config.data.source, PlantedConfig)
    rows = {field.name: 1000 for field in config.data.schema.ids}
    rows |= {"user": config.data.source.users, "item": config.data.source.items}
    dense = dense_part(config, config.data.source.domains, "cpu")
    rank = footprint(config, rows, dense, Place("cpu", nodes * ranks, ranks)).total / GIB
    node = ranks * (rank + LIBRARIES) + 2  # /dev/shm is the pod's memory too
    assert asked["requests"]["memory"] == asked["limits"]["memory"]
    assert node <= float(asked["requests"]["memory"].removesuffix("Gi")) <= HEADROOM * node
    # a rank's own thread and those that read ahead
    assert int(asked["requests"]["cpu"]) == 2 * ranks


def _asked(kustomization: str) -> tuple[int, int, dict[str, Any]]:
    """Nodes, ranks of each, and what each asks for."""
    (pod,) = pods(kustomization)
    (node,) = pod["spec"]["containers"]
    if kustomization != "overlays/slim":
        trainer = of_kind(kustomization, "TrainJob")["spec"]["trainer"]
        assert trainer["resourcesPerNode"] == node["resources"], "the runtime's, for other jobs"
        return trainer["numNodes"], trainer["numProcPerNode"], trainer["resourcesPerNode"]
    given = {env["name"]: env.get("value") for env in node["env"]}
    return int(given["PET_NNODES"]), int(given["PET_NPROC_PER_NODE"]), node["resources"]
