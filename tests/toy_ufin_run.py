"""UFIN runs in miniature: planted titles as vectors of a random BERT, and the life of one run."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import load_file, save_file

from data_shards import Field, Index, write_shards
from data_shards.reader import ShardReader
from data_shards.sidecars import Sidecar
from launch.drilled import Death, Toll
from launch.measures import Cost, cost_of_shared
from tests.toy_run import Step, digests, here, recording, refused
from tests.toy_source import toy_source
from tests.toy_unictr_run import planted_rows, write_small_encoder
from trainer import adding, schedule
from trainer import config as run_files
from trainer import sample as sampling
from trainer.config import RunConfig
from trainer.evaluate import Predictions, predict, zero_shot
from trainer.log import RunLog
from trainer.model import TEACHER, trunk_alone, with_adapters
from trainer.run_folder import RunFolder
from trainer.sample import Sample
from trainer.teachers import teach
from trainer.text_build import build

FIELDS = (
    Field("user", "anonymous", "user"),
    Field("item", "id", "item"),
    Field("title", "text", "item"),
    Field("domain", "id"),
)
SIZES = {"books": 150, "music": 80, "toys": 6}
"""All toys that validate are of one class, so they can have neither teacher nor adapter."""
ADDED, KEPT = {"games": 200}, ("books", "music")
SEEN = 7
# dropout's bits differ from rank to rank
TEACHER_NET = {"name": "eulernet", "orders": [3], "explicit_dropout": 0.0, "implicit_dropout": 0.0}
ADAPT = {"metric": "log_loss", "lr": 0.02, "max_epochs": 3}
RUN = {
    "name": "toy",
    "seed": 3,
    "text": {"prompt": {"sides": ["item"], "without": ["item"]}},
    "reading": {"global_batch": 32, "lanes": 4, "shuffle_rows": 64},
    "tables": {"dim": 4, "lr": 0.02, "init_std": 0.1},
    "method": {"name": "ufin", "experts": 3, "top": 2, "universal": 3, "dim": 4, "orders": 3},
    "teacher": {"lr": 0.02, "max_epochs": 2, "without": ["toys"], "backbone": TEACHER_NET},
    "pretrain": {"lr": 0.01, "max_epochs": 2},
    "adapt": {**ADAPT, "min_rows": 20, "own_ids": True},
    "tracking": {"wandb": "disabled", "pictures": False},
    "keep_checkpoints": 9,
}


def write_toy(folder: Path) -> None:
    """`encoder`, `run.toml`, `shards` of all domains but games, and `added` of games."""
    write_small_encoder(folder / "encoder")
    data = {
        "shards": str(folder / "shards"),
        "source": {"kind": "planted"},  # not read: the shards are there
        "fields": [asdict(field) for field in FIELDS],
        "split": {"by": "time", "parts": {"train": 0.6, "valid": 0.2, "test": 0.2}},
    }
    values = {
        **RUN,
        "data": data,
        "encoder": {"path": str(folder / "encoder"), "max_tokens": 32},
        "text": {**RUN["text"], "folder": str(folder / "text")},
    }
    (folder / "run.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    config, rows = run_files.load(folder / "run.toml"), planted_rows(SIZES | ADDED)
    schema, split = config.data.schema, config.data.split
    source = toy_source(rows)
    index = write_shards(
        source, schema, split, folder / "shards", block_rows=40, hold_out=tuple(ADDED)
    )
    base = index.load_vocabulary(folder / "shards")
    only = tuple(ADDED)
    write_shards(source, schema, split, folder / "added", only_domains=only, base=base)


def configured(toy: Path, output: Path, name: str, *overrides: str) -> RunConfig:
    return run_files.load(toy / "run.toml", [f"output={output}", f"name={name}", *overrides])


def adapters_at(run: Path) -> dict[str, dict[str, np.ndarray]]:
    """The newest adapter's tensors of each domain; as arrays, since pipes mix up empty tensors."""
    return {
        home.name: load_file(max(home.iterdir()) / "adapter.safetensors")
        for home in sorted((run / "adapters" / "ufin").iterdir())
    }


class CutError(Exception):
    """Stands for whatever ends a process between two steps."""


@dataclass(frozen=True)
class Story:
    """What one rank of a run saw; `files` are digests of what others depend on, by time."""

    steps: list[Step]
    teacher: np.ndarray
    adapters: dict[str, dict[str, np.ndarray]]
    added: dict[str, Any]
    files: dict[str, dict[str, str]]
    predictions: dict[str, Predictions | None]
    zero_shot: float | None
    shared: float | None
    seen: Sample | None
    learned: Cost
    adapting: int
    """Steps of phase 2."""


def live(toy: Path, output: Path, name: str, *overrides: str) -> Story:
    """A run, and a domain added to it."""
    ranks = here()
    drawn = f"tracking.pictures={'true' if ranks.world == 1 else 'false'}"
    config = configured(toy, output, name, drawn, *overrides)
    for shards in ("shards", "added"):
        build(config, toy / shards, ranks, lambda text: None)
    with recording() as steps:
        schedule.train(config, ranks)
    folder = RunFolder(config.folder)
    trunk = folder.load_trunk(config, ranks)
    learned = cost_of_shared(trunk, folder.path / "metrics.jsonl", toy / "shards")
    loaded = (folder.adapters.load("ufin", one, trunk=trunk.fingerprint()) for one in KEPT)
    adapting = sum(int(str(adapter.metrics["steps"])) for adapter in loaded)
    files, found = {"trained": _files(folder)}, {"shared": _logits(config, toy / "shards", False)}
    found["trained"] = _logits(config, toy / "shards")
    seen = _seen(config, toy / "shards")
    shot = zero_shot(config, folder, toy / "added", config.test, "games", ranks)
    added = adding.add_domain(config, folder, "games", toy / "added", ranks)
    files |= {"added": _files(folder), "without games": _files(folder, "games")}
    found |= {"added": _logits(config, toy / "shards"), "games": _logits(config, toy / "added")}
    index = Index.load(toy / "shards")
    teacher = Sidecar.open(folder.teachers / "logits", index).columns[TEACHER].copy()
    adapters, shared = adapters_at(folder.path), added["shared"]["auc"]
    return Story(
        steps, teacher, adapters, added, files, found, shot.auc, shared, seen, learned, adapting
    )


