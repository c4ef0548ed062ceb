"""UFIN's feature adaptors (Eq. 11): a logit of each domain from its own fields' own vectors.

All domains' weights lie in stacked tensors, a slot per domain.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from models.adapters import TILE, generator_for, tiles
from models.euler import EulerWeights, euler_nets, first_weights


class FeatureAdaptor(nn.Module, ABC):
    """Parameters [slots, ...]; none as long as there is no slot."""

    width: int
    """Floats that it reads of each field's vector."""

    @abstractmethod
    def first(self, seed: int, domain: str) -> dict[str, Tensor]:
        """A slot's first weights [1, ...], with which it answers 0 to vectors of zeros."""

    @abstractmethod
    def score(self, own_BFW: Tensor, slot: Tensor) -> Tensor:
        """[B]; anything where slot is -1."""

    def forward(self, own_BFW: Tensor, slot: Tensor) -> Tensor:
        """zeta_f [B], 0 where slot is -1."""
        if not self.tensors():
            return own_BFW.new_zeros(len(slot))
        return self.score(own_BFW[:, :, : self.width], slot).masked_fill(slot < 0, 0)

    def tensors(self) -> dict[str, Tensor]:
        """All slots' weights, live."""
        return {name: p.data for name, p in self.named_parameters()}

    def append(self, seed: int, domain: str, like: Tensor) -> None:
        """A new last slot, of the precision and on the device of `like`."""
        new, old = self.first(seed, domain), self.tensors()
        self._set({k: torch.cat([*([old[k]] if old else []), v.to(like)]) for k, v in new.items()})

    def remove(self, slot: int) -> None:
        """Drop one slot; those after it move up."""
        old = self.tensors()
        keep = [i for i in range(len(next(iter(old.values())))) if i != slot]
        self._set({name: tensor[keep] for name, tensor in old.items()} if keep else {})

    def own(self, slot: int) -> dict[str, Tensor]:
        """One domain's weights, as live views."""
        return {name: tensor[slot : slot + 1] for name, tensor in self.tensors().items()}

    def _set(self, tensors: dict[str, Tensor]) -> None:
        self._parameters.clear()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


class LinearAdaptor(FeatureAdaptor):
    """Logistic regression, the paper's: a weight of each id and a bias."""

    width = 1

    def first(self, seed: int, domain: str) -> dict[str, Tensor]:
        return {"bias": torch.zeros(1, 1)}

    def score(self, own_BFW: Tensor, slot: Tensor) -> Tensor:
        return own_BFW.sum((1, 2)) + self.get_parameter("bias")[slot, 0]


class EulerAdaptor(FeatureAdaptor):
    """An EulerNet of one layer, as in the released code."""

    def __init__(self, fields: int, dim: int, vectors: int) -> None:
        super().__init__()
        self.width = dim
        self.sizes = fields, dim, vectors

    def first(self, seed: int, domain: str) -> dict[str, Tensor]:
        """The last layer begins at random, so that the floats of a vector of zeros learn apart."""
        fields, dim, _ = self.sizes
        weights = first_weights(*self.sizes, 1, generator_for(seed, domain, "adaptor"))
        offset = euler_nets(torch.zeros(1, 1, fields, dim), weights).view(1, 1)
        return weights._replace(out_bias=-offset / 2)._asdict()

    def score(self, own_BFW: Tensor, slot: Tensor) -> Tensor:
        place, tile_slot = tiles(slot)
        at = tile_slot.clamp(min=0)  # of tiles without an adapter, masked later
        rows = own_BFW.new_zeros(len(at) * TILE, *own_BFW.shape[1:]).index_copy(0, place, own_BFW)
        weights = EulerWeights(**{name: p[at] for name, p in self.named_parameters()})
        return euler_nets(rows.unflatten(0, (-1, TILE)), weights).flatten()[place]
