"""Raw logs to rows. A new source is one file and one line here."""

from data_shards.errors import unknown
from data_shards.sources.movielens import MovieLens
from data_shards.sources.source import Source, SourceConfig

SOURCES: dict[str, type[Source]] = {"movielens": MovieLens}


def open_source(config: SourceConfig) -> Source:
    """The source that `config.kind` names."""
    if config.kind not in SOURCES:
        raise unknown("source", config.kind, SOURCES)
    return SOURCES[config.kind](config)


__all__ = ["SOURCES", "MovieLens", "Source", "SourceConfig", "open_source"]
