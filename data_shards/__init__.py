"""What a row is, where it lies, and in what order it is read."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from data_shards.errors import UserError
from data_shards.index import Block, Index
from data_shards.order import EpochOrder
from data_shards.reader import ShardReader
from data_shards.reading import Cursor, Reading, Rows
from data_shards.schema import Field, Schema
from data_shards.sources import SOURCES, Source, SourceConfig, open_source
from data_shards.splits import SplitConfig
from data_shards.storage import Location
from data_shards.verify import verify
from data_shards.vocabulary import Vocabulary
from data_shards.writer import Part, write_shards

if TYPE_CHECKING:
    from data_shards.batch import Batch, encode_batch
    from data_shards.loader import Loader

_OF_TORCH = {
    "Batch": "data_shards.batch",
    "encode_batch": "data_shards.batch",
    "Loader": "data_shards.loader",
}


def __getattr__(name: str) -> Any:
    """Batches need torch: seconds that no writing process has to wait for."""
    if name not in _OF_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(_OF_TORCH[name]))[name]


__all__ = [
    "SOURCES",
    "Batch",
    "Block",
    "Cursor",
    "EpochOrder",
    "Field",
    "Index",
    "Location",
    "Loader",
    "Part",
    "Reading",
    "Rows",
    "Schema",
    "ShardReader",
    "Source",
    "SourceConfig",
    "SplitConfig",
    "UserError",
    "Vocabulary",
    "encode_batch",
    "open_source",
    "verify",
    "write_shards",
]
