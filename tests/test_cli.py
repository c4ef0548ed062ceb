"""The command as a user meets it: examples that parse, tables, and mistakes in one line."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from data_shards import Index
from data_shards.sources.movielens import OCCUPATIONS
from launch.__main__ import VERBS, _parser, main

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "launch" / "runs" / "movielens_mlora.toml"


@dataclass(frozen=True)
class Project:
    """A folder with a small MovieLens zip, its shards, and a run on two ranks."""

    folder: Path
    mistaken: subprocess.CompletedProcess[str]
    trained: subprocess.CompletedProcess[str]

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "movielens_mlora"


def _settings(folder: Path) -> list[str]:
    changes = [
        f"data.source.path={folder / 'ml.zip'}",
        f"data.shards={folder / 'shards'}",
        f"output={folder / 'runs'}",
        "data.source.domains=gender",
        "data.hold_out=[]",
        "reading.global_batch=64",
        "backbone.hidden=[16, 8]",
        "pretrain.max_epochs=1",
        "adapt.max_epochs=1",
        "tracking.wandb=disabled",
    ]
    return [argument for change in changes for argument in ("--set", change)]


def _movielens(path: Path) -> None:
    """Six hundred ratings in the official layout."""
    rng = np.random.default_rng(0)
    pairs = rng.permutation(40 * 30)[:600]
    ratings = [
        f"{p // 30 + 1}::{p % 30 + 1}::{rng.integers(1, 6)}::{9 * i}" for i, p in enumerate(pairs)
    ]
    users = [f"{u}::{'FM'[u % 2]}::25::{u % len(OCCUPATIONS)}::0{u:04d}" for u in range(1, 41)]
    movies = [f"{m}::Movie {m} (19{m + 50})::Drama|Comedy" for m in range(1, 31)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, lines in (("ratings", ratings), ("users", users), ("movies", movies)):
            archive.writestr(f"ml-1m/{name}.dat", "\n".join(lines) + "\n")


def _torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", "-m", "launch", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    _movielens(folder / "ml.zip")
    assert main(["write-shards", str(RUN_FILE), *_settings(folder)]) == 0
    train = ["train", str(RUN_FILE), *_settings(folder)]
    mistaken = _torchrun(*train, "--set", "reading.global_batch=65")
    return Project(folder, mistaken, _torchrun(*train))


@pytest.fixture
def files(project: Project, tmp_path: Path) -> Path:
    """Files to make mistakes with."""
    rows = pa.table(
        {
            "user": ["1", "2"],
            "movie": ["1", "2"],
            "gender": ["F", "M"],
            "age": ["25", "25"],
            "zip": ["00001", "00002"],
            "year": ["1951", "1952"],
            "genres": [["Drama"], []],
            "domain": ["F", None],
        }
    )
    good = rows.slice(0, 1)
    for name, table in {
        "good": good,
        "no_zip": good.drop_columns(["zip"]),
        "no_rows": rows.slice(2),
        "no_domain": rows,
        "row_id": good.append_column("row_id", pa.array(["a1"])),
        "nested": good.set_column(0, "user", pa.array([{"id": 1}])),
    }.items():
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    shutil.copytree(project.folder / "shards", tmp_path / "corrupt")
    block = Index.load(tmp_path / "corrupt").select(("test",))[0]
    with (tmp_path / "corrupt" / block.shard).open("r+b") as shard:
        shard.seek(block.offset + block.bytes // 2)
        shard.write(b"\x55\xaa\x55")
    return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_that_parses(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    example = capsys.readouterr().out.split("example: ")[1]
    start, command = example.strip().split("-m launch ")
    assert start in ("python ", "torchrun --nproc-per-node 2 ")
    assert _parser().parse_args(shlex.split(command)).verb == verb


def test_a_verb_that_is_not_there_names_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    assert "write-shards" in capsys.readouterr().err


MISTAKES = {
    "train {files}/none.toml": "none.toml: no such run file; there are some in launch/runs",
    "train {file} --set pretrain.patients=3": "did you mean pretrain.patience?",
    "train {file} --set data.shards={files}": "index.json: no such file; `write-shards` makes",
    "train {file} {settings} --set adapt.lr=2": "holds a run of another run file (they differ in "
    "adapt.lr); set another name or output, or delete the folder",
    "write-shards {file} {settings}": "shards: exists already; give another path or delete it",
    "write-shards {file} --set data.source.kind=movielenz": "data.source: unknown kind "
    "'movielenz'; the nearest is 'movielens'",
    "write-shards {file} --set data.source.path={files}/no.zip --out {files}/out": "no such file",
    "write-shards {file} --base {files} --out {files}/out": "its shared part is not trained yet",
    "evaluate {files}": "not a run's folder (no run.toml); give the one of a `train`",
    "evaluate {run} --domains X": "unknown domain 'X'; the nearest is",
    "evaluate {run} --splits held": "unknown split 'held'",
    "evaluate {run} --shards {files}/corrupt": "its XXH3 differs from the index; restore",
    "add-domain {run} F --shards {shards}": "'F' has an adapter in {run} already; remove it first",
    "add-domain {run} X --shards {shards}": "shards: unknown domain 'X'; the nearest is 'M'; there "
    "are: F, M; write its rows: write-shards RUN_FILE --base {run} --out FOLDER",
    "remove-domain {run} X": "unknown domain with a mlora adapter 'X'; the nearest is",
    "remove-domain {files} F": "not a run's folder",
    "inspect {files}": "neither a shard set, a run's folder, a checkpoint nor an adapter",
    "inspect {files}/corrupt --verify": "its SHA-256 differs from the index",
    "fetch --data {files}/none.zip": "none.zip: no such file; give the path of",
    "predict {run} {files}/good.txt --out {files}/o.csv": "ends in .csv or .parquet",
    "predict {run} {files}/none.csv --out {files}/o.csv": "none.csv: not readable as csv",
    "predict {run} {files}/good.parquet --out {files}/no/o.csv": "no folder {files}/no; make it",
    "predict {files} {files}/good.parquet --out {files}/o.csv": "not a run's folder",
    "predict {run} {files}/no_zip.parquet --out {files}/o.csv": "no column 'zip'; needed: domain,",
    "predict {run} {files}/no_rows.parquet --out {files}/o.csv": "no_rows.parquet: no rows",
    "predict {run} {files}/no_domain.parquet --out {files}/o.csv": "row 1 has no domain; every row",
    "predict {run} {files}/row_id.parquet --out {files}/o.csv": "column 'row_id' is not int64",
    "predict {run} {files}/nested.parquet --out {files}/o.csv": "column 'user' is not string",
}


@pytest.mark.dist
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(
    mistake: str, project: Project, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"files": files, "file": RUN_FILE, "run": project.run}
    places |= {"shards": project.folder / "shards"}
    places |= {"settings": shlex.join(_settings(project.folder))}
    assert main(shlex.split(mistake.format(**places))) == 2
    *progress, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and MISTAKES[mistake].format(**places) in line
    assert not any("Traceback" in other or "error" in other for other in progress)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("F.onnx", "F.onnx: expected a name that ends in .pt2, in a folder that is there"),
        ("F.pt2", "method mlora reads tables; programs are of prompts alone, so of a run with"),
    ],
)
def test_what_cannot_be_exported(
    project: Project, tmp_path: Path, out: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(project.run), "F", "--out", str(tmp_path / out)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.dist
def test_a_run_under_torchrun_trains_and_says_what_it_found(project: Project) -> None:
    assert project.trained.returncode == 0, project.trained.stderr
    summary = json.loads((project.run / "summary.json").read_text(encoding="utf-8"))
    assert [one["domain"] for one in summary["adapted"]["domains"]] == ["F", "M"]
    assert project.trained.stderr.count("WAUC") == 1, "only the first rank speaks"
    lines = (project.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    for line in (line for line in told if line["phase"] == "pretrain"):
        assert line["rows_per_second"] > 0 and 0 <= line["waiting"] <= 1 and line["loss"] > 0
    assert told[0]["ranks"] == 2
    phases = {"start", "pretrain", "checkpoint", "adapt F", "adapt M", "test"}
    assert {line["phase"] for line in told} == phases


@pytest.mark.dist
def test_a_mistake_under_torchrun_does_not_spoil_the_folder(project: Project) -> None:
    """The run that follows it in the same folder is the one of the test above."""
    assert project.mistaken.returncode != 0
    message = (
        r"error \(rank [01]\): global batch 65 is not divisible by 2 ranks; set it to 64 or 66"
    )
    assert re.search(message, project.mistaken.stderr)
    assert "data_shards.errors.UserError" not in project.mistaken.stderr


@pytest.mark.dist
def test_a_block_that_one_rank_finds_corrupt_ends_all_ranks_in_one_line_each(
    project: Project, files: Path
) -> None:
    told = _torchrun("evaluate", str(project.run), "--shards", str(files / "corrupt"))
    assert told.returncode != 0
    lines = [line for line in told.stderr.splitlines() if line.startswith("error")]
    assert any("its XXH3 differs from the index" in line for line in lines)
    assert all("XXH3" in line or "another rank did" in line for line in lines)
    assert "RuntimeError" not in told.stderr


@pytest.mark.dist
def test_a_disk_that_takes_no_more_is_named(
    project: Project, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = files / "runs" / "movielens_mlora"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").symlink_to("/dev/full")
    train = ["train", str(RUN_FILE), *_settings(project.folder), "--set", f"output={files}/runs"]
    assert main(train) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    expected = "metrics.jsonl: could not be written (No space left on device); give it room"
    assert line.startswith("error: ") and expected in line


@pytest.mark.dist
def test_what_was_made_can_be_inspected(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(path: Path, *options: str) -> str:
        assert main(["inspect", str(path), *options]) == 0
        return capsys.readouterr().out

    assert "600 rows" in shown(project.folder / "shards", "--verify")
    assert "blocks verified" in shown(project.folder / "shards", "--verify")
    assert "trunk: domains F, M" in shown(project.run)
    assert json.loads(shown(project.run / "trunk"))["domains"] == ["F", "M"]
    adapter = json.loads(shown(project.run / "adapters" / "mlora" / "F" / "1"))
    assert adapter["domain"] == "F"


@pytest.mark.dist
def test_evaluate_predict_and_remove(
    project: Project, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = files / "copy"
    shutil.copytree(project.run, run)
    assert main(["evaluate", str(run), "--splits", "valid", "--domains", "M"]) == 0
    table = capsys.readouterr().out
    assert "M " in table and "F " not in table and "WAUC" in table

    out = files / "out.csv"
    assert main(["predict", str(run), str(files / "good.parquet"), "--out", str(out)]) == 0
    assert pyarrow.csv.read_csv(out).column_names == ["row_id", "domain", "probability"]

    assert main(["remove-domain", str(run), "F"]) == 0
    assert not (run / "adapters" / "mlora" / "F").exists()
    assert (run / "adapters" / "mlora" / "M" / "1" / "adapter.json").exists()
    capsys.readouterr()
    assert main(["predict", str(run), str(files / "good.parquet"), "--out", str(out)]) == 0
    assert "1 rows; 1 of domains without an adapter" in capsys.readouterr().err
