"""What figures were measured on."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "deepspeed",
    "numba",
    "numpy",
    "pyarrow",
)


def machine() -> dict[str, Any]:
    """This machine and the packages that count, as plain values for JSON."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "matrix_library": "mkl" if torch.backends.mkl.is_available() else "other",
    }


def _versions() -> Iterable[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:  # one of the two fbgemm is never there
            continue


def _lines(path: str) -> Iterable[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else ()
