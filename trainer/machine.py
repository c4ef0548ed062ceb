"""What figures were measured on."""

import hashlib
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "torchrec",
    "fbgemm-gpu-cpu",
    "fbgemm-gpu",
    "deepspeed",
    "numba",
    "numpy",
    "pyarrow",
)


@cache
def machine() -> dict[str, Any]:
    """Processor, memory, and the versions of what does the work."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # one of the two fbgemms
            packages[name] = version(name)
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(memory, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": packages,
        "matrix_library": "mkl" if torch.backends.mkl.is_available() else "other",
    }


@cache
def code() -> str:
    """A digest of the rooms that decide what a run learns."""
    root, whole = Path(__file__).parents[1], hashlib.sha256()
    for room in ("data_shards", "embeddings", "models", "trainer"):
        for path in sorted((root / room).rglob("*.py")):
            whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def _lines(path: str) -> Iterable[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else ()
