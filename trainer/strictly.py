"""TOML files read strictly: an unknown key or another type of value is named with the way out."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import pydantic

from data_shards import UserError
from data_shards.errors import unknown

T = TypeVar("T")


def parsed(path: Path, what: str, others: str) -> dict[str, Any]:
    """The values of a TOML file; `others` are where more of its kind lie."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}; there are some in {others}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def strictly(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """A dataclass of what a file says; the file has no other keys and no other types."""
    _refuse_unknown_keys(kind, data, where, "")
    try:
        return _adapter(kind).validate_python(data)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error)}") from None


@cache
def _adapter(kind: type[T]) -> pydantic.TypeAdapter[T]:
    return pydantic.TypeAdapter(kind)


def override(data: dict[str, Any], text: str) -> None:
    """Set what "a.b=value" says, the value in TOML or a bare word."""
    key, equals, written = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: write it as key=value, such as --set pretrain.lr=0.01")
    try:
        value = tomllib.loads(f"x = {written}")["x"]
    except tomllib.TOMLDecodeError:
        value = written
    *path, last = key.strip().split(".")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {text}: {part} is a value, not a section")
    data[last] = value


def leave_out(data: dict[str, Any], key: str, path: Path) -> None:
    """Take a dotted key out of what this file says."""
    *sections, last = key.split(".")
    for section in sections:
        inner = data.get(section)
        data = inner if isinstance(inner, dict) else {}
    if last not in data:
        raise UserError(f"without: {path} has no {key} that could be left out")
    del data[last]


def _refuse_unknown_keys(kind: type, data: Any, where: str, prefix: str) -> None:
    if not isinstance(data, Mapping):
        return  # a value where a section belongs: pydantic says so
    known = get_type_hints(kind)
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
        for item in value if isinstance(value, list) else [value]:
            inner = _section(known[key], item, f"{where}: {prefix}{key}")
            if inner is not None:
                _refuse_unknown_keys(inner, item, where, f"{prefix}{key}.")


def _section(hint: Any, data: Any, where: str) -> type | None:
    """The dataclass that a section is read into; one of several by the section's kind or name."""
    choices: list[Any] = [t for t in _members(hint) if is_dataclass(t)]
    if len(choices) < 2 or not isinstance(data, Mapping):
        return choices[0] if choices else None
    hints = [get_type_hints(t) for t in choices]
    tag = "kind" if "kind" in hints[0] else "name"
    by_tag = {get_args(h[tag])[0]: t for h, t in zip(hints, choices, strict=True)}
    if tag not in data:
        raise UserError(f"{where}: {tag} is missing; there are: {', '.join(by_tag)}")
    if data[tag] not in by_tag:
        raise UserError(f"{where}: {unknown(tag, str(data[tag]), by_tag)}")
    return by_tag[data[tag]]


def _members(hint: Any) -> list[Any]:
    """A type, what it is a union or a list of, and theirs."""
    return [hint, *(t for part in get_args(hint) for t in _members(part))]


def _first_problem(error: pydantic.ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    # pydantic names the kind of a section as if it were a key
    tagged = ("source", "backbone", "method")
    loc = [part for before, part in pairwise(("", *problem["loc"])) if before not in tagged]
    key = ".".join(str(part) for part in loc)
    where = f"{key}: " if key else ""
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] in ("missing", "value_error") else f", not {problem['input']!r}"
    return f"{where}{message[0].lower()}{message[1:]}{got}"
