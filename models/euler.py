"""EulerNet's interaction layer (Tian et al., 2023): products of features to any learned powers.

A float x of a field stands for the complex number mu e^{ix}. In polar form a product of powers is
a weighted sum of log-moduli and one of phases, so the powers are linear weights. A phase is the
principal one: to a power that is no integer, one beyond pi is raised as if it lay within.

Shapes: R rows, F fields, O order vectors, D floats of a field. Fields come last, so that one matrix
[F, O] weighs them, the same for all D. All of it is in fp32 at least: moduli are exponentials.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapters import DomainLinear
from models.dropout import dropout

FLOOR = 1e-8  # added to a squared modulus, whose logarithm is taken
LIMIT = (
    40.0  # of a log-modulus: fp32 still holds its square, so an order that overflows can be told
)


class Polar(NamedTuple):
    """Complex numbers by log-modulus and phase, which broadcast to one shape."""

    log: Tensor
    phase: Tensor


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """No autocast; it would take the sums of logarithms in bf16."""
    with torch.autocast(device, enabled=False):
        yield


def precise(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def polar(real: Tensor, imag: Tensor) -> Polar:
    """Log-modulus of at least 0.5 log FLOOR, and principal phase.

    The gradient of the phase has the same floor: atan2's own is NaN at 0 and without bound near it.
    """
    power = real.square() + imag.square() + FLOOR
    r, p = real.detach(), imag.detach()
    turn = (r * imag - p * real) / power.detach()  # exactly 0; it carries the gradient
    return Polar(power.log() / 2, torch.atan2(p, r) + turn)


def powers(base: Polar, orders: Tensor, log_bias: Tensor, phase_bias: Tensor) -> Polar:
    """prod_f base_f^orders[f, o]: [..., D, O] for a base of [..., D, F]; orders [F, O] or, of
    networks side by side, [count, F, O]."""
    log, phase = ((part.flatten(-3, -2) @ orders).unflatten(-2, part.shape[-3:-1]) for part in base)
    return Polar((log + log_bias).clamp(max=LIMIT), phase + phase_bias)


class Overflow(NamedTuple):
    """An order that makes a product's log-modulus pass LIMIT."""

    field: int
    vector: int
    order: float
    modulus: float
    """Of the field"""


@torch.no_grad()
def overflow(mu: Tensor, orders: Tensor, log_bias: Tensor) -> Overflow | None:
    """The worst order of a layer on moduli `mu` [F], with `orders` [F, O] and `log_bias` [D, O]."""
    log = (mu.square() + FLOOR).log() / 2
    parts = log.unsqueeze(1) * orders
    total = parts.sum(0) + log_bias.amax(0)
    if not total.max() > LIMIT:
        return None
    vector = int(total.argmax())
    field = int(parts[:, vector].argmax())
    return Overflow(field, vector, float(orders[field, vector]), float(log[field].exp()))


def first_orders(fields: int, vectors: int, generator: torch.Generator | None = None) -> Tensor:
    """[F, O]: the identity, or nearly one field a vector, at random."""
    if fields == vectors:
        return torch.eye(fields)
    return torch.softmax(torch.randn(fields, vectors, generator=generator) / 0.01, 0)


class EulerLayer(nn.Module):
    """Explicit part (powers) plus implicit part (one linear layer on real and imaginary parts)."""

    def __init__(self, fields: int, dim: int, vectors: int, norm: bool) -> None:
        super().__init__()
        self.orders = nn.Parameter(first_orders(fields, vectors))
        self.log_bias = nn.Parameter(torch.randn(dim, vectors) * 0.01)
        self.phase_bias = nn.Parameter(torch.randn(dim, vectors) * 0.01)
        self.implicit = DomainLinear(dim * fields, dim * vectors)
        nn.init.normal_(self.implicit.linear.weight, 0, 0.01)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * norm))

    def forward(
        self, x_2RDF: Tensor, slot: Tensor, drop_explicit: float, drop_implicit: float
    ) -> Tensor:
        """[2, R, D, O] from the same of F fields: real parts, then imaginary ones."""
        base = Polar(*(dropout(part, drop_explicit, self.training) for part in polar(*x_2RDF)))
        log, phase = powers(base, *map(precise, (self.orders, self.log_bias, self.phase_bias)))
        explicit = log.exp() * torch.stack([phase.cos(), phase.sin()])
        flat = dropout(x_2RDF.flatten(2).flatten(0, 1), drop_implicit, self.training)
        implicit = F.relu(self.implicit(flat.to(self.orders.dtype), slot.repeat(2)))
        out = explicit + precise(implicit).view_as(explicit)
        return self._normed(out) if self.norms else out

    def _normed(self, x_2RDO: Tensor) -> Tensor:
        """Over D, real and imaginary parts each by a norm of their own."""
        parts = x_2RDO.mT.to(self.orders.dtype)
        normed = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        return precise(torch.stack(normed)).mT


