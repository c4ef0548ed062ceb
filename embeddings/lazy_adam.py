"""Adam inside backward for tables on CPU, where fbgemm offers only Adagrad and SGD.

The rule is fbgemm's GPU Adam: a row moves only in steps that touch it, moments of untouched rows
stand still, and the bias correction counts all steps. The lookup itself stays fbgemm's kernel.
"""

from itertools import groupby
from typing import Any

import numba
import numpy as np
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


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
        self._runs = _runs_of_equal_width(kernel)

    def forward(self, indices: Tensor, offsets: Tensor, **unused: Any) -> Tensor:
        """Sum-pooled vectors [bags of a feature, widths of all features]."""
        with torch.no_grad():
            pooled = self.kernel(indices=indices, offsets=offsets)
        return _UpdateInBackward.apply(pooled, self._anchor, self, indices, offsets)

    def set_learning_rate(self, lr: float) -> None:
        self.lr = lr

    def split_embedding_weights(self) -> list[Tensor]:
        return self.kernel.split_embedding_weights()

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """Per table, views of both moments, [rows, width] each."""
        return [
            {"exp_avg": m, "exp_avg_sq": v}
            for run in self._runs
            for m, v in zip(run.split(run.exp_avg), run.split(run.exp_avg_sq), strict=True)
        ]

    def update(self, grad: Tensor, indices: Tensor, offsets: Tensor) -> None:
        """One step over the rows that `indices` touch; `grad` [bags, sum of widths]."""
        self.iter += 1
        steps = int(self.iter)
        scale = (1 - BETA2**steps) ** 0.5 / (1 - BETA1**steps)
        eps = EPS * (1 - BETA2**steps) ** 0.5
        grad_np, ids, ends = grad.contiguous().numpy(), indices.numpy(), offsets.numpy()
        for run in self._runs:
            run.step(grad_np, ids, ends, (self.lr * scale, eps, self.lr * self.weight_decay))


class _Run:
    """Neighbouring tables of one width, seen as a single matrix so that one pass updates all."""

    def __init__(self, weight: Tensor, rows: list[int], features: range, column: int) -> None:
        self.weight = weight
        self.rows = rows
        self.features = features
        self.column = column
        self.start = np.cumsum([0, *rows[:-1]])
        self.exp_avg = torch.zeros_like(weight)
        self.exp_avg_sq = torch.zeros_like(weight)
        self._slot = np.full(len(weight), -1, dtype=np.int32)

    def split(self, matrix: Tensor) -> list[Tensor]:
        return list(matrix.split(self.rows))

    def step(
        self, grad: np.ndarray, ids: np.ndarray, ends: np.ndarray, rates: tuple[float, float, float]
    ) -> None:
        state = (self.weight.numpy(), self.exp_avg.numpy(), self.exp_avg_sq.numpy(), self._slot)
        place = (self.features.start, self.column, self.start)
        _adam_step(state, grad, ids, ends, place, rates)


@numba.njit(nogil=True)
def _adam_step(state, grad, ids, ends, place, rates):  # type: ignore[no-untyped-def]
    """Sum the gradient of each touched row, then move those rows; one pass, no sort.

    `slot` is -1 for every row between calls; here it numbers the touched rows.
    """
    weight, exp_avg, exp_avg_sq, slot = state
    feature, column, start = place
    lr, eps, decay = np.float32(rates[0]), np.float32(rates[1]), np.float32(rates[2])
    beta1, beta2, one = np.float32(BETA1), np.float32(BETA2), np.float32(1)
    bags, width = grad.shape[0], weight.shape[1]
    first = feature * bags
    total = ends[first + len(start) * bags] - ends[first]
    rows = np.empty(total, dtype=np.int64)
    sums = np.zeros((total, width), dtype=np.float32)
    count = 0
    for f in range(len(start)):
        left = column + f * width
        for bag in range(bags):
            at = first + f * bags + bag
            for i in range(ends[at], ends[at + 1]):
                row = start[f] + ids[i]
                if slot[row] < 0:
                    slot[row] = count
                    rows[count] = row
                    count += 1
                at_sum = slot[row]
                for d in range(width):
                    sums[at_sum, d] += grad[bag, left + d]
    for s in range(count):
        row = rows[s]
        slot[row] = -1
        for d in range(width):
            g = sums[s, d]
            m = beta1 * exp_avg[row, d] + (one - beta1) * g
            v = beta2 * exp_avg_sq[row, d] + (one - beta2) * g * g
            exp_avg[row, d], exp_avg_sq[row, d] = m, v
            weight[row, d] -= lr * m / (np.sqrt(v) + eps) + decay * weight[row, d]


def _runs_of_equal_width(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> list[_Run]:
    specs = [(rows, dim) for rows, dim, _, _ in kernel.embedding_specs]
    assert list(kernel.feature_table_map) == list(range(len(specs))), "one feature per table"
    flat, runs, at, feature, column = kernel.weights_host.detach(), [], 0, 0, 0
    for width, group in groupby(specs, key=lambda spec: spec[1]):
        rows = [spec[0] for spec in group]
        weight = flat[at : at + sum(rows) * width].view(-1, width)
        features = range(feature, feature + len(rows))
        runs.append(_Run(weight, rows, features, column))
        at += weight.numel()
        feature += len(rows)
        column += len(rows) * width
    return runs


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
