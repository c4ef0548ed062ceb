"""The same network as a good engineer writes it in plain torch, without Banyan."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rows = tuple[Tensor, Tensor, Tensor]
"""Single-valued ids [B, F], ids of a multi-valued field [B, longest] padded with 0, labels [B]."""


class PlainTorch(nn.Module):
    """A table per field, an MLP, and torch's own dropout, to one logit.

    `sparse` tables give gradients of the rows touched only, for `torch.optim.SparseAdam`.
    """

    def __init__(
        self,
        singles: Sequence[int],
        multi: Sequence[int],
        dim: int,
        hidden: Sequence[int],
        dropout: float,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, dim, sparse=sparse) for rows in singles)
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(rows, dim, mode="sum", padding_idx=0, sparse=sparse) for rows in multi
        )
        for table in [*self.tables, *self.bags]:
            nn.init.normal_(table.weight, 0, 0.01)  # type: ignore[arg-type]
        widths = [dim * (len(singles) + len(multi)), *hidden]
        layers: list[nn.Module] = []
        for d_in, d_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(d_in, d_out), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        self.dense = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, ids: Tensor, bag: Tensor) -> Tensor:
        """Logits [B]."""
        vectors = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        vectors += [table(bag) for table in self.bags]
        return self.dense(torch.cat(vectors, dim=1)).squeeze(1)


class PlainTraining:
    """Steps of `model` with torch's Adam."""

    def __init__(self, model: PlainTorch, sparse: bool = False) -> None:
        self.model = model.train()
        tables = [*model.tables.parameters(), *model.bags.parameters()]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(
                model.dense.parameters() if sparse else model.parameters(), lr=1e-3, fused=True
            )
        ]
        if sparse:
            self.optimizers.append(torch.optim.SparseAdam(tables, lr=1e-3))

    def step(self, rows: Rows) -> None:
        ids, bag, label = rows
        loss = F.binary_cross_entropy_with_logits(self.model(ids, bag), label)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def shuffled(rows: Rows, batch: int) -> Iterator[Rows]:
    """Batches of rows in memory: one gather of all rows an epoch, then slices without a copy."""
    order = torch.randperm(len(rows[2]))
    ids, bag, label = (column[order] for column in rows)
    for start in range(0, len(order), batch):
        stop = start + batch
        yield ids[start:stop], bag[start:stop], label[start:stop]
