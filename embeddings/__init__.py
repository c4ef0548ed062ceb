"""Ids become vectors: table layouts, where tables lie, and the rows that only one domain owns."""

from embeddings.embedder import Embedder, Extension
from embeddings.placement import OnTheWay, ShardedTables
from embeddings.table_shard import TableShard
from embeddings.tables import Table, TablesConfig, extension_tables, table_width, trunk_tables

__all__ = [
    "Embedder",
    "Extension",
    "OnTheWay",
    "ShardedTables",
    "Table",
    "TableShard",
    "TablesConfig",
    "extension_tables",
    "table_width",
    "trunk_tables",
]
