"""Lists in the cells of a CSV, as pandas writes them: ['Beauty', "Women's"]."""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import ast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def literal_lists(texts: pa.StringArray) -> tuple[pa.ListArray, np.ndarray]:
    """Lists of texts, and the mask [n] of the cells that are no list of texts or integers.

    Of several lists in one cell, with ; between them, all values once.
    """
    cells = texts.dictionary_encode()
    lists = [_parsed(cell) for cell in cells.dictionary.to_pylist()]
    read = pa.array(lists, pa.list_(pa.string())).take(cells.indices)
    bad = pc.and_(pc.is_null(read), pc.is_valid(texts))
    return read, bad.to_numpy(zero_copy_only=False)


def _parsed(cell: str) -> list[str] | None:
    lists = _evaluated(cell) or _evaluated(cell.replace("];", "],")) or [[None]]
    values = [value for one in lists if type(one) is list for value in one]
    flat = all(type(one) is list for one in lists) and all(type(v) in (str, int) for v in values)
    return [*map(str, dict.fromkeys(values))] if flat else None


def _evaluated(cell: str) -> list[object]:
    try:
        return ast.literal_eval(f"[{cell}]")
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
