"""Where tables lie: the only door to torchrec.distributed.

A table is placed by the TorchRec planner under the sharding type that the run file pins, and its
optimizer runs inside backward, so a step costs what it touches and never the table's rows.

Everything else here speaks of *table shards*: a rectangle of one table with its optimizer state.
First weights, digests, checkpoints and freezing are all written over that one list, so none
of them depends on the number of ranks or on the plan.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder

from embeddings.lazy_adam import LazyAdam
from embeddings.on_the_way import OnTheWay
from embeddings.table_shard import (
    INIT_ROWS,
    Place,
    Rows,
    TablePart,
    TableShard,
    filled_rows,
    first_weights,
    joined_rows,
    place_hash,
)
from embeddings.tables import Sharding, Table, TablesConfig, bags_of

OPTIMIZERS = {
    "adam": EmbOptimType.ADAM,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}


class _AnySharder(EmbeddingBagCollectionSharder):
    """Offers row-wise on CPU too, which TorchRec runs there but does not plan."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise", "column_wise", "row_wise"]


class ShardedTables:
    """A set of tables spread over all ranks, looked up by key and trained inside backward.

    There may be none: then nothing can be sent.
    """

    def __init__(
        self, tables: Sequence[Table], config: TablesConfig, device: torch.device, seed: int
    ) -> None:
        self.tables = tuple(tables)
        self.keys = [table.field for table in tables]
        self.width = max((table.width for table in tables), default=0)
        self.frozen = False
        self._kernels: list[Any] = []
        self._fused: list[Any] = []
        if not tables:
            return
        # Any: TorchRec reaches its kernels through nn.Module attributes, which carry no type.
        self._sharded: Any = _shard(tables, config, device).module
        lookups: Any = self._sharded._lookups
        self._kernels = [one for lookup in lookups for one in lookup._emb_modules]
        for kernel in self._kernels:
            if config.optimizer == "adam" and device.type == "cpu":
                # fbgemm has no Adam on CPU; the same update rule, in the same place.
                kernel._emb_module = LazyAdam(kernel._emb_module, config.lr, config.weight_decay)
            self._fused.append(kernel._emb_module)
        self._initialise(seed)

    def __call__(self, ids: KeyedJaggedTensor) -> Tensor:
        """Sum-pooled vectors [B, fields, width] in the order of `keys`."""
        return self.vectors(self.send(ids))

    def send(self, ids: KeyedJaggedTensor) -> OnTheWay:
        """Start to move ids to the ranks that hold their rows.

        Ids do not depend on weights, so those of the next batch travel while this one trains.
        All ranks must send and ask for vectors in one order.
        """
        context = self._sharded.create_context()
        return OnTheWay(context, self._sharded.input_dist(context, ids))

    def vectors(self, sent: OnTheWay) -> Tensor:
        """Sum-pooled vectors [B, fields, width] of the ids sent, in the order of `keys`.

        Frozen tables are read without a graph: `requires_grad=False` would not stop a fused
        optimizer, a lookup without backward does.
        """
        reading = self.frozen or not torch.is_grad_enabled()
        ids = sent.arrived()
        with torch.set_grad_enabled(not reading):
            pooled = self._sharded.compute_and_output_dist(sent.context, ids).wait()
            # The column order of a KeyedTensor follows the plan, so it is only ever read by key.
            if pooled.keys() == self.keys:
                values = pooled.values()
            else:
                values = torch.cat([pooled[key] for key in self.keys], dim=1)
        if reading:
            self.uncount()
        return values.view(-1, len(self.keys), self.width)

    def freeze(self) -> None:
        """No later step moves a byte of the tables or of their optimizer state."""
        self.frozen = True

    def set_lr(self, lr: float) -> None:
        """Of all tables, from the next step on."""
        for fused in self._fused:
            fused.set_learning_rate(lr)

    def shards(self) -> list[TableShard]:
        """This rank's rectangles, live."""
        width = {table.field: table.width for table in self.tables}
        found = []
        for kernel, fused in zip(self._kernels, self._fused, strict=True):
            states = fused.get_optimizer_state()
            weights = fused.split_embedding_weights()
            for config, weight, state in zip(
                kernel.config.embedding_tables, weights, states, strict=True
            ):
                row, col = config.local_metadata.shard_offsets
                tensors = {"weight": weight, **{k: v for k, v in state.items() if v.ndim > 0}}
                found.append(TableShard(config.name, row, col, width[config.name], tensors))
        return found

    def whole(self) -> dict[str, Tensor]:
        """Every table whole, on every rank: for extension tables, never for a trunk's."""
        mine = [
            (s.table, s.row, s.col, s.tensors["weight"].detach().cpu().numpy())
            for s in self.shards()
        ]
        gathered: list[list] = [[]] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        found = {table.field: torch.zeros(table.rows, table.width) for table in self.tables}
        for table, row, col, part in (item for rank in gathered for item in rank):
            found[table][row : row + part.shape[0], col : col + part.shape[1]] = torch.tensor(part)
        return found

    def load(self, whole: Mapping[str, Tensor]) -> None:
        """The inverse of `whole`."""
        for shard in self.shards():
            weight = shard.tensors["weight"]
            rows, cols = weight.shape
            part = whole[shard.table][shard.row : shard.row + rows, shard.col : shard.col + cols]
            with torch.no_grad():
                weight.copy_(part)

    def filled(self) -> dict[str, Rows]:
        """The rows of every table that are not all zeros, on every rank, ascending.

        What it moves grows with these rows alone: for tables that start at zero.
        """
        mine = [filled_rows(shard) for shard in self.shards()]
        gathered: list[list[tuple[str, int, Rows]]] = [[]] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        parts = [part for rank in gathered for part in rank]
        return {t.field: joined_rows(parts, t.field, t.width) for t in self.tables}

    def fill(self, rows: Mapping[str, Rows]) -> None:
        """The inverse of `filled`, on tables of zeros."""
        for shard in self.shards():
            weight, (place, values) = shard.tensors["weight"], rows[shard.table]
            place = place - shard.row
            here = (place >= 0) & (place < len(weight))
            columns = values[here, shard.col : shard.col + weight.shape[1]]
            with torch.no_grad():
                weight[place[here].to(weight.device)] = columns.to(weight.device)

    def steps(self) -> int:
        """Optimizer steps so far (Adam's bias correction); equal on all ranks."""
        mine = max((int(fused.iter) for fused in self._fused), default=0)
        count = torch.tensor(mine)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        return int(count)

    def set_steps(self, steps: int) -> None:
        """The inverse of `steps`."""
        for fused in self._fused:
            fused.iter.fill_(steps)
            if not isinstance(fused, LazyAdam):
                fused.iter_cpu.fill_(steps)  # the copy that fbgemm's update rule reads

    def uncount(self) -> None:
        """fbgemm takes every lookup for a step, which would bend Adam's bias correction."""
        for fused in self._fused:
            if not isinstance(fused, LazyAdam):
                fused.iter.sub_(1)
                fused.iter_cpu.sub_(1)

    def digest(self) -> str:
        """128 bits over every weight and its place: equal for any plan and number of ranks."""
        sums = np.zeros(2, dtype=np.uint64)
        for shard in self.shards():
            sums += place_hash(shard)
        gathered: list[np.ndarray] = [sums] * dist.get_world_size()
        dist.all_gather_object(gathered, sums)
        return hashlib.sha256(np.sum(gathered, axis=0, dtype=np.uint64).tobytes()).hexdigest()

    def _initialise(self, seed: int) -> None:
        std = {table.field: table.init_std for table in self.tables}
        for shard in self.shards():
            weight = shard.tensors["weight"]
            for start in range(0, weight.shape[0], INIT_ROWS):
                part = weight[start : start + INIT_ROWS]
                with torch.no_grad():
                    part.copy_(first_weights(shard, start, len(part), std[shard.table], seed))


