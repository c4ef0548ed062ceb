"""Raw logs to rows. A new source is a file, a config in `SourceConfig` and a line in `SOURCES`."""

from collections.abc import Callable
from typing import Any

from data_shards.schema import Field
from data_shards.sources.amazon import Amazon, AmazonConfig
from data_shards.sources.movielens import MovieLens, MovieLensConfig
from data_shards.sources.planted import Planted, PlantedConfig
from data_shards.sources.source import Source
from data_shards.sources.table import Table, TableConfig

SourceConfig = AmazonConfig | MovieLensConfig | PlantedConfig | TableConfig
SOURCES: dict[str, Callable[[Any, tuple[Field, ...]], Source]] = {
    "amazon": Amazon,
    "movielens": MovieLens,
    "planted": Planted,
    "table": Table,
}


def open_source(config: SourceConfig, fields: tuple[Field, ...]) -> Source:
    """The source that `config.kind` names, for these fields."""
    return SOURCES[config.kind](config, fields)


__all__ = [
    "SOURCES",
    "AmazonConfig",
    "MovieLens",
    "MovieLensConfig",
    "PlantedConfig",
    "Source",
    "SourceConfig",
    "TableConfig",
    "open_source",
]
