"""The stage before phase 1 in which vectors of rows learn from those of their texts (CTRL 4.2)."""

from pathlib import Path

from data_shards import Location
from embeddings import ShardedTables
from trainer.log import RunLog
from trainer.pretrain import pretrain
from trainer.trunk import Trunk

PHASE = "align"


def align(trunk: Trunk, shards: Location, folder: Path, log: RunLog) -> None:
    """Leave in the trunk what the stage has made of its tables and of its dense part, without what
    the stage alone has; optimizers begin anew. Continues from its checkpoints in `folder`, so that
    it costs a finished stage no step."""
    stage = trunk.aligning()
    pretrain(stage, shards, folder, log, name=PHASE)
    trunk.dense |= {name: t for name, t in stage.dense.items() if name in trunk.dense}
    _forget(trunk.tables)


def _forget(tables: ShardedTables) -> None:
    """Their optimizer knows nothing of the steps so far."""
    for shard in tables.shards():
        for name in shard.tensors.keys() - {"weight"}:
            shard.tensors[name].zero_()
    tables.set_steps(0)
