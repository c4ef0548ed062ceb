"""Files of tensors and of facts: written piece by piece, so that no second copy is in memory.

The library's own writer takes all tensors as bytes first, which for tables of many GB is as much
memory again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from data_shards import UserError

PIECE = 1 << 20  # bytes that are hashed, and written while they are in the core's cache
MOST_JSON = 64 << 20  # bytes of a manifest or a state
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, of tensors of any device and layout."""
    header, end = {}, 0
    # The widest elements first, so that each tensor begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        rows = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach()
        yield from _by_rows(rows)


def write_file(path: Path, content: Iterable[bytes | memoryview]) -> str:
    """A file that is on the disk when this returns; its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for piece in content:
            digest.update(piece)
            rest = memoryview(piece)
            while rest:  # an unbuffered write may take less than it is given
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_small(path: Path) -> bytes:
    """A file that is read into memory whole; UserError where it is larger than any honest one."""
    if path.stat().st_size > MOST_JSON:
        raise UserError(
            f"{path}: {path.stat().st_size:,} bytes, at most {MOST_JSON:,} are read; "
            "take a copy from a source you trust"
        )
    return path.read_bytes()


def rows_at_once(tensor: Tensor) -> int:
    """How many rows make a piece."""
    return max(1, PIECE * max(len(tensor), 1) // max(tensor.numel() * tensor.element_size(), 1))


def _by_rows(tensor: Tensor) -> Iterator[memoryview]:
    if tensor.numel() == 0:
        return
    whole = tensor.reshape(1) if tensor.ndim == 0 else tensor
    for part in whole.split(rows_at_once(whole)):
        yield part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
