"""Small methods with random weights in every tensor, so that no part of them is idle."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from models import Features, MLoRA, MLoRAConfig
from models.backbones import BACKBONES, BackboneConfig, Inputs


def inputs_of(fields: int, dim: int, numbers: int) -> Inputs:
    """The last field and the first number are the item's."""
    return Inputs(fields, dim, numbers, (fields - 1,), (0,)[:numbers])


INPUTS = inputs_of(fields=3, dim=4, numbers=2)
WIDTH = 8  # of a table's row: the vector, a first-order weight and three spare columns
CONFIG = MLoRAConfig(alpha=4)
ABC = ("a", "b", "c")
CONFIGS: dict[str, type] = {kind().name: kind for kind in get_args(BackboneConfig)}
SMALL: dict[str, Any] = {
    "dropout": 0.0,
    "explicit_dropout": 0.0,
    "implicit_dropout": 0.0,
    "orders": (4, 3),
    "attention": 3,
    "depth": 2,
    "width": 3,
    "heads": 2,
}
EVERY = pytest.mark.parametrize("backbone", BACKBONES)
BIAS = pytest.mark.parametrize("bias", [False, True])


def fresh(
    backbone: str, domains: Sequence[str], config: MLoRAConfig = CONFIG, hidden: tuple = (24, 10)
) -> MLoRA:
    """A method as a run begins with it, without dropout, in eval mode."""
    torch.manual_seed(7)
    method = MLoRA(INPUTS, without_dropout(backbone, hidden), config)
    for domain in domains:
        method.add_domain(domain, seed=3)
    return method.eval()


def without_dropout(
    name: str, hidden: tuple[int, ...], cross: int = 2, **options: Any
) -> BackboneConfig:
    """A small backbone; where it has layers of interactions, two of them."""
    kind = CONFIGS[name]
    known = {field.name for field in fields(kind)}
    small = {**SMALL, "hidden": hidden, "cross_layers": cross}
    return kind(**{**{key: small[key] for key in small if key in known}, **options})


def trained(
    backbone: str, domains: Sequence[str], config: MLoRAConfig = CONFIG, hidden: tuple = (24, 10)
) -> MLoRA:
    """As if trained: the shared part is the same in each, a domain's adapter follows its name."""
    method = fresh(backbone, domains, config, hidden)
    stir(method.shared().values(), "shared")
    for domain in domains:
        stir(method.adapter(domain).values(), domain)
    return method


def stir(tensors: Iterable[Tensor], key: str) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.4)


def vectors(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embedded rows [rows, fields, width] and numbers [rows, n]."""
    generator = torch.Generator().manual_seed(seed)
    embedded = torch.randn(rows, INPUTS.fields, WIDTH, generator=generator, dtype=dtype)
    return embedded, torch.randn(rows, INPUTS.numbers, generator=generator, dtype=dtype)


def slots(method: MLoRA, names: Sequence[str]) -> Tensor:
    """The slot of each row's domain, -1 for those without an adapter."""
    place = {domain: slot for slot, domain in enumerate(method.domains)}
    return torch.tensor([place.get(name, -1) for name in names], dtype=torch.int64)


def with_bias(bias: bool) -> MLoRAConfig:
    return MLoRAConfig(alpha=4, bias=bias)


def names_of(rows: int, among: Sequence[str]) -> list[str]:
    """A domain for each row, at random."""
    generator = torch.Generator().manual_seed(0)
    return [among[int(i)] for i in torch.randint(len(among), (rows,), generator=generator)]


def logits(method: MLoRA, names: Sequence[str]) -> Tensor:
    """Of one row of each of these domains."""
    return method(Features(*vectors(len(names)), slots(method, names)))


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(tensors: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    assert tensors.keys() == before.keys()
    return all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
