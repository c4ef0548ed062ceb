"""What a long run of models has found so far, in a file: cut off, it goes on where it was."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer import ranks as groups
from trainer.machine import machine


class Measured:
    """Findings by name, in a JSON file that the first rank writes."""

    def __init__(self, path: Path, ranks: groups.Ranks, about: dict[str, Any]) -> None:
        self.path, self.ranks, self.about = path, ranks, about
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.found: dict[str, Any] = ranks.broadcast(found.get("measured", {}))

    def once(self, key: str, act: Callable[[], dict[str, Any]]) -> None:
        """Measure and store this, unless it is there; ranks act together."""
        if key in self.found:
            return
        began = time.monotonic()
        found = act()
        self.found[key] = {"wall_seconds": round(time.monotonic() - began, 1), **found}
        now = datetime.now(UTC).isoformat(timespec="minutes")
        whole = {"date": now, "machine": machine(), **self.about, "measured": self.found}
        if self.ranks.first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
