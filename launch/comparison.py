"""A suite on its way: what is asked for, what is done, and the table of what there is."""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from data_shards import UserError
from data_shards.durable import write_whole
from data_shards.errors import LostError
from launch.cells import SuiteFolder, locked
from launch.progress import say
from launch.standing import Row, as_csv, cell_row, checked_row, printed, results, table
from launch.suite import Cell, Plan, Point, Suite
from trainer import preemption
from trainer.early_stopping import LOWER_IS_BETTER
from trainer.machine import code
from trainer.metrics import Scores
from trainer.ranks import Ranks

Points = dict[tuple[str, str], Point]
"""Of each model and setting."""
ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Asked:
    """Which cells are to be filled now; the table shows all that are."""

    seeds: tuple[int, ...]
    only: str

    @classmethod
    def of(cls, suite: Suite, seeds: Sequence[int] | None, only: str) -> "Asked":
        """UserError where nothing would be left."""
        for seed in seeds or ():
            if seed not in suite.seeds:
                raise UserError(f"--seeds {seed}: the suite has {', '.join(map(str, suite.seeds))}")
        names = [f"{model.label}, {setting.label}" for model, setting in suite.pairs]
        if not any(only in name for name in names):
            raise UserError(f"--only {only!r}: in no cell's name; there are: {'; '.join(names)}")
        return cls(tuple(seeds or suite.seeds), only)

    def __contains__(self, cell: Cell) -> bool:
        return cell.seed in self.seeds and self.about(cell)

    def about(self, cell: Cell) -> bool:
        """Whether it is of a model and a setting that are asked for, at whatever seed."""
        return self.only in f"{cell.model.label}, {cell.setting.label}"


class Comparison:
    """One process, or its ranks, at work on a suite."""

    def __init__(self, plan: Plan, asked: Asked, ranks: Ranks = ALONE) -> None:
        self.plan, self.suite, self.asked, self.ranks = plan, plan.suite, asked, ranks
        self.folder = SuiteFolder(plan.suite.folder, ranks)
        self.failed: dict[str, str] = {}
        self._took: list[float] = []

    def run(self) -> None:
        """Fill what is asked for, but for what other processes are at."""
        tried = (cell for trials in self._trials().values() for cell in trials)
        trials = [cell for cell in tried if self.asked.about(cell)]  # whatever seeds come later
        self._do(trials)
        self._do(trials, wait=True)
        self._do(self._wanted(self.ranks.broadcast(self._points())))
        self._save()

    def require_all(self) -> None:
        """UserError where a run could not be done."""
        if self.failed:
            name, why = next(iter(self.failed.items()))
            raise UserError(f"{len(self.failed)} of the runs failed; {name}: {why}")

    def progress(self) -> str:
        """How much there is of what is asked for."""
        works = {cell.work.fingerprint: cell.work for cell in self._wanted(self._points())}
        done = sum(self.folder.read(work) is not None for work in works.values())
        return f"{done} of {len(works)} runs"

    def printed(self) -> str:
        """The table of all that is finished."""
        cells = self._finished()
        if not cells:
            return "no cell is finished yet"
        lines = [printed(self.suite, table(self.suite, cells))]
        old = sum(cell["code"] != code() for cell in cells)
        if old:
            lines.append(
                f"{old} of {len(cells)} cells were filled by another version of the code: "
                f"{self.folder.path}/found holds them; without it they are run anew"
            )
        return "\n".join(lines)

    def _wanted(self, points: Points) -> list[Cell]:
        return [cell for cell in self.plan.cells(points) if cell in self.asked]

    def _trials(self) -> dict[tuple[str, str], list[Cell]]:
        """Each model and setting with each point of the grid at the first seed, scored on
        validation rows; none where there is nothing to pick."""
        suite, points = self.suite, self.suite.points
        if len(points) == 1:
            return {}
        return {
            (model.label, setting.label): [
                _on_validation(self.plan.cell(model, setting, suite.seeds[0], point))
                for point in points
            ]
            for model, setting in suite.pairs
        }

    def _points(self) -> Points:
        """What each model and setting has picked, where all is tried; as this rank sees it."""
        suite = self.suite
        if len(suite.points) == 1:
            return {(one.label, other.label): suite.points[0] for one, other in suite.pairs}
        found = {}
        for place, trials in self._trials().items():
            scored = [self._score(trial) for trial in trials]
            values = [value for value in scored if value is not None]
            if len(values) == len(scored):
                found[place] = suite.points[max(range(len(values)), key=values.__getitem__)]
        return found

    def _score(self, trial: Cell) -> float | None:
        """The more the better; None where the trial is not finished."""
        found = self.folder.read(trial.work)
        if found is None:
            return None
        metric = self.suite.metric
        value = Scores.from_dict(cell_row(trial, found)["scores"]).metric(metric)
        if value is None:
            return -math.inf
        return -value if metric in LOWER_IS_BETTER else value

    def _do(self, cells: Sequence[Cell], wait: bool = False) -> None:
        """Each piece of work once, in the order of the cells."""
        works: dict[str, list[Cell]] = {}
        for cell in cells:
            works.setdefault(cell.work.fingerprint, []).append(cell)
        for number, same in enumerate(works.values(), 1):
            if self.folder.found(same[0].work) is None:
                self._one(same, f"{number} of {len(works)}", len(works) - number, wait)

    def _one(self, cells: Sequence[Cell], which: str, others: int, wait: bool) -> None:
        left = f"; {_time(statistics.mean(self._took) * (others + 1))} left" if self._took else ""
        also = f" (and {len(cells) - 1} more cells)" if len(cells) > 1 else ""
        name = cells[0].name
        if self.ranks.first:
            say(f"== run {which}: {name}{also}{left}")
        began = time.monotonic()
        try:
            found = self.folder.get(cells[0].work, wait)
        except LostError:
            raise
        except UserError as error:
            if self.ranks.world > 1:  # the others may be anywhere
                raise UserError(f"{name}: {error}") from error
            preemption.forget()
            self._tell(name, error)
            return
        if found is not None:
            self._took.append(time.monotonic() - began)
            self._save()

    def _finished(self) -> list[Row]:
        """Of the first rank: a row for each cell that is there, whoever filled it."""
        rows = []
        for cell in self.plan.cells(self._points()):
            found = self.folder.read(cell.work)
            try:
                rows += [] if found is None else [checked_row(self.suite, cell, found)]
            except UserError as error:  # such as of a domain that has no test rows
                if cell.name not in self.failed:
                    self._tell(cell.name, error)
        return rows

    def _tell(self, name: str, error: UserError) -> None:
        self.failed[name] = str(error)
        say(f"{name}: {error}")

    def _save(self) -> None:
        """What there is now, written whole by one process at a time."""
        if not self.ranks.first:
            return
        with locked(self.folder.path / "locks" / "results", wait=True):
            rows = self._finished()
            found = results(self.suite, rows, self._points())
            write_whole(self.folder.path / "results.json", json.dumps(found, indent=1) + "\n")
            write_whole(self.folder.path / "results.csv", as_csv(rows))


def _on_validation(cell: Cell) -> Cell:
    """The same, with the validation rows in the place of the test rows, which it never reads."""
    config = cell.work.config
    work = replace(cell.work, config=replace(config, test=config.pretrain.validate))
    return replace(cell, work=work)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
