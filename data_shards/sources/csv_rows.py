"""What Arrow's CSV reader does not tell: where skipped rows stood, and quotes left open."""

from typing import IO

import numpy as np
import pyarrow.csv as pa_csv

from data_shards.sources.json_lines import BadLine


class Skipped:
    """Rows with too many or too few cells: passed over by Arrow, remembered here."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.wrong: list[str] = []

    def __call__(self, row: pa_csv.InvalidRow) -> str:
        self.rows.append(row.number - 2)
        self.wrong.append(f"has {row.actual_columns} cells, the header {row.expected_columns}")
        return "skip"

    def tell(self, bad_line: BadLine, told: int) -> int:
        """Tells of those not told yet; how many are told now."""
        for row, wrong in zip(self.rows[told:], self.wrong[told:], strict=True):
            bad_line(row, wrong)
            told += 1
        return told

    def places(self, good: np.ndarray) -> np.ndarray:
        """The place in the file of the n-th row that was not passed over."""
        before = np.array(self.rows, np.int64) - np.arange(len(self.rows))
        return good + np.searchsorted(before, good, side="right")


class QuoteCounter:
    """A stream that counts the quotes it passes on: closed ones are even in number."""

    closed = False

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.quotes = 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.quotes += data.count(b'"')
        return data

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
