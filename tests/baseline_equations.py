"""Every multi-domain baseline's equations, written out for one row from weights by their names."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.multi_domain import MultiDomain
from models.multi_domain.star import CONSISTENT, DEGREES, EPSILON, LEAST, SPEED

Weights = Mapping[str, Tensor]
Answer = tuple[Tensor, Tensor | None]
"""A logit, and what is added to the loss."""
Equation = Callable[[MultiDomain, Weights, Weights, Tensor, bool], Answer]
"""Of the method, its shared weights, those of one part, a row, and whether that part is general."""


def _shares(logits: Sequence[Tensor]) -> list[Tensor]:
    each = [torch.exp(logit) for logit in logits]
    return [one / sum(each) for one in each]


def _sum(shares: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for share, vector in zip(shares, vectors, strict=True):
        total = total + share * vector
    return total


def _experts(shared: Weights, name: str, x: Tensor) -> list[Tensor]:
    """Of all K."""
    found = []
    for k in range(len(shared[f"{name}.layers.0.weight"])):
        y, i = x, 0
        while f"{name}.layers.{i}.weight" in shared:
            layer = f"{name}.layers.{i}"
            y = F.relu(y @ shared[f"{layer}.weight"][k] + shared[f"{layer}.bias"][k, 0])
            i += 1
        found.append(y)
    return found


def _count(w: Weights, name: str) -> int:
    return sum(key.startswith(name) and key.endswith("_weight") for key in w)


def _layers(w: Weights, name: str, x: Tensor, last: bool) -> Tensor:
    """Of one network; `last`: the last layer gives a logit, and has no ReLU."""
    count = _count(w, name)
    for i in range(count):
        x = w[f"{name}{i}_weight"] @ x + w[f"{name}{i}_bias"]
        x = x if last and i == count - 1 else x.clamp(min=0)
    return x[0] if last else x


def _own_experts(w: Weights, name: str, x: Tensor) -> list[Tensor]:
    mine = {key: tensor for key, tensor in w.items() if key.startswith(name)}
    count = len(mine[f"{name}0_weight"])
    return [_layers({key: t[k] for key, t in mine.items()}, name, x, False) for k in range(count)]


def _head(shared: Weights, name: str, x: Tensor) -> Tensor:
    i = 0
    while f"{name}.layers.{i}.weight" in shared:
        layer = f"{name}.layers.{i}"
        x = F.relu(shared[f"{layer}.weight"] @ x + shared[f"{layer}.bias"])
        i += 1
    return (shared[f"{name}.out.weight"] @ x + shared[f"{name}.out.bias"])[0]


def _shared_bottom(
    method: MultiDomain, shared: Weights, w: Weights, x: Tensor, general: bool
) -> Answer:
    return _layers(w, "tower", _experts(shared, "bottom", x)[0], True), None


def _mmoe(method: MultiDomain, shared: Weights, w: Weights, x: Tensor, general: bool) -> Answer:
    read = _sum(_shares(list(w["gate"] @ x)), _experts(shared, "experts", x))
    return _layers(w, "tower", read, True), None


def _ple(method: MultiDomain, shared: Weights, w: Weights, x: Tensor, general: bool) -> Answer:
    own = common = x
    for level in range(2):
        both = _own_experts(w, f"expert{level}_", own) + _experts(
            shared, f"experts.{level}", common
        )
        own = _sum(_shares(list(w[f"gate{level}"] @ own)), both)
        if level == 0:
            common = _sum(_shares(list(shared["gates.0.weight"] @ common)), both)
    return _layers(w, "tower", own, True), None


def _hmoe(method: MultiDomain, shared: Weights, w: Weights, x: Tensor, general: bool) -> Answer:
    others = {name[7:]: t for name, t in shared.items() if name.startswith("others.")}
    answers = []
    for m in range(len(others["gate"])):
        one = {name: tensor[m] for name, tensor in others.items()}
        answers.append(_mmoe(method, shared, one, x, False)[0])
    if not general:
        answers = [_mmoe(method, shared, w, x, False)[0], *(z.detach() for z in answers)]
    return _sum(_shares(list(w["relation"] @ x)), answers), None


def _aesm2(method: MultiDomain, shared: Weights, w: Weights, x: Tensor, general: bool) -> Answer:
    beside = x.new_zeros(())
    for i in range(2):
        own, rest = w[f"gate{i}"] @ x, shared[f"rest.{i}.weight"] @ x
        specific, common = [], []
        for a, b in zip(own, rest, strict=True):
            p = _shares([a, b])
            specific.append(-torch.log(p[0]))  # KL of (1, 0) from p
            common.append(sum(0.5 * torch.log(0.5 / q) for q in p))
        picked = set()
        for divergence, count in ((specific, 2), (common, 1)):
            least = sorted(range(len(divergence)), key=lambda k, d=divergence: float(d[k].detach()))
            picked |= set(least[:count])
            beside = beside + sum(divergence[k] for k in least[:count]) / count
        outputs = _experts(shared, f"experts.{i}", x)
        ordered = sorted(picked)
        x = _sum(_shares([own[k] for k in ordered]), [outputs[k] for k in ordered])
    return _layers(w, "tower", x, True), 0.1 * beside


def _star(method: MultiDomain, shared: Weights, w: Weights, x: Tensor, general: bool) -> Answer:
    centre = {name[7:]: t[0] for name, t in shared.items() if name.startswith("centre.")}
    one, none = torch.ones_like(x), torch.zeros_like(x)
    gamma, beta = w.get("gamma", one), w.get("beta", none)
    std = (torch.exp(SPEED * w["spread"]) ** 2 + LEAST**2) ** 0.5
    mean = SPEED * w["mean"] * std
    y = (x - mean.detach()) / torch.sqrt(std.detach() ** 2 + EPSILON)
    y = centre["gamma"] * gamma * y + centre["beta"] + beta
    count = _count(centre, "centre")
    for i in range(count):
        weight, bias = centre[f"centre{i}_weight"], centre[f"centre{i}_bias"]
        if not general and f"up{i}" in w:
            weight = weight + sum(
                torch.outer(b, a) for b, a in zip(w[f"up{i}"].T, w[f"down{i}"], strict=True)
            )
        elif not general:
            weight, bias = weight * w[f"star{i}_weight"], bias + w[f"star{i}_bias"]
        y = weight @ y + bias
        y = y if i == count - 1 else F.relu(y)
    scale = std / CONSISTENT
    beside = -torch.distributions.StudentT(DEGREES, mean, scale).log_prob(x.detach()).mean()
    logit = y[0] + _head(shared, "auxiliary", torch.cat([x, w["domain"]]))
    return logit, beside - beside.detach()


def _pepnet(method: MultiDomain, shared: Weights, w: Weights, x: Tensor, general: bool) -> Answer:
    def gate(name: str, y: Tensor) -> Tensor:
        low = F.relu(shared[f"{name}.first.weight"] @ y + shared[f"{name}.first.bias"])
        return 2 * torch.sigmoid(
            shared[f"{name}.second.weight"] @ low + shared[f"{name}.second.bias"]
        )

    h = gate("embedding", torch.cat([w["domain"], x.detach()])) * x
    prior, i = torch.cat([x, h.detach()]), 0
    while f"layers.{i}.weight" in shared:
        h = F.relu(shared[f"layers.{i}.weight"] @ h + shared[f"layers.{i}.bias"])
        h, i = gate(f"gates.{i}", prior) * h, i + 1
    return (shared["out.weight"] @ h + shared["out.bias"])[0], None


def _hinet(method: MultiDomain, shared: Weights, w: Weights, x: Tensor, general: bool) -> Answer:
    experts, gates = _experts(shared, "experts", x), list(shared["gate.weight"] @ x)
    each = len(w["gate"])
    known = [
        _sum(_shares(gates[at : at + each]), experts[at : at + each])
        for at in range(0, len(gates), each)
    ]
    own = _sum(_shares(list(w["gate"] @ x)), _own_experts(w, "expert", x))
    others = _sum(_shares(list(w["attention"])), known[1:])
    return _head(shared, "tower", torch.cat([known[0], own, others])), None


def _dffm(method: MultiDomain, shared: Weights, w: Weights, x: Tensor, general: bool) -> Answer:
    inputs, matrix = method.inputs, shared["matrix.matrix"][0] * w["matrix"]
    vectors = x[: inputs.fields * inputs.dim].chunk(inputs.fields)
    products = torch.stack([b @ (matrix @ a) for a, b in combinations(vectors, 2)])
    return _head(shared, "tower", torch.cat([x, products])), None


EQUATIONS: dict[str, Equation] = {
    "shared_bottom": _shared_bottom,
    "mmoe": _mmoe,
    "ple": _ple,
    "hmoe": _hmoe,
    "aesm2": _aesm2,
    "star": _star,
    "star_low_rank": _star,
    "pepnet": _pepnet,
    "dffm": _dffm,
    "hinet": _hinet,
}
