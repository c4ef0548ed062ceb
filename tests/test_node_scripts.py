"""The scripts of several nodes, with a `python` that says what it was asked."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAY = '#!/bin/sh\necho "$PYTHONPATH" "$@"\n'
RUN = "-m launch run my_run.toml --set seed=2"


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """An environment in which python, and Slurm's commands, only speak."""
    srun = '#!/bin/sh\nshift\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n'
    scripts = {"python": SAY, "scontrol": "#!/bin/sh\nprintf 'node7\\nnode8\\n'\n", "srun": srun}
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def _said(script: str, given: str, environment: dict[str, str]) -> list[str]:
    command = ["bash", str(ROOT / "launch" / script), *given.split()]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=True)
    return done.stdout.decode().splitlines()


def test_fixed_nodes_have_a_number(tools: dict[str, str]) -> None:
    said = _said("multi_node.sh", "first 4 1 my_run.toml --set seed=2", tools)
    assert said == [f"{ROOT} {RUN} --nodes 4 --host first --node-rank 1"]


def test_nodes_that_come_and_go_are_started_again(tools: dict[str, str]) -> None:
    said = _said("multi_node.sh", "first 2:4 - my_run.toml --set seed=2", tools)
    assert said == [f"{ROOT} {RUN} --nodes 2:4 --host first --max-restarts 10"]


def test_too_few_words_show_how(tools: dict[str, str]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        _said("multi_node.sh", "first 4", tools)
    assert (
        error.value.returncode == 2 and b"launch/multi_node.sh FIRST_NODE 4 0" in error.value.stderr
    )


def test_slurm_starts_one_agent_a_node(tools: dict[str, str]) -> None:
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "51003",
        "SLURM_NNODES": "2",
    }
    said = _said("slurm.sbatch", "my_run.toml --set seed=2", tools | slurm)
    place = "--host node7 --port 29403"
    assert said == [f"{ROOT} {RUN} --nodes 2 --node-rank {at} {place}" for at in (0, 1)]
