"""What every source offers."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import pyarrow as pa


@dataclass(frozen=True)
class SourceConfig:
    """Where raw rows lie and how they become labels and domains."""

    kind: str = "movielens"
    path: str = ""
    label: Literal["five_stars", "drop_three"] = "five_stars"
    domains: Literal["gender", "age", "occupation", "age3"] = "gender"

    def describe(self) -> dict[str, Any]:
        """What decides the rows, without the place where they happen to lie."""
        described = asdict(self)
        del described["path"]
        return described


class Source(Protocol):
    """Raw rows, table by table, the same at every call.

    Columns: `row_id` int64 (unique), `domain` string, `label` float32 (0 or 1), `time` int64, and
    one column per field: string, list<string> when multi-valued, float32 for numbers.
    """

    config: SourceConfig

    def __init__(self, config: SourceConfig) -> None: ...

    def tables(self) -> Iterator[pa.Table]:
        """All rows in a fixed order."""
        ...

    def dropped(self) -> dict[str, int]:
        """Rows that the source left out, by reason."""
        ...
