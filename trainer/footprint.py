"""What a run would take of each rank, without any rank: memory, traffic, and the speed they allow.

Tables are placed by the planner that will place them, and the dense part is built without memory,
so bytes of weights and optimizers are those of the run. Activations are counted on a few rows, but
those of a language model's layers come from a formula. The speed is a bound: what the arithmetic,
the tables' memory and the network need at their full rates, one after the other.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks

from data_shards import UserError
from data_shards.loader import require_divisible
from embeddings import Place, Table, TablePart, planned, trunk_tables
from models import Features, Method
from models.encoder_files import find
from trainer.config import RunConfig
from trainer.engine import bucket_of
from trainer.trunk import new_method, row_width

# Moments that Adam keeps for each weight; row-wise Adagrad keeps one number for each row instead.
MOMENTS = 2
FLOAT = 4
IDS_OF_MULTI = 4
"""Ids that a field of several values is taken to have in a row."""
SAMPLE = 64
"""Rows on which activations are counted."""
VALUES_A_TOKEN = 17
"""A transformer's layer keeps 34 bytes a token and channel at two bytes each (Korthikanti et al.,
2022, Eq. 2, without the attention's map, which is never kept whole)."""
MAPS = 3
"""Of a layer's attention, one for each head, where it is no single kernel."""
DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "dropout_rate")
"""Of a map's entries, as the families call it; a CPU's kernel has none, so its maps are kept."""
GATHERED = 1_000_000_000, 50_000_000
"""Numbers that DeepSpeed's stage 3 has gathered, and those on their way, at most (its defaults)."""
UNBOUNDED = 1 << 60


@dataclass(frozen=True)
class Rates:
    """Of one rank's device, in 10**9 a second."""

    flops: float
    memory: float
    network: float


RATES = {"cuda": Rates(200_000, 2_000, 25), "cpu": Rates(110, 10, 1)}
"""An H100 at half of what its bf16 can do, with 200 Gbit/s; one core, as it
multiplies large matrices of fp32, with 8 Gbit/s."""


@dataclass(frozen=True)
class Dense:
    """The method's parameters, and what rows cost in it."""

    trained: int
    frozen: int
    bytes_a_row: float
    flops_a_row: float


@dataclass(frozen=True)
class Footprint:
    """Bytes of the fullest rank, bytes that a rank sends in a step, and rows a second of all."""

    parts: tuple[TablePart, ...]
    memory: dict[str, int]
    wire: dict[str, int]
    seconds: dict[str, float]
    rows_a_second: float

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def dense_part(config: RunConfig, domains: int, device: str) -> Dense:
    """Of phase 1, with the heads that learn along in it."""
    schema, width = config.data.schema, _text_width(config)
    with torch.device("meta"):
        method = new_method(config, schema, width)
        for number in range(domains if method.adapters_in_pretrain else 0):
            method.add_domain(f"{number}", config.seed)
    trained = {id(p): p.numel() for p in method.shared_parameters()}
    if method.adapters_in_pretrain:
        trained |= {id(p): p.numel() for p in method.adapter_parameters()}
    learned = sum(trained.values())
    frozen = sum(p.numel() for p in method.parameters()) - learned
    if config.data.prompt is None:
        counted = new_method(config, schema, width)
        return Dense(learned, frozen, _kept_of_ids(counted, config, width), 6.0 * learned)
    return _with_encoder(config, method, learned, frozen, device)


def _with_encoder(
    config: RunConfig, method: Method, trained: int, frozen: int, device: str
) -> Dense:
    from models.encoder_library import load_config

    shape, tokens = load_config(find(config.encoder, weights=False)), config.encoder.max_tokens
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    layer = VALUES_A_TOKEN * hidden
    if device == "cpu" and any(shape.to_dict().get(name) for name in DROPOUTS):
        layer += MAPS * shape.num_attention_heads * tokens
    states: list[torch.Tensor] = []

    def over() -> list[torch.Tensor]:
        states.extend(method.over_states(tokens))
        return states

    heads, again = _kept(method, over) // FLOAT, config.encoder.checkpointing
    if again:
        # a layer is computed anew when what stands on the states has left no more than gradients
        kept = tokens * layers * hidden + sum(state.numel() for state in states)
        kept += max(tokens * layer, heads)
    else:
        kept = tokens * layers * layer + heads
    # forward, and the gradient of what goes in, but none of frozen weights; words are looked up
    multiplied = frozen - shape.vocab_size * hidden
    flops = tokens * multiplied * 2 * (3 if again else 2) + 6.0 * trained
    return Dense(trained, frozen, float(kept * _bytes_of(config)), flops)


def _text_width(config: RunConfig) -> int:
    if not config.text:
        return 0
    from models.encoder_library import load_config

    return load_config(find(config.encoder, weights=False)).hidden_size


def _kept_of_ids(method: Method, config: RunConfig, text_width: int) -> float:
    """Bytes a row that backward needs of forward, weights left out."""
    schema = config.data.schema
    read = [field for field in schema.ids if config.method.reads(field)]
    features = Features(
        torch.zeros(SAMPLE, len(read), row_width(config), requires_grad=True),
        torch.zeros(SAMPLE, len(schema.numbers)),
        torch.full((SAMPLE,), -1),
        text=torch.zeros(SAMPLE, text_width) if text_width else None,
    )
    return _kept(method, lambda: [method(features)]) / SAMPLE * _bytes_of(config) / FLOAT


