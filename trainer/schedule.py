"""A whole run: two phases, and what its test rows say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from data_shards import Index, Location
from trainer.adapt import NoAdapterError, adapt, rows_of
from trainer.adapter_store import Adapter
from trainer.align import align
from trainer.config import RunConfig
from trainer.evaluate import evaluate
from trainer.log import RunLog
from trainer.machine import machine
from trainer.model import trunk_alone, with_adapters
from trainer.pictures import take_pictures
from trainer.pretrain import Pretrained, pretrain
from trainer.ranks import Ranks, together
from trainer.report import final_table, sizes
from trainer.run_folder import RunFolder
from trainer.teachers import teach
from trainer.trunk import Trunk, new_trunk


def train(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Pretrain, adapt every domain, compare; returns the summary. Continues an unfinished run."""
    shards = config.data.shards
    index = Index.load(shards)
    index.require_schema(config.data.schema)
    folder = RunFolder(config.folder)
    with folder.open(config, ranks):
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
    log.left_out("test", 0, ranks, test)
    summary = {
        "trunk": trunk_id,
        "pretrain_seconds": round(seconds, 3),
        "shared": base.to_dict(),
        "adapted": adapted.to_dict() if adapted else None,
        "kept": [adapter.domain for adapter in kept],
        "skipped": skipped,
        "one_phase": config.pretrain.one_phase,
        "bad_steps": log.bad_steps(),
        "corrupt_rows": log.corrupt_rows(),
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
    config, ranks, skipped = trunk.config, trunk.ranks, {}
    for number, domain in enumerate(domains, 1):
        if folder.has_adapter(domain, trunk):
            with folder.adapting(domain, config, ranks):  # where a start was cut off, it ends here
                folder.adapters.load(config.method.name, domain, trunk=trunk_id)
            continue
        log.say(f"adapt {domain} ({number} of {len(domains)})")
        try:
            rows = rows_of(trunk, shards, domain)
        except NoAdapterError as error:
            skipped[domain] = str(error)
            log.say(f"adapt {domain}: no adapter: {error}")
            continue
        with folder.adapting(domain, config, ranks) as steps:
            if not folder.has_adapter(domain, trunk):  # an `add-domain` may have come first
                folder.save_adapter(adapt(trunk, trunk_id, rows, log, steps), ranks)
    return skipped


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
        folder.save_adapter(adapter, trunk.ranks)
