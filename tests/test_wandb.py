"""A key of wandb that a server does not take: one line, before any rank waits for another."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb

from launch.__main__ import main
from trainer import ranks

ANSWER = b'{"errors":[{"message":"user is not logged in"}]}'


class Expired(BaseHTTPRequestHandler):
    """401 to whatever is asked."""

    def do_POST(self) -> None:  # noqa: N802  (the library's name)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """wandb's server refuses every key, and this user has none on disk."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), Expired) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        yield
        wandb.teardown()
        server.shutdown()


@pytest.mark.parametrize(
    ("key", "status", "told"),
    [
        ("a" * 40, 1, "tracking.wandb: the key is not taken: Failed to authenticate"),
        (None, 2, "tracking.wandb: No API key configured."),
    ],
)
def test_a_key_is_asked_for_before_any_rank_waits(
    key: str | None,
    status: int,
    told: str,
    toy: Path,
    refusing: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ranks, "start", lambda faults: pytest.fail("a rank waits for the others"))
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    assert main(["train", str(toy / "run.toml"), "--set", "tracking.wandb=online"]) == status
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1 and told in said[0] and "WANDB_API_KEY" in said[0]
