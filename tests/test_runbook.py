"""The runbook: each case names what plays it, and one that nothing else plays."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tomli_w

from data_shards import SplitConfig, write_shards
from tests.gang import gang
from tests.toy_run import RUN, SCHEMA, SPLIT, here, planted_rows, toy_config
from tests.toy_source import toy_source
from trainer import exporter
from trainer.evaluate import evaluate_run
from trainer.metrics import Scores
from trainer.run_folder import RunFolder
from trainer.schedule import train

ROOT = Path(__file__).parents[1]
BOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
CASES = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", BOOK, re.M | re.S))
SIZES = {"books": 900, "music": 420, "toys": 400}
TURNED = "toys"
BY_TIME = SplitConfig(by="time_per_domain", parts=SPLIT.parts)


@pytest.mark.parametrize("case", CASES)
def test_what_plays_a_case_is_there(case: str) -> None:
    """Tests by file, and by the first words of their names; benchmarks by module."""
    (named,) = re.findall(r"\[([^][]*)\]\s*$", CASES[case])
    for one in re.split(r"[;,] (?=tests/|`python)", " ".join(named.split())):
        file, _, words = one.partition(": ")
        if file.startswith("`python -m "):
            path = ROOT / (file.strip("`").removeprefix("python -m ").replace(".", "/") + ".py")
        else:
            path = ROOT / file
        assert path.is_file(), one
        test = f"def test_{words.replace(' ', '_')}" if words else "def "
        assert test in path.read_text(encoding="utf-8"), one


def write_turned(folder: Path) -> None:
    """Shards and a run file; the labels of one domain's later rows, by which adapters and trunk
    are judged, are upside down, as when a log begins to count something else."""
    rows = planted_rows(SIZES, seed=1)
    label = rows["label"].to_numpy().copy()
    at = np.flatnonzero(np.array(rows["domain"].to_pylist()) == TURNED)
    late = at[int(len(at) * (SPLIT.parts["train"] + SPLIT.parts["adapt"])) :]
    label[late] = 1 - label[late]
    rows = rows.set_column(rows.column_names.index("label"), "label", pa.array(label))
    write_shards(toy_source(rows), SCHEMA, BY_TIME, folder / "shards", block_rows=100)
    split = {"by": BY_TIME.by, "parts": BY_TIME.parts}
    data = {**RUN["data"], "shards": str(folder / "shards"), "split": split}
    (folder / "run.toml").write_text(tomli_w.dumps({**RUN, "data": data}), encoding="utf-8")


@dataclass(frozen=True)
class Turned:
    kept: list[str]
    metrics: str
    scores: tuple[Scores, Scores]


def _turned(folder: Path) -> Turned:
    config = toy_config(folder, folder)
    summary = train(config, here())
    shards, run = folder / "shards", RunFolder(config.folder)
    scores = evaluate_run(config, run, shards, config.test, None, here())
    return Turned(summary["kept"], exporter.text(), scores)


@pytest.mark.dist
def test_a_domain_that_learns_nothing_is_seen_and_served_by_the_trunk(tmp_path: Path) -> None:
    write_turned(tmp_path)
    (found,) = gang(1, _turned, tmp_path)
    served = re.findall(r'banyan_auc\{phase="([^"]*)",domain="(\w+)"\} (\S+)', found.metrics)
    assert {domain for _, domain, _ in served} == SIZES.keys()
    # what the alert asks for: min by (pod, phase) (banyan_auc) < 0.5
    low = {(phase, domain) for phase, domain, auc in served if float(auc) < 0.5}
    assert low == {("pretrain", TURNED), (f"adapt {TURNED}", TURNED)}
    assert found.kept and TURNED not in found.kept
    alone, adapted = (scores.of(TURNED) for scores in found.scores)
    assert adapted == alone, "its rows are served by the trunk"
    others = [scores.of(found.kept[0]) for scores in found.scores]
    assert others[0] != others[1], "and those of a kept adapter are not"
