"""A verb as it is, in a process that a drill may kill: `python -m launch.drilled train RUN_FILE`.

BANYAN_DRILL names a folder. `deaths.json` there says when a rank of each start has to die;
`ledger/` gets the row ids of every step that a rank has completed. No line of the product
knows of it.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "BANYAN_DRILL"
PLAN, DEAD, COUNTS, LEDGER = "deaths.json", "dead.jsonl", "counts", "ledger"
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.link")
SAVED = ("checkpoints", "trunk", "adapters")  # of a run's folder
WRITES = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Death:
    """`rank` dies at the `number`-th event of this kind in its start; `time`: after as many
    milliseconds. With `agent` torchrun is killed instead, and its ranks go with it; with `told`
    it is SIGTERM, which leaves time to save."""

    kind: str
    number: int
    rank: int
    agent: bool = False
    told: bool = False


class Toll:
    """Counts what a process does, and ends it at the event that its death names."""

    def __init__(self, death: Death | None, last_words: Callable[[Death], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._death, self._last_words = death, last_words

    def ring(self, kind: str, number: int = 0) -> None:
        """One more event of this kind; or all up to this number."""
        self.counts[kind] += number or 1
        death = self._death
        if death and death.kind == kind and death.number == self.counts[kind]:
            self._last_words(death)
            victim = os.getppid() if death.agent else os.getpid()
            os.kill(victim, signal.SIGTERM if death.told else signal.SIGKILL)
            if not death.told:
                time.sleep(60)  # for the agent's end, which is this one's too

    def listen(self) -> None:
        """To files read and written, steps, evaluations and the clock, from now on."""
        from trainer import evaluate
        from trainer.engine import Engine

        sys.addaudithook(self._file)
        _preceded(Engine, "step", lambda: self.ring("step"))
        _preceded(evaluate, "predict", lambda: self.ring("evaluation"))

    def watch(self) -> None:
        """The clock."""
        if self._death and self._death.kind == "time":
            number = self._death.number
            alarm = threading.Timer(number / 1000, self.ring, ("time", number))
            alarm.daemon = True
            alarm.start()

    def _file(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).endswith(".tar"):
            self.ring("read")
        elif event in CHANGES or (event == "open" and (args[2] or 0) & WRITES):
            if any(f"/{part}/" in f"{args[0]}/" for part in SAVED):
                self.ring("save")


def _preceded(holder: Any, name: str, act: Callable[[], None]) -> None:
    """From now on `act` comes before each call."""
    call = getattr(holder, name)
    setattr(holder, name, lambda *args, **kwargs: (act(), call(*args, **kwargs))[1])


class Ledger:
    """The row ids of each step that this rank has completed; one file for each start and rank."""

    def __init__(self, folder: Path, start: int, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{start}-{rank}.jsonl").open("a", encoding="utf-8")

    def keep(self) -> None:
        """From now on."""
        from trainer import heartbeat
        from trainer.fit import Trainee
        from trainer.model import Sent

        file = self._file
        taken: Callable[..., Any] = Trainee.step

        def step(self: Trainee, sent: Sent, following: Sent | None, at: int) -> Any:
            loss = taken(self, sent, following, at)
            rows = sent.batch.row_id[sent.batch.weight > 0].tolist()
            line = {"phase": heartbeat.where()[0], "step": at, "rows": rows, "time": time.time()}
            file.write(json.dumps(line) + "\n")
            file.flush()  # into the system's memory, which outlives this process
            return loss

        Trainee.step = step


def keep_ledgers(folder: Path) -> None:
    """Of each group that this process joins, or one that is forked of it."""
    from trainer import ranks

    join = ranks.start

    def start(faults: ranks.FaultsConfig | None = None) -> ranks.Ranks:
        group = join(faults)
        Ledger(folder, group.broadcast(time.time_ns()), group.rank).keep()
        return group

    ranks.start = start


def main() -> int:
    folder, rank = Path(os.environ[FOLDER]), int(os.environ["RANK"])
    deaths = [Death(**death) for death in json.loads((folder / PLAN).read_text(encoding="utf-8"))]
    dead = folder / DEAD
    before = len(dead.read_text(encoding="utf-8").splitlines()) if dead.exists() else 0
    death = deaths[before] if before < len(deaths) else None

    def last_words(death: Death) -> None:
        with dead.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(death), "time": time.time()}) + "\n")

    mine = death is not None and rank == death.rank
    toll = Toll(death if mine else None, last_words)
    toll.watch()
    from launch.__main__ import main as verb

    toll.listen()
    keep_ledgers(folder / LEDGER)
    status = verb(sys.argv[1:])
    (folder / COUNTS).with_suffix(f".{rank}").write_text(json.dumps(toll.counts), encoding="utf-8")
    return status


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    os._exit(ended) if ended else sys.exit(0)
