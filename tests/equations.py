"""Every backbone's equations, written out for one row at a time from its weights by their names."""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.backbones import Backbone, BackboneConfig

Row = tuple[Tensor, Tensor, Tensor]
"""Vectors [F, D], first-order weights [F] and numbers [n] of a row."""
Equation = Callable[[Backbone, BackboneConfig, Row], Tensor]


def _deep(backbone: Backbone, x: Tensor, name: str = "deep") -> list[Tensor]:
    """What each hidden layer gives."""
    parts, states = dict(backbone.named_parameters()), []
    while f"{name}.layers.{len(states)}.linear.weight" in parts:
        layer = f"{name}.layers.{len(states)}.linear."
        x = (parts[layer + "weight"] @ x + parts[layer + "bias"]).clamp(min=0)
        states.append(x)
    return states


def _out(backbone: Backbone, x: Tensor) -> Tensor:
    return (backbone.get_parameter("out.weight") @ x + backbone.get_parameter("out.bias"))[0]


def _mlp(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    emb_FD, _, numbers = row
    return _out(backbone, _deep(backbone, torch.cat([*emb_FD, numbers]))[-1])


def _wide_deep(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    return sum(row[1], start=_mlp(backbone, config, row))


def _nfm(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    emb_FD, first_F, numbers = row
    pooled = sum((a * b for a, b in combinations(emb_FD, 2)), start=torch.zeros_like(emb_FD[0]))
    return sum(first_F, start=_out(backbone, _deep(backbone, torch.cat([pooled, numbers]))[-1]))


def _afm(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    emb_FD, first_F, numbers = row
    get = backbone.get_parameter
    w, b, h = get("attention.linear.weight"), get("attention.linear.bias"), get("score.weight")[0]
    products = [a * b for a, b in combinations(emb_FD, 2)]
    share = [torch.exp(h @ F.relu(w @ product + b)) for product in products]
    pooled = sum((s * p for s, p in zip(share, products, strict=True)), torch.zeros_like(emb_FD[0]))
    return sum(first_F, start=_out(backbone, torch.cat([pooled / sum(share), numbers])))


def _autoint(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    get, x = backbone.get_parameter, list(row[0])
    for depth in range(config.depth):  # type: ignore[union-attr]
        weight = get(f"attention.layers.{depth}.weight")[0]
        bias = get(f"attention.layers.{depth}.bias")[0, 0]
        q, k, v, residual = torch.stack([e @ weight + bias for e in x]).chunk(4, 1)
        heads = []
        for q_h, k_h, v_h in zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), strict=True):
            rows = []
            for one in q_h:
                share = torch.stack([torch.exp(one @ other) for other in k_h])
                rows.append(sum(s * u for s, u in zip(share / share.sum(), v_h, strict=True)))
            heads.append(torch.stack(rows))
        x = list(F.relu(torch.cat(heads, 1) + residual))
    logit = torch.cat(x) @ get("attention.out.weight")[0, :, 0] + get("attention.out.bias")[0, 0, 0]
    return logit + _mlp(backbone, config, row)


def _pnn(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    emb_FD, _, numbers = row
    if config.product == "inner":  # type: ignore[union-attr]
        products = [a @ b for a, b in combinations(emb_FD, 2)]
        p = torch.stack(products) if products else emb_FD.new_zeros(0)
    else:
        p = sum(torch.outer(a, b) for a in emb_FD for b in emb_FD).flatten()  # type: ignore[union-attr]
    return _out(backbone, _deep(backbone, torch.cat([*emb_FD, numbers, p]))[-1])


def _dcn(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    x0 = x = torch.cat([*row[0], row[2]])
    for i in range(config.cross_layers):  # type: ignore[union-attr]
        w, b = (backbone.get_parameter(f"cross.{part}.{i}")[:, 0] for part in ("kernels", "bias"))
        x = x0 * (x @ w) + b + x
    return _out(backbone, torch.cat([x, _deep(backbone, x0)[-1]]))


def _dcnv2(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    get = backbone.get_parameter
    x0 = x = torch.cat([*row[0], row[2]])
    for i in range(config.cross_layers):  # type: ignore[union-attr]
        if config.rank:  # type: ignore[union-attr]
            w = get(f"cross.W_kernels.{i}") @ get(f"cross.V_kernels.{i}")
        else:
            w = get(f"cross.kernels.{i}")
        x = x0 * (w @ x + get(f"cross.bias.{i}").flatten()) + x
    if config.structure == "stacked":  # type: ignore[union-attr]
        return _out(backbone, _deep(backbone, x)[-1])
    return _out(backbone, torch.cat([x, _deep(backbone, x0)[-1]]))


def _fibinet(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    emb_FD, first_F, numbers = row
    matrices, kind = backbone.get_parameter("bilinear"), config.bilinear  # type: ignore[union-attr]
    z = torch.stack([e.sum() / len(e) for e in emb_FD])
    for part in ("squeeze", "excite"):
        z = F.relu(backbone.get_parameter(f"{part}.weight") @ z)
    found = []
    for vectors in (list(emb_FD), [a * e for a, e in zip(z, emb_FD, strict=True)]):
        for number, (i, j) in enumerate(combinations(range(len(vectors)), 2)):
            matrix = matrices[{"all": 0, "each": i, "interaction": number}[kind]]
            found.append((vectors[i] @ matrix) * vectors[j])
    return sum(first_F, start=_out(backbone, _deep(backbone, torch.cat([*found, numbers]))[-1]))


def _deepfm(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    pairs = [a @ b for a, b in combinations(row[0], 2)]
    return sum([*row[1], *pairs], start=_mlp(backbone, config, row))


def _xdeepfm(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    get, emb_FD, sums = backbone.get_parameter, row[0], []
    maps = list(emb_FD)
    for depth in range(config.depth):  # type: ignore[union-attr]
        weight, bias = get(f"cin.layers.{depth}.weight")[0], get(f"cin.layers.{depth}.bias")[0, 0]
        products = [above * first for above in maps for first in emb_FD]
        maps = [
            sum(w * product for w, product in zip(column, products, strict=True)) + b
            for column, b in zip(weight.T, bias, strict=True)
        ]
        sums += [one.sum() for one in maps]
    logit = torch.stack(sums) @ get("cin.out.weight")[0, :, 0] + get("cin.out.bias")[0, 0, 0]
    return logit + _wide_deep(backbone, config, row)


def _eulernet(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    """In complex numbers, whose own power has the principal phase."""
    emb_FD, _, numbers = row
    parts = backbone.get_parameter
    of_numbers = (
        [x * unit for x, unit in zip(numbers, parts("unit"), strict=True)] if len(numbers) else []
    )
    phase = torch.stack([*emb_FD, *of_numbers])
    z_FD = parts("mu").unsqueeze(1) * torch.exp(1j * phase)
    for i in range(2):
        layer = f"layers.{i}."
        bias = torch.complex(parts(layer + "log_bias"), parts(layer + "phase_bias")).T
        explicit = torch.stack(
            [(z_FD ** order.unsqueeze(1)).prod(0) for order in parts(layer + "orders").T]
        )
        weight, b = parts(layer + "implicit.linear.weight"), parts(layer + "implicit.linear.bias")
        flat = z_FD.T.flatten()
        implicit = torch.complex(*(F.relu(weight @ part + b) for part in (flat.real, flat.imag)))
        z_FD = explicit * torch.exp(bias) + implicit.view_as(bias.T).T
    flat = z_FD.T.flatten()
    return _out(backbone, flat.real) + _out(backbone, flat.imag)


def _inttower(backbone: Backbone, config: BackboneConfig, row: Row) -> Tensor:
    """The last field and the first number are the item's, as in `tests.toy_method.inputs_of`."""
    emb_FD, _, numbers = row
    get, heads = backbone.get_parameter, config.heads  # type: ignore[union-attr]

    def states(side: str, vectors: Tensor, numbers: Tensor) -> list[Tensor]:
        mean = torch.stack([e.sum() / len(e) for e in vectors])
        score = torch.exp(get(f"{side}.light.weight") @ mean + get(f"{side}.light.bias"))
        refined = [e * (1 + s) for e, s in zip(vectors, score / score.sum(), strict=True)]
        return _deep(backbone, torch.cat([*refined, numbers]), f"{side}.deep")

    item = states("item", emb_FD[-1:], numbers[:1])[-1]
    v = (get("met.weight") @ item + get("met.bias")).chunk(heads)
    logit = emb_FD.new_zeros(())
    for i, state in enumerate(states("user", emb_FD[:-1], numbers[1:])):
        u = (get(f"meet.{i}.weight") @ state + get(f"meet.{i}.bias")).chunk(heads)
        logit = logit + sum(max((one @ other for other in v), key=Tensor.detach) for one in u)
    return logit


EQUATIONS: dict[str, Equation] = {
    "mlp": _mlp,
    "wide_deep": _wide_deep,
    "nfm": _nfm,
    "afm": _afm,
    "autoint": _autoint,
    "pnn": _pnn,
    "dcn": _dcn,
    "dcnv2": _dcnv2,
    "fibinet": _fibinet,
    "deepfm": _deepfm,
    "xdeepfm": _xdeepfm,
    "eulernet": _eulernet,
    "inttower": _inttower,
}
