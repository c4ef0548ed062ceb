"""What the steps of a phase are like: their loss, their speed, and how long they wait for data."""

from collections.abc import Callable
from typing import Any

import torch

from data_shards import UserError
from trainer import exporter
from trainer.log import RunLog
from trainer.ranks import Ranks

LOSS_EVERY = 50  # steps between looks at the loss: each look is one small all-reduce
LINE_EVERY = 10.0  # seconds between lines in the metrics file, at least; evaluations have their own


class Meter:
    """Of one phase, on each rank; stops a run whose weights have gone astray."""

    def __init__(
        self,
        ranks: Ranks,
        diagnose: Callable[[], str | None],
        log: RunLog,
        name: str,
        seconds: float,
    ) -> None:
        self.ranks, self.log, self.name = ranks, log, name
        self._diagnose = diagnose
        self._sum: torch.Tensor | float = 0.0
        self._steps = 0
        self._loss: float | None = None
        self._rows, self._seconds, self._waited = 0, seconds, exporter.waited(name)
        self.shown = ""

    def add(self, loss: torch.Tensor, rows: int, step: int) -> None:
        """One more step, of `rows` rows; `loss` is this rank's share of their mean."""
        self._sum, self._steps, self._rows = self._sum + loss, self._steps + 1, self._rows + rows
        if self._steps == LOSS_EVERY:
            self._look(step)

    def tell(self, step: int, seconds: float) -> None:
        """A line, where the last one is long ago; `seconds` is the phase's training time so far."""
        if self._steps == 0 and seconds - self._seconds >= LINE_EVERY:
            self.log.metrics(self.name, {"step": step, **self.since_last(step, seconds)})

    def since_last(self, step: int, seconds: float) -> dict[str, Any]:
        """Loss of the last steps, rows of all ranks a second since the last line, and the share of
        that time in which the first rank waited for data; nothing without a step. Collective."""
        if not self._rows:
            return {}
        if self._steps:
            self._look(step)
        waited, took = exporter.waited(self.name), max(seconds - self._seconds, 1e-9)
        values = {
            "loss": self._loss,
            "rows_per_second": round(self._rows / took, 1),
            "waiting": round(min((waited - self._waited) / took, 1.0), 4),
        }
        self._rows, self._seconds, self._waited = 0, seconds, waited
        return values

    def _look(self, step: int) -> None:
        self._loss = sum(self.ranks.gather(float(self._sum))) / self._steps
        wrong = self._diagnose()
        if wrong is not None:
            raise UserError(f"{self.name}: step {step}: {wrong}")
        self._sum, self._steps, self.shown = 0.0, 0, f"loss {self._loss:.4f}"
