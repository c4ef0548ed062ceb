"""Every backbone as a good engineer writes it in plain torch: `nn.Embedding`, `nn.Linear`, Adam.

Single-valued fields alone, so that both sides of a comparison read the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones import BACKBONES

Deep = nn.Sequential


def mlp(d_in: int, hidden: Sequence[int], drop: float, out: bool = True) -> Deep:
    """Hidden layers, and one to a logit."""
    layers: list[nn.Module] = []
    for a, b in zip([d_in, *hidden], hidden, strict=False):
        layers += [nn.Linear(a, b), nn.ReLU(inplace=True), nn.Dropout(drop)]
    return nn.Sequential(*layers, *([nn.Linear(hidden[-1], 1)] if out else []))


class Plain(nn.Module):
    """Tables, and what a subclass makes of their vectors."""

    first_order = False

    def __init__(self, rows: Sequence[int], dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, dim) for count in rows)
        self.weights = nn.ModuleList(
            nn.Embedding(count, 1) for count in (rows if self.first_order else ())
        )
        for table in [*self.tables, *self.weights]:
            nn.init.normal_(table.weight, 0, 0.01)  # type: ignore[arg-type]
        self.i, self.j = torch.triu_indices(len(rows), len(rows), 1).tolist()
        self.fields, self.dim, self.pairs = len(rows), dim, len(self.i)

    def forward(self, ids_BF: Tensor) -> Tensor:
        """Logits [B]."""
        e = torch.stack([table(ids_BF[:, k]) for k, table in enumerate(self.tables)], 1)
        first = [weight(ids_BF[:, k]) for k, weight in enumerate(self.weights)]
        logit = self.score(e)
        return logit + torch.cat(first, 1).sum(1) if first else logit

    def score(self, e: Tensor) -> Tensor:
        """[B] of [B, F, D]."""
        raise NotImplementedError


class MLP(Plain):
    def __init__(self, rows: Sequence[int], dim: int, hidden: Sequence[int], drop: float) -> None:
        super().__init__(rows, dim)
        self.deep = mlp(self.fields * dim, hidden, drop)

    def score(self, e: Tensor) -> Tensor:
        return self.deep(e.flatten(1))[:, 0]


class WideDeep(MLP):
    first_order = True


class DeepFM(MLP):
    first_order = True

    def score(self, e: Tensor) -> Tensor:
        return super().score(e) + 0.5 * (e.sum(1) ** 2 - (e**2).sum(1)).sum(1)


class NFM(Plain):
    first_order = True

    def __init__(self, rows: Sequence[int], dim: int, hidden: Sequence[int], drop: float) -> None:
        super().__init__(rows, dim)
        self.deep = mlp(dim, hidden, drop)

    def score(self, e: Tensor) -> Tensor:
        return self.deep(0.5 * (e.sum(1) ** 2 - (e**2).sum(1)))[:, 0]


class AFM(Plain):
    first_order = True

    def __init__(self, rows: Sequence[int], dim: int, hidden: Sequence[int], drop: float) -> None:
        super().__init__(rows, dim)
        self.attention = nn.Sequential(nn.Linear(dim, 16), nn.ReLU(), nn.Linear(16, 1, bias=False))
        self.out = nn.Sequential(nn.Dropout(drop), nn.Linear(dim, 1))

    def score(self, e: Tensor) -> Tensor:
        pairs = e[:, self.i] * e[:, self.j]
        return self.out((self.attention(pairs).softmax(1) * pairs).sum(1))[:, 0]


class AutoInt(MLP):
    def __init__(self, rows: Sequence[int], dim: int, hidden: Sequence[int], drop: float) -> None:
        super().__init__(rows, dim, hidden, drop)
        self.qkv = nn.ModuleList(nn.Linear(d, 4 * 32) for d in (dim, 32, 32))
        self.last = nn.Linear(self.fields * 32, 1)

    def score(self, e: Tensor) -> Tensor:
        x = e
        for layer in self.qkv:
            split = layer(x).unflatten(2, (4, 2, 16)).permute(2, 0, 3, 1, 4)
            seen = (split[0] @ split[1].mT).softmax(-1) @ split[2]
            x = F.relu(seen + split[3]).transpose(1, 2).flatten(2)
        return super().score(e) + self.last(x.flatten(1))[:, 0]


class PNN(Plain):
    def __init__(self, rows: Sequence[int], dim: int, hidden: Sequence[int], drop: float) -> None:
        super().__init__(rows, dim)
        self.deep = mlp(self.fields * dim + self.pairs, hidden, drop)

    def score(self, e: Tensor) -> Tensor:
        products = (e[:, self.i] * e[:, self.j]).sum(2)
        return self.deep(torch.cat([e.flatten(1), products], 1))[:, 0]


class DCN(Plain):
    def __init__(self, rows: Sequence[int], dim: int, hidden: Sequence[int], drop: float) -> None:
        super().__init__(rows, dim)
        wide = self.fields * dim
        self.cross = nn.ModuleList(self.crossing(wide) for _ in range(3))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(wide)) for _ in range(3))
        self.deep = mlp(wide, hidden, drop, out=False)
        self.out = nn.Linear(wide + hidden[-1], 1)

    def crossing(self, wide: int) -> nn.Linear:
        return nn.Linear(wide, 1, bias=False)

    def score(self, e: Tensor) -> Tensor:
        x0 = x = e.flatten(1)
        for cross, bias in zip(self.cross, self.bias, strict=True):
            x = x0 * cross(x) + bias + x
        return self.out(torch.cat([x, self.deep(x0)], 1))[:, 0]


class DCNv2(DCN):
    def crossing(self, wide: int) -> nn.Linear:
        return nn.Linear(wide, wide, bias=False)

    def score(self, e: Tensor) -> Tensor:
        x0 = x = e.flatten(1)
        for cross, bias in zip(self.cross, self.bias, strict=True):
            x = x0 * (cross(x) + bias) + x
        return self.out(torch.cat([x, self.deep(x0)], 1))[:, 0]


class FiBiNET(Plain):
    first_order = True

    def __init__(self, rows: Sequence[int], dim: int, hidden: Sequence[int], drop: float) -> None:
        super().__init__(rows, dim)
        low = max(self.fields // 3, 1)
        self.squeeze = nn.Linear(self.fields, low, bias=False)
        self.excite = nn.Linear(low, self.fields, bias=False)
        self.bilinear = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in self.i)
        self.deep = mlp(2 * self.pairs * dim, hidden, drop)

    def score(self, e: Tensor) -> Tensor:
        weighed = e * F.relu(self.excite(F.relu(self.squeeze(e.mean(2))))).unsqueeze(2)
        found = [
            layer(x[:, i]) * x[:, j]
            for x in (e, weighed)
            for layer, i, j in zip(self.bilinear, self.i, self.j, strict=True)
        ]
        return self.deep(torch.cat(found, 1))[:, 0]


class XDeepFM(MLP):
    first_order = True

    def __init__(self, rows: Sequence[int], dim: int, hidden: Sequence[int], drop: float) -> None:
        super().__init__(rows, dim, hidden, drop)
        maps = (self.fields, 100, 100)
        self.cin = nn.ModuleList(nn.Conv1d(above * self.fields, 100, 1) for above in maps)
        self.last = nn.Linear(300, 1)

    def score(self, e: Tensor) -> Tensor:
        x, sums = e, []
        for layer in self.cin:
            x = layer(torch.einsum("bhd,bfd->bhfd", x, e).flatten(1, 2))
            sums.append(x.sum(2))
        return super().score(e) + self.last(torch.cat(sums, 1))[:, 0]


class EulerNet(Plain):
    def __init__(self, rows: Sequence[int], dim: int, hidden: Sequence[int], drop: float) -> None:
        super().__init__(rows, dim)
        self.mu = nn.Parameter(torch.ones(self.fields, 1))
        self.orders = nn.Parameter(torch.softmax(torch.randn(self.fields, 7) / 0.01, 0))
        self.log_bias = nn.Parameter(torch.randn(dim, 7) * 0.01)
        self.phase_bias = nn.Parameter(torch.randn(dim, 7) * 0.01)
        self.implicit = nn.Linear(self.fields * dim, 7 * dim)
        self.out = nn.Linear(7 * dim, 1)

    def score(self, e: Tensor) -> Tensor:
        real, imag = ((self.mu * part).mT for part in (e.cos(), e.sin()))
        log = 0.5 * torch.log(real**2 + imag**2 + 1e-8)
        log, phase = (
            F.dropout(part, 0.3, self.training) @ self.orders
            for part in (log, torch.atan2(imag, real))
        )
        modulus, phase = torch.exp(log + self.log_bias), phase + self.phase_bias
        logit = 0.0
        for part, explicit in ((real, modulus * phase.cos()), (imag, modulus * phase.sin())):
            flat = F.dropout(part.flatten(1), 0.3, self.training)
            logit = logit + self.out(explicit.flatten(1) + F.relu(self.implicit(flat)))[:, 0]
        return logit  # type: ignore[return-value]


class IntTower(Plain):
    """The second field is the item's."""

    def __init__(self, rows: Sequence[int], dim: int, hidden: Sequence[int], drop: float) -> None:
        super().__init__(rows, dim)
        self.item = [1]
        self.user = [k for k in range(self.fields) if k != 1]
        sides = (self.user, self.item)
        self.light = nn.ModuleList(nn.Linear(len(side), len(side)) for side in sides)
        self.towers = nn.ModuleList(mlp(len(s) * dim, hidden, drop, out=False) for s in sides)
        self.meet = nn.ModuleList(nn.Linear(width, 128) for width in (*hidden, hidden[-1]))

    def states(self, e: Tensor, which: int) -> list[Tensor]:
        own = e[:, (self.user, self.item)[which]]
        x = (own + own * self.light[which](own.mean(2)).softmax(1).unsqueeze(2)).flatten(1)
        states = []
        for at in range(0, len(self.towers[which]), 3):  # type: ignore[arg-type]
            x = self.towers[which][at : at + 3](x)  # type: ignore[index]
            states.append(x)
        return states

    def score(self, e: Tensor) -> Tensor:
        v = self.meet[-1](self.states(e, 1)[-1]).unflatten(1, (4, 32))
        logit = torch.zeros(len(e))
        for layer, state in zip(self.meet, self.states(e, 0), strict=False):
            logit = logit + (layer(state).unflatten(1, (4, 32)) @ v.mT).max(2).values.sum(1)
        return logit


PLAIN: dict[str, Callable[[Sequence[int], int, Sequence[int], float], Plain]] = {
    "mlp": MLP,
    "wide_deep": WideDeep,
    "nfm": NFM,
    "afm": AFM,
    "autoint": AutoInt,
    "pnn": PNN,
    "dcn": DCN,
    "dcnv2": DCNv2,
    "fibinet": FiBiNET,
    "deepfm": DeepFM,
    "xdeepfm": XDeepFM,
    "eulernet": EulerNet,
    "inttower": IntTower,
}
assert PLAIN.keys() == BACKBONES.keys()
