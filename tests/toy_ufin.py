"""Small UFINs with random weights in every tensor, and UFIN's equations a row at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import UFIN, Features, UFINConfig
from models.backbones import Inputs
from models.interactions import (
    AutoIntExperts,
    CINExperts,
    CrossExperts,
    EulerExperts,
    Interaction,
    MLPExperts,
)
from tests.toy_method import ABC, stir

INPUTS = Inputs(fields=2, dim=4, numbers=0)
"""Of the anonymous fields, two of three."""
TEXT, IDS = 6, 3
PLAIN = UFINConfig(
    experts=3, universal=4, dim=5, orders=2, top=2, hidden=(7, 6), dropout=0.0, width=3
)
CONFIGS = {
    "paper": PLAIN,
    "released": replace(
        PLAIN, activation="none", orders=4, top=3, adaptor="euler", mix=0.4, anonymous=False
    ),
    "deltas": replace(PLAIN, alpha=2, semantic_width=5, renormalise=True),
    "deltas_alone": replace(PLAIN, alpha=3, adaptor="none", interaction="mlp"),
    "no_experts": replace(PLAIN, semantic=False, interaction="cross", alpha=3),
    "no_features": replace(PLAIN, universal=0),
    "cin": replace(PLAIN, interaction="cin", adaptor="euler"),
    "autoint": replace(PLAIN, interaction="autoint"),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def fresh(config: UFINConfig, domains: Sequence[str] = ABC) -> UFIN:
    """As a run begins with it, in eval mode and float64."""
    torch.manual_seed(5)
    inputs = INPUTS if config.anonymous else replace(INPUTS, fields=0)
    method = UFIN(inputs, TEXT, IDS, config)
    for domain in domains:
        method.add_domain(domain, seed=3)
    return method.double().eval()


def trained(config: UFINConfig, domains: Sequence[str] = ABC) -> UFIN:
    """As if trained: the shared part is the same in each, a domain's adapter follows its name."""
    method = fresh(config, domains)
    stir(method.shared().values(), "shared")
    for domain in domains:
        stir(method.adapter(domain).values(), domain)
    return method


