"""When a phase has learned enough."""

from dataclasses import asdict, dataclass
from typing import Any

LOWER_IS_BETTER = ("log_loss",)


@dataclass
class EarlyStopping:
    """Counts evaluations since the best one."""

    metric: str
    patience: int
    best: float | None = None
    best_step: int = -1
    without_best: int = 0

    def update(self, value: float | None, step: int) -> bool:
        """Whether this evaluation is a new best; an undefined value never is."""
        better = value is not None and (self.best is None or self._beats(value, self.best))
        if better:
            self.best, self.best_step, self.without_best = value, step, 0
        else:
            self.without_best += 1
        return better

    def lose_best(self, step: int) -> None:
        """The best state is gone: that of `step` stands for it, and whatever comes is better."""
        self.best, self.best_step = None, step

    @property
    def ended(self) -> bool:
        return self.without_best >= self.patience

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def _beats(self, value: float, best: float) -> bool:
        return value < best if self.metric in LOWER_IS_BETTER else value > best
