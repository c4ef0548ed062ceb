"""What a setting of a suite asks for: the run that answers, and how its scores are taken."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from data_shards.schema import canonical
from trainer.config import DataConfig, RunConfig, TrackingConfig
from trainer.phases import AdaptConfig

UNCOUNTED = ("name", "output", "tracking", "faults", "keep_checkpoints")
"""Keys of a run file that say nothing of what it learns."""
Act = Literal["train", "zero_shot", "add_domain"]


@dataclass(frozen=True)
class Work:
    """What is done once, however many cells ask for it."""

    act: Act
    config: RunConfig
    domain: str = ""

    @property
    def adapts(self) -> bool:
        """Whether there will be adapters to score."""
        phases = "adapt" in self.config.phases or self.config.pretrain.one_phase
        return self.act == "add_domain" or phases

    @property
    def fingerprint(self) -> str:
        """Equal for equal work."""
        config = {k: v for k, v in asdict(self.config).items() if k not in UNCOUNTED}
        config["data"] = data_of(self.config.data)
        return digest([self.act, self.domain, config])

    @property
    def trunk(self) -> "Work":
        """The run whose shared part a domain comes to; phase 2's choices are not its own."""
        adapt = self.config.adapt
        plain = AdaptConfig(rows=adapt.rows, validate=adapt.validate)
        return Work("train", replace(self.config, phases=("pretrain",), adapt=plain))


@dataclass(frozen=True)
class Kind:
    """How a run file, and a domain, become work."""

    work: Callable[[RunConfig, str], Work]
    scores: tuple[str, ...] = ("shared", "adapted")
    of_a_domain: bool = True


def data_of(data: DataConfig) -> dict[str, Any]:
    """What decides a shard set's content."""
    return {key: value for key, value in asdict(data).items() if key != "shards"}


def digest(value: object) -> str:
    return hashlib.sha256(canonical(json.loads(json.dumps(value, default=str)))).hexdigest()


def _run(config: RunConfig, domain: str) -> Work:
    tracking = TrackingConfig(wandb="disabled", pictures=False)
    return Work("train", replace(config, tracking=tracking, keep_checkpoints=1))


def _alone(config: RunConfig, domain: str) -> Work:
    data = replace(config.data, only=(domain,), hold_out=())
    return _run(replace(config, data=data, phases=("pretrain",)), domain)


def _held_out(config: RunConfig, domain: str) -> RunConfig:
    others = (name for name in config.data.hold_out if name != domain)
    data = replace(config.data, hold_out=(*others, domain))
    return _run(replace(config, data=data), domain).config


def _zero_shot(config: RunConfig, domain: str) -> Work:
    held_out = Work("train", _held_out(config, domain)).trunk.config
    return Work("zero_shot", held_out, domain)


def _add_domain(config: RunConfig, domain: str) -> Work:
    return Work("add_domain", _held_out(config, domain), domain)


KINDS = {
    "train": Kind(_run, of_a_domain=False),
    # the shared part of a run that has not seen the domain, on its rows
    "zero_shot": Kind(_zero_shot, ("shared",)),
    # an adapter for the domain on that same shared part
    "add_domain": Kind(_add_domain, ("adapted",)),
    # a run on the domain's rows and no others
    "alone": Kind(_alone, ("shared",)),
}
