"""Uni-CTR runs in miniature: planted titles as prompts, a random BERT, and the life of one run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel

from data_shards import Field, Loader, Rows, write_shards
from launch.__main__ import main
from tests.toy_encoder import write_tokenizer
from tests.toy_run import Step, digests, here, recording, refused
from tests.toy_source import toy_source
from trainer import adding, schedule
from trainer import config as run_files
from trainer.adapt import adapt, rows_of
from trainer.adapter_store import Adapter
from trainer.config import RunConfig
from trainer.evaluate import Predictions, evaluate, predict, zero_shot
from trainer.log import RunLog
from trainer.metrics import Scores
from trainer.model import Model, with_adapters
from trainer.prompting import prompter_of
from trainer.run_folder import RunFolder

LIKED = {
    "books": ("red", "blue"),
    "music": ("green", "gray"),
    "toys": ("red", "green"),
    "games": ("blue", "green"),
}
KEYS = ("red", "blue", "green", "gray")
FILLERS = ("song", "card", "dress", "guitar", "gift")
WORDS = (*LIKED, *KEYS, *FILLERS, ":", ".", ",", "The", "the", "ID", "title", "is", "current")
FIELDS = (
    Field("user", "anonymous", "user"),
    Field("item", "id", "item"),
    Field("domain", "id"),
    Field("prompt", "tokens"),
)
SIZES = {"books": 150, "music": 80, "toys": 8}
ADDED = {"games": 200}
NOISE = 0.1
RUN = {
    "name": "toy",
    "seed": 3,
    "reading": {"global_batch": 32, "lanes": 4, "shuffle_rows": 64},
    "tables": {"dim": 4, "lr": 0.02},
    "backbone": {"hidden": [16, 8], "dropout": 0.0},
    "method": {"name": "unictr", "ladder_dropout": 0.0, "tower": [16, 8], "dropout": 0.0},
    "pretrain": {"lr": 0.003, "max_epochs": 2},
    "adapt": {"lr": 0.003, "max_epochs": 1, "min_rows": 20},
    "engine": {"optimizer": "adamw"},
    "tracking": {"wandb": "disabled", "pictures": False},
    "keep_checkpoints": 9,
}
STORY = (
    "encoder.lora_dropout=0.1",
    "method.dropout=0.2",
    "method.ladder_dropout=0.2",
    "adapt.max_epochs=8",
    "adapt.lr=0.01",
)
STEPS = 10
"""Of phase 1: five in each of two epochs."""
CUT = 7
"""The step of phase 1 in which a run is cut: after its first checkpoint, before its second."""


def planted_rows(sizes: dict[str, int], seed: int = 0) -> pa.Table:
    """Rows in which a word of the item's title decides, another one in each domain.

    Four rows in a row have an item of their own, so that later items are new.
    """
    rng = np.random.default_rng(seed)
    domain = rng.permutation(np.repeat(list(sizes), list(sizes.values())))
    item = np.arange(len(domain)) // 4
    key, filler = (rng.choice(words, item[-1] + 1)[item] for words in (KEYS, FILLERS))
    liked = np.array([word in LIKED[name] for name, word in zip(domain, key, strict=True)])
    return pa.table(
        {
            "row_id": np.arange(len(domain)),
            "domain": domain.tolist(),
            "label": (liked ^ (rng.random(len(domain)) < NOISE)).astype(np.float32),
            "time": np.arange(len(domain)),
            "user": [f"u{number}" for number in rng.integers(0, 20, len(domain))],
            "item": [f"i{number}" for number in item],
            "title": [f"{a} {b}" for a, b in zip(filler, key, strict=True)],
        }
    )


def write_toy(folder: Path, sizes: dict[str, int], added: dict[str, int]) -> pa.Table:
    """`encoder`, `run.toml`, `shards` of all domains but the added ones, and `added` of those;
    returns the raw rows of both."""
    write_small_encoder(folder / "encoder")
    data = {
        "shards": str(folder / "shards"),
        "source": {"kind": "planted"},  # not read: the shards are there
        "fields": [asdict(field) for field in FIELDS],
        "split": {"by": "time", "parts": {"train": 0.6, "valid": 0.2, "test": 0.2}},
        "prompt": {"template": "uni_ctr", "fields": [asdict(Field("title", "text", "item"))]},
    }
    encoder = {"path": str(folder / "encoder"), "max_tokens": 32, "every": 2, "lora_dropout": 0.0}
    values = {**RUN, "data": data, "encoder": {**encoder, "chunks": 2}}
    (folder / "run.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    config, rows = run_files.load(folder / "run.toml"), planted_rows(sizes | added)
    schema, split, prompter = config.data.schema, config.data.split, prompter_of(config)
    index = write_shards(
        toy_source(rows),
        schema,
        split,
        folder / "shards",
        hold_out=tuple(added),
        prompter=prompter,
    )
    if added:
        write_shards(
            toy_source(rows),
            schema,
            split,
            folder / "added",
            only_domains=tuple(added),
            base=index.load_vocabulary(folder / "shards"),
            prompter=prompter,
        )
    return rows


def write_small_encoder(folder: Path) -> None:
    """Of two layers, for under ZeRO 3 each layer costs every step a tenth of a second."""
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    BertModel(shape).save_pretrained(folder)
    write_tokenizer(folder, WORDS)


def other_encoder(folder: Path, out: Path) -> Path:
    """The same files, but for one weight."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0, 0] += 1e-3
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def configured(toy: Path, output: Path, name: str, *overrides: str) -> RunConfig:
    return run_files.load(toy / "run.toml", [f"output={output}", f"name={name}", *overrides])


