"""Whole runs in miniature: planted rows of uneven domains, their shards, and a run file."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tomli_w
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from data_shards import Field, Schema, SplitConfig, UserError, write_shards
from tests.toy_source import toy_source
from trainer import config as run_files
from trainer.config import RunConfig
from trainer.fence import LOCK
from trainer.fit import Trainee
from trainer.model import Sent
from trainer.ranks import Ranks

SCHEMA = Schema(
    (
        Field("user", "id", "user"),
        Field("item", "anonymous", "item"),
        Field("tags", "id", "item", multi=True),
        Field("price", "number", "item"),
        Field("domain", "id"),
    )
)
SPLIT = SplitConfig(parts={"train": 0.5, "adapt": 0.2, "valid": 0.15, "test": 0.15})
SIZES = {"books": 900, "music": 420, "tiny": 45, "toys": 240}
ADDED = {"games": 1000}
TAGS = ("a", "b", "c", "d")

RUN = {
    "name": "toy",
    "seed": 3,
    "data": {
        "source": {"kind": "planted"},  # not read: the shards are there
        "fields": [asdict(field) for field in SCHEMA.fields],
        "split": {"parts": SPLIT.parts},
    },
    "reading": {"global_batch": 64, "lanes": 4, "shuffle_rows": 128},
    "tables": {"dim": 4, "lr": 0.02, "init_std": 0.1},
    "backbone": {"hidden": [16, 8], "dropout": 0.0},
    "method": {"name": "mlora", "alpha": 4},
    "pretrain": {"lr": 0.01, "max_epochs": 2},
    "adapt": {"rows": ["adapt"], "lr": 0.02, "max_epochs": 4, "min_rows": 20},
    "tracking": {"wandb": "disabled", "pictures": False},
}


def planted_rows(sizes: dict[str, int], seed: int = 0) -> pa.Table:
    """Rows whose label follows user, item and what each domain makes of the tags.

    Users and items are common to all domains, but every third one of "games" is its own.
    """
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=40)
    liking = {name: rng.normal(size=len(TAGS)) * 2 for name in (*SIZES, *ADDED)}
    domain = rng.permutation(np.repeat(list(sizes), list(sizes.values())))
    user, item = rng.integers(0, 40, (2, len(domain)))
    tags = [np.flatnonzero(mask) for mask in rng.random((len(domain), len(TAGS))) < 0.4]
    liked = [liking[name][row].sum() for name, row in zip(domain, tags, strict=True)]
    score = taste[user] + taste[item] + liked
    return pa.table(
        {
            "row_id": np.arange(len(domain)),
            "domain": domain.tolist(),
            "label": (score + rng.normal(size=len(domain)) > 0).astype(np.float32),
            "time": np.arange(len(domain)),
            "user": [_name(*pair) for pair in zip(user, domain, strict=True)],
            "item": [_name(*pair) for pair in zip(item, domain, strict=True)],
            "tags": pa.array([[TAGS[i] for i in row] for row in tags], pa.list_(pa.string())),
            "price": rng.random(len(domain)).astype(np.float32),
        }
    )


def _name(number: int, domain: str) -> str:
    """Three digits, as an id often is; a reader that takes it for a number loses the zeros."""
    own = domain == "games" and number % 3 == 0
    return f"{number + 100 * own:03d}"


def write_toy(folder: Path) -> None:
    """`shards` of all domains but games, `added` on top of it with games, and `run.toml`."""
    rows = toy_source(planted_rows(SIZES | ADDED))
    index = write_shards(
        rows, SCHEMA, SPLIT, folder / "shards", block_rows=100, hold_out=tuple(ADDED)
    )
    base = index.load_vocabulary(folder / "shards")
    write_shards(
        rows, SCHEMA, SPLIT, folder / "added", block_rows=100, only_domains=tuple(ADDED), base=base
    )
    data = {**RUN["data"], "shards": str(folder / "shards")}
    (folder / "run.toml").write_text(tomli_w.dumps({**RUN, "data": data}), encoding="utf-8")


def toy_config(toy: Path, output: Path, *overrides: str) -> RunConfig:
    """The run file in `toy`, with its folder under `output`."""
    return run_files.load(toy / "run.toml", [f"output={output}", *overrides])


def here() -> Ranks:
    """This process in its gang."""
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


@dataclass(frozen=True)
class Step:
    """One optimizer step as one rank took it: its share of the loss, and its rows."""

    at: int
    loss: float
    row_ids: tuple[int, ...]
    domains: frozenset[int]


@contextmanager
def recording(before: Callable[[int], None] = lambda at: None) -> Iterator[list[Step]]:
    """All steps of this rank, of either phase; `before` is called with the number of each."""
    steps: list[Step] = []
    original = Trainee.step

    def step(self: Trainee, sent: Sent, following: Sent | None, at: int) -> Tensor:
        before(at)
        loss = original(self, sent, following, at)
        batch = sent.batch
        real = batch.weight > 0
        rows = tuple(batch.row_id[real].tolist())
        steps.append(Step(at, float(loss), rows, frozenset(batch.domain[real].tolist())))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainee, "step", step)
        yield steps


def checkpoint_at(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything in a checkpoint whole, whoever wrote which part: tensors, and plain values."""
    whole = load_file(folder / "dense.safetensors")
    pieces: dict[str, list[tuple[int, int, Tensor]]] = {}
    for path in folder.glob("tables-*.safetensors"):
        for key, tensor in load_file(path).items():
            _, table, name, row, col = key.split("|")
            pieces.setdefault(f"{table}/{name}", []).append((int(row), int(col), tensor))
    values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return whole | {name: _joined(parts) for name, parts in pieces.items()}, values


def _joined(pieces: list[tuple[int, int, Tensor]]) -> Tensor:
    whole = torch.full(
        (
            max(row + tensor.shape[0] for row, _, tensor in pieces),
            max(col + tensor.shape[1] for _, col, tensor in pieces),
        ),
        torch.nan,
    )
    for row, col, tensor in pieces:
        whole[row : row + tensor.shape[0], col : col + tensor.shape[1]] = tensor
    assert not whole.isnan().any(), "the rectangles do not cover the table"
    return whole


def adapters_at(run: Path) -> dict[str, dict[str, Tensor]]:
    """The newest adapter's tensors of each domain."""
    return {
        home.name: load_file(max(home.glob("[0-9]*")) / "adapter.safetensors")
        for home in sorted((run / "adapters" / "mlora").iterdir())
    }


def digests(run: Path, parts: tuple[str, ...], without: str = "") -> dict[str, str]:
    """SHA-256 of each file in these parts of a run's folder, but those of the domain `without` and
    locks, which name a process."""
    paths = (path for part in parts for path in sorted((run / part).rglob("*")) if path.is_file())
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if without not in path.parts and path.name != LOCK
    }


def refused(act: Callable[[], Any]) -> str:
    """The message of the UserError that `act` raises; empty where it raises none."""
    try:
        act()
    except UserError as error:
        return str(error)
    return ""
