"""A network of each domain's own, trained before the shared part and heard by it (UFIN II-D3).

Teachers are trained one after another by phase 1's own loop. What is kept of them are their logits
of the rows that phase 1 learns from, as a sidecar of the shard set; they are never loaded again.
"""

import hashlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import safetensors.numpy

from data_shards import Index, UserError
from data_shards.durable import flush
from data_shards.index import Block
from data_shards.reader import CorruptBlockError, ShardReader
from data_shards.schema import canonical
from data_shards.sidecars import Sidecar, SidecarWriter
from models import MLoRAConfig
from trainer.config import RunConfig
from trainer.evaluate import Predictions, predict
from trainer.log import RunLog
from trainer.model import TEACHER, trunk_alone
from trainer.phases import PretrainConfig, TeacherConfig
from trainer.pretrain import pretrain
from trainer.ranks import Ranks, together
from trainer.trunk import new_trunk


def teach(config: RunConfig, ranks: Ranks, index: Index, folder: Path, log: RunLog) -> Path:
    """Train the teacher of every domain that has none yet; the sidecar of their logits, in
    `folder`. Started again, it goes on with the domain where it was cut off. Collective."""
    teacher = config.teacher
    assert teacher is not None
    sidecar, made_by = folder / "logits", _made_by(config, teacher)
    if (sidecar / "sidecar.json").exists():
        Sidecar.open(sidecar, index, made_by)
        return sidecar
    _require_both_classes(config, teacher, index)
    for number, domain in enumerate(index.domains, 1):
        if domain not in teacher.without:
            log.say(f"teacher of {domain} ({number} of {len(index.domains)})")
            _teach(config, teacher, ranks, index, domain, folder, log)
    together(ranks, folder, lambda: _write(config, index, folder, made_by) if ranks.first else None)
    return sidecar


def phase_of(domain: str) -> str:
    """The name of the phase in which a domain's teacher learns."""
    return f"teacher of {domain}"


def _teach(
    config: RunConfig,
    teacher: TeacherConfig,
    ranks: Ranks,
    index: Index,
    domain: str,
    folder: Path,
    log: RunLog,
) -> None:
    """One domain's teacher, unless its logits are there already."""
    path = _logits(folder, index, domain)
    home = path.with_suffix("")
    if not any(ranks.gather(path.exists())):
        trunk = new_trunk(_alone(config, teacher), ranks, index)
        shards, domains = config.data.shards, (domain,)
        pretrain(trunk, shards, home, log, domains=domains, name=phase_of(domain))
        rows = trunk.loader(shards, config.pretrain.rows, domains)
        found = predict(trunk_alone(trunk), rows, ranks, f"logits of {domain}'s teacher")
        together(ranks, folder, lambda: _save(path, found) if found is not None else None)
    if ranks.first:  # also what a start left that was cut off here
        shutil.rmtree(home, ignore_errors=True)


def _alone(config: RunConfig, teacher: TeacherConfig) -> RunConfig:
    """The run file of a teacher: the run's own, with a backbone over all ids as its method."""
    phase = {k: v for k, v in vars(teacher).items() if k not in ("backbone", "without")}
    return replace(
        config,
        method=MLoRAConfig(),
        backbone=teacher.backbone,
        pretrain=PretrainConfig(**phase),
        text=None,
        teacher=None,
    )


def _write(config: RunConfig, index: Index, folder: Path, made_by: dict[str, object]) -> None:
    """The logits of all teachers in the order of the index; NaN where a row has none."""
    writer = SidecarWriter(folder / "logits", index, {TEACHER: "float32"}, made_by)
    reader = ShardReader(config.data.shards, index)
    known: dict[str, dict[str, np.ndarray]] = {}
    for number in writer.todo:
        block = index.blocks[number]
        values = np.full(block.rows, np.nan, np.float32)
        path = _logits(folder, index, block.domain)
        if block.split in config.pretrain.rows and path.exists():
            if block.domain not in known:
                known = {block.domain: safetensors.numpy.load_file(path)}
            values = _of_block(reader, block, known[block.domain], config.reading.corrupt, values)
        writer.put(number, {TEACHER: values})
    writer.finish()
    for path in folder.glob("*.safetensors"):
        path.unlink()


def _of_block(
    reader: ShardReader,
    block: Block,
    known: dict[str, np.ndarray],
    corrupt: str,
    blank: np.ndarray,
) -> np.ndarray:
    """A block's logits; those of `blank` for rows that were left out as corrupt."""
    try:
        row_id = reader.read(block)["row_id"].to_numpy()
    except CorruptBlockError:
        if corrupt == "error":
            raise
        return blank
    place = np.searchsorted(known["row_id"], row_id).clip(max=len(known["row_id"]) - 1)
    return np.where(known["row_id"][place] == row_id, known["logit"][place], blank)


def _logits(folder: Path, index: Index, domain: str) -> Path:
    """Where one teacher's logits wait for the others'; a number, for a name may hold anything."""
    return folder / f"{index.domains.index(domain):05d}.safetensors"


def _save(path: Path, found: Predictions) -> None:
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    logits = {"row_id": found.row_id, "logit": found.logit}
    safetensors.numpy.save_file(logits, temporary)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def _made_by(config: RunConfig, teacher: TeacherConfig) -> dict[str, object]:
    """What the logits depend on."""
    parts = asdict(teacher), asdict(config.tables), config.pretrain.rows
    digest = hashlib.sha256(canonical([config.seed, *parts])).hexdigest()
    return {"teacher": digest}


def _require_both_classes(config: RunConfig, teacher: TeacherConfig, index: Index) -> None:
    for domain in teacher.without:
        if domain not in index.domains:
            raise UserError(
                f"teacher.without: no domain {domain!r} in {config.data.shards}; there are: "
                f"{', '.join(index.domains)}"
            )
    for domain in index.domains:
        for splits in (teacher.rows, teacher.validate):
            blocks = index.select(splits, (domain,))
            positives, rows = sum(b.positives for b in blocks), sum(b.rows for b in blocks)
            if positives in (0, rows) and domain not in teacher.without:
                raise UserError(
                    f"domain {domain!r} can have no teacher: all {rows} rows of "
                    f"{', '.join(splits)} have label {int(positives > 0)}; name it in "
                    "teacher.without, and nothing is distilled there"
                )
