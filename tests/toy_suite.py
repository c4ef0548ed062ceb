"""Suites in miniature, on planted rows: a run file and a suite file in one folder."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from data_shards import Loader
from launch.cells import locked
from launch.comparison import Asked, Comparison
from launch.suite import Plan
from tests.toy_run import here, recording
from trainer.trunk import Trunk

RUN: dict[str, Any] = {
    "name": "planted",
    "data": {
        "shards": "not used",
        "fields": [
            {"name": "user", "kind": "anonymous"},
            {"name": "item", "kind": "id"},
            {"name": "domain", "kind": "id"},
        ],
        "source": {
            "kind": "planted",
            "rows": 1200,
            "domains": 3,
            "users": 60,
            "items": 40,
            "user_overlap": 0.2,
            "tail": 0.5,
            "specific": 1.5,
        },
        "split": {"by": "random", "parts": {"train": 0.6, "valid": 0.2, "test": 0.2}},
        "block_rows": 256,
    },
    "reading": {"global_batch": 128, "lanes": 4, "shuffle_rows": 256},
    "tables": {"dim": 4, "lr": 0.02, "init_std": 0.1},
    "backbone": {"hidden": [8], "dropout": 0.0},
    "method": {"name": "mlora", "alpha": 4},
    "pretrain": {"lr": 0.01, "max_epochs": 2},
    "adapt": {"lr": 0.02, "max_epochs": 2, "min_rows": 20},
}
MODELS = [{"label": "mlp"}, {"label": "deepfm", "set": ["backbone.name=deepfm"]}]
SETTINGS = [
    {"label": "shared"},
    {"label": "adapters", "scores": "adapted"},
    {"label": "one phase", "scores": "adapted", "set": ["pretrain.one_phase=true"]},
]
SUITE: dict[str, Any] = {
    "name": "toy",
    "title": "A toy",
    "run": "run.toml",
    "base": "shared",
    "seeds": [1, 2],
    "models": MODELS,
    "settings": SETTINGS,
}

RATES = [0.0001, 0.03]
GRID = {"grid": {"pretrain.lr": RATES}, "models": MODELS[:1], "settings": SETTINGS[:1]}
WAYS = [
    {"label": "trunk alone", "kind": "zero_shot"},
    {"label": "+ adapter", "kind": "add_domain", "scores": "adapted"},
    {
        "label": "+ own ids",
        "kind": "add_domain",
        "scores": "adapted",
        "set": ["adapt.own_ids=true", "adapt.own_ids_lr=0.1"],
    },
    {"label": "alone", "kind": "alone"},
    {"label": "retrained", "set": ['phases=["pretrain"]']},
]
DOMAINS = {
    "models": [{"label": name, "domain": name} for name in ("d1",)],
    "settings": WAYS,
    "base": "trunk alone",
    "seeds": [1],
    "metric": "auc",
}
FAILED = {
    "models": [{"label": "wrong", "set": ["pretrain.metric=auc/nowhere"]}, MODELS[0]],
    "settings": SETTINGS[:1],
    "seeds": [1],
}


def write_suite(folder: Path, **changes: Any) -> Path:
    """The path of a suite file whose runs will lie in `folder` too; None takes a key out."""
    folder.mkdir(exist_ok=True)
    suite = {**SUITE, "output": str(folder), **changes}
    suite = {key: value for key, value in suite.items() if value is not None}
    (folder / "run.toml").write_text(tomli_w.dumps(RUN), encoding="utf-8")
    path = folder / "suite.toml"
    path.write_text(tomli_w.dumps(suite), encoding="utf-8")
    return path


def compared(path: Path, seeds: Sequence[int] | None = None, only: str = "") -> dict[str, Any]:
    """`results.json` after this process, or its gang, has done its part."""
    plan = Plan.load(path)
    comparison = Comparison(plan, Asked.of(plan.suite, seeds, only), here())
    comparison.run()
    found = json.loads((path.parent / "toy" / "results.json").read_text(encoding="utf-8"))
    return found | {"failed": comparison.failed}


def learned(results: dict[str, Any]) -> dict[tuple[str, str, int], Any]:
    """What of each cell does not hang on the machine."""
    return {
        (cell["model"], cell["setting"], cell["seed"]): [
            cell[key] for key in ("run", "scores", "sizes", "steps")
        ]
        for cell in results["cells"]
    }


@dataclass
class Told:
    """What the suites of one process came to."""

    whole: dict[str, Any]
    again: tuple[dict[str, Any], int]
    """Once more, and how many steps that took."""
    elsewhere: tuple[dict[str, Any], int]
    """Likewise, where only what was found has been taken along."""
    stopped: list[int]
    """Pieces of work that were finished at each stop."""
    resumed: dict[str, Any]
    beside: dict[str, Any]
    """While another process is at the only run."""
    grid: dict[str, Any]
    read: dict[str, set[str]]
    """Splits that each run under a grid has read."""
    domains: dict[str, Any]
    failed: dict[str, Any]


def tell(folder: Path) -> Told:
    """All that is told below, in one process: its engine can join one group only."""
    path = write_suite(folder / "whole")
    whole = compared(path)
    with recording() as steps:
        again = compared(path), len(steps)
    with recording() as steps:
        elsewhere = compared(_taken_along(folder)), len(steps)
    read: dict[str, set[str]] = {}
    with _noting(read):
        grid = compared(write_suite(folder / "grid", **GRID))
    stopped, resumed = _stopped(write_suite(folder / "stopped", models=MODELS[:1], seeds=[2]))
    return Told(
        whole,
        again,
        elsewhere,
        stopped,
        resumed,
        _beside(
            write_suite(folder / "beside", models=MODELS[:1], settings=SETTINGS[:1], seeds=[1])
        ),
        grid,
        read,
        compared(write_suite(folder / "domains", **DOMAINS)),
        compared(write_suite(folder / "failed", **FAILED)),
    )


def _taken_along(folder: Path) -> Path:
    """Of the whole suite, what was found."""
    path = write_suite(folder / "elsewhere")
    shutil.copytree(folder / "whole" / "toy" / "found", folder / "elsewhere" / "toy" / "found")
    return path


def _stopped(path: Path) -> tuple[list[int], dict[str, Any]]:
    """A suite that is stopped twice, in the middle of a run."""
    taken, finished = 0, []

    def stop(at: int) -> None:
        nonlocal taken
        taken += 1
        if taken in (12, 40):
            raise KeyboardInterrupt

    with recording(stop):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                compared(path)
            finished.append(len([*path.parent.glob("toy/found/*")]))
        return finished, compared(path)


def _beside(path: Path) -> dict[str, Any]:
    plan = Plan.load(path)
    [first, *_] = plan.cells({("mlp", "shared"): {}})
    lock = path.parent / "toy" / "locks" / f"work-{first.work.fingerprint[:16]}"
    with locked(lock, wait=False) as mine:
        assert mine
        return compared(path)


@contextmanager
def _noting(read: dict[str, set[str]]) -> Iterator[None]:
    original = Trunk.loader

    def loader(self: Trunk, shards: Any, splits: tuple[str, ...], *args: Any, **kw: Any) -> Loader:
        read.setdefault(self.config.name, set()).update(splits)
        return original(self, shards, splits, *args, **kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trunk, "loader", loader)
        yield