def planned(tables: Sequence[Table], config: TablesConfig, place: Place) -> list[TablePart]:
    """Where each part of each table would lie on ranks that need not be there.

    Raises PlannerError where a rank's memory cannot hold its parts.
    """
    # Any: its type says nothing of tables, which a collection's plan is made of.
    plan: Any = _planner(tables, place).plan(bags_of(tables), [_sharder(config, place.device)])
    return [
        TablePart(name, shard.placement.rank(), *shard.shard_offsets, *shard.shard_sizes)
        for name, sharding in plan.plan[""].items()
        for shard in sharding.sharding_spec.shards
    ]


def _shard(
    tables: Sequence[Table], config: TablesConfig, device: torch.device
) -> DistributedModelParallel:
    world, memory = dist.get_world_size(), None
    if device.type == "cuda":  # TorchRec would take any GPU to have 32 GiB
        memory = torch.cuda.get_device_properties(device).total_memory
    place = Place(device.type, world, int(os.environ.get("LOCAL_WORLD_SIZE", world)), memory)
    bags, sharders = bags_of(tables), [_sharder(config, device.type)]
    return DistributedModelParallel(
        bags,
        device=device,
        plan=_planner(tables, place).collective_plan(bags, sharders, dist.group.WORLD),
        sharders=sharders,
        init_data_parallel=False,
    )


def _sharder(config: TablesConfig, device: str) -> ModuleSharder[Any]:
    on_cpu_adam = config.optimizer == "adam" and device == "cpu"
    return _AnySharder(
        fused_params={
            "optimizer": EmbOptimType.EXACT_SGD if on_cpu_adam else OPTIMIZERS[config.optimizer],
            "learning_rate": config.lr,
            "weight_decay": config.weight_decay,
            "eps": 1e-8,
        }
    )


def _planner(tables: Sequence[Table], place: Place) -> EmbeddingShardingPlanner:
    return EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(
            TrainerConfig(world_size=place.world, local_world_size=place.local_world),
            HardwareConfig(hbm_cap_bytes=place.memory, ddr_cap_bytes=place.memory),
            KernelConfig(compute_device=place.device),
        ),
        storage_reservation=FixedPercentageStorageReservation(0.15),
        constraints={
            table.field: ParameterConstraints(
                sharding_types=[_sharding(table, place.world)],
                compute_kernels=["fused"],
                min_partition=4,
            )
            for table in tables
        },
    )


def _sharding(table: Table, world: int) -> Sharding:
    """Row-wise would leave the last ranks without a row of a tiny table, and in backward fbgemm
    on CPU reads past the end of its sizes there; such a table stays whole."""
    rows_per_rank = -(-table.rows // world)
    some_empty = (world - 1) * rows_per_rank >= table.rows
    return "table_wise" if table.sharding == "row_wise" and some_empty else table.sharding
