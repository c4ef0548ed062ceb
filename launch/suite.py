"""A suite file: models x settings x seeds over one run file, resolved before anything trains.

A model and a setting each change what they declare of the run file, the setting last; `[grid]`
lists values of a few keys, of which each model and setting takes the best on validation rows.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from data_shards import UserError
from data_shards.errors import unknown
from launch.kinds import KINDS, Work
from trainer import config as run_files
from trainer.config import RunConfig
from trainer.metrics import METRICS
from trainer.strictly import parsed, strictly

FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
Point = Mapping[str, Any]
"""A value of each key of the grid."""


@dataclass(frozen=True)
class Change:
    """What a row or a column of the table changes."""

    label: str
    set: tuple[str, ...] = ()
    """What it changes, as in --set."""
    without: tuple[str, ...] = ()
    """Keys of the run file that it leaves out, such as a section."""
    domain: str = ""
    """The one whose rows are scored; none named: all."""
    at: float | None = None
    """Its place on the suite's axis."""


@dataclass(frozen=True)
class Model(Change):
    """`[[models]]`: a row of the table."""

    settings: tuple[str, ...] = ()
    """Those that mean something for it; none named: all."""


@dataclass(frozen=True)
class Setting(Change):
    """`[[settings]]`: a column of the table."""

    kind: str = "train"
    scores: Literal["shared", "adapted"] = "shared"
    """Of the shared part alone, or with adapters."""


@dataclass(frozen=True)
class Published:
    """`[published]`: figures of a paper, by model and setting."""

    source: str
    figures: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Cell:
    """One place of the table at one seed, and the work that fills it."""

    model: Model
    setting: Setting
    seed: int
    work: Work

    @property
    def domain(self) -> str:
        return self.model.domain or self.setting.domain

    @property
    def name(self) -> str:
        return f"{self.model.label}, {self.setting.label}, seed {self.seed}"


@dataclass(frozen=True)
class Suite:
    """A whole suite file."""

    name: str
    title: str
    run: str
    """The run file, relative to the suite's own."""
    base: str
    """The setting that the others are tested against."""
    models: tuple[Model, ...]
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    metric: str = "wauc"
    note: str = ""
    output: str = "runs"
    """The suite's folder is `<output>/<name>`."""
    set: tuple[str, ...] = ()
    """What all of it changes."""
    axis: str = ""
    """What the `at` of the models, or of the settings, counts."""
    published: Published | None = None
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of a key such as "pretrain.lr"."""

    def __post_init__(self) -> None:
        for what, labels in (("models", self.model_labels), ("settings", self.setting_labels)):
            twice = next((label for label in labels if labels.count(label) > 1), None)
            if twice is not None or not labels:
                raise UserError(
                    f"{what}: {f'two of them are called {twice!r}' if labels else 'none'}; "
                    "each needs a label of its own"
                )
        if self.base not in self.setting_labels:
            raise unknown("setting in base", self.base, self.setting_labels)
        if self.metric not in METRICS and not self.metric.startswith("auc/"):
            raise unknown("metric", self.metric, (*METRICS, "auc/<domain>"))
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise UserError(f"seeds: {list(self.seeds)}; give at least one, and each once")
        if not FOLDER.fullmatch(self.name):
            raise UserError(f"name: {self.name!r} names a folder; letters, digits, _ and - will do")
        for model in self.models:
            for label in model.settings:
                if label not in self.setting_labels:
                    raise unknown(f"setting of {model.label!r}:", label, self.setting_labels)
        self._check_kinds()
        self._check_axis()
        self._check_published()
        self._check_grid()

    @property
    def model_labels(self) -> list[str]:
        return [model.label for model in self.models]

    @property
    def setting_labels(self) -> list[str]:
        return [setting.label for setting in self.settings]

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def places(self) -> dict[str, float]:
        """On the axis, of the models or of the settings."""
        every: tuple[Change, ...] = (*self.models, *self.settings)
        return {one.label: one.at for one in every if one.at is not None}

    @property
    def pairs(self) -> list[tuple[Model, Setting]]:
        """The places of the table, row by row."""
        return [
            (model, setting)
            for model, setting in product(self.models, self.settings)
            if not model.settings or setting.label in model.settings
        ]

    @property
    def points(self) -> list[Point]:
        """Of the grid; a suite without one has a single point, which changes nothing."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())
        ]

    def _check_kinds(self) -> None:
        for setting in self.settings:
            if setting.kind not in KINDS:
                raise unknown(f"kind of setting {setting.label!r}:", setting.kind, KINDS)
            kind = KINDS[setting.kind]
            if setting.scores not in kind.scores:
                raise UserError(
                    f"setting {setting.label!r}: kind {setting.kind} has no scores = "
                    f"{setting.scores!r}, but {' and '.join(map(repr, kind.scores))}"
                )
            for model in self.models:
                if model.domain and setting.domain:
                    raise UserError(
                        f"domain: model {model.label!r} and setting {setting.label!r} both name "
                        "one; leave it to one side"
                    )
                if kind.of_a_domain and not (model.domain or setting.domain):
                    raise UserError(
                        f"setting {setting.label!r}: kind {setting.kind} is about one domain; "
                        "give `domain` to it, or to every model"
                    )

    def _check_axis(self) -> None:
        if not self.axis and self.places:
            raise UserError(f"axis: {next(iter(self.places))!r} has a place `at` on none; name it")
        if not self.axis:
            return
        others = [one for one in self.settings if one.label != self.base]
        sides = [("models", self.models), ("settings", others)]
        placed = [(what, side) for what, side in sides if any(one.at is not None for one in side)]
        if len(placed) != 1:
            raise UserError(f"axis {self.axis!r}: give `at` to all models, or to all settings")
        [(what, side)] = placed
        for one in side:
            if one.at is None:
                raise UserError(
                    f"axis {self.axis!r}: {one.label!r} has no `at`, as other {what} do"
                )

    def _check_published(self) -> None:
        for model, row in self.published.figures.items() if self.published else ():
            if model not in self.model_labels:
                raise unknown("model in published.figures", model, self.model_labels)
            for setting in row:
                if setting not in self.setting_labels:
                    raise unknown(
                        f"setting in published.figures.{model}", setting, self.setting_labels
                    )

    def _check_grid(self) -> None:
        for key, values in self.grid.items():
            if not values:
                raise UserError(f"grid: {key} has no values; give a few, or leave it out")
            for one in (*self.models, *self.settings):
                if any(text.partition("=")[0].strip() == key for text in one.set):
                    raise UserError(f"grid: {one.label!r} sets {key} too; leave it to one of them")


