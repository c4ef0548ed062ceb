"""Whole runs: two phases for `train`, the second one alone for `add-domain`."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_shards import Index, Location
from trainer.adapt import DomainRows, NoAdapterError, adapt, rows_of
from trainer.adapter_store import Adapter
from trainer.align import align
from trainer.config import RunConfig
from trainer.evaluate import evaluate, predict
from trainer.log import RunLog
from trainer.machine import machine
from trainer.model import trunk_alone, with_adapters
from trainer.pictures import take_pictures
from trainer.pretrain import Pretrained, pretrain
from trainer.ranks import Ranks, together
from trainer.report import added_table, final_table, sizes
from trainer.run_folder import RunFolder
from trainer.teachers import teach
from trainer.trunk import Trunk, new_trunk


def train(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Pretrain, adapt every domain, compare; returns the summary. Continues an unfinished run."""
    shards = config.data.shards
    index = Index.load(shards)
    index.require_schema(config.data.schema)
    folder = RunFolder(config.folder)
    folder.open(config, ranks)
    log = RunLog(ranks.first, folder.path, config.tracking, config.name)
    try:
        log.metrics("start", {"ranks": ranks.world, "device": ranks.device.type, **machine()})
        return _train(config, ranks, index, folder, log)
    finally:
        log.close()


def _train(
    config: RunConfig, ranks: Ranks, index: Index, folder: RunFolder, log: RunLog
) -> dict[str, Any]:
    shards = config.data.shards
    # A file system of many nodes may show a new file to some of them later.
    if ranks.broadcast((folder.trunk / "manifest.json").exists() if ranks.first else None):
        log.say("pretrain: done already, its trunk is taken")
        trunk = folder.load_trunk(config, ranks)
        seconds = folder.trunk_values()["seconds"]
    else:
        trunk, pretrained = _learned(config, ranks, index, folder, log)
        seconds = pretrained.seconds
        if "adapt" in config.phases and not config.pretrain.one_phase:
            trunk.starts = pretrained.adapters
        else:
            _save_one_phase(trunk, pretrained, index, folder)
        folder.save_trunk(trunk, index, shards, seconds)
        trunk.freeze()
    trunk_id = trunk.fingerprint()
    skipped = {}
    if "adapt" in config.phases:
        skipped = _adapt_all(trunk, trunk_id, index.domains, shards, folder, log)
    test = trunk.loader(shards, config.test)
    base = evaluate(trunk_alone(trunk), test, ranks, "test, shared part")
    kept = folder.kept_adapters(trunk, trunk_id)
    adapted = base if kept or "adapt" in config.phases else None
    if kept:
        adapted = evaluate(with_adapters(trunk, kept), test, ranks, "test, with adapters")
    summary = {
        "trunk": trunk_id,
        "pretrain_seconds": round(seconds, 3),
        "shared": base.to_dict(),
        "adapted": adapted.to_dict() if adapted else None,
        "kept": [adapter.domain for adapter in kept],
        "skipped": skipped,
        "bad_steps": log.bad_steps(),
        "sizes": sizes(trunk, kept),
    }
    if ranks.first:
        folder.save_summary(summary)
    waucs = {"wauc_shared": base.wauc} | ({"wauc_adapted": adapted.wauc} if adapted else {})
    log.metrics("test", waucs)
    log.say(final_table(summary))
    for name in ("shared", "adapted"):
        for part in ("domains", "reliability") if summary[name] else ():
            log.table(f"{name}/{part}", summary[name][part])
    if config.tracking.pictures:
        take_pictures(trunk, kept, test, summary, folder.pictures, log)
    return summary


def _learned(
    config: RunConfig, ranks: Ranks, index: Index, folder: RunFolder, log: RunLog
) -> tuple[Trunk, Pretrained]:
    """A shared part: begun anew or from another run's, and pretrained if the run says so."""
    if "pretrain" not in config.phases:
        # rows that nobody has trained say nothing
        config = replace(config, tables=replace(config.tables, init_std=0.0))
    trunk = new_trunk(config, ranks, index)
    if config.start_from:
        RunFolder(Path(config.start_from)).begin(trunk)
        log.say(f"begins from the shared part of {config.start_from}")
    if "pretrain" not in config.phases:
        return trunk, Pretrained(0.0, 0, {})
    teacher = None
    if config.teacher:
        teacher = teach(config, ranks, index, folder.teachers, log)
    shards = config.data.shards
    if config.align:
        align(trunk, shards, folder.checkpoints / "align", log)
    return trunk, pretrain(trunk, shards, folder.checkpoints, log, teacher=teacher)


def _adapt_all(
    trunk: Trunk,
    trunk_id: str,
    domains: tuple[str, ...],
    shards: Location,
    folder: RunFolder,
    log: RunLog,
) -> dict[str, str]:
    """Adapt each domain that has no adapter on this trunk yet; returns why others have none."""
    method, ranks, skipped = trunk.config.method.name, trunk.ranks, {}
    done = ranks.broadcast(folder.adapters.domains(method) if ranks.first else None)
    for number, domain in enumerate(domains, 1):
        if domain in done:
            folder.adapters.load(method, domain, trunk=trunk_id)
            _forget_steps(folder, domain, ranks)
            continue
        log.say(f"adapt {domain} ({number} of {len(domains)})")
        try:
            rows = _rows_of(trunk, shards, domain)
        except NoAdapterError as error:
            skipped[domain] = str(error)
            log.say(f"adapt {domain}: no adapter: {error}")
            continue
        adapter = adapt(trunk, trunk_id, rows, log, folder.adapting(domain))
        save_adapter(folder, adapter, ranks)
    return skipped


