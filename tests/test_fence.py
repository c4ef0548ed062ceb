"""A run's folder has one writer: ranks end with their agent, and a second start is kept out."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import TextIO

import pytest

from data_shards.errors import LostError
from launch.tie import leave_with
from trainer import fence as fences
from trainer.fence import LOCK, fence

ROOT = Path(__file__).parents[1]
RANK = """
import launch, os, sys, time
print("torch" in sys.modules, flush=True)
time.sleep(5)
print("outlived", flush=True)
"""


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[TextIO]:
    """The lock of a folder that somebody else holds: a lock belongs to who has opened the file."""
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("pid 7 on that machine", end="", file=lock, flush=True)
        yield lock


def _free(folder: Path) -> bool:
    with (folder / LOCK).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_lock_whose_file_was_deleted_keeps_nobody_in(tmp_path: Path) -> None:
    """Who waited for it looks at the file that is there now."""
    first, second = ((tmp_path / LOCK).open("a+") for _ in range(2))
    fcntl.flock(first, fcntl.LOCK_EX)

    def replaced() -> None:
        (tmp_path / LOCK).unlink()
        third = (tmp_path / LOCK).open("a+")
        fcntl.flock(third, fcntl.LOCK_EX)
        held.append(third)
        first.close()

    held: list[TextIO] = []
    timer = Timer(0.3, replaced)
    timer.start()
    with pytest.raises(LostError, match="another process writes to it"), fence(tmp_path, 1.0):
        pass
    held[0].close()
    second.close()


@pytest.mark.parametrize("put_back", [False, True])
def test_a_lock_is_none_whose_file_is_taken_away_before_it_is_locked(
    put_back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `remove-domain` does, between another start's open and its flock."""
    folder, opened = tmp_path / "home", list[Path]()
    really = fences._opened

    def late(home: Path) -> TextIO:
        file = really(home)
        if not opened:
            home.rename(tmp_path / "doomed")
            if put_back:
                really(home).close()
        opened.append(home)
        return file

    monkeypatch.setattr(fences, "_opened", late)
    with fence(folder, patience=5):
        assert len(opened) == 2
        with (folder / LOCK).open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_rank_is_tied_to_its_agent_before_it_imports_anything_heavy() -> None:
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "toy", "PYTHONPATH": str(ROOT)}
    command = ["sh", "-c", '"$0" -c "$1" & wait', sys.executable, RANK]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None and agent.stdout.readline() == b"False\n"
        agent.kill()
        assert agent.stdout.read() == b"", "until the rank has gone as well"


def test_a_rank_whose_agent_went_before_ends_at_once() -> None:
    child = os.fork()
    if child == 0:
        leave_with(os.getpid())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_one_process_has_one_folder_for_itself(tmp_path: Path) -> None:
    with fence(tmp_path / "a"):
        assert not _free(tmp_path / "a")
        assert (tmp_path / "a" / LOCK).read_text().startswith(f"pid {os.getpid()} on ")
        with fence(tmp_path / "b"):
            assert not _free(tmp_path / "a") and not _free(tmp_path / "b")
        assert _free(tmp_path / "b")
    assert _free(tmp_path / "a")


def test_a_folder_that_is_taken_is_refused(
    tmp_path: Path, taken: TextIO, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = r"\(pid 7 on that machine\); wait for it or stop it, or"
    with pytest.raises(LostError, match=wanted), fence(tmp_path, 0.1):
        pass
    assert "waiting 0.1 s at most for another process (pid 7 on" in capsys.readouterr().err


def test_one_that_is_about_to_end_is_waited_for(tmp_path: Path, taken: TextIO) -> None:
    Timer(0.3, taken.close).start()
    with fence(tmp_path, 30):
        assert taken.closed and not _free(tmp_path)


def test_a_file_system_without_locks_is_said_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(file: TextIO, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fences.fcntl, "flock", without)
    with fence(tmp_path, 0.1):
        pass
    assert "cannot be locked (No locks available): that no other" in capsys.readouterr().err
