"""The prompts of a run: made in one way for rows that are written and for rows that are scored."""

import json
from collections.abc import Mapping
from typing import Any

from data_shards import SourceConfig, UserError
from data_shards.prompted import Prompter
from data_shards.sources import TableConfig
from models.prompt_tokenizer import PromptTokenizer
from trainer.config import RunConfig, first_difference


def prompter_of(config: RunConfig) -> Prompter | None:
    """What makes the prompts of a run's raw rows; None where it has none."""
    if config.data.prompt is None:
        return None
    fields = config.data.raw.fields
    local = [field.name for field in fields if field.name in _local(config.data.source)]
    tokenize = PromptTokenizer(config.encoder)
    return Prompter(config.data.prompt, fields, tokenize, tuple(local))


def require_same_prompts(
    prompter: Prompter | None, theirs: Mapping[str, Any] | None, where: str
) -> None:
    """UserError naming the first difference between this prompter and another's description."""
    mine = json.loads(json.dumps(prompter.describe() if prompter else {}))
    key = first_difference(mine, json.loads(json.dumps(theirs or {})))
    if key is not None:
        raise UserError(
            f"{where}: its prompts are of another run file (they differ in {key}); take the "
            "[data.prompt] and [encoder] that it was made with, or write the shards again"
        )


def _local(source: SourceConfig) -> tuple[str, ...]:
    """Fields whose values read "<domain>:<value>"."""
    if not isinstance(source, TableConfig):
        return ()
    history = source.per_user.history if source.per_user else None
    return (
        (*source.local, history.field) if history and history.of in source.local else source.local
    )
