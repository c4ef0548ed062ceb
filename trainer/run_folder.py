"""A run's folder: what it was asked, what it learned, and everything needed to use that later.

run.toml, metrics.jsonl, wandb/, teachers/ (their logits), checkpoints/, trunk/ (the shared part at
its best), vocabulary/, summary.json, report.html, pictures/, added/<domain>.json,
adapters/<method>/<domain>/<version>/ and adapting/ beside them (a phase 2 that has not ended).
"""

import json
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from data_shards import Index, Location, Schema, UserError, Vocabulary
from data_shards.durable import flush, write_whole
from data_shards.errors import LostError
from trainer.adapter_store import Adapter, AdapterStore
from trainer.checkpoint import MANIFEST, STATE, Checkpoint, Snapshot, checked
from trainer.config import RunConfig, dump, first_difference, from_dict
from trainer.fence import others_kept_out
from trainer.prompting import prompter_of, require_same_prompts
from trainer.ranks import Ranks, together
from trainer.saving import save
from trainer.trunk import Trunk, copy_into, empty_trunk

RUN_FILE, SUMMARY, ADAPTING = "run.toml", "summary.json", "adapting"
START = "start/"
"""Before the names of the tensors with which a domain's phase 2 begins."""

# What says nothing of what a run has learned so far: it may be another when the run is continued.
FREE = {
    "name",
    "output",
    "faults",
    "tracking",
    "keep_checkpoints",
    "engine.zero_stage",
    "engine.bad_steps",
    "reading.corrupt",
    "tables.sharding",
    "pretrain.checkpoint_every",
    "pretrain.max_epochs",
    "adapt.checkpoint_every",
}


