"""A suite's folder: shard sets, runs, and what each piece of work has found, each made once.

shards/<set>, trained/<run> (run folders), found/<work>.json, locks/. Any number of processes may
work in it at the same time: each takes what nobody has locked, and the system frees the lock of one
that is gone, whose run the next one continues.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_shards import Index, Vocabulary
from data_shards.durable import write_whole
from launch.kinds import Work, data_of, digest
from launch.measures import Cost, cost_of_adapter, cost_of_shared, latency_ms
from launch.progress import say
from launch.write_shards import write
from trainer.adapt import adapt, rows_of
from trainer.adapter_store import Adapter
from trainer.config import RunConfig
from trainer.evaluate import evaluate, zero_shot
from trainer.log import RunLog
from trainer.machine import code
from trainer.model import Model, trunk_alone, with_adapters
from trainer.ranks import Ranks, together
from trainer.report import sizes
from trainer.run_folder import RunFolder
from trainer.schedule import train
from trainer.text_build import build

Found = dict[str, Any]
"""By part, `shared` and `adapted`: scores, sizes, seconds, steps, rows_per_second, latency_ms."""


class SuiteFolder:
    """Where the work of a suite is done, by all ranks together."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path, self.ranks = path, ranks
        self._fingerprints: dict[Path, str] = {}

    def get(self, work: Work, wait: bool = False) -> Found | None:
        """What the work has found; done now, unless another process is at it. Then None, or with
        `wait` what that one finds."""
        found = self.found(work)
        if found is None:
            with self.claim(f"work-{work.fingerprint[:16]}", wait) as mine:
                found = self.found(work) if mine else None
                if mine and found is None:
                    shards = self.write(work.config)  # their rows name what may lie there
                    found = self.found(work) or self._do(work, shards)
        return found

    def found(self, work: Work) -> Found | None:
        """What finished work has found."""
        return self.ranks.broadcast(self.read(work) if self.ranks.first else None)

    def read(self, work: Work) -> Found | None:
        """Likewise, on one rank."""
        shards = self._set(work.config)
        if not shards.exists():
            return None
        path = self.path / "found" / f"{self._key(work, shards)}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _do(self, work: Work, shards: Path) -> Found:
        began, worked = time.monotonic(), time.process_time()
        key, config = self._key(work, shards), work.config
        model = config.backbone.name if config.method.name == "mlora" else config.method.name
        config = bound(config, self.path, f"{model}-{config.seed}-{key}", shards)
        found = ACTS[work.act](self, replace(work, config=config))
        found["run"], found["code"] = f"trained/{config.name}", code()
        found["wall_seconds"] = round(time.monotonic() - began, 1)
        found["cpu_seconds"] = round(time.process_time() - worked, 1)
        if self.ranks.first:
            write_whole(self.path / "found" / f"{key}.json", json.dumps(found, indent=1) + "\n")
        return found

    def write(self, config: RunConfig, base: Path | None = None) -> Path:
        """The shard set of a run and its text vectors, written unless they are there; with `base`
        a set whose ids that run numbers."""
        out = self._set(config, base)
        vocabulary = Index.load(base).load_vocabulary(base) if base else None
        with self.claim(f"shards-{out.name}", wait=True):
            together(self.ranks, out, lambda: self._write(config, out, vocabulary))
            if config.text:
                build(config, str(out), self.ranks, say if self.ranks.first else lambda text: None)
        return out

    def _write(self, config: RunConfig, out: Path, base: Vocabulary | None) -> None:
        if self.ranks.first and not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            write(config, out, base)

    @contextmanager
    def claim(self, name: str, wait: bool) -> Iterator[bool]:
        """Whether this process, with its ranks, alone has the name until the end of the block."""
        with ExitStack() as stack:
            lock = self.path / "locks" / name
            mine = self.ranks.first and stack.enter_context(locked(lock, wait))
            yield self.ranks.broadcast(mine)

    def _set(self, config: RunConfig, base: Path | None = None) -> Path:
        made_by = [data_of(config.data), config.encoder.path if config.data.prompt else ""]
        return self.path / "shards" / digest([*made_by, base.name if base else ""])[:16]

    def _key(self, work: Work, shards: Path) -> str:
        """Equal for equal work on equal rows."""
        if shards not in self._fingerprints:
            self._fingerprints[shards] = Index.load(shards).fingerprint
        return digest([work.fingerprint, self._fingerprints[shards]])[:16]


