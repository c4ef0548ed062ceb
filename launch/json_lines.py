"""Lines for a log collector: each line on stderr as JSON with time, job, pod and rank.

BANYAN_LOG=json asks for it; a cluster's manifests do.
"""

import io
import json
import os
import time
from typing import TextIO

ASKED = "BANYAN_LOG"
# Key, and the variable that holds it.
PLACES = {"job": "JOB_NAME", "pod": "POD_NAME", "rank": "RANK"}


class JsonLines(io.TextIOBase):
    """A stream of lines that turns each into one JSON object; those that are one stay as they are,
    for they come from a rank of this process."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._begun = stream, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text.replace("\r", "\n")).split("\n")
        for line in lines:
            if line.strip():
                self._stream.write(_object(line) + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


def _object(line: str) -> str:
    if line.strip().startswith("{"):
        return line.strip()
    places = {key: os.environ[name] for key, name in PLACES.items() if name in os.environ}
    level = "error" if line.startswith(("error", "Traceback")) else "info"
    record = {"time": round(time.time(), 3), "level": level, **places, "message": line.strip()}
    return json.dumps(record, ensure_ascii=False)