class Plan:
    """A suite whose cells all stand."""

    def __init__(self, suite: Suite, path: Path, overrides: Sequence[str] = ()) -> None:
        """UserError for the first cell whose run file and changes do not go together."""
        self.suite, self.path, self.overrides = suite, path, overrides
        self._configs: dict[str, RunConfig] = {}
        for (model, setting), point in product(suite.pairs, suite.points):
            self.cell(model, setting, suite.seeds[0], point)

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> "Plan":
        """Of a suite file; the overrides are for all cells."""
        return cls(
            strictly(Suite, parsed(path, "suite", "launch/suites"), str(path)), path, overrides
        )

    def cells(self, points: Mapping[tuple[str, str], Point]) -> Iterator[Cell]:
        """Seed by seed, of those models and settings that have their point of the grid."""
        suite = self.suite
        for seed, (model, setting) in product(suite.seeds, suite.pairs):
            if (model.label, setting.label) in points:
                yield self.cell(model, setting, seed, points[model.label, setting.label])

    def cell(self, model: Model, setting: Setting, seed: int, point: Point) -> Cell:
        """The run file with the changes of both, and of a point of the grid."""
        try:
            config = self._config(model, setting, point)
            config = replace(config, seed=seed, reading=replace(config.reading, seed=seed))
            work = KINDS[setting.kind].work(config, model.domain or setting.domain)
            if setting.scores == "adapted" and not work.adapts:
                raise UserError('scores = "adapted", but phases has no adapt; add it')
        except UserError as error:
            where = f"{self.path}: model {model.label!r}, setting {setting.label!r}"
            raise UserError(f"{where}: {error}") from None
        return Cell(model, setting, seed, work)

    def _config(self, model: Model, setting: Setting, point: Point) -> RunConfig:
        values = [f"{key}={json.dumps(value)}" for key, value in point.items()]
        changes = [*self.suite.set, *self.overrides, *model.set, *setting.set, *values]
        without = [*model.without, *setting.without]
        key = json.dumps([changes, without])
        if key not in self._configs:
            file = self.path.parent / self.suite.run
            self._configs[key] = run_files.load(file, changes, without)
        return self._configs[key]

    def head(self) -> str:
        """What is compared, and what each setting changes."""
        suite = self.suite
        lines = [f"{suite.title} ({suite.run}; {suite.metric} against {suite.base!r})"]
        common = [*suite.set, *self.overrides]
        lines += [f"  all: {', '.join(common)}"] if common else []
        for one in suite.settings:
            changes = [*one.set, *(f"without {key}" for key in one.without)]
            about = f" of {one.domain}" if one.domain else ""
            lines.append(
                f"  {one.label}: {one.kind}{about}, scores {one.scores}; "
                f"{', '.join(changes) or 'as the run file says'}"
            )
        for key, values in suite.grid.items():
            lines.append(f"  {key} is one of {list(values)}, picked on validation rows")
        return "\n".join(lines)
