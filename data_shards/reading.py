"""What a loader is told: which rows, how they are read, and from where on."""

from dataclasses import dataclass
from typing import Literal

from data_shards.errors import UserError

_CHOICES = {
    "sampler": ("mixed", "domain_pure"),
    "mix": ("proportional", "temperature"),
    "corrupt": ("error", "skip"),
}


@dataclass(frozen=True)
class Rows:
    """Which rows: these splits, of these domains (None: of all)."""

    splits: tuple[str, ...]
    domains: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Reading:
    """How rows are read. `domain_pure`: every global batch holds rows of one domain only."""

    global_batch: int = 1024
    lanes: int = 24
    shuffle_rows: int = 262144
    sampler: Literal["mixed", "domain_pure"] = "mixed"
    seed: int = 1
    mix: Literal["proportional", "temperature"] = "proportional"
    """How much of each domain a shuffled epoch holds; rows in order are read once each."""
    temperature: float = 1.0
    """Under `mix = "temperature"` a domain of n rows has a share ~ n ** (1 / temperature)."""
    corrupt: Literal["error", "skip"] = "error"
    """skip: the rows of a corrupt block become padding, and `Loader.skipped` lists it."""
    threads: int = 4
    """They fetch and check the blocks of the next window."""
    cache_dir: str = ""
    """Folder for blocks that came from a URL; empty: none are kept."""
    cache_bytes: int = 32 << 30

    def __post_init__(self) -> None:
        if min(self.global_batch, self.lanes, self.shuffle_rows) < 1:
            raise UserError("reading: global_batch, lanes and shuffle_rows are 1 or more")
        if min(self.threads, self.cache_bytes) < 1:
            raise UserError("reading: threads and cache_bytes are 1 or more")
        if self.seed < 0:
            raise UserError(f"reading: seed is 0 or more, not {self.seed}")
        if not self.temperature >= 1:
            raise UserError(f"reading: temperature is 1 or more, not {self.temperature}")
        for name, choices in _CHOICES.items():
            if (value := vars(self)[name]) not in choices:
                raise UserError(f"reading: {name} is {' or '.join(choices)}, not {value!r}")
        if self.lanes > self.global_batch:
            raise UserError(
                f"reading: {self.lanes} lanes cannot share a global batch of "
                f"{self.global_batch}; set lanes to at most {self.global_batch}"
            )


@dataclass(frozen=True)
class Cursor:
    """The next step to read, and nothing else."""

    epoch: int = 0
    step: int = 0
