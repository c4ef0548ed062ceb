"""The members of a tar, read strictly: plain files only, each inside of the file it lies in."""

from collections.abc import Iterator
from dataclasses import dataclass

from data_shards.errors import UserError
from data_shards.storage import Storage

_RECORD = 512
_PLAIN, _PAX = (b"0", b"\0"), (b"x", b"g")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"5": "a folder", b"6": "a named pipe"}
_MOST_PAX = 1 << 16
_PAX_RENAMES = ("path", "size", "linkpath", "GNU.")  # keys that make a member another one


@dataclass(frozen=True)
class Member:
    """A plain file in a tar; `offset` is that of its first byte."""

    name: str
    offset: int
    size: int


def members(storage: Storage, shard: str) -> Iterator[Member]:
    """The members of a tar in its order; UserError at the first thing that is not plain."""
    end = storage.size(shard)
    if end is None:
        raise UserError(f"{storage}/{shard}: missing; restore it or write the shards again")
    place = 0
    while place < end:
        header = storage.read_range(shard, place, _RECORD)
        if not header.strip(b"\0"):
            return  # the mark of the end; what follows is no member
        try:
            kind, member = _member(header, place + _RECORD, end)
            if kind in _PAX:
                _require_harmless(storage.read_range(shard, member.offset, member.size))
        except ValueError as error:
            raise UserError(
                f"{storage}/{shard}, header at byte {place}: {error}; "
                "restore the shard or write the shards again"
            ) from error
        if kind in _PLAIN:
            yield member
        place = member.offset + member.size + -member.size % _RECORD
    raise UserError(f"{storage}/{shard}: cut, it has no end mark; restore it")


def _member(header: bytes, offset: int, end: int) -> tuple[bytes, Member]:
    """(kind, member) of a header; ValueError where it is not a plain one."""
    if len(header) < _RECORD:
        raise ValueError("cut")
    blanked = header[:148] + b" " * 8 + header[156:]
    if _octal(header[148:156]) != sum(blanked):
        raise ValueError("its checksum is wrong")
    kind = header[156:157]
    if kind not in (*_PLAIN, *_PAX):
        raise ValueError(f"it is {_KINDS.get(kind, f'of the kind {kind!r}')}, no plain file")
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    size = _octal(header[124:136])
    if not name or offset + size > end or (kind in _PAX and size > _MOST_PAX):
        raise ValueError(f"the member {name!r} of {size} bytes reaches past the end")
    return kind, Member(name, offset, size)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode()


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits.isdigit():
        raise ValueError(f"{field!r} is no octal number")
    return int(digits, 8)


def _require_harmless(records: bytes) -> None:
    """An extended header may tell times and owners; ValueError where it tells a name or a size."""
    for record in records.split(b"\n"):
        key = record.partition(b" ")[2].partition(b"=")[0].decode()
        if key.startswith(_PAX_RENAMES):
            raise ValueError(f"an extended header sets {key!r}")