class RunFolder:
    """Paths of one run, and how its parts are written and read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.teachers = path / "teachers"
        self.trunk = path / "trunk"
        self.vocabulary = path / "vocabulary"
        self.adapters = AdapterStore(path / "adapters")
        self.pictures = path / "pictures"

    @contextmanager
    def open(self, config: RunConfig, ranks: Ranks) -> Iterator[None]:
        """Start the folder, or continue one of the same run file; another one is refused, and so is
        a folder to which another process writes. Collective."""

        def act() -> None:
            existing = self.path / RUN_FILE
            begun = (self.teachers, self.checkpoints, self.trunk)
            # A run that has saved nothing yet, such as one with a mistake in it, may change.
            if existing.exists() and any(path.exists() for path in begun):
                theirs = tomllib.loads(existing.read_text(encoding="utf-8"))
                learned = {"pretrain.max_epochs"} if (self.trunk / MANIFEST).exists() else set()
                key = first_difference(tomllib.loads(dump(config)), theirs, FREE - learned)
                if key is not None:
                    raise UserError(
                        f"{self.path}: holds a run of another run file (they differ in {key}); "
                        "set another name or output, or delete the folder"
                    )
            write_whole(existing, dump(config))

        with others_kept_out(self.path, config.faults, ranks):
            together(ranks, self.path, lambda: act() if ranks.first else None)
            yield

    @classmethod
    def config(cls, path: Path) -> RunConfig:
        """The resolved run file of a run."""
        file = path / RUN_FILE
        if not file.exists():
            raise UserError(
                f"{path}: not a run's folder (no {RUN_FILE}); give the one of a `train`"
            )
        return from_dict(tomllib.loads(file.read_text(encoding="utf-8")), str(file))

    def save_trunk(self, trunk: Trunk, index: Index, shards: Location, seconds: float) -> None:
        """The shared part without optimizer state, and the vocabulary that numbers its rows."""
        prompter = prompter_of(trunk.config)
        values = {
            "schema": trunk.schema.to_json(),
            "rows": trunk.rows,
            "vocabulary": trunk.vocabulary,
            "domains": list(index.domains),
            "shards": index.fingerprint,
            "seconds": seconds,
            "base": trunk.base,
            "prompts": prompter.describe() if prompter else None,
        }

        def save_vocabulary() -> None:
            shutil.rmtree(self.vocabulary, ignore_errors=True)
            index.load_vocabulary(shards).save(self.vocabulary)
            for path in (*self.vocabulary.iterdir(), self.vocabulary):
                flush(path)

        together(trunk.ranks, self.path, lambda: save_vocabulary() if trunk.ranks.first else None)
        starts = {
            f"{START}{quote(domain, safe='')}/{name}": tensor
            for domain, tensors in trunk.starts.items()
            for name, tensor in tensors.items()
        }
        snapshot = Snapshot({**trunk.dense, **starts}, values)
        save(self.trunk, trunk.ranks, [trunk.tables], snapshot, optimizer=False)

    def load_trunk(self, config: RunConfig, ranks: Ranks) -> Trunk:
        """The shared part as phase 1 left it, frozen."""
        values = self.trunk_values()
        schema = Schema.from_json(values["schema"])
        trunk = empty_trunk(config, ranks, schema, values["rows"], values["vocabulary"])
        snapshot = self._checked_trunk(ranks).load([trunk.tables], optimizer=False)
        for name, tensor in snapshot.tensors.items():
            if name.startswith(START):
                domain, name = name.removeprefix(START).split("/", 1)
                trunk.starts.setdefault(unquote(domain), {})[name] = tensor
        trunk.dense = {k: t for k, t in snapshot.tensors.items() if not k.startswith(START)}
        trunk.require_base(values["base"], self.path)
        require_same_prompts(prompter_of(config), values["prompts"], str(self.path))
        trunk.freeze()
        return trunk

    def begin(self, trunk: Trunk) -> None:
        """Give the trunk of another run this run's dense shared part. Collective."""
        values = self.trunk_values()
        trunk.require_base(values["base"], self.path)
        tensors = self._checked_trunk(trunk.ranks).dense()
        theirs = {name: t for name, t in tensors.items() if not name.startswith(START)}
        copy_into(trunk.dense, theirs, f"shared part of {self.path}")

    def _checked_trunk(self, ranks: Ranks) -> Checkpoint:
        try:
            return checked(self.trunk, ranks)
        except LostError:
            raise
        except UserError as error:
            raise UserError(
                f"{error}, or delete {self.trunk} and start its `train` again, which makes it of "
                f"{self.checkpoints.name}/"
            ) from error

    def trunk_values(self) -> dict[str, Any]:
        """What the saved trunk says of itself."""
        if not (self.trunk / MANIFEST).exists():
            raise UserError(
                f"{self.path}: its shared part is not trained yet; run `train` to the end"
            )
        return json.loads((self.trunk / STATE).read_text(encoding="utf-8"))

    def load_vocabulary(self) -> Vocabulary:
        """The vocabulary of the trunk's tables."""
        values = self.trunk_values()
        schema = Schema.from_json(values["schema"])
        return Vocabulary.load(self.vocabulary, schema, values["rows"], None)

    def kept_adapters(self, trunk: Trunk, trunk_id: str) -> list[Adapter]:
        """The newest adapter of each domain, where it beat the shared part. Collective."""
        method, ranks = trunk.config.method.name, trunk.ranks
        domains = ranks.broadcast(self.adapters.domains(method) if ranks.first else None)
        found = [self.adapters.load(method, domain, trunk=trunk_id) for domain in domains]
        return [adapter for adapter in found if adapter.kept]

    def has_adapter(self, domain: str, trunk: Trunk) -> bool:
        """As the first rank sees it: a file system of many nodes may show it to some later."""
        method, ranks = trunk.config.method.name, trunk.ranks
        there = ranks.first and domain in self.adapters.domains(method)
        return ranks.broadcast(there)

    def save_adapter(self, adapter: Adapter, ranks: Ranks) -> None:
        """Store an adapter once, whatever the number of ranks. Collective."""
        together(ranks, self.path, lambda: self.adapters.save(adapter) if ranks.first else None)

    @contextmanager
    def adapting(self, domain: str, config: RunConfig, ranks: Ranks) -> Iterator[Path]:
        """The folder where a domain's phase 2 keeps its state; it is gone when all has ended well.

        One process at a time adapts a domain; others may be adapted meanwhile. Collective.
        """
        home = self.adapters.home(config.method.name, domain)
        with others_kept_out(home, config.faults, ranks):
            yield home / ADAPTING
            if ranks.first:
                shutil.rmtree(home / ADAPTING, ignore_errors=True)

    def save_added(self, domain: str, values: dict[str, Any]) -> None:
        """What `add-domain` found."""
        folder = self.path / "added"
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"{quote(domain, safe='')}.json", json.dumps(values, indent=1) + "\n")

    def save_summary(self, values: dict[str, Any]) -> None:
        write_whole(self.path / SUMMARY, json.dumps(values, indent=1) + "\n")