def _rows_of(trunk: Trunk, shards: Location, domain: str) -> DomainRows:
    """As `rows_of`, the same on every rank: what one cannot read, none trains on. Collective."""
    found: list[DomainRows] = []
    together(trunk.ranks, f"rows of {domain}", lambda: found.append(rows_of(trunk, shards, domain)))
    return found[0]


def _save_one_phase(trunk: Trunk, pretrained: Pretrained, index: Index, folder: RunFolder) -> None:
    """Adapters that learned together with the trunk belong to it: each is kept.

    Those that lie here already are of a start that was cut off before it had saved its trunk.
    """
    trunk_id = trunk.fingerprint() if pretrained.adapters else ""
    method, stored = trunk.config.method.name, folder.adapters

    def remove_stale() -> None:
        for domain in pretrained.adapters.keys() & set(stored.domains(method)):
            stored.remove(method, domain)

    together(trunk.ranks, folder.path, lambda: remove_stale() if trunk.ranks.first else None)
    for domain, tensors in pretrained.adapters.items():
        adapter = Adapter(
            method=method,
            domain=domain,
            version=0,
            trunk=trunk_id,
            schema=trunk.schema.fingerprint(),
            data=index.fingerprint,
            metrics={"steps": pretrained.steps, "seconds": round(pretrained.seconds, 3)},
            kept=True,
            tensors=tensors,
        )
        save_adapter(folder, adapter, trunk.ranks)


def save_adapter(folder: RunFolder, adapter: Adapter, ranks: Ranks) -> None:
    """Store an adapter once, whatever the number of ranks; what led to it is not needed then."""
    together(ranks, folder.path, lambda: folder.adapters.save(adapter) if ranks.first else None)
    _forget_steps(folder, adapter.domain, ranks)


def _forget_steps(folder: RunFolder, domain: str, ranks: Ranks) -> None:
    """Or a domain that is removed and added anew would go on from them."""
    if ranks.first:
        shutil.rmtree(folder.adapting(domain), ignore_errors=True)


@dataclass(frozen=True)
class Witness:
    """What adding a domain must not move: digests, and other domains' predictions."""

    trunk: str
    adapters: dict[str, str]
    logits: np.ndarray | None

    def differences(self, after: "Witness") -> list[str]:
        """Names of what moved; empty is the promise kept."""
        moved = ["trunk"] if self.trunk != after.trunk else []
        moved += [f"adapter of {d}" for d, h in self.adapters.items() if after.adapters[d] != h]
        if self.logits is not None and after.logits is not None:
            same = np.array_equal(self.logits.view(np.uint32), after.logits.view(np.uint32))
            moved += [] if same else ["predictions"]
        return moved


def add_domain(
    config: RunConfig,
    folder: RunFolder,
    domain: str,
    shards: Location,
    ranks: Ranks,
    notes: Path | None = None,
) -> dict[str, Any]:
    """Phase 2 for one name on a finished run, and the proof that the others did not move.

    With a folder for its notes (metrics, summary) it writes only the adapter into the run's own.
    """
    noted = RunFolder(notes or folder.path)
    log = RunLog(ranks.first, noted.path, config.tracking, f"{config.name}-{domain}")
    try:
        trunk = folder.load_trunk(config, ranks)
        rows = _rows_of(trunk, shards, domain)
        folder.begin_adding(domain, config, ranks)
        before = _witness(trunk, folder, domain)
        adapter = adapt(trunk, before.trunk, rows, log, folder.adapting(domain))
        save_adapter(folder, adapter, ranks)
        moved = ranks.broadcast(before.differences(_witness(trunk, folder, domain)))
        summary = _added_summary(trunk, folder, adapter, shards, moved)
        log.metrics("add-domain", summary)
        if ranks.first:
            noted.save_added(domain, summary)
        log.say(added_table(summary))
        if moved:
            raise RuntimeError(f"adding {domain} moved: {', '.join(moved)}; this is a defect")
        return summary
    finally:
        log.close()


def _added_summary(
    trunk: Trunk, folder: RunFolder, adapter: Adapter, shards: Location, moved: list[str]
) -> dict[str, Any]:
    test = trunk.loader(shards, trunk.config.test, (adapter.domain,))
    model = with_adapters(trunk, [adapter])
    return {
        "domain": adapter.domain,
        "shared": evaluate(trunk_alone(trunk), test, trunk.ranks).to_dict(),
        "adapted": evaluate(model, test, trunk.ranks).to_dict(),
        "kept": adapter.kept,
        "own_ids": {key: len(values) for key, values in adapter.vocabulary.items()},
        "seconds": adapter.metrics["seconds"],
        "others": len(folder.adapters.domains(adapter.method)) - 1,
        "moved": moved,
        "sizes": sizes(trunk, [adapter]),
    }


def _witness(trunk: Trunk, folder: RunFolder, domain: str) -> Witness:
    """Digests of trunk and stored adapters; predictions of the trunk's domains but `domain`."""
    method = trunk.config.method.name
    trunk_id = trunk.fingerprint()
    model = with_adapters(trunk, folder.kept_adapters(trunk, trunk_id))
    stored = folder.adapters.domains(method)
    digests = {domain: folder.adapters.digest(method, domain) for domain in stored}
    rows = trunk.loader(trunk.config.data.shards, trunk.config.test)
    found = predict(model, rows, trunk.ranks, "others' predictions")
    if found is None:
        return Witness(trunk_id, digests, None)
    others = np.array([name != domain for name in found.domains])[found.domain]
    return Witness(trunk_id, digests, found.logit[others])
