"""DeepFM (Guo et al., 2017): first order + factorization machine + MLP, on shared embeddings."""

from torch import Tensor

from models.adapters import DomainLinear
from models.backbones.backbone import Backbone, BackboneConfig, Inputs
from models.layers import MLP, flat, output_layer


class DeepFM(Backbone):
    """logit = sum_i w_i + sum_{i<j} <e_i, e_j> + w . MLP([e_1, ..., e_F, numbers]) (Eq. 1-4)."""

    first_order = True

    def __init__(self, inputs: Inputs, config: BackboneConfig) -> None:
        super().__init__(inputs, config)
        self.deep = MLP(inputs.fields * inputs.dim + inputs.numbers, config.hidden, config.dropout)
        self.out = output_layer(self.deep.d_out)

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        deep = self.out(self.deep(flat(emb_BFD, numbers), slot))
        return first_BF.sum(1) + _all_pairs(emb_BFD) + deep.squeeze(1)

    def adaptable(self) -> dict[str, DomainLinear]:
        return self.deep.adaptable()


def _all_pairs(emb_BFD: Tensor) -> Tensor:
    """sum_{i<j} <e_i, e_j> of each row [B], at the cost of one pass (Rendle, 2010).

    TorchRec's FactorizationMachine pairs single floats, those of one vector among themselves too.
    """
    return (emb_BFD.sum(1).square() - emb_BFD.square().sum(1)).sum(1) / 2
