"""Adam inside backward for tables on CPU, where fbgemm offers only Adagrad and SGD.

The rule is fbgemm's GPU Adam: a row moves only in steps that touch it, moments of untouched rows
stand still, and the bias correction counts all steps. The lookup itself stays fbgemm's kernel.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
AHEAD = 32  # rows read before the first of them moves
CACHE_LINE = 16  # floats


class LazyAdam(nn.Module):
    """Stands where the fbgemm module stood in a TorchRec lookup, and speaks the same few verbs."""

    def __init__(
        self, kernel: SplitTableBatchedEmbeddingBagsCodegen, lr: float, weight_decay: float
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.lr, self.weight_decay = lr, weight_decay
        self.iter = torch.zeros(1, dtype=torch.int64)
        # Backward is called only if some input asks for a gradient; the weights must not.
        self._anchor = torch.zeros(0, requires_grad=True)
        self._tables = _tables_of(kernel)
        # No two tables share a row, so threads change no bit of the result.
        threads = min(torch.get_num_threads(), len(self._tables))
        self._map = map if threads == 1 else ThreadPoolExecutor(threads).map

    def forward(self, indices: Tensor, offsets: Tensor, **unused: Any) -> Tensor:
        """Sum-pooled vectors [bags of a feature, widths of all features]."""
        with torch.no_grad():
            pooled = self.kernel(indices=indices, offsets=offsets)
        return _UpdateInBackward.apply(pooled, self._anchor, self, indices, offsets)

    def set_learning_rate(self, lr: float) -> None:
        """Of all tables, from the next step on."""
        self.lr = lr

    def split_embedding_weights(self) -> list[Tensor]:
        """Per table, a view of its weights [rows, width]."""
        return self.kernel.split_embedding_weights()

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """Per table, views of both moments, [rows, width] each."""
        return [{"exp_avg": t.exp_avg, "exp_avg_sq": t.exp_avg_sq} for t in self._tables]

    def update(self, grad: Tensor, indices: Tensor, offsets: Tensor) -> None:
        """One step over the rows that `indices` touch; `grad` [bags, sum of widths]."""
        self.iter += 1
        steps = int(self.iter)
        scale = (1 - BETA2**steps) ** 0.5 / (1 - BETA1**steps)
        eps = EPS * (1 - BETA2**steps) ** 0.5
        rates = (self.lr * scale, eps, self.lr * self.weight_decay)
        batch = (grad.contiguous().numpy(), indices.numpy(), offsets.numpy())
        for _ in self._map(lambda table: table.step(*batch, rates), self._tables):
            pass


class _Table:
    """One table's weight and moments, and which feature and columns of a lookup are its own."""

    def __init__(self, weight: Tensor, feature: int, column: int) -> None:
        self.weight = weight
        self.feature, self.column = feature, column
        self.exp_avg = torch.zeros_like(weight)
        self.exp_avg_sq = torch.zeros_like(weight)
        self._slot = np.full(len(weight), -1, dtype=np.int32)

    def step(
        self, grad: np.ndarray, ids: np.ndarray, ends: np.ndarray, rates: tuple[float, float, float]
    ) -> None:
        state = (self.weight.numpy(), self.exp_avg.numpy(), self.exp_avg_sq.numpy(), self._slot)
        first = self.feature * len(grad)
        own_ends = ends[first : first + len(grad) + 1]
        _adam_step(state, grad, self.column, ids, own_ends, rates)


# As numpy divides: a check for zero in every division would keep the loops from vector registers.
_compiled = numba.njit(nogil=True, error_model="numpy")


@_compiled
def _adam_step(state, grad, column, ids, ends, rates):  # type: ignore[no-untyped-def]
    """Sum the gradient of each touched row, then move those rows; one pass, no sort."""
    weight, exp_avg, exp_avg_sq, slot = state
    rows, sums = _sum_by_row(slot, grad, column, ids, ends, weight.shape[1])
    seen = np.float32(0)
    for first in range(0, len(rows), AHEAD):
        block = slice(first, first + AHEAD)
        seen += _read_ahead(weight, exp_avg, exp_avg_sq, rows[block])
        _move(weight, exp_avg, exp_avg_sq, rows[block], sums[block], rates)
    return seen


@_compiled
def _sum_by_row(slot, grad, column, ids, ends, width):  # type: ignore[no-untyped-def]
    """(touched rows, the gradient of each); `slot` is -1 for every row before and after."""
    total = ends[-1] - ends[0]
    rows = np.empty(total, dtype=np.int64)
    sums = np.zeros((total, width), dtype=np.float32)
    count = 0
    for bag in range(len(grad)):
        for i in range(ends[bag], ends[bag + 1]):
            row = ids[i]
            if slot[row] < 0:
                slot[row] = count
                rows[count] = row
                count += 1
            at = slot[row]
            for d in range(width):
                sums[at, d] += grad[bag, column + d]
    for s in range(count):
        slot[rows[s]] = -1
    return rows[:count], sums[:count]


@_compiled
def _read_ahead(weight, exp_avg, exp_avg_sq, rows):  # type: ignore[no-untyped-def]
    """Loads that wait for nothing, so that cache misses overlap; their sum keeps them compiled."""
    seen = np.float32(0)
    for row in rows:
        for d in range(0, weight.shape[1], CACHE_LINE):
            seen += weight[row, d] + exp_avg[row, d] + exp_avg_sq[row, d]
    return seen


@_compiled
def _move(weight, exp_avg, exp_avg_sq, rows, sums, rates):  # type: ignore[no-untyped-def]
    lr, eps, decay = np.float32(rates[0]), np.float32(rates[1]), np.float32(rates[2])
    beta1, beta2, one = np.float32(BETA1), np.float32(BETA2), np.float32(1)
    for s in range(len(rows)):
        row = rows[s]
        for d in range(weight.shape[1]):
            g = sums[s, d]
            m = beta1 * exp_avg[row, d] + (one - beta1) * g
            v = beta2 * exp_avg_sq[row, d] + (one - beta2) * g * g
            exp_avg[row, d], exp_avg_sq[row, d] = m, v
            weight[row, d] -= lr * m / (np.sqrt(v) + eps) + decay * weight[row, d]


def _tables_of(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> list[_Table]:
    weights = kernel.split_embedding_weights()
    assert list(kernel.feature_table_map) == list(range(len(weights))), "one feature per table"
    columns = np.cumsum([0, *(weight.shape[1] for weight in weights)]).tolist()
    return [_Table(weight, i, columns[i]) for i, weight in enumerate(weights)]


class _UpdateInBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pooled: Tensor, anchor: Tensor, adam: LazyAdam, indices: Tensor, offsets: Tensor
    ) -> Tensor:
        ctx.adam = adam
        ctx.save_for_backward(indices, offsets)
        return pooled.view_as(pooled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None, None]:
        indices, offsets = ctx.saved_tensors
        with torch.no_grad():
            ctx.adam.update(grads[0], indices.long(), offsets.long())
        return None, None, None, None, None
