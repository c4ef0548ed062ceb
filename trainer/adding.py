"""Phase 2 for one more domain on a finished run, and the proof that the others did not move."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_shards import Location, UserError
from data_shards.durable import write_whole
from trainer.adapt import DomainRows, adapt, rows_of
from trainer.adapter_store import Adapter
from trainer.config import RunConfig
from trainer.evaluate import evaluate, predict
from trainer.log import RunLog
from trainer.model import trunk_alone, with_adapters
from trainer.ranks import Ranks, together
from trainer.report import added_table, sizes
from trainer.run_folder import RunFolder
from trainer.trunk import Trunk


@dataclass(frozen=True)
class Witness:
    """Digests of what adding a domain must not move."""

    trunk: str
    adapters: dict[str, str]
    """Of the other domains."""
    predictions: str
    """Of the trunk's other domains; empty on all ranks but the first."""

    def differences(self, after: "Witness") -> list[str]:
        """Names of what moved; empty is the promise kept."""
        moved = ["trunk"] if self.trunk != after.trunk else []
        moved += [f"adapter of {d}" for d, h in self.adapters.items() if after.adapters.get(d) != h]
        return moved + (["predictions"] if self.predictions != after.predictions else [])


def add_domain(
    config: RunConfig,
    folder: RunFolder,
    domain: str,
    shards: Location,
    ranks: Ranks,
    notes: Path | None = None,
) -> dict[str, Any]:
    """Add a domain's adapter to a run, once; returns what is said of it. UserError if it has one.

    With a folder for its notes (metrics, summary) it writes only the adapter into the run's own.
    Cut off, it goes on from what it has, and so it does between the adapter and the proof.
    """
    noted = RunFolder(notes or folder.path)
    log = RunLog(ranks.first, noted.path, config.tracking, f"{config.name}-{domain}")
    try:
        trunk = folder.load_trunk(config, ranks)
        rows = rows_of(trunk, shards, domain)
        with folder.adapting(domain, config, ranks) as steps:
            before, adapter = _added(trunk, folder, rows, steps, log)
            after = _witness(trunk, folder, domain, added=True)
            moved = ranks.broadcast(before.differences(after))
            summary = _summary(trunk, folder, adapter, shards, moved, log)
            log.metrics("add-domain", summary)
            if ranks.first:
                noted.save_added(domain, summary)
        log.say(added_table(summary))
        if moved:
            raise RuntimeError(f"adding {domain} moved: {', '.join(moved)}; this is a defect")
        return summary
    finally:
        log.close()


def _added(
    trunk: Trunk, folder: RunFolder, rows: DomainRows, steps: Path, log: RunLog
) -> tuple[Witness, Adapter]:
    """What was there before, and the domain's adapter, which is stored."""
    domain, ranks = rows.domain, trunk.ranks
    begun = _Begun(steps / "before.json", ranks)
    if folder.has_adapter(domain, trunk):
        adapter = folder.adapters.load(trunk.config.method.name, domain, trunk=trunk.fingerprint())
        if not begun.digests or adapter.data != rows.data:
            raise UserError(
                f"domain {domain!r} has an adapter in {folder.path} already; "
                f"remove it first: remove-domain {folder.path} {domain}"
            )
        log.say(f"adapt {domain}: stored already by a start that was cut off")
        before = _witness(trunk, folder, domain, added=False)
        return replace(before, **begun.digests), adapter
    before = _witness(trunk, folder, domain, added=False)
    begun.keep(before)
    adapter = adapt(trunk, before.trunk, rows, log, steps)
    folder.save_adapter(adapter, ranks)
    return before, adapter


class _Begun:
    """The digests from before the first of several starts; predictions follow from them."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self._path, self._ranks = path, ranks
        self.digests: dict[str, Any] = ranks.broadcast(self._read() if ranks.first else {})

    def _read(self) -> dict[str, Any]:
        return json.loads(self._path.read_bytes()) if self._path.exists() else {}

    def keep(self, before: Witness) -> None:
        """For a later start, should this one be cut off. Collective."""
        text = json.dumps({"trunk": before.trunk, "adapters": before.adapters})
        ranks, path = self._ranks, self._path
        together(ranks, path, lambda: write_whole(path, text) if ranks.first else None)


def _witness(trunk: Trunk, folder: RunFolder, domain: str, added: bool) -> Witness:
    """Digests of trunk and stored adapters, and of the predictions for the trunk's other domains,
    without and with the domain's own adapter."""
    method, trunk_id = trunk.config.method.name, trunk.fingerprint()
    others = [name for name in folder.adapters.domains(method) if name != domain]
    digests = {name: folder.adapters.digest(method, name) for name in others}
    kept = [
        adapter
        for adapter in folder.kept_adapters(trunk, trunk_id)
        if added or adapter.domain != domain
    ]
    rows = trunk.loader(trunk.config.data.shards, trunk.config.test)
    found = predict(with_adapters(trunk, kept), rows, trunk.ranks, "others' predictions")
    if found is None:
        return Witness(trunk_id, digests, "")
    of_others = np.array([name != domain for name in found.domains])[found.domain]
    return Witness(trunk_id, digests, hashlib.sha256(found.logit[of_others].tobytes()).hexdigest())


def _summary(
    trunk: Trunk,
    folder: RunFolder,
    adapter: Adapter,
    shards: Location,
    moved: list[str],
    log: RunLog,
) -> dict[str, Any]:
    domain = adapter.domain
    test = trunk.loader(shards, trunk.config.test, (domain,))
    model = with_adapters(trunk, [adapter])
    shared = evaluate(trunk_alone(trunk), test, trunk.ranks).to_dict()
    adapted = evaluate(model, test, trunk.ranks).to_dict()
    log.left_out(f"test {domain}", 0, trunk.ranks, test)
    phases = (f"adapt {domain}", f"test {domain}")
    corrupt = log.corrupt_rows()  # of the run's other phases too, whose log it may be
    return {
        "domain": domain,
        "shared": shared,
        "adapted": adapted,
        "kept": adapter.kept,
        "own_ids": {key: len(values) for key, values in adapter.vocabulary.items()},
        "seconds": adapter.metrics["seconds"],
        "others": len(folder.adapters.domains(adapter.method)) - 1,
        "moved": moved,
        "corrupt_rows": {phase: corrupt[phase] for phase in phases if phase in corrupt},
        "sizes": sizes(trunk, [adapter]),
    }