class EulerWeights(NamedTuple):
    """Of `count` EulerNets with one layer each."""

    mu: Tensor
    """[count, F]"""
    orders: Tensor
    """[count, F, O]"""
    log_bias: Tensor
    """[count, D, O]"""
    phase_bias: Tensor
    weight: Tensor
    """[count, D * F, D * O], of the implicit part, as all that follows"""
    bias: Tensor
    """[count, D * O]"""
    out: Tensor
    """[count, D, O], to a logit"""
    out_bias: Tensor
    """[count, heads]; it counts twice, with the real part and with the imaginary one"""


def first_weights(
    fields: int, dim: int, vectors: int, heads: int, generator: torch.Generator | None = None
) -> EulerWeights:
    """Of one net, as EulerNet begins, with `vectors` order vectors for each head: mu is 1, and
    what leads to a logit is Glorot's."""
    wide = heads * vectors

    def normal(std: float, *shape: int) -> Tensor:
        return torch.empty(1, *shape).normal_(0, std, generator=generator)

    orders = [first_orders(fields, vectors, generator) for _ in range(heads)]
    return EulerWeights(
        mu=torch.ones(1, fields),
        orders=torch.cat(orders, 1).unsqueeze(0),
        log_bias=normal(0.01, dim, wide),
        phase_bias=normal(0.01, dim, wide),
        weight=normal(0.01, dim * fields, dim * wide),
        bias=torch.zeros(1, dim * wide),
        out=normal(math.sqrt(2 / (dim * vectors + 1)), dim, wide),
        out_bias=torch.zeros(1, heads),
    )


def euler_nets(x: Tensor, weights: EulerWeights) -> Tensor:
    """Logits [count, R, heads] of nets on `x` [count, R, F, D], each head from as many order
    vectors of its own: heads are EulerNets that share their input.

    A row's log-moduli follow from mu alone, so they are the same for all rows; and only the sum of
    a product's real and imaginary parts reaches a logit, which is one cosine.
    """
    with full_precision(x.device.type):
        own = EulerWeights(*map(precise, weights))
        x_RDF = precise(x).mT
        real, imag = x_RDF.cos(), x_RDF.sin()
        base = _turned(real, imag, own.mu[:, None, None])
        biases = own.log_bias.unsqueeze(1), own.phase_bias.unsqueeze(1) - math.pi / 4
        log, phase = powers(base, own.orders, *biases)
        explicit = (log.exp() * math.sqrt(2)) * phase.cos()
        scaled = own.weight * own.mu.repeat(1, x_RDF.shape[2]).unsqueeze(2)
        implicit = [
            F.relu(torch.baddbmm(own.bias.unsqueeze(1), part.flatten(2), scaled))
            for part in (real, imag)
        ]
        both = explicit.flatten(2) + implicit[0] + implicit[1]
        return both @ _by_head(own.out, own.out_bias.shape[1]) + 2 * own.out_bias.unsqueeze(1)


def _turned(real: Tensor, imag: Tensor, mu: Tensor) -> Polar:
    """mu (real + i imag), of modulus |mu|: a negative mu turns the phase by pi."""
    phase = torch.atan2(imag, real)
    opposite = torch.where(phase > 0, phase - math.pi, phase + math.pi)
    return Polar((mu.square() + FLOOR).log() / 2, torch.where(mu < 0, opposite, phase))


def _by_head(out: Tensor, heads: int) -> Tensor:
    """[count, D * O, heads]: each head's own weights, and zeros for the vectors of the others."""
    split = out.unflatten(2, (heads, -1)).transpose(2, 3)
    return torch.diag_embed(split).transpose(2, 3).flatten(1, 3)
