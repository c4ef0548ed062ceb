"""Rows to a shard set: by any number of processes, on any number of machines, with one result.

The source is cut into pieces that depend on it alone. Each stage (`rows` for the split, `values`
for the vocabulary, `blocks`) goes over all pieces, and is left out where nothing needs counting;
what it finds is joined before the next one starts. Everything lies in a folder beside the set until
the set is whole, so a writer that was killed goes on where it was. A block holds rows of one domain
and one split, so that choosing blocks chooses rows.
"""

import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.durable import flush, unfinished
from data_shards.errors import InterruptedWriteError, UserError, unknown
from data_shards.index import Block, Index, VocabularyInfo
from data_shards.pieces import (
    BEFORE,
    COUNTS,
    Job,
    count_piece,
    read_table,
    values_piece,
    write_piece,
    write_table,
)
from data_shards.processes import SAY_EVERY, Progress, Stage, do_pieces
from data_shards.prompted import Prompter
from data_shards.row_ids import Run, require_unique
from data_shards.schema import Schema
from data_shards.sources.source import Source
from data_shards.splits import SplitConfig, joined
from data_shards.stratified import standing_before
from data_shards.vocabulary import Vocabulary, load_counts
from data_shards.work_folder import work_folder


@dataclass(frozen=True)
class Part:
    """One machine's share of the pieces: every `of`th from `number` on."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise UserError(
                f"part {self.number}/{self.of}: of {max(self.of, 1)} parts the first is 0 and the "
                f"last {max(self.of - 1, 0)}"
            )


WHOLE = Part()


def write_shards(  # noqa: PLR0913  keyword-only: each is one choice of the user
    source: Source,
    schema: Schema,
    split: SplitConfig,
    out: Path,
    *,
    block_rows: int = 4096,
    shard_bytes: int = 256 << 20,
    only_domains: tuple[str, ...] = (),
    hold_out: tuple[str, ...] = (),
    base: Vocabulary | None = None,
    prompter: Prompter | None = None,
    jobs: int = 1,
    part: Part = WHOLE,
    progress: Progress = lambda _: None,
) -> Index:
    """Write a shard set into the new folder `out`, with `jobs` processes.

    `hold_out` domains are left out and count in no vocabulary; with `only_domains` all others
    are. With `base` ids extend the vocabulary of the trunk. The `prompter` makes the schema's field
    of tokens out of the source's rows. Of several parts, which all start
    with the same choices on a common file system, the first joins the set; the others wait for it,
    and one that is started once more, when the set is there, has nothing left to do.
    """
    if base is not None and base.schema != schema:
        field = base.schema.first_difference(schema)
        raise UserError(f"the base vocabulary is of another schema: field {field!r} differs")
    split.require_fields(schema)
    job = Job(
        source=source,
        schema=schema,
        split=split,
        folder=out.with_name(f".{out.name}.writing"),
        block_rows=block_rows,
        shard_bytes=shard_bytes,
        only=only_domains,
        hold_out=hold_out,
        base_sizes=base.sizes if base else None,
        base_fingerprint=base.fingerprint if base else None,
        prompter=prompter,
    )
    if out.exists():
        return _existing(job, out, part)
    with work_folder(job, out, part.number, part.of):
        return _Writing(job, base, jobs, part, progress).write(out)


def _existing(job: Job, out: Path, part: Part) -> Index:
    """The set that all parts have made already; any other that is there is an error."""
    if part.of > 1 and (out / "index.json").exists():
        index = Index.load(out)
        if (index.schema, index.source, index.split) == (
            job.schema,
            job.describe_source(),
            job.split,
        ):
            return index
    raise UserError(f"{out}: exists already; give another path or delete it")


class _Writing:
    """The stages, as one part of the writers goes through them."""

    def __init__(
        self, job: Job, base: Vocabulary | None, jobs: int, part: Part, progress: Progress
    ) -> None:
        self.job, self.base, self.jobs, self.part, self.say = job, base, jobs, part, progress
        self.pieces = range(len(job.source.pieces()))
        self.mine = self.pieces[part.number :: part.of]
        self.total: int | None = None

    def write(self, out: Path) -> Index:
        """All stages, and in the first part the index and the set's name."""
        job = self.job
        if not self.pieces:
            raise UserError("the source has no rows")
        if self.part.number and not self._todo("blocks"):
            return self._await_set(out)  # which part 0 may be about to join
        if job.split.counted:
            self._stage("rows", count_piece)
            self._join_counts()
        self._save_vocabulary()
        self._stage("blocks", write_piece, everyone=self.part.number == 0)
        if self.part.number:
            self.say(f"part {self.part.number} of {self.part.of} is done; part 0 joins the set")
            return self._await_set(out)
        index = self._index()
        index.save(job.folder)
        _finish(job.folder, out)
        blocks, shards = len(index.blocks), len(index.shards)
        self.say(f"{index.rows:,} rows in {blocks:,} blocks, {shards} shards")
        return index

    def _join_counts(self) -> None:
        """What the split needs of all pieces together, one piece at a time."""
        job = self.job
        counted = [job.table("rows", piece) for piece in self.pieces]
        write_table(job.folder / COUNTS, joined(job.split, map(read_table, counted)))
        if job.split.by == "per_domain":
            for piece, standing in enumerate(standing_before(map(read_table, counted))):
                if piece in self.mine:
                    write_table(job.table(BEFORE, piece), standing)

    def _save_vocabulary(self) -> None:
        job = self.job
        counts = {}
        if any(field.vocabulary == "frequency" for field in job.schema.ids):
            self._stage("values", values_piece)
            folders = (job.folder / f"values-{piece:05d}" for piece in self.pieces)
            counts = load_counts(job.schema, folders)
        fresh = self.base.extend(counts) if self.base else Vocabulary.build(job.schema, counts)
        beside = unfinished(job.folder / "vocabulary")
        fresh.save(beside)
        try:
            beside.rename(job.folder / "vocabulary")
        except OSError:  # another part was first, or this one before it was killed: the same bytes
            shutil.rmtree(beside)
        self.say("vocabulary: " + ", ".join(f"{k} {v:,}" for k, v in fresh.sizes.items()))

    def _stage(self, name: str, act: Stage, everyone: bool = True) -> None:
        """Do this part's pieces, then wait for those of the others (if `everyone` is needed)."""
        todo = self._todo(name)
        if len(todo) < len(self.mine):
            self.say(f"{name}: {len(self.mine) - len(todo)} pieces are there already")
        do_pieces(name, act, self.job, todo, self.jobs, self._expected(len(todo)), self.say)
        if everyone:
            self._await_others(name)
            self._check_domains(name)

    def _todo(self, name: str) -> list[int]:
        return [piece for piece in self.mine if not self.job.result(name, piece).exists()]

    def _expected(self, todo: int) -> int | None:
        """Rows that the stage will read here, once a stage has counted them."""
        return self.total and self.total * todo // len(self.pieces)

    def _await_others(self, name: str) -> None:
        said = 0.0
        while missing := [p for p in self.pieces if not self.job.result(name, p).exists()]:
            self._check_others()
            if time.monotonic() - said > 6 * SAY_EVERY:
                said = time.monotonic()
                parts = sorted({piece % self.part.of for piece in missing})
                self.say(
                    f"{name}: waiting for {len(missing)} pieces of the parts "
                    f"{', '.join(map(str, parts))} of {self.part.of}"
                )
            time.sleep(0.2)

    def _await_set(self, out: Path) -> Index:
        while not out.exists():
            self._check_others()
            time.sleep(0.2)
        return Index.load(out)

    def _check_others(self) -> None:
        for failure in sorted(self.job.folder.glob("failed-*")):
            raise InterruptedWriteError(
                f"another part stopped: {failure.read_text(encoding='utf-8')}; start it again "
                "first, then this one"
            )

    def _check_domains(self, stage: str) -> None:
        found = self._sum(stage, "domains")
        self.total = sum(found.values())
        if not found:
            raise UserError("the source has no rows")
        for name in (*self.job.only, *self.job.hold_out):
            if name not in found:
                raise unknown("domain", name, found)
        if not any(self.job.keeps(name) for name in found):
            raise UserError("no domain is left to write; hold out fewer")

    def _sum(self, stage: str, what: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for piece in self.pieces:
            total.update(_result(self.job, stage, piece)[what])
        return total

    def _index(self) -> Index:
        job = self.job
        results = [_result(job, "blocks", piece) for piece in self.pieces]
        runs = [Run(*run) for result in results for run in result["ids"]]
        require_unique(job.folder, runs, job.source.pieces())
        blocks = tuple(Block(*row) for result in results for row in result["blocks"])
        dropped = dict(sorted(self._sum("blocks", "dropped").items()))
        if not any(block.split in job.split.vocabulary_parts for block in blocks):
            raise UserError(
                f"no row is left in {', '.join(job.split.vocabulary_parts)} (left out: "
                f"{', '.join(f'{n:,} {why}' for why, n in dropped.items()) or 'none'}); look at "
                "the split and at the unit of the times"
            )
        vocabulary = Vocabulary.load(
            job.folder / "vocabulary", job.schema, job.base_sizes, job.base_fingerprint
        )
        return Index(
            schema=job.schema,
            domains=tuple(sorted({block.domain for block in blocks})),
            blocks=blocks,
            shards={name: size for result in results for name, size in result["shards"].items()},
            vocabulary=VocabularyInfo.of(vocabulary),
            source=job.describe_source(),
            split=job.split,
            dropped=dropped,
        )


def _result(job: Job, stage: str, piece: int) -> dict[str, Any]:
    return json.loads(job.result(stage, piece).read_text(encoding="utf-8"))


def _finish(folder: Path, out: Path) -> None:
    """The set gets its name, and then loses what only its writers needed."""
    for path in (*(folder / "vocabulary").iterdir(), folder / "index.json", folder):
        flush(path)
    folder.rename(out)
    for path in out.iterdir():
        if path.suffix != ".tar" and path.name not in ("vocabulary", "index.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