def live_cut(toy: Path, output: Path, at: int) -> None:
    """A run that ends in its step of this number, of all phases together, and is started again."""
    config, seen = configured(toy, output, f"cut{at}"), []

    def cut(_: int) -> None:
        seen.append(at)
        if len(seen) == at:
            raise CutError

    with recording(cut), pytest.raises(CutError):
        schedule.train(config, here())
    schedule.train(config, here())


def taught(toy: Path, output: Path, death: Death | None = None) -> np.ndarray:
    """The logits of all teachers; nothing where a rank dies while they are trained."""
    toll = Toll(death if death and here().rank == death.rank else None, lambda death: None)
    toll.listen()
    config, index = configured(toy, output, "x"), Index.load(toy / "shards")
    log = RunLog(False, output, config.tracking, "x")
    logits = teach(config, here(), index, output / "checkpoints", log)  # where a toll hears saves
    assert death is None, f"lived through {toll.counts}"
    return Sidecar.open(logits, index).columns[TEACHER].copy()


def taught_around(toy: Path, output: Path) -> tuple[str, np.ndarray, np.ndarray, int]:
    """Teachers of a set whose first block is corrupt by now, with row_ids as logits: what is
    refused, what is heard where it is skipped, what should be, and the rows of that block."""
    shards = shutil.copytree(toy / "shards", output / "shards")
    index = Index.load(shards)
    first, *_ = index.blocks
    ids = [ShardReader(shards, index).read(block)["row_id"].to_numpy() for block in index.blocks]
    wanted = [np.full(block.rows, np.nan, np.float32) for block in index.blocks]
    for number, domain in enumerate(("books", "music")):
        own = [p for p, b in enumerate(index.blocks) if (b.domain, b.split) == (domain, "train")]
        known = np.sort(np.concatenate([ids[place] for place in own if place > 0]))
        tensors = {"row_id": known, "logit": known.astype(np.float32)}
        save_file(tensors, output / f"{number:05d}.safetensors")
        for place in own[own[0] == 0 :]:
            wanted[place] = ids[place].astype(np.float32)
    with (shards / first.shard).open("r+b") as file:
        file.seek(first.offset + 8)
        file.write(b"damaged")

    def taught(corrupt: str) -> Path:
        choice = (f"data.shards={shards}", f"reading.corrupt={corrupt}")
        config = configured(toy, output, "x", *choice)
        return teach(config, here(), index, output, RunLog(False, output, config.tracking, "x"))

    said = refused(lambda: taught("error"))
    left = output / "00000" / "checkpoints"  # by a start that was cut off when its logits were out
    left.mkdir(parents=True)
    logits = Sidecar.open(taught("skip"), index).columns[TEACHER].copy()
    assert not left.parent.exists()
    return said, logits, np.concatenate(wanted), first.rows


def told(toy: Path, output: Path) -> dict[str, str]:
    """What is refused, and how."""
    whole = str(output / "one")
    fresh = ("phases=['adapt']", f"start_from={whole}")

    def train(name: str, *overrides: str) -> Callable[[], Any]:
        return lambda: schedule.train(configured(toy, output, name, *overrides), here())

    return {
        "no text": refused(train("a", f"text.folder={output / 'nowhere'}")),
        "other shape": refused(train("b", *fresh, "method.universal=2")),
        "other encoder": refused(train("c", *fresh, "encoder.max_tokens=31")),
        "no teacher": refused(train("d", "teacher.without=[]")),
        "unknown": refused(train("e", "teacher.without=['toy']")),
        "begun": refused(train("g", *fresh)),
    }


def _seen(config: RunConfig, shards: Path) -> Sample | None:
    """What pictures would be drawn from, were they of SEEN rows of a domain at most."""
    folder = RunFolder(config.folder)
    trunk = folder.load_trunk(config, here())
    kept = folder.kept_adapters(trunk, trunk.fingerprint())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "EACH", SEEN)
        return sampling.sample(trunk, kept, trunk.loader(shards, config.test))


def _files(folder: RunFolder, without: str = "") -> dict[str, str]:
    return digests(folder.path, ("trunk", "vocabulary", "adapters"), without)


def _logits(config: RunConfig, shards: Path, adapted: bool = True) -> Predictions | None:
    """Of all test rows of one shard set."""
    folder = RunFolder(config.folder)
    trunk = folder.load_trunk(config, here())
    stored = folder.adapters
    kept = [stored.load("ufin", d, trunk=trunk.fingerprint()) for d in stored.domains("ufin")]
    # whether kept or not: what is asked is where its rows go
    every = [replace(adapter, kept=True) for adapter in kept]
    model = with_adapters(trunk, every) if adapted else trunk_alone(trunk)
    return predict(model, trunk.loader(shards, config.test), here())
