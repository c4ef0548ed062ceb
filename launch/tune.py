"""Search values of a run file on its validation rows alone (Optuna's TPE).

Each trial is a run of its own in OUTPUT/NAME-tune/, the first one with the run file's own values.
Scores are of validation rows: test rows are not read. Started again, it goes on where it stopped.
At the end the best values are in best.toml there, ready to train, and all trials in trials.csv; of
trials no weights are kept.

Example: python -m launch tune launch/runs/movielens_mlora.toml --trials 12 --jobs 2 \
--search 'pretrain.lr={low=5e-4, high=1e-2, log=true}' --search 'backbone.dropout=[0.2, 0.5]'
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards import UserError
from launch.progress import say
from trainer.preemption import SAVED, PreemptedError

if TYPE_CHECKING:
    import optuna

    from launch.search import Search
    from trainer.config import RunConfig

# Attributes of a trial: the folder where it runs, which one that was cut off hands to the one in
# its place, and why it came to no end.
FOLDER, FAILED = "folder", "failed"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=Path)
    parser.add_argument(
        "--search",
        action="append",
        required=True,
        metavar="KEY=VALUES",
        help="a list, or a range {low=1e-4, high=1e-2, log=true}; of whole numbers if both are",
    )
    parser.add_argument("--trials", type=int, default=20, help="in all, those of before among them")
    parser.add_argument("--jobs", type=int, default=1, help="trials side by side")
    parser.add_argument("--ranks", default="1", help="of each trial, as for `run`")
    parser.add_argument("--metric", help="of the validation rows; default: pretrain.metric")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")


def run(args: argparse.Namespace) -> None:
    from data_shards import Index
    from launch.search import Search
    from trainer import config as run_files

    if min(args.trials, args.jobs) < 1:
        raise UserError("--trials and --jobs are 1 or more")
    config = run_files.load(args.run_file, args.overrides)
    metric = args.metric or config.pretrain.metric
    search = Search.parse(args.run_file, args.overrides, args.search)
    search.resolved({}, f"pretrain.metric={metric}")  # or it says which there are
    Index.load(config.data.shards)  # each trial would say that they are missing
    tuning = Tuning(args, config, search, metric)
    with tuning.ended():
        tuning.play()
    say(tuning.table())


class Tuning:
    """A study in a folder, and the runs that are its trials."""

    def __init__(
        self, args: argparse.Namespace, config: "RunConfig", search: "Search", metric: str
    ) -> None:
        self.args, self.config, self.search, self.metric = args, config, search, metric
        self.folder = Path(config.output) / f"{config.name}-tune"
        self.study = _study(self.folder, search, config, self.metric)
        self.running: dict[subprocess.Popen[bytes], optuna.Trial] = {}
        self._began, self._before = time.monotonic(), len(self._finished())

    def play(self) -> None:
        """Trials until there are enough."""
        while len(self._finished()) < self.args.trials:
            room = min(self.args.jobs, self.args.trials - len(self._finished()))
            while len(self.running) < room:
                self._start()
            time.sleep(0.2)
            for process in [one for one in self.running if one.poll() is not None]:
                self._end(self.running.pop(process), process.returncode)

    @contextmanager
    def ended(self) -> Iterator[None]:
        """No trial outlives the search, and one that SIGTERM ends has saved what it can."""
        handler = signal.signal(signal.SIGTERM, _leave)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, handler)
            for process in self.running:
                process.terminate()
            for process in self.running:
                process.wait()

    def table(self) -> str:
        """The trials, the best first; writes them and the best run file."""
        from launch.search import with_values
        from trainer import config as run_files
        from trainer.early_stopping import LOWER_IS_BETTER
        from trainer.report import grid

        done = [one for one in self.study.trials if one.value is not None]
        done.sort(key=_value, reverse=self.metric not in LOWER_IS_BETTER)
        failed = [one.user_attrs[FAILED] for one in self.study.trials if FAILED in one.user_attrs]
        if not done:
            raise UserError(f"no trial came to its end; the last one: {failed[-1]}")
        head = ["trial", *self.search.space, f"validation {self.metric}"]
        rows = [[one.number, *one.params.values(), _value(one)] for one in done]
        with (self.folder / "trials.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([head, *rows])
        best = with_values(self.config, self.search.resolved(done[0].params))
        file = self.folder / "best.toml"
        file.write_text(run_files.dump(best), encoding="utf-8")
        lost = f"; {len(failed)} failed, the last: {failed[-1]}" if failed else ""
        shown = [[_told(cell) for cell in row] for row in rows[:10]]
        return f"{grid(head, shown)}\n{len(done)} trials{lost}\nthe best as a run file: {file}"

    def _start(self) -> None:
        from launch.search import assigned, on_validation

        trial = self.study.ask(self.search.space)
        if FOLDER not in trial.user_attrs:
            trial.set_user_attr(FOLDER, f"trial-{trial.number:03d}")
        changes = [
            *self.args.overrides,
            *assigned(trial.params),
            on_validation(self.search.resolved(trial.params)),
            f"name={json.dumps(trial.user_attrs[FOLDER])}",
            f"output={json.dumps(str(self.folder))}",
            "tracking.pictures=false",
        ]
        command = [sys.executable, "-m", "launch", "run", str(self.args.run_file)]
        command += ["--ranks", self.args.ranks]
        command += [word for one in changes for word in ("--set", one)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._log(trial).open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.running[process] = trial

    def _end(self, trial: "optuna.Trial", status: int) -> None:
        import optuna

        from launch.search import score_of

        if status == SAVED:
            _leave(signal.SIGTERM, None)
        folder = self.folder / trial.user_attrs[FOLDER]
        value, why = None, _last_line(self._log(trial))
        if status == 0:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            value, why = score_of(summary, self.metric), f"{self.metric} is undefined"
        for part in ("checkpoints", "trunk", "adapters", "teachers"):
            shutil.rmtree(folder / part, ignore_errors=True)
        if value is None:
            trial.set_user_attr(FAILED, why)
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial, value)
        told = f"failed: {why}" if value is None else f"{self.metric} {value:.5f}"
        self._progress(f"trial {trial.number}: {told}")

    def _progress(self, news: str) -> None:
        done = len(self._finished())
        pace = (time.monotonic() - self._began) / max(done - self._before, 1)
        left = max(self.args.trials - done, 0) * pace
        say(f"{news} ({done} of {self.args.trials}, {left:.0f} s left)")

    def _log(self, trial: "optuna.Trial") -> Path:
        return self.folder / f"{trial.user_attrs[FOLDER]}.log"

    def _finished(self) -> "list[optuna.trial.FrozenTrial]":
        """Trials with a value, and those that failed by themselves."""
        trials = self.study.trials
        return [one for one in trials if one.values is not None or FAILED in one.user_attrs]


def _study(folder: Path, search: "Search", config: "RunConfig", metric: str) -> "optuna.Study":
    """The study of the folder: a new one, or the one that goes on."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    from trainer.early_stopping import LOWER_IS_BETTER

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "trials.journal"))),
        study_name=config.name,
        direction="minimize" if metric in LOWER_IS_BETTER else "maximize",
        load_if_exists=True,
    )
    # new values each time that it is started
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))
    _require_same(folder, study, {**search.describe(config), "metric": metric})
    own = search.own_values(config)
    if not study.trials and own is not None:
        study.enqueue_trial(own)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # cut off
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, {FOLDER: f"trial-{trial.number:03d}"} | trial.user_attrs)
    return study


def _require_same(folder: Path, study: "optuna.Study", asked: dict[str, str]) -> None:
    before = study.user_attrs or asked
    for key in {**asked, **before}:
        if asked.get(key) != before.get(key):
            raise UserError(
                f"{folder}: holds a search with another {key} ({before.get(key)}, not "
                f"{asked.get(key)}); set another name, or delete the folder"
            )
    for key, value in asked.items():
        study.set_user_attr(key, value)


def _leave(number: int, frame: object) -> None:
    raise PreemptedError("what its trials have learned is saved; start the same command again")


def _value(trial: "optuna.trial.FrozenTrial") -> float:
    assert trial.value is not None, "a trial that is complete has a value"
    return trial.value


def _told(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
