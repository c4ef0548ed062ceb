"""UFIN (Tian et al., 2024): universal features out of a text, and experts of their interactions.

Phase 1 trains all but the feature adaptors; phase 2 freezes it and trains one domain's adaptor.
No parameter of the shared part belongs to a domain: L is a width. The released code differs:
`top` = `experts`, `orders` = `universal` = 32, `activation` none, `adaptor` euler, `mix` 0.4, and
both phases in one.

Shapes: B rows, V floats of a text vector, n_u universal features of d floats, L experts.
"""

import logging

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from models.adapters import AdapterShape, DomainLinear, generator_for
from models.backbones import Inputs
from models.domain_head import Tower
from models.euler import overflow, precise
from models.feature_adaptor import EulerAdaptor, FeatureAdaptor, LinearAdaptor
from models.interactions import INTERACTIONS, EulerExperts, ExpertShape
from models.method import Features, Method, Seen, cross_entropy
from models.semantic_experts import SemanticExperts, SparseGate, glorot_each
from models.ufin_config import UFINConfig
from models.universal import UniversalNetwork

_LOG = logging.getLogger(__name__)
EXPERT = ("interaction expert",)


class UFIN(Method):
    """Logits [B, 2 or 3] of a row: `mix` zeta + zeta_f (zeta alone where slot is -1), zeta
    (Eq. 8), and in phase 1 its teacher's, if there are any."""

    def __init__(self, inputs: Inputs, text: int, ids: int, config: UFINConfig) -> None:
        """`text`: V; `ids`: the fields of which a feature adaptor reads vectors of its own."""
        super().__init__()
        if text == 0:
            raise _no_text()
        self.domains: list[str] = []
        self.config = config
        self.dim = inputs.dim
        self._frozen = False
        self.norm = nn.LayerNorm(text)
        self.semantic = _semantic(text, config)
        self.beside = _beside(inputs.fields, inputs.dim, text)
        self.network = _network(text, config)
        self.tower = None if self.network else Tower(text, config.hidden, config.dropout)
        self.adaptor = _adaptor(ids, config)
        self.own_width = self.adaptor.width if self.adaptor else 0
        self.shows = self.network is not None

    def forward(self, features: Features) -> Tensor:
        zeta = self._zeta(self._latent(features), features.slot)
        columns = [self._predict(zeta, features), zeta]
        if features.teacher is not None and not self._frozen:
            columns.append(features.teacher.detach().to(zeta))
        return torch.stack(columns, 1)

    def loss(self, logit: Tensor, label: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Eq. 12-14 as a mean over rows; a row without a teacher adds nothing to the former."""
        summed = cross_entropy(logit[:, 0], label, weight)
        if logit.shape[1] > 2:
            teacher = logit[:, 2]
            gap = (teacher - logit[:, 1]).masked_fill(teacher.isnan(), 0)
            summed = summed + self.config.distill * (weight * gap.square()).sum()
        return summed / max(rows, 1)

    def freeze_shared(self, keep: bool) -> None:
        """No teacher teaches an adapter: Eq. 12 is about zeta."""
        self._frozen = True

    def shared(self) -> dict[str, Tensor]:
        own = {id(p) for p in self.adapter_parameters()}
        return {name: p.data for name, p in self.named_parameters() if id(p) not in own}

    def adapter(self, domain: str) -> dict[str, Tensor]:
        slot = self.slot_of(domain)
        own = self.adaptor.own(slot) if self.adaptor else {}
        tensors = {f"adaptor.{name}": tensor for name, tensor in own.items()}
        for layer_name, layer in self._adapted().items():
            tensors |= {f"{layer_name}.{name}": t for name, t in layer.own(slot).items()}
        return tensors

    def diagnose(self) -> str | None:
        experts = self.network.experts if self.network else None
        if not isinstance(experts, EulerExperts):
            return None
        found = overflow(*(own[0] for own in experts.weights()[:3]))
        return found and (
            f"order {found.order:.3g} of universal feature {found.field} (its modulus is "
            f"{found.modulus:.3g}) overflows in interaction expert "
            f"{found.vector // self.config.orders}, both counted from 0; lower pretrain.lr, or "
            "raise pretrain.weight_decay"
        )

    def shared_parameters(self) -> list[nn.Parameter]:
        own = {id(p) for p in self.adapter_parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def adapter_parameters(self) -> list[nn.Parameter]:
        layers = [layer.low_rank for layer in self._adapted().values()]
        return [p for part in (self.adaptor, *layers) if part for p in part.parameters()]

    def add_domain(self, domain: str, seed: int) -> None:
        self.require_new(domain)
        if self.adaptor is None and not self._adapted():
            raise UserError(
                'method: adaptor "none" and alpha 0 leave a domain nothing to learn; set one of '
                'them, or phases to ["pretrain"]'
            )
        if self.adaptor:
            self.adaptor.append(seed, domain, self.norm.weight)
        for name, layer in self._adapted().items():
            of_one = self.config.experts if name == "semantic" else 1
            rank = max(layer.linear.out_features // of_one // self.config.alpha, 1)
            layer.append(AdapterShape(rank, False, 0.0, 0.0), generator_for(seed, domain, name))
        self.domains.append(domain)

    def remove_domain(self, domain: str) -> None:
        slot = self.slot_of(domain)
        if self.adaptor:
            self.adaptor.remove(slot)
        for layer in self._adapted().values():
            layer.remove(slot)
        self.domains.remove(domain)

    @torch.no_grad()
    def universal(self, features: Features) -> Tensor:
        """[B, n_u, d] (Eq. 6)."""
        return self._universal().universal(self._latent(features), features.slot)

    @torch.no_grad()
    def gates(self, features: Features) -> Tensor:
        """[B, L] weights of the interaction experts, all but K of a row 0 (Eq. 9)."""
        return self._universal().gate(self._latent(features))

    def orders(self) -> Tensor:
        """[L, n_u, orders] of the interaction experts (Eq. 7)."""
        experts = self._universal().experts
        if not isinstance(experts, EulerExperts):
            raise UserError(
                f"method.interaction: {self.config.interaction} learns no orders; euler does"
            )
        return experts.orders_by_expert().detach()

    def pictured(self, features: Features) -> dict[str, Seen]:
        """Figure 4, and how much each domain asks of each expert."""
        if not self.shows:
            return {}
        points = Seen("universal features", self.universal(features).flatten(1))
        shares = Seen("interaction experts", self.gates(features), EXPERT)
        return {"points": points, "shares": shares}

    def pictured_weights(self) -> dict[str, Seen]:
        """Figure 5."""
        if not (self.network and isinstance(self.network.experts, EulerExperts)):
            return {}
        axes = (*EXPERT, "universal feature", "order vector")
        return {"matrices": Seen("orders of interactions", self.orders(), axes)}

    def _latent(self, features: Features) -> Tensor:
        """z~ [B, V] (Eq. 2-5)."""
        if features.text is None:
            raise _no_text()
        s = self.norm(features.text)
        z = self.semantic(s, features.slot) if self.semantic else s
        if self.beside is None:
            return z
        return z + self.beside(features.embedded[:, :, : self.dim].flatten(1))

    def _zeta(self, z_BV: Tensor, slot: Tensor) -> Tensor:
        """[B], at least fp32."""
        if self.network is not None:
            return self.network(z_BV, slot)
        assert self.tower is not None
        return precise(self.tower(z_BV))

    def _predict(self, zeta: Tensor, features: Features) -> Tensor:
        """Eq. 11 [B]; zeta where a row has no feature adaptor."""
        if self.adaptor is None or not self.domains:
            return zeta
        assert features.own is not None, "rows of a feature adaptor come with its own vectors"
        mixed = torch.where(features.slot < 0, zeta, self.config.mix * zeta)
        return mixed + precise(self.adaptor(features.own, features.slot))

    def _universal(self) -> UniversalNetwork:
        if self.network is None:
            raise UserError("method.universal is 0, so there are no universal features to look at")
        return self.network

    def _adapted(self) -> dict[str, DomainLinear]:
        """Layers with low-rank matrices of each domain, by name."""
        decoder = self.network.decoder if self.network else None
        semantic = self.semantic.layer if self.semantic else None
        named = {"decoder": decoder, "semantic": semantic} if self.config.alpha else {}
        return {name: layer for name, layer in named.items() if layer}


def _network(text: int, config: UFINConfig) -> UniversalNetwork | None:
    if config.universal == 0:
        return None
    if 2 * config.top <= config.experts:
        _LOG.warning(
            "method.top: with %d of %d interaction experts two domains may share none; "
            "above half of them, every two share one (Theorem 1)",
            config.top,
            config.experts,
        )
    shape = ExpertShape(
        experts=config.experts,
        fields=config.universal,
        dim=config.dim,
        orders=config.orders,
        hidden=config.hidden,
        dropout=config.dropout,
        depth=config.depth,
        width=config.width,
    )
    gate = SparseGate(text, config.experts, config.top, config.renormalise)
    return UniversalNetwork(text, shape, INTERACTIONS[config.interaction](shape), gate)


def _semantic(text: int, config: UFINConfig) -> SemanticExperts | None:
    if not config.semantic:
        return None
    return SemanticExperts(text, config.experts, config.activation, config.semantic_width)


def _beside(fields: int, dim: int, text: int) -> nn.Linear | None:
    """U_k of each anonymous field (Eq. 5), side by side."""
    if fields == 0:
        return None
    layer = nn.Linear(fields * dim, text, bias=False)
    glorot_each(layer.weight.data.view(text, fields, dim).transpose(0, 1))
    return layer


def _adaptor(ids: int, config: UFINConfig) -> FeatureAdaptor | None:
    if config.adaptor == "none":
        return None
    if config.adaptor == "linear":
        return LinearAdaptor()
    if ids == 0:
        raise UserError(
            "method.adaptor: euler reads id fields, and the schema has none; set it to linear"
        )
    return EulerAdaptor(ids, config.dim, config.orders)


def _no_text() -> UserError:
    return UserError(
        "method ufin reads text vectors, and this run has none; give its run file a section "
        "[text], and write them by `cache-text`"
    )
