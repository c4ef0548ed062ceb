"""What ranks share before they are forked: heavy imports, and the tables' optimizer compiled."""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (brings torch.compile)
import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

import trainer.engine  # noqa: F401
from embeddings.lazy_adam import LazyAdam

LazyAdam(
    SplitTableBatchedEmbeddingBagsCodegen(
        [(1, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType.EXACT_SGD
    ),
    lr=0.0,
    weight_decay=0.0,
).update(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0, 1]))
