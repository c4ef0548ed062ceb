"""Numbers of a run for Prometheus, in its text format, on the port that BANYAN_METRICS_PORT names.

The first rank serves them. Beside it every rank touches a file of its own below BANYAN_HEARTBEAT
with each batch that it has dealt with, by which a probe tells a rank that stands still.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from data_shards.errors import UserError

T = TypeVar("T")
PORT, HEARTBEAT = "BANYAN_METRICS_PORT", "BANYAN_HEARTBEAT"
BEAT_EVERY = 1.0  # seconds
# Name, kind and meaning of all that is served.
METRICS = {
    "banyan_rows_total": ("counter", "Rows that all ranks have dealt with."),
    "banyan_steps_total": ("counter", "Batches that the first rank has dealt with."),
    "banyan_seconds_total": ("counter", "The first rank's time, by part: wait for data, or work."),
    "banyan_loss": ("gauge", "Log loss at the last evaluation."),
    "banyan_auc": ("gauge", "AUC of a domain at the last evaluation."),
    "banyan_evaluation_step": ("gauge", "The step of the last evaluation."),
    "banyan_checkpoint_timestamp_seconds": ("gauge", "When a checkpoint was last saved."),
    "banyan_restarts": ("gauge", "Times that this run was started again."),
}
_values: dict[tuple[str, str], float] = {}
_lock = threading.Lock()
_beat = {"last": 0.0, "ended": 0.0}


def text() -> str:
    """All numbers so far, in Prometheus' text format."""
    with _lock:
        values = sorted(_values.items())
    lines = []
    for name, (kind, meaning) in METRICS.items():
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value!r}" for (one, labels), value in values if one == name]
    return "\n".join(lines) + "\n"


def dealt_with(what: str, rows: int) -> None:
    """One more batch; the time since the last one, less the wait for data, went into it."""
    phase, now = what.split(" epoch ")[0], time.monotonic()
    _add("banyan_rows_total", rows, phase=phase)
    _add("banyan_steps_total", 1, phase=phase)
    if _beat["ended"]:
        _add("banyan_seconds_total", now - _beat["ended"], phase=phase, part="work")
    _beat["ended"] = now
    folder = os.environ.get(HEARTBEAT)
    if folder and now - _beat["last"] >= BEAT_EVERY:
        _beat["last"] = now
        with suppress(OSError):  # the probe sees it; it is no reason to end a run
            (Path(folder) / os.environ.get("RANK", "0")).touch()


def waiting(phase: str, batches: Iterable[T]) -> Iterator[T]:
    """The same batches, with the wait for each counted apart."""
    batches = iter(batches)
    while True:
        began = time.monotonic()
        batch = next(batches, None)
        waited = time.monotonic() - began
        _add("banyan_seconds_total", waited, phase=phase, part="data")
        if _beat["ended"]:
            _beat["ended"] += waited
        if batch is None:
            return
        yield batch


def waited(phase: str) -> float:
    """Seconds that the first rank has waited for this phase's batches."""
    with _lock:
        return _values.get(("banyan_seconds_total", _labels({"phase": phase, "part": "data"})), 0.0)


def evaluated(phase: str, values: Mapping[str, Any]) -> None:
    """What a line of the metrics file says; AUC by domain where it says that."""
    if "log_loss" in values:
        _set("banyan_loss", values["log_loss"], phase=phase)
        _set("banyan_evaluation_step", values["step"], phase=phase)
    for domain, auc in values.get("domains", {}).items():
        if auc is not None:
            _set("banyan_auc", auc, phase=phase, domain=domain)


def saved() -> None:
    """A checkpoint is whole on its disk."""
    _set("banyan_checkpoint_timestamp_seconds", time.time())


def serve() -> int | None:
    """Answer on the port from now on; returns it, or None where none is asked for."""
    if PORT not in os.environ:
        return None
    restarts = (os.environ.get(name) or 0 for name in ("TORCHELASTIC_RESTART_COUNT", "RESTARTS"))
    _set("banyan_restarts", sum(map(int, restarts)))
    try:
        server = ThreadingHTTPServer(("", int(os.environ[PORT])), _Answer)
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(
            f"{PORT}={os.environ[PORT]}: no metrics can be served there ({error}); give a free "
            "port, or leave it out"
        ) from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: N802  (the name that http.server looks for)
        content = text().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """A line for each scrape says nothing."""


def _add(name: str, value: float, **labels: str) -> None:
    key = name, _labels(labels)
    with _lock:
        _values[key] = _values.get(key, 0.0) + value


def _set(name: str, value: float, **labels: str) -> None:
    with _lock:
        _values[name, _labels(labels)] = float(value)


def _labels(labels: Mapping[str, str]) -> str:
    escaped = {
        key: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for key, value in labels.items()
    }
    inner = ",".join(f'{key}="{value}"' for key, value in escaped.items())
    return f"{{{inner}}}" if inner else ""