def rows(slot: Sequence[int], seed: int = 0) -> Features:
    """Each follows its place; vectors have one spare column more than anybody reads."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(len(slot), *shape, generator=generator, dtype=torch.float64)

    slots = torch.tensor(slot, dtype=torch.int64)
    own = normal(IDS, PLAIN.dim + 1).masked_fill((slots < 0)[:, None, None], 0)
    return Features(normal(2, 5), normal(0), slots, text=normal(TEXT), own=own)


def part_of(features: Features, place: Tensor | slice) -> Features:
    assert features.text is not None and features.own is not None
    return Features(
        features.embedded[place],
        features.numbers[place],
        features.slot[place],
        text=features.text[place],
        own=features.own[place],
        teacher=None if features.teacher is None else features.teacher[place],
    )


def by_hand(method: UFIN, features: Features, row: int) -> Tensor:
    """(logit that predicts, zeta) of one row (Eq. 2-11)."""
    config, slot = method.config, int(features.slot[row])
    assert features.text is not None and features.own is not None
    s = _norm(features.text[row], method.norm)
    z = _semantic(method, s, slot) if config.semantic else s
    for k in range(2 if config.anonymous else 0):
        u = method.get_parameter("beside.weight")[:, 4 * k : 4 * k + 4]
        z = z + u @ features.embedded[row, k, :4]
    zeta = _zeta(method, z, slot) if config.universal else _tower(method, z)
    if config.adaptor == "none" or slot < 0:
        return torch.stack([zeta, zeta])
    own = {name: method.get_parameter(f"adaptor.{name}")[slot] for name in _names(method)}
    if config.adaptor == "linear":
        beside = features.own[row, :, 0].sum() + own["bias"][0]
    else:
        beside = euler_by_hand(own, features.own[row, :, : config.dim], 0, config.orders)
    return torch.stack([config.mix * zeta + beside, zeta])


def _names(method: UFIN) -> list[str]:
    assert method.adaptor is not None
    return [name for name, _ in method.adaptor.named_parameters()]


def _norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def _weight(method: UFIN, name: str, slot: int) -> Tensor:
    """W, and W + B A for a domain with low-rank matrices."""
    weight = method.get_parameter(f"{name}.linear.weight")
    if not method.config.alpha or slot < 0:
        return weight
    low, high = (method.get_parameter(f"{name}.low_rank.{part}")[slot] for part in "ab")
    return weight + high @ low


def _semantic(method: UFIN, s: Tensor, slot: int) -> Tensor:
    config, semantic = method.config, method.semantic
    assert semantic is not None
    g = torch.softmax(semantic.gate.weight @ s, 0)
    weights = _weight(method, "semantic.layer", slot).chunk(config.experts)
    biases = semantic.layer.linear.bias.chunk(config.experts)
    z = torch.zeros_like(s)
    for j in range(config.experts):
        hidden = weights[j] @ s + biases[j]
        hidden = hidden.clamp(min=0) if config.activation == "relu" else hidden
        if config.semantic_width:
            assert semantic.back is not None
            hidden = semantic.back.weight.chunk(config.experts, 1)[j] @ hidden
        z = z + g[j] * hidden
    return z


def _tower(method: UFIN, z: Tensor) -> Tensor:
    assert method.tower is not None
    for layer in method.tower.layers:
        z = (layer.weight @ z + layer.bias).clamp(min=0)  # type: ignore[operator]
    return (method.tower.out.weight @ z + method.tower.out.bias)[0]


def _zeta(method: UFIN, z: Tensor, slot: int) -> Tensor:
    config, network = method.config, method.network
    assert network is not None
    decoders = _weight(method, "network.decoder", slot).chunk(config.universal)
    e_FD = torch.stack([_norm(v @ z, network.norm) for v in decoders])
    g = torch.softmax(network.gate.gate.weight @ z, 0)
    best = sorted(range(config.experts), key=lambda j: -g[j].item())[: config.top]
    scale = g[best].sum() if config.renormalise else 1
    expert = EXPERTS[type(network.experts)]
    return torch.stack([g[j] / scale * expert(network.experts, e_FD, j) for j in best]).sum()


def euler_by_hand(weights: dict[str, Tensor], e_FD: Tensor, head: int, vectors: int) -> Tensor:
    """Eq. 7 in complex numbers, with the implicit part; weights of one net."""
    dim = e_FD.shape[1]
    mine = slice(head * vectors, (head + 1) * vectors)
    z_FD = weights["mu"].unsqueeze(1) * torch.exp(1j * e_FD)
    bias = torch.complex(weights["log_bias"], weights["phase_bias"]).T[mine]
    orders = weights["orders"].T[mine]
    explicit = torch.stack([(z_FD ** order.unsqueeze(1)).prod(0) for order in orders])
    matrix = weights["weight"].unflatten(1, (dim, -1))[:, :, mine].flatten(1)
    flat, b = z_FD.T.flatten(), weights["bias"].unflatten(0, (dim, -1))[:, mine].flatten()
    real, imag = (F.relu(part @ matrix + b).view(dim, -1).T for part in (flat.real, flat.imag))
    both = explicit * torch.exp(bias) + torch.complex(real, imag)
    out = weights["out"].T[mine]
    return (both.real * out).sum() + (both.imag * out).sum() + 2 * weights["out_bias"][head]


def _euler(experts: Interaction, e_FD: Tensor, j: int) -> Tensor:
    assert isinstance(experts, EulerExperts)
    weights = {name: p[0] for name, p in experts.named_parameters()}
    return euler_by_hand(weights, e_FD, j, experts.orders_each)


def _side(experts: Interaction, name: str, x: Tensor, j: int) -> Tensor:
    """Expert j's own of the layers side by side."""
    part = experts.get_parameter
    return x @ part(f"{name}.weight")[j] + part(f"{name}.bias")[j, 0]


def _mlp(experts: Interaction, e_FD: Tensor, j: int) -> Tensor:
    x = e_FD.flatten()
    for i in range(2):
        x = _side(experts, f"layers.{i}", x, j).clamp(min=0)
    return _side(experts, "out", x, j)[0]


def _cross(experts: Interaction, e_FD: Tensor, j: int) -> Tensor:
    x = e_FD.flatten()
    for i in range(2):
        x = e_FD.flatten() * _side(experts, f"layers.{i}", x, j) + x
    return _side(experts, "out", x, j)[0]


def _cin(experts: Interaction, e_FD: Tensor, j: int) -> Tensor:
    maps, sums = e_FD, []
    for i in range(2):
        pairs = torch.stack([a * b for a in maps for b in e_FD])
        maps = _side(experts, f"layers.{i}", pairs.T, j).T
        sums.append(maps.sum(1))
    return _side(experts, "out", torch.cat(sums), j)[0]


def _autoint(experts: Interaction, e_FD: Tensor, j: int) -> Tensor:
    x = e_FD
    for i in range(2):
        heads = _side(experts, f"layers.{i}", x, j).view(len(x), 4, 2, 3)
        seen = []
        for h in range(2):
            q, k, v, residual = heads[:, :, h].unbind(1)
            seen.append((torch.softmax(q @ k.T, 1) @ v + residual).clamp(min=0))
        x = torch.cat(seen, 1)
    return _side(experts, "out", x.flatten(), j)[0]


EXPERTS: dict[type, Callable[[Interaction, Tensor, int], Tensor]] = {
    EulerExperts: _euler,
    MLPExperts: _mlp,
    CrossExperts: _cross,
    CINExperts: _cin,
    AutoIntExperts: _autoint,
}
