"""What a search may try: run file keys, and the values of each."""

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from data_shards import UserError
from trainer import config as run_files
from trainer.config import RunConfig

RANGE = ("low", "high", "log", "step")
FORMS = "give a list of values, or a range {low = 1e-4, high = 1e-2, log = true}"


@dataclass(frozen=True)
class Search:
    """Keys of a run file and their distributions. A value is the text that --set takes."""

    run_file: Path
    overrides: tuple[str, ...]
    space: dict[str, BaseDistribution]

    @classmethod
    def parse(cls, run_file: Path, overrides: Sequence[str], asked: Sequence[str]) -> "Search":
        """Of `KEY=[...]` and `KEY={low=..., high=...}`; each value that an end of it gives must
        make a run file."""
        space = dict(map(_distribution, asked))
        search = cls(run_file, tuple(overrides), space)
        for key, distribution in space.items():
            for value in _ends(distribution):
                search.resolved({key: value})
        return search

    def resolved(self, values: dict[str, Any], *more: str) -> RunConfig:
        """The run file with these values in it."""
        return run_files.load(self.run_file, [*self.overrides, *assigned(values), *more])

    def own_values(self, config: RunConfig) -> dict[str, Any] | None:
        """What the run file itself has, or None where it is not among what is searched."""
        written = tomllib.loads(run_files.dump(config))
        found = {key: _at(written, key) for key in self.space}
        for key, distribution in self.space.items():
            if isinstance(distribution, CategoricalDistribution):
                found[key] = json.dumps(found[key])
        inside = all(_within(self.space[key], value) for key, value in found.items())
        return found if inside else None

    def describe(self, config: RunConfig) -> dict[str, str]:
        """As text, to tell one search from another: the space, and the run file around it."""
        space = {f"--search {key}": str(one) for key, one in self.space.items()}
        return {**space, "run file": sha256(run_files.dump(config).encode()).hexdigest()}


def assigned(values: dict[str, Any]) -> list[str]:
    """As --set takes them."""
    return [f"{key}={value}" for key, value in values.items()]


def _distribution(asked: str) -> tuple[str, BaseDistribution]:
    key, _, text = asked.partition("=")
    try:
        given = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        given = None
    if isinstance(given, list) and len(given) > 1:
        return key, CategoricalDistribution([json.dumps(one) for one in given])
    if not isinstance(given, dict) or not {"low", "high"} <= given.keys() <= {*RANGE}:
        raise UserError(f"--search {asked}: {FORMS}, of two values or more")
    whole = isinstance(given["low"], int) and isinstance(given["high"], int)
    try:
        return key, IntDistribution(**given) if whole else FloatDistribution(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"--search {asked}: {error}; {FORMS}") from None


def _ends(distribution: BaseDistribution) -> Iterator[Any]:
    if isinstance(distribution, CategoricalDistribution):
        yield from distribution.choices
    elif isinstance(distribution, IntDistribution | FloatDistribution):
        yield distribution.low
        yield distribution.high


def _at(written: Any, key: str) -> Any:
    """The value of a dotted key; None where it was not given and has no default."""
    for part in key.split("."):
        written = written.get(part) if isinstance(written, dict) else None
    return written


def _within(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (TypeError, ValueError):
        return False


def score_of(summary: dict[str, Any], metric: str) -> float | None:
    """`metric` of a run: with its adapters, or of the shared part where it has no others."""
    scores = summary["adapted"] or summary["shared"]
    name, slash, domain = metric.partition("/")
    if slash:
        scores = next((one for one in scores["domains"] if one["domain"] == domain), {})
    return scores.get(name)


def on_validation(config: RunConfig) -> str:
    """The override by which a run's final scores are of validation rows, and test rows unread."""
    phase = config.adapt if "adapt" in config.phases else config.pretrain
    return f"test={json.dumps(list(phase.validate))}"


def with_values(config: RunConfig, best: RunConfig) -> RunConfig:
    """`best`, under the names of the run that was searched."""
    return replace(best, name=config.name, output=config.output, test=config.test)
