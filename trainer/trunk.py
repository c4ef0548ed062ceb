"""The trunk is what phase 1 trains: sharded tables and the shared dense tensors."""

import hashlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from data_shards import Field, Index, Loader, Location, Rows, Schema, UserError
from data_shards.prompted import Prompter
from data_shards.schema import canonical
from data_shards.sidecars import Sidecar
from embeddings import ShardedTables, table_width, trunk_tables
from models import METHODS, Method, Parts
from models.backbones import BACKBONES, Inputs
from trainer.config import RunConfig
from trainer.phases import PretrainConfig
from trainer.prompting import prompter_of, require_same_prompts
from trainer.ranks import Ranks
from trainer.text_cache import TextCache


@dataclass
class Trunk:
    """The shared part: tables on all ranks, dense tensors whole on each."""

    config: RunConfig
    ranks: Ranks
    schema: Schema
    rows: dict[str, int]
    """Of the vocabulary, by id field; a method that reads no tables has it too."""
    vocabulary: str
    """Fingerprint of the vocabulary that numbers the tables' rows."""
    tables: ShardedTables
    dense: dict[str, Tensor]
    starts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Adapters that phase 1 trained along, by domain: phase 2 begins with them."""
    aligns: bool = False
    """Whether it is in the stage before phase 1 that reads text vectors."""

    def method(self) -> Method:
        """A method with the trunk's dense tensors and no adapter; what is frozen is shared by all
        methods of the trunk."""
        trained = {id(p) for p in self._blank.shared_parameters()}
        frozen = [p for p in self._blank.parameters() if id(p) not in trained]
        same = {id(p): nn.Parameter(p.data, requires_grad=False) for p in frozen}
        method = deepcopy(self._blank, same)
        copy_into(method.shared(), self.dense, "shared part")
        return method

    @cached_property
    def _blank(self) -> Method:
        """The method as it begins."""
        width = self.text.width if self.text else 0
        return new_method(self.config, self.schema, width).to(self.ranks.device)

    @cached_property
    def _prompter(self) -> Prompter | None:
        return prompter_of(self.config)

    @property
    def base(self) -> str:
        """Fingerprint of what no phase trains, such as an encoder's own weights; read anew."""
        own = _digest(self._blank.frozen())
        if self.text is None:
            return own
        return hashlib.sha256(canonical([own, self.text.encoder.describe()])).hexdigest()

    def require_base(self, theirs: str, where: Path) -> None:
        """UserError unless what was learned there stood on the same base."""
        if theirs != self.base:
            raise UserError(
                f"{where}: learned on another encoder than the one at {self.config.encoder.path}; "
                "put that one back there, or train a run of another name"
            )

    @cached_property
    def text(self) -> TextCache | None:
        """What turns prompts into vectors; None for a run without."""
        config = self.config
        reads = config.method.text or self.aligns
        return (
            TextCache(config.text, config.encoder, self.ranks.device)
            if config.text and reads
            else None
        )

    def loader(
        self,
        shards: Location,
        splits: tuple[str, ...],
        domains: tuple[str, ...] | None = None,
        *,
        shuffle: bool = False,
        teacher: Path | None = None,
    ) -> Loader:
        """Rows of a shard set for this run's models; all domains for None, and beside them the
        logits of a `teacher`."""
        sidecars: list[Sidecar] = []
        if self.text or teacher:
            index = Index.load(shards)
            sidecars += self.text.open(index) if self.text else ()
            sidecars += [Sidecar.open(teacher, index)] if teacher else ()
        ranks, rows = self.ranks, Rows(splits, domains)
        reading, place = self.config.reading, (ranks.rank, ranks.world)
        loader = Loader(shards, rows, reading, *place, shuffle, sidecars=sidecars)
        self._check(loader)
        return loader

    def aligning(self) -> "Trunk":
        """The same tables, and the dense part in the stage before phase 1."""
        stage, phase = self.config.align, self.config.pretrain
        assert stage is not None
        rows = {"rows": stage.rows or phase.rows, "validate": stage.validate or phase.validate}
        config = replace(self.config, pretrain=PretrainConfig(**{**vars(stage), **rows}))
        trunk = replace(self, config=config, aligns=True)
        first = trunk._blank.shared()
        trunk.dense = {name: self.dense.get(name, first[name]).clone() for name in first}
        return trunk

    def freeze(self) -> None:
        self.tables.freeze()

    def fingerprint(self) -> str:
        """Of every byte that the other domains depend on; the same for any number of ranks."""
        parts = self.tables.digest(), _digest(self.dense), self.base
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def _check(self, loader: Loader) -> None:
        """Refuse shards whose ids mean other rows."""
        for index in loader.indexes:
            index.require_schema(self.schema)
            require_same_prompts(self._prompter, index.source.get("prompt"), "these shards")
            if index.vocabulary.trunk != self.vocabulary:
                raise UserError(
                    "these shards number their ids by another vocabulary than the trunk's tables; "
                    "write them with this run as base (`write-shards --base RUN_FOLDER`)"
                )


def new_trunk(config: RunConfig, ranks: Ranks, index: Index) -> Trunk:
    """An untrained shared part for this shard set."""
    if index.vocabulary.base_fingerprint is not None:
        raise UserError(
            "a shard set with an added domain's own ids cannot found a trunk; "
            "write one without --base"
        )
    return empty_trunk(
        config, ranks, index.schema, index.vocabulary.sizes, index.vocabulary.fingerprint
    )


def empty_trunk(
    config: RunConfig, ranks: Ranks, schema: Schema, rows: Mapping[str, int], vocabulary: str
) -> Trunk:
    """A shared part of these sizes, with its first weights."""
    ids = {field.name: rows[field.name] for field in schema.ids}
    read = {field.name: ids[field.name] for field in schema.ids if config.method.reads(field)}
    tables = trunk_tables(read, config.tables, row_width(config))
    sharded = ShardedTables(tables, config.tables, ranks.device, config.seed)
    trunk = Trunk(config, ranks, schema, ids, vocabulary, sharded, {})
    trunk.dense = {name: tensor.clone() for name, tensor in trunk._blank.shared().items()}
    return trunk


def row_width(config: RunConfig) -> int:
    """Floats of one table row, see `table_width`."""
    return table_width(config.tables.dim, BACKBONES[config.backbone.name].first_order)


def new_method(config: RunConfig, schema: Schema, text_width: int = 0) -> Method:
    """First weights are a pure function of the seed."""
    read = [field for field in schema.ids if config.method.reads(field)]
    parts = Parts(
        inputs=Inputs(
            len(read),
            config.tables.dim,
            len(schema.numbers),
            item_fields=_of_items(read),
            item_numbers=_of_items(schema.numbers),
        ),
        backbone=config.backbone,
        encoder=config.encoder,
        seed=config.seed,
        text_width=text_width,
        ids=len(schema.ids),
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return METHODS[config.method.name](config.method, parts)


def _of_items(fields: Sequence[Field]) -> tuple[int, ...]:
    """The places of those that tell of the item."""
    return tuple(place for place, field in enumerate(fields) if field.side == "item")


def copy_into(target: dict[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    if target.keys() != source.keys():
        name = sorted(target.keys() ^ source.keys())[0]
        raise UserError(f"{what}: tensor {name!r} is on one side only; it is of another run file")
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise UserError(
                f"{what}: {name!r} has shape {tuple(source[name].shape)}, "
                f"expected {tuple(tensor.shape)}; it is of another run file"
            )
        tensor.copy_(source[name])


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
