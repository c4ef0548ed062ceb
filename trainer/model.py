"""A scorer: tables and dense part joined, for one set of adapter slots.

The trunk is what phase 1 trains: sharded tables and the shared dense tensors. A phase, an
evaluation or a prediction builds a fresh method around it, so no state is left behind from one
to the next.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from data_shards import Batch, Index, Loader, Schema, UserError, Vocabulary
from data_shards.prompted import Prompter
from embeddings import (
    Embedder,
    Extension,
    OnTheWay,
    ShardedTables,
    extension_tables,
    table_width,
    trunk_tables,
)
from models import METHODS, Features, Method, Parts, Tokens
from models.backbones import BACKBONES, Inputs
from trainer.adapter_store import Adapter
from trainer.config import RunConfig
from trainer.prompting import prompter_of, require_same_prompts
from trainer.ranks import Ranks

Dense = Callable[[Features], Tensor]
Agree = Callable[[Tensor], tuple[int, ...]]
OWN_ROWS = "own_rows/"


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

    def method(self) -> Method:
        """A method with the trunk's dense tensors and no adapter; what is frozen is shared by all
        methods of the trunk."""
        trained = {id(p) for p in self._blank.shared_parameters()}
        frozen = [p for p in self._blank.parameters() if id(p) not in trained]
        same = {id(p): nn.Parameter(p.data, requires_grad=False) for p in frozen}
        method = deepcopy(self._blank, same)
        _copy_into(method.shared(), self.dense, "shared part")
        return method

    @cached_property
    def _blank(self) -> Method:
        """The method as it begins."""
        return new_method(self.config, self.schema).to(self.ranks.device)

    @cached_property
    def _prompter(self) -> Prompter | None:
        return prompter_of(self.config)

    @property
    def base(self) -> str:
        """Fingerprint of what no phase trains, such as an encoder's own weights; read anew."""
        return _digest(self._blank.frozen())

    def require_base(self, theirs: str, where: Path) -> None:
        """UserError unless what was learned there stood on the same base."""
        if theirs != self.base:
            raise UserError(
                f"{where}: learned on another encoder than the one at {self.config.encoder.path}; "
                "put that one back there, or train a run of another name"
            )

    def freeze(self) -> None:
        self.tables.freeze()

    def fingerprint(self) -> str:
        """Of every byte that the other domains depend on; the same for any number of ranks."""
        parts = self.tables.digest(), _digest(self.dense), self.base
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def check(self, loader: Loader) -> None:
        """Refuse shards whose ids mean other rows."""
        for index in loader.indexes:
            index.require_schema(self.schema)
            require_same_prompts(self._prompter, index.source.get("prompt"), "these shards")
            if index.vocabulary.trunk != self.vocabulary:
                raise UserError(
                    "these shards number their ids by another vocabulary than the trunk's tables; "
                    "write them with this run as base (`write-shards --base RUN_FOLDER`)"
                )


@dataclass
class Model:
    """Scores batches with whatever adapters its method holds."""

    embedder: Embedder
    dense: Dense
    domains: Sequence[str]
    agree: Agree | None = None
    """The slots of all ranks' rows, for `Features.slots`."""

    def slots(self, loader: Loader) -> Tensor:
        """The slot of each of the loader's domains, -1 where no adapter is loaded."""
        place = {domain: slot for slot, domain in enumerate(self.domains)}
        return torch.tensor([place.get(domain, -1) for domain in loader.domains])

    def logits(self, batch: Batch, slots: Tensor, extended: bool) -> Tensor:
        """[B]; `slots` from `slots(loader)`, `extended` if some shard set has own ids."""
        return self.outputs(self.send(batch, slots, extended))[:, 0]

    def send(self, batch: Batch, slots: Tensor, extended: bool) -> "Sent":
        """Start to move a batch's ids to the ranks that hold their rows."""
        slot = slots[batch.domain]
        return Sent(batch, slot, self.embedder.send(batch.ids, slot if extended else None))

    def outputs(self, sent: "Sent") -> Tensor:
        """[B, k] as in `Method.forward`, of a batch whose ids are on their way."""
        batch, slot = sent.batch, sent.slot
        none = batch.numbers.new_empty(len(batch), 0, 0)
        # a schema has one field of tokens at most
        prompts = [Tokens(field.values(), field.lengths()) for field in batch.tokens.values()]
        return self.dense(
            Features(
                embedded=self.embedder.vectors(sent.ids) if sent.ids else none,
                numbers=batch.numbers,
                slot=slot,
                tokens=prompts[0] if prompts else None,
                slots=self.agree(slot) if self.agree else None,
            )
        )


@dataclass(frozen=True)
class Sent:
    """A batch whose ids are on their way to their tables; `slot` [B] of each row's adapter."""

    batch: Batch
    slot: Tensor
    ids: Sequence[OnTheWay]

    def announced(self) -> None:
        """Let the ids go, now that every rank knows how many it gets."""
        for ids in self.ids:
            ids.announced()


