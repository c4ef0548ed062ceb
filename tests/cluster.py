"""A cluster in small: pods as processes, each with its own network, names, mounts and user.

A pod's container starts with the manifest's command, environment and mounts: a claim is a folder,
read-only where the manifest says so, and so is the root. Nothing else of the machine can be
written. Only two things differ from a node's: the image is this checkout with its Python, and an
interpreter that has imported the libraries already is forked instead of started.
"""

import ctypes
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.gang import _CONTEXT

ROOT = Path(__file__).parents[1]
USER = 1000
NEWNS, NEWUTS, NEWPID, NEWNET = 0x00020000, 0x04000000, 0x20000000, 0x40000000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18
PDEATHSIG, DUMPABLE = 1, 4
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/dev")
PATHS = {str(ROOT), sys.base_prefix, str(Path(sys.prefix).resolve())}
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mount:
    source: Path
    place: str
    read_only: bool


@dataclass(frozen=True)
class Pod:
    """One container as a node would start it."""

    name: str
    address: str
    command: list[str]
    environment: dict[str, str]
    mounts: list[Mount]
    log: Path
    hosts: dict[str, str] = field(default_factory=dict)


@contextmanager
def network() -> Iterator[int]:
    """The process in whose network namespace a switch stands."""
    script = "ip link add banyan type bridge && ip link set banyan up && echo up && exec sleep 999"
    process = subprocess.Popen(["unshare", "-n", "sh", "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


class Running:
    """A pod that was started."""

    def __init__(self, pod: Pod, switch: int) -> None:
        self.pod = pod
        ours, theirs = Pipe()
        self._process = _CONTEXT.Process(target=_contain, args=(pod, theirs))
        self._process.start()
        _wire(switch, ours.recv(), pod.address)
        ours.send("wired")

    def wait(self, timeout: float = 120) -> int:
        """Its exit status."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"{self.pod.name} hangs:\n{self.told()}"
        return self._process.exitcode

    def kill(self) -> None:
        """All its processes at once, as when its node is lost."""
        self._process.kill()
        self._process.join()

    def ended(self) -> bool:
        return self._process.exitcode is not None

    def told(self) -> str:
        return self.pod.log.read_text(encoding="utf-8") if self.pod.log.exists() else ""


def _wire(switch: int, process: int, address: str) -> None:
    port = f"p{process}"
    for where, command in (
        (switch, f"ip link add {port} type veth peer name eth0 netns {process}"),
        (switch, f"ip link set {port} master banyan up"),
        (process, f"ip addr add {address}/24 dev eth0"),
        (process, "ip link set eth0 up"),
        (process, "ip link set lo up"),
    ):
        subprocess.run(["nsenter", "-t", str(where), "-n", *command.split()], check=True)


def _contain(pod: Pod, parent: Connection) -> None:
    _checked(LIBC.unshare(NEWNS | NEWUTS | NEWPID | NEWNET))
    parent.send(os.getpid())
    parent.recv()
    inner = os.fork()  # the first process of the pod: all others end with it
    if inner:
        _, status = os.waitpid(inner, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    try:
        _speak_to(pod.log)
        _enter(pod)
        status = _python(pod)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _speak_to(log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)


def _enter(pod: Pod) -> None:
    """Into a root of its own, as a user who may do nothing there."""
    root = Path("/tmp")  # noqa: S108  (a mount that only this process sees)
    places = {path: (Path(path), path != "/dev") for path in {*SYSTEM, *PATHS}}
    places |= {mount.place: (mount.source, mount.read_only) for mount in pod.mounts}
    there = [(place, *places[place]) for place in sorted(places) if places[place][0].exists()]
    opened = [(os.open(source, os.O_PATH), place, fixed) for place, source, fixed in there]
    _mount("none", "/", "", RECURSIVE | PRIVATE)
    _mount("none", str(root), "tmpfs", 0)
    for source, place, fixed in opened:  # a checkout under /tmp lies in a pod's own /tmp
        _bind(source, root, place, fixed)
    (root / "proc").mkdir()
    _mount("proc", str(root / "proc"), "proc", 0)
    hosts = root / "hosts"
    names = {"localhost": "127.0.0.1", **pod.hosts}
    hosts.write_text("".join(f"{address} {name}\n" for name, address in names.items()))
    _bind(os.open(hosts, os.O_PATH), root, "/etc/hosts", True)
    _mount("none", str(root), "", REMOUNT | BIND | READ_ONLY)
    name = pod.name.encode()
    _checked(LIBC.sethostname(name, len(name)))
    os.chroot(root)
    os.chdir(ROOT)
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)
    LIBC.prctl(PDEATHSIG, signal.SIGKILL)
    LIBC.prctl(DUMPABLE, 1)  # or its own files in /proc would be root's


def _bind(source: int, root: Path, place: str, read_only: bool) -> None:
    target = root / place.lstrip("/")
    if not target.exists():
        target.mkdir(parents=True)
    _mount(f"/proc/self/fd/{source}", str(target), "", BIND | (0 if read_only else RECURSIVE))
    if read_only:
        _mount("none", str(target), "", REMOUNT | BIND | READ_ONLY)


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    _checked(LIBC.mount(source.encode(), target.encode(), kind.encode() or None, flags, None))


def _checked(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _python(pod: Pod) -> int:
    """`python -m MODULE ...`, here."""
    python, dash, module, *arguments = pod.command
    assert (python, dash) == ("python", "-m"), pod.command
    os.environ.clear()
    os.environ.update(pod.environment)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


class Node:
    """Makes pods of manifests: folders for claims, files for the run file, addresses."""

    def __init__(self, folder: Path, run_file: str) -> None:
        self.folder, self._run_file, self._pods = folder, run_file, 0

    def claim(self, name: str) -> Path:
        return _own(self.folder / "claims" / name)

    def pod(
        self, name: str, spec: dict[str, Any], container: dict[str, Any], given: dict[str, str]
    ) -> Pod:
        """One container of a pod; `given` is what only the cluster knows: names and indexes."""
        self._pods += 1
        home = _own(self.folder / "pods" / f"{self._pods}-{name}")
        volumes = {one["name"]: one for one in spec["volumes"]}
        mounts = [
            Mount(
                self._volume(volumes[one["name"]], home, one.get("subPath", "")),
                one["mountPath"],
                one.get("readOnly", False),
            )
            for one in container["volumeMounts"]
        ]
        image = {
            "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": "/tmp",
        }
        environment = image | {
            one["name"]: value
            for one in container.get("env", [])
            if (value := _value(one, given)) is not None
        }
        environment |= {name: value for name, value in given.items() if name.isupper()}
        words = [_expanded(word, environment) for word in container["command"] + container["args"]]
        address = f"10.88.0.{self._pods + 1}"
        log = self.folder / "pods" / f"{self._pods}-{name}.log"
        return Pod(name, address, words, environment, mounts, log, {name: address})

    def _volume(self, volume: dict[str, Any], home: Path, below: str) -> Path:
        if "persistentVolumeClaim" in volume:
            return _own(self.claim(volume["persistentVolumeClaim"]["claimName"]) / below)
        folder = _own(home / volume["name"])
        if "configMap" in volume:
            (folder / "run.toml").write_text(self._run_file, encoding="utf-8")
        return folder


def _value(asked: dict[str, Any], given: dict[str, str]) -> str | None:
    """An environment variable of a container; None for a secret that is not there."""
    if "value" in asked:
        return asked["value"]
    source = asked["valueFrom"]
    if "fieldRef" in source:
        return given[source["fieldRef"]["fieldPath"]]
    assert source["secretKeyRef"]["optional"]
    return None


def _expanded(word: str, environment: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word)


def _own(folder: Path) -> Path:
    """A folder of the pods' user, as fsGroup makes it."""
    if not folder.exists():
        folder.mkdir() if folder.parent.name in ("claims", "pods") else _own(folder.parent)
        folder.mkdir(exist_ok=True)
        os.chown(folder, USER, USER)
    return folder


def possible() -> bool:
    """Whether this machine lets us make namespaces and networks."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        return False
    probe = "ip link add banyan type bridge && mount -t tmpfs none /mnt"
    return not subprocess.run(["unshare", "-nm", "sh", "-c", probe], check=False).returncode
