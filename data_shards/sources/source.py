"""What every source offers."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa


class Source(Protocol):
    """Raw rows, piece by piece, the same at every call and in every process (it is picklable).

    Columns: `row_id` int64 (unique over all pieces), `domain` string, `label` float32 (0 or 1),
    `time` int64 (0 where there is none), where it is known the true click rate `probability`
    float32, and one column per field: string, list<string> when multi-valued, float32 for numbers,
    list<int32> for tokens.
    """

    def pieces(self) -> tuple[str, ...]:
        """Names of the units of parallel work; they depend on the source alone."""
        ...

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        """The rows of a piece in a fixed order; `dropped` counts what is left out, by reason."""
        ...

    def state(self) -> list[Any]:
        """What tells that the input has changed: names, sizes and times of its files."""
        ...

    def describe(self) -> dict[str, Any]:
        """What decides the rows, without the place where they happen to lie."""
        ...