def bound(config: RunConfig, folder: Path, name: str, shards: Path) -> RunConfig:
    """The run as it stands in the suite's folder."""
    data = replace(config.data, shards=str(shards))
    return replace(config, name=name, output=str(folder / "trained"), data=data)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether the lock was to be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _train(at: SuiteFolder, work: Work) -> Found:
    """A whole run: its shared part, and with its adapters."""
    config, shards = work.config, work.config.data.shards
    summary = train(config, at.ranks)
    folder = RunFolder(config.folder)
    trunk = folder.load_trunk(config, at.ranks)
    store, method, trunk_id = folder.adapters, config.method.name, trunk.fingerprint()
    adapters = [store.load(method, name, trunk=trunk_id) for name in store.domains(method)]
    learned = cost_of_shared(trunk, folder.path / "metrics.jsonl", shards)
    # adapters that learned with the shared part have cost nothing more
    second = () if config.pretrain.one_phase else adapters
    adapted = sum((cost_of_adapter(trunk, one, shards) for one in second), learned)
    kept = [adapter for adapter in adapters if adapter.kept]

    def part(name: str, cost: Cost, model: Model, count: list[Adapter]) -> Found | None:
        if summary[name] is None:
            return None
        latency = latency_ms(trunk, model, shards)
        measured = {"sizes": sizes(trunk, count), **cost.to_dict(), "latency_ms": latency}
        return {"scores": summary[name], **measured}

    found = {
        "shared": part("shared", learned, trunk_alone(trunk), []),
        "adapted": part("adapted", adapted, with_adapters(trunk, kept), kept),
    }
    if at.ranks.first:
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return found


def _zero_shot(at: SuiteFolder, work: Work) -> Found:
    """The shared part of a run that has not seen the domain, on its rows; the run's own cost is not
    the domain's."""
    config, folder, shards = _comes_to(at, work)
    scores = zero_shot(config, folder, str(shards), config.test, work.domain, at.ranks)
    trunk = folder.load_trunk(config, at.ranks)
    latency = latency_ms(trunk, trunk_alone(trunk), str(shards), (work.domain,))
    part = {"sizes": sizes(trunk, []), **Cost().to_dict(), "latency_ms": latency}
    return {"shared": {"scores": scores.to_dict(), **part}, "adapted": None}


def _add_domain(at: SuiteFolder, work: Work) -> Found:
    """An adapter for the domain on that same shared part, and what it alone has cost."""
    trained, folder, shards = _comes_to(at, work)
    config, domain = replace(trained, adapt=work.config.adapt), work.domain
    trunk = folder.load_trunk(config, at.ranks)
    log = RunLog(at.ranks.first, work.config.folder, config.tracking, work.config.name)
    try:
        rows = rows_of(trunk, str(shards), domain)
        adapter = adapt(trunk, trunk.fingerprint(), rows, log)
    finally:
        log.close()
    kept = [adapter] if adapter.kept else []
    model, cost = with_adapters(trunk, kept), cost_of_adapter(trunk, adapter, str(shards))
    scores = evaluate(model, trunk.loader(str(shards), config.test, (domain,)), at.ranks)
    latency = latency_ms(trunk, model, str(shards), (domain,))
    part = {"sizes": sizes(trunk, kept), **cost.to_dict(), "latency_ms": latency}
    return {"shared": None, "adapted": {"scores": scores.to_dict(), **part}}


def _comes_to(at: SuiteFolder, work: Work) -> tuple[RunConfig, RunFolder, Path]:
    """The run that the domain comes to, trained by now, and the domain's rows by its ids."""
    trunk = work.trunk
    found = at.get(trunk, wait=True)
    assert found is not None
    shards = at.write(trunk.config)
    name = Path(found["run"]).name
    config = bound(trunk.config, at.path, name, shards)
    data = replace(trunk.config.data, only=(work.domain,), hold_out=())
    added = at.write(replace(trunk.config, data=data), base=shards)
    return config, RunFolder(config.folder), added


ACTS: dict[str, Callable[[SuiteFolder, Work], Found]] = {
    "train": _train,
    "zero_shot": _zero_shot,
    "add_domain": _add_domain,
}
