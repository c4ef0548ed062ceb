"""UFIN from its latent vector on: universal features and the experts of their interactions."""

from torch import Tensor, nn

from models.adapters import DomainLinear
from models.euler import precise
from models.interactions import ExpertShape, Interaction
from models.semantic_experts import SparseGate


class UniversalNetwork(nn.Module):
    """zeta = sum_j F(e~; A_j) g~_j (Eq. 8)."""

    def __init__(
        self, text: int, shape: ExpertShape, experts: Interaction, gate: SparseGate
    ) -> None:
        super().__init__()
        self.split = shape.fields, shape.dim
        self.decoder = DomainLinear(text, shape.fields * shape.dim, bias=False)
        self.norm = nn.LayerNorm(shape.dim)  # one for all universal features
        self.experts = experts
        self.gate = gate

    def universal(self, z_BV: Tensor, slot: Tensor) -> Tensor:
        """e~ [B, n_u, d] (Eq. 6)."""
        return self.norm(self.decoder(z_BV, slot).unflatten(1, self.split))

    def forward(self, z_BV: Tensor, slot: Tensor) -> Tensor:
        """zeta [B], at least fp32."""
        return (precise(self.experts(self.universal(z_BV, slot))) * self.gate(z_BV)).sum(1)
