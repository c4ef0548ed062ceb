"""Ids that travel while the batch before them trains."""

from typing import Any


class OnTheWay:
    """Ids between the ranks: first their number is exchanged (`announced`), then they are."""

    def __init__(self, context: Any, awaitable: Any) -> None:
        self.context = context
        self._announced, self._ids = awaitable, None

    def announced(self) -> None:
        """Wait for the numbers and start to move the ids, unless that has been done."""
        if self._ids is None:
            self._ids = self._announced.wait()

    def arrived(self) -> Any:
        """The ids whose rows this rank holds."""
        self.announced()
        assert self._ids is not None
        return self._ids.wait()