def _kept(method: Method, forward: Callable[[], Sequence[torch.Tensor]]) -> int:
    """Bytes that backward needs of a forward, but for weights and for the tensors that it returns:
    an encoder's states are among what its layers keep."""
    kept: dict[int, torch.UntypedStorage] = {}  # held, or another one would take its place

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        returned = forward()
    without = {one.untyped_storage()._cdata for one in (*method.parameters(), *returned)}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in without)


def _bytes_of(config: RunConfig) -> int:
    return 2 if config.engine.precision == "bf16" else FLOAT


def footprint(config: RunConfig, rows: Mapping[str, int], dense: Dense, place: Place) -> Footprint:
    """Of a run over tables of so many rows on these ranks. UserError if they divide no batch."""
    require_divisible(config.reading, place.world)
    read = {f.name: rows[f.name] for f in config.data.schema.ids if config.method.reads(f)}
    tables = trunk_tables(read, config.tables, row_width(config))
    unbounded = Place(place.device, place.world, place.local_world, UNBOUNDED)
    parts = tuple(planned(tables, config.tables, unbounded)) if tables else ()
    local = config.reading.global_batch // place.world
    weights, state = _table_bytes(parts, config)
    # the vectors that a rank looked up for others stand beside those that it got from them
    sent = local * len(tables) * tables_row(tables) if place.world > 1 else 0
    looked_up = local * _ids(config) * tables_row(tables)
    memory = {
        "tables": weights,
        "tables' optimizer": state,
        **_dense_bytes(config, dense, place.world),
        "activations": int(local * dense.bytes_a_row) + looked_up + sent,
    }
    wire = _wire(config, tables, parts, dense, place.world)
    rates = RATES[place.device]
    touched = _ids(config) * tables_row(tables) * (4 if config.tables.optimizer == "adam" else 3)
    seconds = {
        "arithmetic": local * dense.flops_a_row / rates.flops / 1e9,
        "tables": local * touched / rates.memory / 1e9,
        "network": sum(wire.values()) / rates.network / 1e9,
    }
    speed = config.reading.global_batch / sum(seconds.values())
    return Footprint(parts, memory, wire, seconds, speed)


def tables_row(tables: tuple[Table, ...]) -> int:
    """Bytes of one table row."""
    return tables[0].width * FLOAT if tables else 0


def _ids(config: RunConfig) -> int:
    """Of one row of data."""
    read = [field for field in config.data.schema.ids if config.method.reads(field)]
    return sum(IDS_OF_MULTI if field.multi else 1 for field in read)


def _table_bytes(parts: tuple[TablePart, ...], config: RunConfig) -> tuple[int, int]:
    """Weights and optimizer of the fullest rank."""
    weights, states = Counter[int](), Counter[int]()
    for part in parts:
        size = part.rows * part.cols * FLOAT
        weights[part.rank] += size
        adam = config.tables.optimizer == "adam"
        states[part.rank] += MOMENTS * size if adam else part.rows * FLOAT
    fullest = max(weights, key=lambda rank: weights[rank] + states[rank], default=0)
    return weights[fullest], states[fullest]


def _dense_bytes(config: RunConfig, dense: Dense, world: int) -> dict[str, int]:
    """As DeepSpeed keeps them at this stage."""
    stage, value = config.engine.zero_stage, _bytes_of(config)
    whole = (dense.trained + dense.frozen) * value
    masters = FLOAT if stage else 0
    share = world if stage else 1
    live = sum(min(dense.trained + dense.frozen, most) for most in GATHERED)
    return {
        "dense": whole // world if stage == 3 else whole,
        "gathered weights": live * value if stage == 3 else 0,
        "dense gradients": dense.trained * value // (world if stage >= 2 else 1),
        "reduction buffer": bucket_of(dense.trained) * value if stage else 0,
        "dense optimizer": dense.trained * (masters + MOMENTS * FLOAT) // share,
    }


def _wire(
    config: RunConfig,
    tables: tuple[Table, ...],
    parts: tuple[TablePart, ...],
    dense: Dense,
    world: int,
) -> dict[str, int]:
    """Bytes that one rank sends to others in a step."""
    others, local = (world - 1) / world, config.reading.global_batch // world
    row_wise = {
        p.table for p in parts if p.rows < max(q.rows for q in tables if q.field == p.table)
    }
    vectors = 0.0
    for table in tables:
        size = local * table.width * FLOAT
        # row-wise each rank sums what it has for all ranks' rows; else whole vectors travel
        vectors += size * (world if table.field in row_wise else 1) * 2 * others
    stage, value = config.engine.zero_stage, _bytes_of(config)
    # gradients go to all at any stage; each rank's share of the weights comes back from the first
    back = (0, dense.trained, dense.trained, dense.trained + dense.frozen)
    moved = 2 * dense.trained + back[stage]
    return {
        "ids": int(local * _ids(config) * 8 * others),
        "vectors and their gradients": int(vectors),
        "dense gradients and weights": int(moved * value * others),
    }


def require_rows(config: RunConfig, rows: Mapping[str, int]) -> None:
    """Every table's size is known, or its field is named."""
    for field in config.data.schema.ids:
        if field.name not in rows:
            raise UserError(
                f"rows of the table of {field.name!r} are not known before its shards are written; "
                f"write them, or give --rows {field.name}=NUMBER"
            )
