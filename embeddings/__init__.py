"""Ids become vectors: table layouts, where tables lie, and the rows that only one domain owns."""

from embeddings.embedder import Embedder, Extension, SentIds
from embeddings.placement import ShardedTables, planned
from embeddings.table_shard import Place, TablePart, TableShard
from embeddings.tables import Table, TablesConfig, extension_tables, table_width, trunk_tables

__all__ = [
    "Embedder",
    "Extension",
    "Place",
    "SentIds",
    "ShardedTables",
    "Table",
    "TablePart",
    "TableShard",
    "TablesConfig",
    "extension_tables",
    "planned",
    "table_width",
    "trunk_tables",
]