def new_method(config: RunConfig, schema: Schema) -> Method:
    """First weights are a pure function of the seed."""
    inputs = Inputs(len(schema.ids), config.tables.dim, len(schema.numbers))
    parts = Parts(inputs, config.backbone, config.encoder, config.seed)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return METHODS[config.method.name](config.method, parts)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    read = ids if config.method.reads_tables else {}
    tables = trunk_tables(read, config.tables, row_width(config))
    sharded = ShardedTables(tables, config.tables, ranks.device, config.seed)
    trunk = Trunk(config, ranks, schema, ids, vocabulary, sharded, {})
    trunk.dense = {name: tensor.clone() for name, tensor in trunk._blank.shared().items()}
    return trunk


def row_width(config: RunConfig) -> int:
    """Floats of one table row, see `table_width`."""
    if config.backbone.name not in BACKBONES:
        raise UserError(
            f"backbone.name: unknown {config.backbone.name!r}; there are: {', '.join(BACKBONES)}"
        )
    return table_width(config.tables.dim, BACKBONES[config.backbone.name].first_order)


def trunk_alone(trunk: Trunk) -> Model:
    """The shared part without any adapter."""
    method = trunk.method().eval()
    return Model(Embedder(trunk.tables, trunk.rows), method, method.domains)


def add_domain(trunk: Trunk, method: Method, domain: str) -> bool:
    """Give the domain an adapter; returns whether it is one that phase 1 has trained."""
    method.add_domain(domain, trunk.config.seed)
    if domain in trunk.starts:
        _copy_into(method.adapter(domain), trunk.starts[domain], f"adapter of {domain}")
    return domain in trunk.starts


def with_adapters(trunk: Trunk, adapters: Sequence[Adapter]) -> Model:
    """The shared part and these adapters, for mixed batches of all domains."""
    method = trunk.method()
    for adapter in adapters:
        method.add_domain(adapter.domain, trunk.config.seed)
        own = {k: v for k, v in adapter.tensors.items() if not k.startswith(OWN_ROWS)}
        _copy_into(method.adapter(adapter.domain), own, f"adapter of {adapter.domain}")
    extension = None
    if any(adapter.vocabulary for adapter in adapters):
        keys = trunk.tables.keys
        rows = [[len(a.vocabulary.get(key, ())) for key in keys] for a in adapters]
        extension = new_extension(trunk, rows)
        extension.tables.load({key: _joined_rows(adapters, key, extension) for key in keys})
        extension.tables.freeze()
    embedder = Embedder(trunk.tables, trunk.rows, extension)
    return Model(embedder, method.eval(), method.domains)


def adapter_tensors(
    trunk: Trunk, domains: Sequence[str], parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Each domain's adapter, out of the stacked parameters that an engine has trained."""
    method = trunk.method()
    for domain in domains:
        method.add_domain(domain, trunk.config.seed)
    for name, parameter in method.named_parameters():
        if name in parameters:
            parameter.data.copy_(parameters[name])
    return {d: {k: t.clone() for k, t in method.adapter(d).items()} for d in domains}


def renumbered(adapter: Adapter, vocabulary: Vocabulary) -> Adapter:
    """The adapter with its own rows where these shards' vocabulary puts their ids.

    Each write of an added domain's shards numbers its own ids anew. Ids that the adapter has never
    seen get rows of zeros.
    """
    wanted = {key: vocabulary.added(key).to_pylist() for key in adapter.vocabulary}
    wanted = {key: tuple(values) for key, values in wanted.items() if values}
    tensors = {k: v for k, v in adapter.tensors.items() if not k.startswith(OWN_ROWS)}
    for key, values in wanted.items():
        place = {value: row for row, value in enumerate(adapter.vocabulary[key])}
        known = nn.functional.pad(adapter.tensors[OWN_ROWS + key], (0, 0, 0, 1))
        tensors[OWN_ROWS + key] = known[[place.get(value, -1) for value in values]]
    return replace(adapter, tensors=tensors, vocabulary=wanted)


def new_extension(trunk: Trunk, rows: Sequence[Sequence[int]]) -> Extension:
    """Zero rows of their own for the domains in slot order; `rows` per domain and field."""
    counts = Extension.table_rows(trunk.tables.keys, rows)
    tables = extension_tables(counts, trunk.config.tables, trunk.tables.width)
    sharded = ShardedTables(tables, trunk.config.tables, trunk.ranks.device, trunk.config.seed)
    return Extension(sharded, rows)


def _joined_rows(adapters: Sequence[Adapter], key: str, extension: Extension) -> Tensor:
    width = extension.tables.width
    found = [a.tensors[OWN_ROWS + key] for a in adapters if OWN_ROWS + key in a.tensors]
    return torch.cat(found) if found else torch.zeros(1, width)


def _copy_into(target: dict[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
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
