"""Amazon's item metadata, cleaned: entities unescaped, tags stripped, scripts known as such."""

import ast
import html
import json
import re
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from data_shards.hashing import StringTable

TAG = re.compile(r"</?[a-zA-Z][^<>]*(>|$)")
SCRIPT = re.compile(r"var aPageStart|getTime|\bfunction\s*\(|\{[^{}]*:[^{}]*;[^{}]*\}")
PRICE = re.compile(r"\$\s*(\d[\d,]*(?:\.\d+)?)")


def parse_line(line: bytes) -> dict[str, Any]:
    """A line as published: JSON (2018), or a Python literal (2014), which is never evaluated."""
    text = line.decode()
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = _literal(text)
    if not isinstance(found, dict):
        raise ValueError(f"it is {text[:40]!r}")
    return found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("neither JSON nor a Python literal") from None


class Items:
    """The items of one domain by asin; of rows with one asin the first counts."""

    def __init__(self, objects: Iterable[dict[str, Any]]) -> None:
        rows: dict[str, dict[str, Any]] = {}
        for found in objects:
            asin = found.get("asin")
            if isinstance(asin, str) and asin not in rows:
                rows[asin] = _item(found)
        self.index = StringTable(pa.array(list(rows), pa.string()))
        self.table = pa.Table.from_pylist(list(rows.values()), schema=ITEM)


ITEM = pa.schema(
    {
        "title": pa.string(),
        "brand": pa.string(),
        "category": pa.list_(pa.string()),
        "main_category": pa.string(),
        "price": pa.float32(),
        "script_title": pa.bool_(),
    }
)


def _item(found: dict[str, Any]) -> dict[str, Any]:
    title = clean(found.get("title"))
    script = title is not None and bool(SCRIPT.search(title))
    category = _category(found)
    main = clean(found["main_cat"]) if "main_cat" in found else next(iter(category or []), None)
    return {
        "title": None if script else title,
        "brand": clean(found.get("brand")),
        "category": category,
        "main_category": main,
        "price": price(found.get("price")),
        "script_title": script,
    }


def clean(text: object) -> str | None:
    """Text without entities, tags and runs of white space; None where nothing is left."""
    if not isinstance(text, str):
        return None
    plain = TAG.sub(" ", html.unescape(html.unescape(text)))
    return " ".join(plain.split()) or None


def _category(found: dict[str, Any]) -> list[str] | None:
    """The path from the widest category on; of several paths (2014) the first."""
    path = found.get("category") or found.get("categories") or []
    if isinstance(path, list) and path and isinstance(path[0], list):
        path = path[0]
    names = [name for name in map(clean, path if isinstance(path, list) else [path]) if name]
    return names or None


def price(value: object) -> float | None:
    """A number, "$12.99", or the middle of "$5.00 - $10.00"; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str) or SCRIPT.search(value) or len(value) > 40:
        return None
    found = [float(number.replace(",", "")) for number in PRICE.findall(value)]
    return sum(found) / len(found) if found else None