def adapters_at(run: Path) -> dict[str, dict[str, Tensor]]:
    """The newest adapter's tensors of each domain."""
    return {
        home.name: load_file(max(home.iterdir()) / "adapter.safetensors")
        for home in sorted((run / "adapters" / "unictr").iterdir())
    }


class _CutError(Exception):
    """Stands for whatever ends a process between two steps."""


def _cut(at: int) -> None:
    if at == CUT:
        raise _CutError


@dataclass(frozen=True)
class Begun:
    """Phase 2 that makes no step: its adapter, and what it should say of it."""

    adapter: Adapter
    start: dict[str, Tensor]
    own: float | None
    shared: float | None


@dataclass(frozen=True)
class Story:
    """What one run saw; `files` are digests of every file that others depend on, by time."""

    resumed: list[Step]
    added: dict[str, Any]
    games: dict[str, Tensor]
    files: dict[str, dict[str, str]]
    predictions: dict[str, Predictions]
    zero_shot: Scores
    general: Scores
    begun: dict[str, Begun]
    told: dict[str, str]


def live(toy: Path, output: Path) -> Story:
    """A run in one go and one cut in phase 1; a domain added to the former, and removed."""
    config = configured(toy, output, "whole", *STORY)
    cut = configured(toy, output, "cut", *STORY)
    schedule.train(config, here())
    with recording(_cut), pytest.raises(_CutError):
        schedule.train(cut, here())
    with recording() as resumed:
        schedule.train(cut, here())
    folder = RunFolder(config.folder)
    files, logits = {"trained": _files(folder)}, {"trained": _logits(config, toy)}
    added = adding.add_domain(config, folder, "games", toy / "added", here())
    files |= {"added": _files(folder), "without games": _files(folder, "games")}
    logits["added"] = _logits(config, toy)
    games = adapters_at(folder.path)["games"]
    shot = zero_shot(config, folder, toy / "added", config.test, "games", here())
    general = _general(config, toy / "added")
    assert main(["remove-domain", str(folder.path), "games"]) == 0
    files["removed"] = _files(folder)
    logits["removed"] = _logits(config, toy)
    begun = {name: _begun(config, toy, name, 1) for name in ("books", "music")}
    begun["spoilt"] = _begun(config, toy, "books", -1)
    told = _told(config, toy, output)
    return Story(resumed, added, games, files, logits, shot, general, begun, told)


def _told(config: RunConfig, toy: Path, output: Path) -> dict[str, str]:
    """What is refused, and how."""
    folder = RunFolder(config.folder)
    other = other_encoder(toy / "encoder", output / "other_encoder")
    elsewhere = replace(config, encoder=replace(config.encoder, path=str(other)))
    longer = configured(toy, output, "longer", "encoder.max_tokens=31")

    def shot(domain: str) -> Callable[[], Scores]:
        shards = toy / "shards"
        return lambda: zero_shot(config, folder, shards, config.test, domain, here())

    return {
        "other encoder": refused(lambda: folder.load_trunk(elsewhere, here())),
        "other prompts": refused(lambda: schedule.train(longer, here())),
        "served": refused(lambda: folder.load_trunk(longer, here())),
        "learned": refused(shot("music")),
        "unknown": refused(shot("gamse")),
    }


def _files(folder: RunFolder, without: str = "") -> dict[str, str]:
    return digests(folder.path, ("trunk", "vocabulary", "adapters"), without)


def _with_adapters(config: RunConfig) -> Model:
    folder = RunFolder(config.folder)
    trunk = folder.load_trunk(config, here())
    return with_adapters(trunk, folder.kept_adapters(trunk, trunk.fingerprint()))


def _loader(config: RunConfig, shards: tuple[Path, ...], rows: Rows) -> Loader:
    return Loader(shards, rows, config.reading, here().rank, here().world, shuffle=False)


def _logits(config: RunConfig, toy: Path) -> Predictions:
    """Of all test rows, with every kept adapter."""
    shards = (toy / "shards", toy / "added")
    found = predict(_with_adapters(config), _loader(config, shards, Rows(config.test)), here())
    assert found is not None
    return found


def _general(config: RunConfig, shards: Path) -> Scores:
    """Of the general network's column beside those of the heads."""
    model = _with_adapters(config)
    assert "games" in model.domains, "its head was not kept"
    column = replace(model, dense=lambda features: model.dense(features)[:, 1:])
    return evaluate(column, _loader(config, (shards,), Rows(config.test)), here())


def _begun(config: RunConfig, toy: Path, domain: str, sign: int) -> Begun:
    """No epoch of phase 2 on a head that says the opposite where `sign` is -1."""
    still = replace(config, adapt=replace(config.adapt, max_epochs=0))
    trunk = RunFolder(config.folder).load_trunk(still, here())
    for part in ("weight", "bias"):
        trunk.starts[domain][f"tower.out.{part}"] *= sign
    start, rows = dict(trunk.starts[domain]), rows_of(trunk, toy / "shards", domain)
    log = RunLog(False, config.folder, config.tracking, "begun")
    adapter = adapt(trunk, trunk.fingerprint(), rows, log)
    models = (with_adapters(trunk, held) for held in ([adapter], []))
    own, shared = (evaluate(model, rows.valid, here()).auc for model in models)
    return Begun(adapter, start, own, shared)
